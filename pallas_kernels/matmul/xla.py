"""The portable path: XLA's own product, for every device, and to be differentiated."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.matmul.around import Around

# XLA's CPU backend converts a whole weight of 16 bits for a single row: 147-170 ms against 40-43 ms for a step with eight rows
# (135M widths, 2 cores with AVX-512, jax 0.10.2, November 2026).
_FEWEST_ROWS = 8


def matmul(x: jax.Array, weight: jax.Array, around: Around, out_dtype: jax.typing.DTypeLike) -> jax.Array:
    """See the contract in `pallas_kernels.matmul`; each part rounds to the result's dtype."""
    return around.result(_product(around.rows(x), weight), out_dtype)


def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """float32, asked for explicitly: XLA's CPU backend has a fast path for a bfloat16 product only when the result is float32."""
    dtype = jnp.promote_types(x.dtype, weight.dtype)

    def multiply(x: jax.Array) -> jax.Array:
        contracting = (((1,), (1,)), ((), ()))
        return lax.dot_general(x.astype(dtype), weight.astype(dtype), contracting, preferred_element_type=jnp.float32)

    def padded() -> jax.Array:
        return multiply(jnp.pad(x, ((0, _FEWEST_ROWS - 1), (0, 0))))[:1]

    if x.shape[0] != 1 or weight.dtype.itemsize == 4:
        return multiply(x)
    return lax.platform_dependent(cpu=padded, default=lambda: multiply(x))
