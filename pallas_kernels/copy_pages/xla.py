"""The portable path: one page of all layers after the other, so that no more than that is ever held beside the pool.

A gather of all sources followed by a scatter would need room for all of them, when the pool has taken what memory there is.
"""

from __future__ import annotations

import jax
from jax import lax

from pallas_kernels import pools
from pallas_kernels.bits import as_bits


def copy_pages(pages: jax.Array, sources: jax.Array, targets: jax.Array, num_layers: int) -> jax.Array:
    """See the contract in `pallas_kernels.copy_pages`."""

    def turn(x: jax.Array, pool: jax.Array) -> jax.Array:
        page = lax.dynamic_slice_in_dim(pool, sources[x], 1, axis=1)
        return lax.dynamic_update_slice_in_dim(pool, page, targets[x], axis=1)

    pool = lax.fori_loop(0, sources.shape[0], turn, pools.by_layer(as_bits(pages), num_layers))
    return pool.reshape(pages.shape).view(pages.dtype)
