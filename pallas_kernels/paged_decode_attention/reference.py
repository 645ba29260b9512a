"""The definition, as slow and plain as it can be said: gather every page, mask, softmax, sum."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.paged_decode_attention.dispatch import Arrays, Options


def attend(arrays: Arrays, options: Options) -> tuple[jax.Array, jax.Array]:
    """Causal attention of T consecutive queries per row, the first at `first_positions[b]`: [B, T, N, H] and LSE [B, T, N]."""
    q, k_pages, v_pages, tables, kv_lens, first_positions, sinks, k_scales, v_scales = arrays
    (B, T, N, H), (_, K, S, _), M = q.shape, k_pages.shape, tables.shape[1]
    dtype = jnp.promote_types(q.dtype, jnp.float32)  # float64 stays float64

    def context(pages: jax.Array, scales: jax.Array | None) -> jax.Array:
        """[B, K, M*S, H], the numbers that a row's pages stand for."""
        values = pages[tables].astype(dtype)
        if scales is not None:
            values *= (scales[:, None, None] if scales.ndim == 1 else scales[tables][..., None]).astype(dtype)
        return jnp.moveaxis(values, 2, 1).reshape(B, K, M * S, H)

    key_position = jnp.arange(M * S)
    query_position = first_positions[:, None] + jnp.arange(T)
    sees = key_position[None, None] <= query_position[:, :, None]
    sees &= key_position[None, None] < kv_lens[:, None, None]
    if options.window:
        sees &= key_position[None, None] > query_position[:, :, None] - options.window
    sees = sees[:, None, None]  # [B, 1, 1, T, M*S]

    queries = jnp.moveaxis(q.reshape(B, T, K, N // K, H), 1, 3).astype(dtype)
    scores = jnp.einsum("bkgth,bkch->bkgtc", queries, context(k_pages, k_scales), precision="highest") * options.scale
    if options.soft_cap:
        scores = options.soft_cap * jnp.tanh(scores / options.soft_cap)
    peak = jnp.max(jnp.where(sees, scores, -jnp.inf), axis=-1, keepdims=True)
    if sinks is not None:
        sink = sinks.astype(dtype).reshape(1, K, N // K, 1, 1)
        peak = jnp.maximum(peak, sink)
    weights = jnp.where(sees, jnp.exp(scores - peak), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sink - peak)
    # A weight of 0 times a NaN is a NaN: places that no query sees are masked in V as well.
    values = jnp.where((key_position < kv_lens[:, None])[:, None, :, None], context(v_pages, v_scales), 0.0)
    out = jnp.einsum("bkgtc,bkch->bkgth", weights / jnp.where(total == 0, 1.0, total), values, precision="highest")
    lse = jnp.where(total == 0, -jnp.inf, jnp.log(total) + peak)
    lse = jnp.where((kv_lens == 0)[:, None, None, None, None], -jnp.inf, lse)[..., 0]
    return jnp.moveaxis(out, 3, 1).reshape(B, T, N, H).astype(q.dtype), jnp.moveaxis(lse, 3, 1).reshape(B, T, N)
