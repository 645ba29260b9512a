"""The portable path: one weighted sum over all parts, which XLA makes one or two loops of."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def merge(outs: jax.Array, lses: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Results [I, ..., H] and their LSEs [I, ...] as one."""
    dtype = jnp.promote_types(outs.dtype, jnp.float32)
    lses = lses.astype(dtype)
    peak = jnp.max(lses, axis=0)
    weights = jnp.exp(lses - jnp.where(jnp.isneginf(peak), 0.0, peak))
    total = jnp.sum(weights, axis=0)
    # A weight of 0 times a NaN is a NaN: what an empty part holds is replaced.
    values = jnp.where(weights[..., None] > 0, outs.astype(dtype), 0.0)
    out = jnp.sum(weights[..., None] * values, axis=0) / jnp.where(total > 0, total, 1.0)[..., None]
    lse = jnp.where(total > 0, peak + jnp.log(jnp.where(total > 0, total, 1.0)), -jnp.inf)
    return out.astype(outs.dtype), lse.astype(jnp.float32)
