"""The definition: the pages of all layers by their numbers."""

from __future__ import annotations

import jax

from pallas_kernels import pools
from pallas_kernels.bits import as_bits


def gather_pages(pages: jax.Array, page_numbers: jax.Array, num_layers: int) -> jax.Array:
    """See the contract in `pallas_kernels.gather_pages`."""
    return pools.by_layer(as_bits(pages), num_layers)[:, page_numbers].swapaxes(0, 1).view(pages.dtype)
