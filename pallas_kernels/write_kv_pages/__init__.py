"""Write new keys or values into their slots of a page array."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def write_kv_pages(pages: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
    """Put token x's heads at slot `slots[x]` = page * S + offset; in place when `pages` is donated to the surrounding jit.

    Args:
      pages: [P, K, S, H].
      new: [X, K, H], cast to the pages' dtype.
      slots: int32 [X], each in [0, P * S). Live tokens have distinct slots; padding tokens all write to the null page.
    """
    S = pages.shape[2]
    return pages.at[slots // S, :, slots % S].set(new.astype(pages.dtype), mode="promise_in_bounds", unique_indices=False)
