"""The definition, as slow and plain as it can be said: gather every page, mask, softmax, sum."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attend_at(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_tables: jax.Array,
    kv_lens: jax.Array,
    first_positions: jax.Array,
    *,
    scale: float,
    window: int,
) -> jax.Array:
    """Causal attention of T consecutive queries per row, the first at `first_positions[b]`; shared with the prefill operation."""
    (B, T, N, H), (_, K, S, _), M = q.shape, k_pages.shape, block_tables.shape[1]
    dtype = jnp.promote_types(q.dtype, jnp.float32)  # float64 stays float64, so that this is also the oracle

    def context(pages: jax.Array) -> jax.Array:
        return jnp.moveaxis(pages[block_tables], 2, 1).reshape(B, K, M * S, H).astype(dtype)

    key_position = jnp.arange(M * S)
    query_position = first_positions[:, None] + jnp.arange(T)
    sees = key_position[None, None] <= query_position[:, :, None]
    sees &= key_position[None, None] < kv_lens[:, None, None]
    if window:
        sees &= key_position[None, None] > query_position[:, :, None] - window
    sees = sees[:, None, None]  # [B, 1, 1, T, M*S]

    queries = jnp.moveaxis(q.reshape(B, T, K, N // K, H), 1, 3).astype(dtype)
    scores = jnp.einsum("bkgth,bkch->bkgtc", queries, context(k_pages), precision="highest") * scale
    weights = jnp.where(sees, jnp.exp(scores - jnp.max(jnp.where(sees, scores, -jnp.inf), axis=-1, keepdims=True)), 0.0)
    # A weight of 0 times a NaN is a NaN: places that no query sees are masked in V as well.
    values = jnp.where((key_position < kv_lens[:, None])[:, None, :, None], context(v_pages), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum("bkgtc,bkch->bkgth", weights / jnp.where(total == 0, 1.0, total), values, precision="highest")
    return jnp.moveaxis(out, 3, 1).reshape(B, T, N, H).astype(q.dtype)
