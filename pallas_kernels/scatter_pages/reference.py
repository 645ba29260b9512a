"""The definition: the pages of all layers by their numbers."""

from __future__ import annotations

import jax

from pallas_kernels import pools
from pallas_kernels.bits import as_bits


def scatter_pages(pages: jax.Array, staged: jax.Array, page_numbers: jax.Array, num_layers: int) -> jax.Array:
    """See the contract in `pallas_kernels.scatter_pages`."""
    pool = pools.by_layer(as_bits(pages), num_layers)
    return pool.at[:, page_numbers].set(as_bits(staged).swapaxes(0, 1)).reshape(pages.shape).view(pages.dtype)
