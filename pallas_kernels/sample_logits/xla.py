"""The portable path: one row after the other, each as cheaply as what it asks for allows, and no sort of a vocabulary.

The logits are read once for the largest of every 32. A greedy row needs one tile more. A filtered row takes its 256 best tiles
as candidates and looks for its thresholds there by bisection. Every token outside is at most the 257th tile's largest, so a
threshold above that is the whole row's; only a row that keeps more, or has no filter, works on all its logits.

Rows do not share a reduction, so a row's token is the same in any company. On a CPU the loop costs nothing, because rows that ask
for less are cheaper; a GPU would rather have all rows at once, and has its own kernels.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.sample_logits import noise
from pallas_kernels.sample_logits.rows import LOWEST_RANK, Rows, clean, rank

# Measured on 2 cores, jax 0.10.2, November 2026.
TILE = 32
CANDIDATE_TILES = 256


def sample(logits: jax.Array, rows: Rows) -> jax.Array:
    """One token of each row, int32 [B]."""
    B, V = logits.shape
    if V < TILE:
        logits = jnp.pad(logits, ((0, 0), (0, TILE - V)), constant_values=-jnp.inf)
    peaks = _peaks(logits)

    def one_row(b: jax.Array, tokens: jax.Array) -> jax.Array:
        row = jax.tree.map(lambda x: x[b], rows)
        token = lax.cond(row.is_greedy, _first_largest, _draw, logits, peaks[b], b, row)
        return tokens.at[b].set(token)

    return lax.fori_loop(0, B, one_row, jnp.zeros(B, jnp.int32))


def _peaks(logits: jax.Array) -> jax.Array:
    """The largest logit of each tile, float32 [B, tiles]; a row's last tile ends with the row and may overlap the one before."""
    B, V = logits.shape
    whole = clean(logits[:, : V // TILE * TILE].reshape(B, V // TILE, TILE)).max(axis=2)
    return whole if V % TILE == 0 else jnp.concatenate([whole, clean(logits[:, V - TILE :]).max(axis=1, keepdims=True)], axis=1)


def _tile(logits: jax.Array, b: jax.Array, tile: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The logits of a tile and their token ids; -inf for what the tile before it has too."""
    start = jnp.minimum(tile * TILE, logits.shape[1] - TILE)
    x = clean(lax.dynamic_slice(logits, (b, start), (1, TILE))[0])
    tokens = start + jnp.arange(TILE, dtype=jnp.int32)
    return jnp.where(tokens >= tile * TILE, x, -jnp.inf), tokens


def _first_largest(logits: jax.Array, peaks: jax.Array, b: jax.Array, row: Rows) -> jax.Array:
    del row
    x, tokens = _tile(logits, b, jnp.argmax(peaks).astype(jnp.int32))
    token = tokens[jnp.argmax(x)]
    return jnp.where(jnp.max(peaks) > -jnp.inf, token, 0)


def _draw(logits: jax.Array, peaks: jax.Array, b: jax.Array, row: Rows) -> jax.Array:
    """A token of a row that has a temperature."""
    V = logits.shape[1]
    highest = jnp.max(peaks)
    lowest, from_p = row.lowest(highest), row.below(highest, V)

    def from_all(from_k: jax.Array) -> jax.Array:
        x = clean(logits[b])
        kept = _threshold(x, row, highest, from_k, from_p, lambda least: _weight(x, row, highest, least))
        return _best(x, jnp.arange(V, dtype=jnp.int32), row, highest, kept)

    if peaks.shape[0] <= 2 * CANDIDATE_TILES:
        return from_all(lowest)

    def from_candidates() -> tuple[jax.Array, jax.Array]:
        """A token, or -1 when more than the candidates are kept; and the rank from which top_k certainly keeps."""
        best, tiles = lax.top_k(peaks, CANDIDATE_TILES + 1)
        bound = rank(best[-1])
        x, tokens = jax.vmap(_tile, in_axes=(None, None, 0))(logits, b, tiles[:-1])
        x, tokens = x.reshape(-1), tokens.reshape(-1)
        # At least k tokens reach the k-th largest of the tiles' maxima.
        kth = rank(best[jnp.clip(row.top_ks - 1, 0, CANDIDATE_TILES)])
        from_k = jnp.maximum(lowest, jnp.where((row.top_ks > 0) & (row.top_ks <= CANDIDATE_TILES), kth, LOWEST_RANK))

        def weight(least: jax.Array) -> jax.Array:
            """Of all tokens from that rank on; without top_k they may be anywhere."""
            return lax.cond(
                least > bound,
                lambda: _weight(x, row, highest, least),
                lambda: _weight(clean(logits[b]), row, highest, least),
            )

        kept = _threshold(x, row, highest, from_k, from_p, weight)
        return jnp.where(kept > bound, _best(x, tokens, row, highest, kept), -1), from_k

    is_filtered = (row.top_ks > 0) | (row.top_ps < 1) | (row.min_ps > 0)
    token, from_k = lax.cond(is_filtered, from_candidates, lambda: (jnp.int32(-1), lowest))
    return lax.cond(token < 0, from_all, lambda _: token, from_k)


def _best(x: jax.Array, tokens: jax.Array, row: Rows, highest: jax.Array, kept: jax.Array) -> jax.Array:
    """The token of the largest noisy logit from rank `kept` on, the lowest id on ties, 0 if there is none."""
    noisy = (x - highest) * row.inverse_temperatures + noise.gumbel(row.first_keys, row.second_keys, tokens)
    noisy = jnp.where(rank(x) >= kept, noisy, -jnp.inf)
    best = jnp.max(noisy)
    winner = jnp.min(jnp.where(noisy == best, tokens, jnp.iinfo(jnp.int32).max))
    return jnp.where(best > -jnp.inf, winner, 0)


def _weight(x: jax.Array, row: Rows, highest: jax.Array, least: jax.Array) -> jax.Array:
    weights = jnp.exp((x - highest) * row.inverse_temperatures)
    return jnp.sum(jnp.where(rank(x) >= least, weights, 0.0))


def _threshold(
    x: jax.Array,
    row: Rows,
    highest: jax.Array,
    from_k: jax.Array,
    from_p: jax.Array,
    weight: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """The rank from which a row's filters keep its tokens, as far as x has them.

    Args:
      x: logits of the row, float32, any number of them.
      from_k, from_p: ranks that top_k, and top_p of what is left, certainly keep.
      weight: of all the row's tokens from a rank on.
    """
    ranks, above = rank(x), jnp.maximum(rank(highest), from_k) + 1

    def by_count(least: jax.Array) -> jax.Array:
        return jnp.sum(ranks >= least, dtype=jnp.int32)

    def by_weight(kept: jax.Array) -> jax.Array:
        weights = jnp.exp((x - highest) * row.inverse_temperatures)
        wanted = row.top_ps * weight(kept)
        return _narrow(jnp.maximum(kept, from_p), above, wanted, lambda least: jnp.sum(jnp.where(ranks >= least, weights, 0.0)))

    kept = lax.cond(row.top_ks > 0, lambda: _narrow(from_k, above, row.top_ks, by_count), lambda: from_k)
    return lax.cond(row.top_ps < 1, by_weight, lambda kept: kept, kept)


def _narrow(low: jax.Array, high: jax.Array, wanted: jax.Array, measure: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The largest rank in low .. high - 1 from which on there is at least `wanted`, which there is from `low` on."""

    def halve(bracket: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bracket
        middle = low + lax.shift_right_logical(high - low, jnp.int32(1))  # the difference may be over 2**31; as bits it is right
        is_enough = measure(middle) >= wanted
        return jnp.where(is_enough, middle, low), jnp.where(is_enough, high, middle)

    return lax.while_loop(lambda bracket: bracket[1] - bracket[0] != 1, halve, (low, high))[0]
