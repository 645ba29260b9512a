"""Matrix products on a CPU, in C++, called by XLA on its own threads.

XLA's CPU backend widens a whole weight of bfloat16 for one row, and reads weights of float32 at half of what memory gives.
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.native import building

_SOURCE = Path(__file__).with_name("matmul.cc")


@functools.cache
def unavailable() -> str | None:
    """Why this backend cannot run here, or None when it can. Builds and registers it at the first call."""
    handlers = {name: _target(name) for name in ("Matmul", "MatmulInt8", "MatmulIntegers")}
    return building.register(_SOURCE, handlers, building.MATH, "matrix products")


def _target(name: str) -> str:
    return f"pallas_kernels.{name}"


def matmul(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    norm: jax.Array | None,
    residual: jax.Array | None,
    is_real: jax.Array | None,
    *,
    eps: float,
    is_gated: bool,
    out_dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """See the contract in `pallas_kernels.matmul`."""
    num_outputs = weight.shape[0] * (weight.shape[2] if weight.ndim == 4 else 1) // (2 if is_gated else 1)
    call = jax.ffi.ffi_call(_target("Matmul"), jax.ShapeDtypeStruct((x.shape[0], num_outputs), out_dtype))
    absent = jnp.zeros(0, jnp.float32)
    optional = (absent if bias is None else bias.astype(jnp.float32), *(absent if a is None else a for a in (norm, residual)))
    rows = jnp.zeros(0, bool) if is_real is None else is_real
    return call(x, weight, *optional, rows, eps=np.float32(eps), is_gated=is_gated)


def matmul_int8(x: jax.Array, weight: jax.Array, scales: jax.Array) -> jax.Array:
    """Rows [X, D] times the transpose of a weight of int8 [F, D] whose output f is multiplied by scales[f]: float32 [X, F].

    Rows of int8, from -127 to 127, are multiplied exactly.
    """
    is_integer = x.dtype == jnp.int8
    rows = (x.astype(jnp.int32) + 128).astype(jnp.uint8) if is_integer else x.astype(jnp.float32)
    name = "MatmulIntegers" if is_integer else "MatmulInt8"
    call = jax.ffi.ffi_call(_target(name), jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), jnp.float32))
    return call(rows, weight, scales)
