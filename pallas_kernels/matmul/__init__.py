"""x times the transpose of a weight, with what a transformer does before and after it."""

from __future__ import annotations

import importlib

import jax
import jax.numpy as jnp

from pallas_kernels import backends
from pallas_kernels.matmul.around import Around
from pallas_kernels.matmul.packed import from_packed, is_packed, num_words
from pallas_kernels.matmul.panels import LANES, from_panels
from pallas_kernels.native import matmul as native

__all__ = ["is_native", "matmul"]

_FLOATS = ("float32", "bfloat16", "float16")


def matmul(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    *,
    norm: jax.Array | None = None,
    eps: float = 0.0,
    is_gated: bool = False,
    residual: jax.Array | None = None,
    is_real: jax.Array | None = None,
    out_dtype: str | None = None,
    backend: backends.Backend = "auto",
) -> jax.Array:
    """Multiply rows by the transpose of a weight: [X, D] times [F, D] gives [X, F], with float32 sums.

    In this order: each row is normalised, x / sqrt(mean(x^2) + eps) in float32, rounded to x's dtype, times `norm`; the product;
    the bias; of a gated weight silu(first half of the outputs) * second half; the residual; the result's dtype. What comes after
    the product may be rounded to that dtype in between or not.

    >>> import jax.numpy as jnp
    >>> matmul(jnp.ones((3, 64)), jnp.ones((8, 64)), norm=jnp.ones(64), is_gated=True).shape
    (3, 4)

    Args:
      x: [X, D], of float32, bfloat16 or float16.
      weight: [F, D], or [2F, D] when gated, of float32, bfloat16 or float16; or its panels, which give the same bits: see
        `pallas_kernels.matmul.panels`; or, for rows of bfloat16, its packed panels, which do so too: see `packed` beside it. The
        native backend counts subnormal numbers of a bfloat16 product, below 1.2e-38, as 0.
      bias: [F], or [2F] when gated.
      norm: [D] of x's dtype, the scale of a norm of the rows; None for rows as they are.
      eps: of that norm.
      residual: [X, F] of the result's dtype, added to it.
      is_real: bool [X], rows that count; the others yield 0, and cost nothing on the native backend. None for all.
      out_dtype: "float32" or x's dtype, which it is when left out.
      backend: of "native" a row's bits depend on that row and the weight alone, not on the number of rows. "auto" is it on a
        CPU.

    Returns:
      [X, F].

    Raises:
      ValueError: shapes or dtypes that do not fit each other.
      NotImplementedError: the named backend cannot run here; the message says why.
    """
    dtype = jnp.dtype(out_dtype or x.dtype)
    around = Around(norm, eps, bias, is_gated, residual, is_real)
    _check(x, weight, around, dtype)
    choice = backends.choose("matmul", backend, native=native.unavailable)
    # For any number of rows: with XLA's products for some, the last bits of a request would depend on how many others there are.
    module = native if choice.name == "native" else importlib.import_module(f"pallas_kernels.matmul.{choice.name}")
    if module is not native and is_packed(weight):
        weight = from_packed(weight, x.shape[1])
    elif module is not native and weight.ndim == 4:
        weight = from_panels(weight)
    return module.matmul(x, weight, around, dtype)


def is_native(backend: backends.Backend) -> bool:
    """Whether this backend's products are in C++ here: a weight that stays is then better kept as panels, and rows that do not
    count cost nothing.
    """
    return backends.choose("matmul", backend, native=native.unavailable).name == "native"


def _check(x: jax.Array, weight: jax.Array, around: Around, dtype: jnp.dtype) -> None:
    def refuse(what: str) -> None:
        raise ValueError(f"matmul: {what}")

    if x.ndim != 2 or weight.ndim not in (2, 4):
        refuse(f"x and weight have {x.ndim} and {weight.ndim} axes, expected 2 and 2, or 4 of panels")
    for name, array in (("x", x), ("weight", weight)):
        if array.dtype.name not in _FLOATS and not (array is weight and is_packed(weight)):
            refuse(f"{name} of {array.dtype} is not supported; {', '.join(_FLOATS)} are")
    (X, D), num_outputs, unit = x.shape, weight.shape[0], 1
    if is_packed(weight):
        num_outputs, unit = num_outputs * LANES, LANES
        if x.dtype != jnp.bfloat16 or D % 8 or weight.shape[1] != num_words(D):
            expected = f"uint16[P, {num_words(D)}] for rows of bfloat16 whose length is a multiple of 8"
            refuse(f"packed panels of the weight are {list(weight.shape)} and x {x.dtype}{[X, D]}, expected {expected}")
    elif weight.ndim == 4:
        num_outputs, unit = num_outputs * LANES, LANES
        at_a_step = weight.shape[3]
        if weight.shape[2] != LANES or (weight.dtype.name, at_a_step) not in (("float32", 1), ("bfloat16", 2)):
            expected = "float32[P, D, 16, 1] or bfloat16[P, D / 2, 16, 2]"
            refuse(f"panels of the weight are {weight.dtype}{list(weight.shape)}, expected {expected}")
    if not is_packed(weight) and weight.size != num_outputs * D:
        refuse(f"weight is {list(weight.shape)}, expected [F, {D}] for x of [{X}, {D}]")
    if dtype not in (jnp.float32, x.dtype):
        refuse(f"out_dtype {dtype.name!r}, expected 'float32' or x's dtype, {x.dtype.name!r}")
    around.check(refuse, x, num_outputs, dtype, unit)
