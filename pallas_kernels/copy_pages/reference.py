"""The definition: all reads, then all writes."""

from __future__ import annotations

import jax

from pallas_kernels import pools
from pallas_kernels.bits import as_bits


def copy_pages(pages: jax.Array, sources: jax.Array, targets: jax.Array, num_layers: int) -> jax.Array:
    """See the contract in `pallas_kernels.copy_pages`."""
    pool = pools.by_layer(as_bits(pages), num_layers)
    return pool.at[:, targets].set(pool[:, sources]).reshape(pages.shape).view(pages.dtype)
