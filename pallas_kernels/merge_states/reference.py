"""The definition: weights exp(lse_i - lse), one part after the other."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def merge(outs: jax.Array, lses: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Results [I, ..., H] and their LSEs [I, ...] as one."""
    dtype = jnp.promote_types(outs.dtype, jnp.float32)
    lse = jax.nn.logsumexp(lses.astype(dtype), axis=0)
    out = jnp.zeros(outs.shape[1:], dtype)
    for part, part_lse in zip(outs, lses, strict=True):
        is_empty = jnp.isneginf(part_lse)
        weight = jnp.where(is_empty, 0.0, jnp.exp(jnp.where(is_empty, 0.0, part_lse - lse)))
        out += weight[..., None] * jnp.where(is_empty[..., None], 0.0, part.astype(dtype))
    return out.astype(outs.dtype), lse.astype(jnp.float32)
