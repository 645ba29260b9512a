"""x times the transpose of a weight of 8 or 4 bits a number, and the making of such weights."""

from __future__ import annotations

import importlib

import jax
import jax.numpy as jnp

from pallas_kernels import backends
from pallas_kernels.matmul.around import Around
from pallas_kernels.matmul.panels import LANES, from_panels
from pallas_kernels.quantized_matmul.formats import DTYPES, MAX_SUM, Operands, packing, shape_of
from pallas_kernels.quantized_matmul.quantize import quantize
from pallas_kernels.target import Target

__all__ = ["quantize", "quantized_matmul"]

_NAME = "quantized_matmul"
_ROWS = ("float32", "bfloat16", "float16", "float8_e4m3fn")


def quantized_matmul(
    x: jax.Array,
    weight: jax.Array,
    scales: jax.Array,
    *,
    zeros: jax.Array | None = None,
    x_scales: jax.Array | None = None,
    activations: str | None = None,
    norm: jax.Array | None = None,
    eps: float = 0.0,
    bias: jax.Array | None = None,
    is_gated: bool = False,
    residual: jax.Array | None = None,
    is_real: jax.Array | None = None,
    out_dtype: str | None = None,
    backend: backends.Backend = "auto",
) -> jax.Array:
    """Multiply rows by the transpose of a quantised weight: [X, D] times [F, D] gives [X, F], with float32 sums.

    The weight's dtype is its format: int8 and float8_e4m3fn hold one number each, uint8 holds two numbers of 4 bits. Number d of
    output f stands for `value * scales[f]`, or for `value * scales[d // group, f]` when D is cut into D // group groups; value is
    the stored number, for 4 bits less its zero point.

    Two numbers of a byte: 2j is in the low four bits of byte j, 2j + 1 in the high ones, as in GPTQ's words on a little-endian
    machine once its `qweight` [D / 8, F] is transposed and viewed as bytes. AWQ packs along F in the order 0 2 4 6 1 3 5 7 and
    has to be packed anew. The scales of both, [D / group, F], are taken as they are.

    >>> import jax, jax.numpy as jnp
    >>> from pallas_kernels.quantized_matmul import quantize, quantized_matmul
    >>> weight = jax.random.normal(jax.random.key(0), (64, 128))
    >>> packed, scales = quantize(weight, "int4", group_size=32)
    >>> packed.shape, packed.dtype.name, scales.shape
    ((64, 64), 'uint8', (4, 64))
    >>> quantized_matmul(jnp.ones((3, 128), jnp.bfloat16), packed, scales).shape
    (3, 64)

    Args:
      x: [X, D], of float32, bfloat16 or float16; or of float8_e4m3fn, which is multiplied exactly and not rounded again.
      weight: int8 or float8_e4m3fn [F, D], or uint8 [F, D / 2]; for `activations` of int8 also the panels of one of int8: see
        `pallas_kernels.matmul.panels`.
      scales: float32 [F] or [D / group, F].
      zeros: float32 [D / group, F] (or [F]), the stored 4-bit number that stands for 0; 8 everywhere when left out. GPTQ files
        hold one less than that.
      x_scales: float32 [X], what the rows are to be multiplied by; for rows of float8_e4m3fn.
      activations: "int8" rounds each row of x to int8 with a scale of its own, max|x| / 127, and multiplies integers, which is
        exact. It moves each element of x by at most max|x| / 254 of its row, so the result by at most that times the sum of
        |weight| over D; for normal x that is a relative error of about 0.01. None takes x as it is.
      norm, eps, bias, is_gated, residual, is_real: what is done before and after, as in `pallas_kernels.matmul`; rows are rounded
        to int8 behind the norm. Of the native backend, that of int8 rows does all in one call, and leaves out rows that do not
        count.
      out_dtype: of the result; x's when left out. To be named for rows of float8_e4m3fn.

    Returns:
      [X, F].

    Raises:
      ValueError: shapes or dtypes that do not fit each other, or an unknown option.
      NotImplementedError: the named backend cannot run here; the message says why.

    Source: the formats of GPTQ (arXiv 2210.17323) and AWQ (arXiv 2306.00978); int8 rows as in LLM.int8 (arXiv 2208.07339).
    """
    operands = Operands(*(None if a is None else jnp.asarray(a) for a in (x, weight, scales, zeros, x_scales)))  # type: ignore[arg-type]
    around = Around(norm, eps, bias, is_gated, residual, is_real)
    _check(operands, around, activations, out_dtype)
    dtype = jnp.dtype(out_dtype or operands.x.dtype)

    def unavailable(target: Target) -> str | None:
        return _module("mosaic").unavailable(target, operands, activations)

    choice = backends.choose(_NAME, backend, native=lambda: _module("native").unavailable(operands), mosaic=unavailable)
    if choice.name == "native" and activations is not None:
        return _module("native").matmul_rounded(operands, around, dtype)
    weight = from_panels(operands.weight) if operands.weight.ndim == 4 else operands.weight
    operands = operands._replace(x=around.rows(operands.x), weight=weight)
    if choice.target is None:
        out = _module(choice.name).matmul(operands, is_int8=activations is not None)
    else:
        out = _module("mosaic").matmul(operands, jnp.dtype(jnp.float32) if around.follows else dtype, choice.target)
    return around.result(out, dtype)


def _module(name: str):
    # Named here, not imported above: who runs on a CPU does not wait for Mosaic's import.
    return importlib.import_module(f"pallas_kernels.quantized_matmul.{name}")


def _check(operands: Operands, around: Around, activations: str | None, out_dtype: str | None) -> None:
    x, weight, scales, zeros, x_scales = operands

    def refuse(what: str) -> None:
        raise ValueError(f"{_NAME}: {what}")

    has_panels = weight.ndim == 4 and weight.dtype.name == "int8" and activations is not None
    if x.ndim != 2 or (weight.ndim != 2 and not has_panels):
        refuse(f"x and weight have {x.ndim} and {weight.ndim} axes, expected 2 and 2, or 4 of panels of int8 for rows of int8")
    if weight.dtype.name not in DTYPES:
        refuse(f"weights of {weight.dtype} are not supported; {', '.join(DTYPES)} (two 4-bit numbers) are")
    if x.dtype.name not in _ROWS:
        refuse(f"x of {x.dtype} is not supported; {', '.join(_ROWS)} are")
    (X, D), (F, groups, group) = x.shape, shape_of(operands)
    if has_panels and (D % 4 or weight.shape[1:] != (1 + D // 4, LANES, 4)):
        refuse(f"panels of the weight are {list(weight.shape)}, expected [F / 16, 1 + D / 4, 16, 4] for x of [{X}, {D}]")
    if not has_panels and weight.shape[1] * packing(weight) != D:
        refuse(f"weight is {weight.dtype}{list(weight.shape)}, expected [F, {D // packing(weight)}] for x of [{X}, {D}]")
    if scales.dtype != jnp.float32 or scales.shape not in ((F,), (groups, F)):
        refuse(f"scales are {scales.dtype}{list(scales.shape)}, expected float32 [{F}] or [D / group, {F}]")
    if groups == 0 or group * groups != D or group % packing(weight):
        refuse(f"{groups} groups do not cut D of {D} into equal groups of whole bytes")
    if zeros is not None and weight.dtype != jnp.uint8:
        refuse(f"zeros are for 4-bit weights (uint8), the weight is {weight.dtype}")
    if zeros is not None and (zeros.shape != scales.shape or zeros.dtype != jnp.float32):
        refuse(f"zeros are {zeros.dtype}{list(zeros.shape)}, expected float32{list(scales.shape)} as the scales")
    is_narrow = x.dtype.name == "float8_e4m3fn"
    if x_scales is not None and (not is_narrow or x_scales.shape != (X,) or x_scales.dtype != jnp.float32):
        refuse(f"x_scales are {x_scales.dtype}{list(x_scales.shape)} for x of {x.dtype}, expected float32[{X}] for float8_e4m3fn")
    if is_narrow and out_dtype is None:
        refuse("x of float8_e4m3fn needs out_dtype, such as 'bfloat16'")
    if out_dtype not in (None, "float32", "bfloat16", "float16"):
        refuse(f"out_dtype {out_dtype!r}, expected 'float32', 'bfloat16' or 'float16'")
    if activations not in (None, "int8"):
        refuse(f"activations {activations!r}, expected 'int8' or None")
    if activations and group > MAX_SUM:
        refuse(f"sums of {group} products of int8 may not fit 32 bits, expected {MAX_SUM} or fewer")
    if activations and (is_narrow or weight.dtype.name == "float8_e4m3fn"):
        refuse(f"int8 activations need weights of int8 or uint8 and wider x, got {weight.dtype} and {x.dtype}")
    around.check(refuse, x, F, out_dtype or x.dtype, LANES if has_panels else 1)
