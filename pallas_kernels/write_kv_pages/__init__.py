"""Write new keys or values into their slots of a page array."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import backends, native
from pallas_kernels.bits import as_bits


def write_kv_pages(pages: jax.Array, new: jax.Array, slots: jax.Array, *, backend: backends.Backend = "auto") -> jax.Array:
    """Put token x's heads at slot `slots[x]` = page * S + offset; in place when `pages` is donated to the surrounding jit.

    Args:
      pages: [P, K, S, H].
      new: [X, K, H], cast to the pages' dtype.
      slots: int32 [X], each in [0, P * S). Live tokens have distinct slots; padding tokens all write to the null page.
    """
    choice = backends.choose("write_kv_pages", backend, native=lambda: native.unavailable(pages.shape[-1]))
    if choice.name == "native":
        return native.write_kv_pages(pages, new, slots)
    S = pages.shape[2]
    new = new.astype(pages.dtype)
    if slots.shape[0] == 1:
        # XLA turns a scatter of one update into a dynamic-update-slice, for which its CPU backend copies the whole pool
        # (three times, jax 0.10.2). The same token written twice stays a scatter, in place.
        new, slots = jnp.concatenate([new, new]), jnp.concatenate([slots, slots])
    written = as_bits(pages).at[slots // S, :, slots % S].set(as_bits(new), mode="promise_in_bounds")
    return written.view(pages.dtype)
