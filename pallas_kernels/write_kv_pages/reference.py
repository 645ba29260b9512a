"""The definition: one token after the other."""

from __future__ import annotations

import jax
from jax import lax

from pallas_kernels.bits import as_bits


def write_kv_pages(pages: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
    """See the contract in `pallas_kernels.write_kv_pages`; `new` is in the pages' dtype."""
    fresh, S = as_bits(new), pages.shape[2]

    def turn(x: jax.Array, bits: jax.Array) -> jax.Array:
        return bits.at[slots[x] // S, :, slots[x] % S].set(fresh[x])

    return lax.fori_loop(0, slots.shape[0], turn, as_bits(pages)).view(pages.dtype)
