"""The portable path: one scatter."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.bits import as_bits


def write_kv_pages(pages: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
    """See the contract in `pallas_kernels.write_kv_pages`; `new` is in the pages' dtype."""
    S, fresh = pages.shape[2], as_bits(new)
    if slots.shape[0] == 1:
        # XLA turns a scatter of one update into a dynamic-update-slice, for which its CPU backend copies the whole pool
        # (three times, jax 0.10.2). The same token written twice stays a scatter, in place.
        fresh, slots = jnp.concatenate([fresh, fresh]), jnp.concatenate([slots, slots])
    written = as_bits(pages).at[slots // S, :, slots % S].set(fresh, mode="promise_in_bounds")
    return written.view(pages.dtype)
