"""The definition, as slow and plain as it can be said: sort, cut, add noise, take the largest."""

from __future__ import annotations

import jax
import jax.numpy as jnp

_LOWEST_TEMPERATURE = 1e-5


def sample(
    logits: jax.Array,
    seeds: jax.Array,
    positions: jax.Array,
    temperatures: jax.Array,
    top_ks: jax.Array,
    top_ps: jax.Array,
    min_ps: jax.Array,
) -> jax.Array:
    """One token of each row, int32 [B]."""
    return jax.vmap(_sample_row)(logits, seeds, positions, temperatures, top_ks, top_ps, min_ps)


def _sample_row(
    logits: jax.Array,
    seed: jax.Array,
    position: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
) -> jax.Array:
    V = logits.shape[0]
    logits = logits.astype(jnp.float32)
    logits = jnp.where(jnp.isnan(logits), -jnp.inf, jnp.minimum(logits, jnp.finfo(jnp.float32).max))
    peak = jnp.max(logits)
    is_greedy = temperature < _LOWEST_TEMPERATURE
    temperature = jnp.where(is_greedy, 1.0, temperature)
    descending = jnp.sort(logits, descending=True)

    # Each filter is the smallest logit that it keeps.
    by_min_p = peak + temperature * jnp.log(jnp.minimum(min_p, 1.0))
    by_top_k = descending[jnp.where((top_k > 0) & (top_k < V), top_k, V) - 1]
    kept = descending >= jnp.maximum(by_min_p, by_top_k)
    weights = jnp.where(kept, jnp.exp((descending - peak) / temperature), 0.0)
    before = jnp.cumsum(weights) - weights  # the weight of all larger ones
    is_nucleus = (before < top_p * jnp.sum(weights)) | (top_p >= 1) | (jnp.arange(V) == 0)
    threshold = jnp.min(jnp.where(kept & is_nucleus, descending, jnp.inf))

    key = jax.random.key(0, impl="threefry2x32")
    for word in (seed[0], seed[1], position.astype(jnp.uint32)):
        key = jax.random.fold_in(key, word)
    noisy = (logits - peak) / temperature + jax.random.gumbel(key, (V,), jnp.float32)
    candidates = jnp.where((logits >= threshold) & (logits > -jnp.inf), noisy, -jnp.inf)
    return jnp.where(is_greedy, jnp.argmax(logits), jnp.argmax(candidates)).astype(jnp.int32)
