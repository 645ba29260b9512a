"""The portable path: one page of one layer after the other, so that no more than that is ever held beside the pool.

A gather of all sources followed by a scatter would need room for all of them, when the pool has taken what memory there is. Rows
of the pool as it is, not pages of all layers: see `scatter_pages/xla.py`.
"""

from __future__ import annotations

import jax
from jax import lax

from pallas_kernels import pools
from pallas_kernels.bits import as_bits


def copy_pages(pages: jax.Array, sources: jax.Array, targets: jax.Array, num_layers: int) -> jax.Array:
    """See the contract in `pallas_kernels.copy_pages`."""
    reads, writes = (pools.rows(numbers, pages.shape[0], num_layers).reshape(-1) for numbers in (sources, targets))

    def turn(n: jax.Array, pool: jax.Array) -> jax.Array:
        page = lax.dynamic_slice_in_dim(pool, reads[n], 1, axis=0)
        return lax.dynamic_update_slice_in_dim(pool, page, writes[n], axis=0)

    return lax.fori_loop(0, reads.size, turn, as_bits(pages)).view(pages.dtype)
