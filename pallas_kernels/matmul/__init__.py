"""x times the transpose of a weight, with what a transformer does before and after it."""

from __future__ import annotations

import importlib

import jax
import jax.numpy as jnp

from pallas_kernels import backends
from pallas_kernels.matmul.around import Around
from pallas_kernels.matmul.forms import FLOATS, form_of
from pallas_kernels.native import matmul as native

__all__ = ["is_native", "matmul"]


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
    if module is not native:
        weight = form_of(weight).plain(weight, x.shape[1])
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
    if x.dtype.name not in FLOATS:
        refuse(f"x of {x.dtype} is not supported; {', '.join(FLOATS)} are")
    form = form_of(weight)
    if fault := form.fault(x, weight):
        refuse(fault)
    if dtype not in (jnp.float32, x.dtype):
        refuse(f"out_dtype {dtype.name!r}, expected 'float32' or x's dtype, {x.dtype.name!r}")
    around.check(refuse, x, form.num_outputs(weight), dtype, form.unit)
