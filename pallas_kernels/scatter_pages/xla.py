"""The portable path: one staged page of one layer after the other, in place at any number of them.

Rows of the pool as it is, not pages of all layers: when K or S is 1, XLA's CPU backend lays a pool [L, P, K, S, H] out in another
way and copies all of it there and back.
"""

from __future__ import annotations

import jax
from jax import lax

from pallas_kernels import pools
from pallas_kernels.bits import as_bits


def scatter_pages(pages: jax.Array, staged: jax.Array, page_numbers: jax.Array, num_layers: int) -> jax.Array:
    """See the contract in `pallas_kernels.scatter_pages`."""
    fresh = as_bits(staged)
    rows = pools.rows(page_numbers, pages.shape[0], num_layers)

    def turn(n: jax.Array, pool: jax.Array) -> jax.Array:
        x, layer = n // num_layers, n % num_layers
        page = lax.dynamic_slice(fresh, (x, layer, 0, 0, 0), (1, 1, *fresh.shape[2:]))
        return lax.dynamic_update_slice_in_dim(pool, page[0], rows[x, layer], axis=0)

    return lax.fori_loop(0, rows.size, turn, as_bits(pages)).view(pages.dtype)
