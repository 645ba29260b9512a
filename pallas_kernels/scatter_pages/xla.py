"""The portable path: one staged page of all layers after the other, in place at any number of them."""

from __future__ import annotations

import jax
from jax import lax

from pallas_kernels import pools
from pallas_kernels.bits import as_bits


def scatter_pages(pages: jax.Array, staged: jax.Array, page_numbers: jax.Array, num_layers: int) -> jax.Array:
    """See the contract in `pallas_kernels.scatter_pages`."""
    fresh = as_bits(staged)

    def turn(x: jax.Array, pool: jax.Array) -> jax.Array:
        page = lax.dynamic_slice_in_dim(fresh, x, 1, axis=0).swapaxes(0, 1)
        return lax.dynamic_update_slice_in_dim(pool, page, page_numbers[x], axis=1)

    pool = lax.fori_loop(0, staged.shape[0], turn, pools.by_layer(as_bits(pages), num_layers))
    return pool.reshape(pages.shape).view(pages.dtype)
