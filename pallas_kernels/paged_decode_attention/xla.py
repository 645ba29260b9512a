"""The portable path: a loop over only the blocks of pages that exist, with an online softmax.

A gather of the whole padded block table costs max_model_len for every row. Here a work list of (row, block) pairs is built from
`kv_lens` on the device, so that the cost follows the tokens that are there, padding rows are free, and nothing recompiles.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.bits import as_bits
from pallas_kernels.paged_decode_attention.dispatch import Arrays, Options

# Tokens of one block; query positions of all work items of one turn of the loop, and the most items (32 of them gather 6 MB for 3
# heads of 64, what two cores' caches hold): half as many of each cost a fifth to a half more, twice as many win nothing.
BLOCK_TOKENS = 128
TURN_QUERIES = 128
TURN_ITEMS = 32
_LOWEST = -1e30  # stands for -inf: finite, so that exp(lowest - lowest) is 1 and never NaN


def attend(arrays: Arrays, options: Options) -> tuple[jax.Array, jax.Array]:
    """Causal attention of T consecutive queries per row, the first at `first_positions[b]`: [B, T, N, H] and LSE [B, T, N]."""
    q, k_pages, v_pages, block_tables, kv_lens, first_positions, sinks, k_scales, v_scales = arrays
    window = options.window
    (B, T, N, H), (_, K, S, _), M = q.shape, k_pages.shape, block_tables.shape[1]
    G, E = N // K, max(1, min(M, BLOCK_TOKENS // S))  # E pages a block
    C = E * S
    W = min(B, TURN_ITEMS, max(1, TURN_QUERIES // T))  # work items a turn

    # The work list: row b owns blocks first_block[b] .. last, which are items ends[b] - count[b] .. ends[b] - 1.
    first_block = jnp.maximum(first_positions - window + 1, 0) // C if window else jnp.zeros_like(kv_lens)
    count = jnp.where(kv_lens > 0, -(-kv_lens // C) - first_block, 0)
    ends = jnp.cumsum(count)
    num_items = ends[-1]
    tables = jnp.pad(block_tables, ((0, 0), (0, -M % E))).reshape(B, -1, E)

    # [P*K, S, H]: the gather then yields [item, K, context, H] with no transposition.
    k_flat, v_flat = as_bits(k_pages).reshape(-1, S, H), as_bits(v_pages).reshape(-1, S, H)
    queries = jnp.moveaxis(q.reshape(B, T, K, G, H), 1, 3).astype(jnp.float32).reshape(B, K, G * T, H) * options.scale
    query_position = jnp.tile(first_positions[:, None] + jnp.arange(T), (1, G))  # [B, G*T]

    def turn(carry):
        index, peak, total, out = carry
        item = index * W + jnp.arange(W)
        is_real = item < num_items
        row = jnp.minimum(jnp.searchsorted(ends, item, side="right"), B - 1)
        block = jnp.where(is_real, item - ends[row] + count[row] + first_block[row], 0)
        pages = jnp.where(is_real[:, None], tables[row, block], 0)
        flat = pages[:, None, :] * K + jnp.arange(K)[None, :, None]
        # float32 from here: XLA's CPU backend runs a batch of small bfloat16 products 3x slower than the cast plus float32.
        k = k_flat[flat].view(k_pages.dtype).astype(jnp.float32).reshape(W, K, C, H)
        v = v_flat[flat].view(v_pages.dtype).astype(jnp.float32).reshape(W, K, C, H)
        if k_scales is not None and v_scales is not None:
            k, v = k * _scales_of(k_scales, flat, C), v * _scales_of(v_scales, flat, C)

        key_position = block[:, None] * C + jnp.arange(C)  # [W, C]
        exists = (key_position < kv_lens[row][:, None]) & is_real[:, None]
        sees = exists[:, None] & (key_position[:, None] <= query_position[row][:, :, None])
        if window:
            sees &= key_position[:, None] > query_position[row][:, :, None] - window
        sees = sees[:, None]  # [W, 1, G*T, C]

        scores = jnp.einsum("ikqh,ikch->ikqc", queries[row], k)
        if options.soft_cap:
            scores = options.soft_cap * jnp.tanh(scores / options.soft_cap)
        scores = jnp.where(sees, scores, _LOWEST)
        item_peak = jnp.max(scores, axis=-1)
        weights = jnp.where(sees, jnp.exp(scores - item_peak[..., None]), 0.0)
        # A weight of 0 times a NaN is a NaN: places that hold no token of this row are masked in V as well.
        values = jnp.where(exists[:, None, :, None], v, 0.0)
        item_out = jnp.einsum("ikqc,ikch->ikqh", weights, values)

        # Several items of one turn may belong to one row, so they are merged by scatter; a padding item weighs 0.
        new_peak = peak.at[row].max(item_peak)
        item_scale = jnp.where(item_peak > _LOWEST, jnp.exp(item_peak - new_peak[row]), 0.0)
        row_scale = jnp.exp(peak - new_peak)
        total = (total * row_scale).at[row].add(item_scale * jnp.sum(weights, axis=-1))
        out = (out * row_scale[..., None]).at[row].add(item_scale[..., None] * item_out)
        return index + 1, new_peak, total, out

    peak = jnp.full((B, K, G * T), _LOWEST)
    total = jnp.zeros_like(peak)
    if sinks is not None:
        # A sink is a first score whose value is 0.
        first_score = jnp.maximum(sinks.astype(jnp.float32), _LOWEST).reshape(K, G)
        peak = jnp.broadcast_to(jnp.repeat(first_score, T, axis=1), peak.shape)
        total = jnp.ones_like(peak)
    start = (jnp.int32(0), peak, total, jnp.zeros((B, K, G * T, H)))
    _, peak, total, out = lax.while_loop(lambda carry: carry[0] * W < num_items, turn, start)
    out = out / jnp.where(total == 0, 1.0, total)[..., None]
    is_empty = (total == 0) | (kv_lens == 0)[:, None, None]
    lse = jnp.where(is_empty, -jnp.inf, peak + jnp.log(jnp.where(is_empty, 1.0, total)))

    def by_token(x: jax.Array) -> jax.Array:
        """[B, K, G*T, ...] to [B, T, N, ...]."""
        return jnp.moveaxis(x.reshape(B, K, G, T, *x.shape[3:]), 3, 1).reshape(B, T, N, *x.shape[3:])

    return by_token(out).astype(q.dtype), by_token(lse)


def _scales_of(scales: jax.Array, flat: jax.Array, num_tokens: int) -> jax.Array:
    """Scales of gathered pages, `flat` [W, K, E] being page * K + head: [W, K, num_tokens, 1], or what broadcasts to it."""
    if scales.ndim == 1:
        return scales[:, None, None]
    return scales.reshape(-1, scales.shape[-1])[flat].reshape(*flat.shape[:2], num_tokens, 1)
