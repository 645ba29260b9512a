"""The formulation to beat: index the pools with the whole padded block table, and attend as if pages had never been.

It is what one writes first. It costs what the table is wide, not what the rows are long, and it multiplies what unused places
hold by 0, so that a NaN there reaches the result. No backend, but what `pallas_kernels.bench` shows beside them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.paged_decode_attention.dispatch import Arrays, Options


def attend(arrays: Arrays, options: Options) -> tuple[jax.Array, jax.Array]:
    """Causal attention of T consecutive queries per row, the first at `first_positions[b]`: [B, T, N, H] and LSE [B, T, N]."""
    q, k_pages, v_pages, tables, kv_lens, first_positions, sinks, k_scales, v_scales = arrays
    (B, T, N, H), K, C = q.shape, k_pages.shape[1], tables.shape[1] * k_pages.shape[2]

    def context(pages: jax.Array, scales: jax.Array | None) -> jax.Array:
        """[B, M, K, S, H] to [B, C, K, H], in the queries' dtype."""
        x = pages[tables].astype(q.dtype)
        if scales is not None:
            x *= (scales[:, None, None] if scales.ndim == 1 else scales[tables][..., None]).astype(q.dtype)
        return jnp.moveaxis(x, 3, 2).reshape(B, C, K, H)

    key_position, query_position = jnp.arange(C), first_positions[:, None] + jnp.arange(T)
    sees = (key_position <= query_position[..., None]) & (key_position < kv_lens[:, None, None])  # [B, T, C]
    if options.window:
        sees &= key_position > query_position[..., None] - options.window

    queries, keys, values = q.reshape(B, T, K, N // K, H), context(k_pages, k_scales), context(v_pages, v_scales)
    scores = jnp.einsum("btkgh,bckh->bkgtc", queries, keys, preferred_element_type=jnp.float32) * options.scale
    if options.soft_cap:
        scores = options.soft_cap * jnp.tanh(scores / options.soft_cap)
    scores = jnp.where(sees[:, None, None], scores, -1e30)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks.reshape(K, N // K, 1, 1), (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, sink.astype(scores.dtype)], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., :C].astype(q.dtype)
    out = jnp.einsum("bkgtc,bckh->btkgh", weights, values).reshape(B, T, N, H)
    lse = jnp.moveaxis(jax.nn.logsumexp(scores, axis=-1), 3, 1).reshape(B, T, N)
    return out, jnp.where((kv_lens == 0)[:, None, None], -jnp.inf, lse)
