"""The portable path: one gather of rows, which writes the result as it is to be."""

from __future__ import annotations

import jax

from pallas_kernels import pools
from pallas_kernels.bits import as_bits


def gather_pages(pages: jax.Array, page_numbers: jax.Array, num_layers: int) -> jax.Array:
    """See the contract in `pallas_kernels.gather_pages`."""
    rows = pools.rows(page_numbers, pages.shape[0], num_layers)
    return as_bits(pages).at[rows].get(mode="promise_in_bounds").view(pages.dtype)
