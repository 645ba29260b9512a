"""Three small kernels and no sort: read every logit once, find each row's threshold, let the noisy logits compete.

1. `_scan` reads the logits once and keeps the largest of every tile of 512. Between the kernels XLA orders the tiles of each row
   by that number and brackets the thresholds, on arrays of one number a tile.
2. `_search` has one block a row and finds the threshold of top-k, then that of top-p. A pass counts or weighs the logits at or
   above seven candidates, so that an eighth of the bracket is left, and reads only the tiles that reach the lowest candidate, a
   prefix of the ordered tiles: for k of 50 at most 50 of 251, which stay in the first-level cache. A row without top-k and top-p
   reads nothing; the others make at most 11 passes for each of the two, and one to weigh what top-p is a part of.
3. `_compete` reads again the tiles that hold a token that may win, adds the noise and keeps the best token of each block.

So a greedy row is read once, and a tile of it twice. Every block works for one row and adds up in one order: a row's token is the
same in any company. One warpgroup a block, because Mosaic's reductions across warps share one scratch space per block. Nothing
here needs a copy engine or a barrier: the same source runs from sm_80 to sm_100.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import _compat
from pallas_kernels._compat import plgpu
from pallas_kernels.sample_logits import noise
from pallas_kernels.sample_logits.rows import LOWEST_RANK, Rows, clean, rank, value
from pallas_kernels.target import Target

TILE = 512  # logits of one load: 4 for each thread of a warpgroup, 16 bytes of float32
BLOCK_TILES = 8  # of a block of `_scan` and of `_compete`; the scan's loads are independent, so a block has 16 KB in flight
TURN_TILES = 4  # of one turn of `_search`
CANDIDATES = 7  # thresholds that a pass of `_search` tries: the bracket shrinks to an eighth
DTYPES = ("float32", "bfloat16", "float16")


def unavailable(target: Target, *, dtype: str, vocab_size: int) -> str | None:
    """Why these arguments cannot run on that GPU, None when they can."""
    if dtype not in DTYPES:
        return f"logits of {dtype} are not supported; {', '.join(DTYPES)} are"
    if vocab_size > 1 << 24:
        return f"a vocabulary of {vocab_size} is more than 2**24, to where float32 counts"
    return None


def sample(logits: jax.Array, rows: Rows, target: Target) -> jax.Array:
    """One token of each row, int32 [B]."""
    V = logits.shape[1]
    if V < TILE:
        logits = jnp.pad(logits, ((0, 0), (0, TILE - V)), constant_values=-jnp.inf)
    num_tiles = -(-V // TILE)

    tile_ranks = _scan(logits, target)
    top = jnp.max(tile_ranks, axis=1)
    highest = value(top)
    lowest = rows.lowest(highest)

    order, ordered = _by_rank(tile_ranks[:, :num_tiles])
    # At least k tokens reach the k-th largest of the tiles' maxima.
    kth = jnp.take_along_axis(ordered, jnp.clip(rows.top_ks - 1, 0, num_tiles - 1)[:, None], axis=1)[:, 0]
    from_k = jnp.maximum(lowest, jnp.where(rows.top_ks <= num_tiles, kth, LOWEST_RANK))
    bounds = (lowest, from_k, rows.below(highest, V))
    threshold = _search(logits, (order, ordered), bounds, top, highest, rows, target)

    threshold = jnp.where(rows.is_greedy, jnp.maximum(lowest, top), threshold)
    scores, tokens = _compete(logits, tile_ranks, threshold, highest, rows, target)
    return jnp.take_along_axis(tokens, jnp.argmax(scores, axis=1)[:, None], axis=1)[:, 0]


def _by_rank(tile_ranks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The tiles of each row by their largest logit, downwards: their numbers and their ranks, padded by a turn of tiles of none.

    By comparing all with all: a row has a few hundred tiles, and this is one fused loop.
    """
    B, n = tile_ranks.shape
    here, there = tile_ranks[:, :, None], tile_ranks[:, None, :]
    is_before = (there > here) | ((there == here) & (jnp.arange(n) < jnp.arange(n)[:, None]))
    place, row = jnp.sum(is_before, axis=2, dtype=jnp.int32), jnp.arange(B)[:, None]
    size = (-(-n // TURN_TILES) + 1) * TURN_TILES
    order = jnp.full((B, size), n, jnp.int32).at[row, place].set(jnp.arange(n, dtype=jnp.int32)[None])
    return order, jnp.full((B, size), LOWEST_RANK, jnp.int32).at[row, place].set(tile_ranks)


def _load(logits_ref, row: jax.Array, tile: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The logits of a tile, `clean`, and their token ids.

    A row's last tile ends with the row and overlaps the one before it, whose tokens are -inf here; so are all of a tile of none.
    """
    start = jnp.minimum(tile * TILE, logits_ref.shape[1] - TILE)
    x = plgpu.load(logits_ref.at[row, pl.ds(start, TILE)], layout=_layout(), optimized=False)
    token = start + plgpu.layout_cast(lax.iota(jnp.int32, TILE), _layout())
    return jnp.where(token >= tile * TILE, clean(x), -jnp.inf), token


def _layout():
    """Thread i of a warpgroup has the 4 logits from 4 * i on."""
    return plgpu.Layout.WG_STRIDED((TILE,), vec_size=TILE // 128)


def _scan(logits: jax.Array, target: Target) -> jax.Array:
    """The rank of the largest logit of each tile, int32 [B, tiles], padded to whole blocks with the last tile's."""
    B, V = logits.shape
    num_tiles = -(-V // TILE)
    num_blocks = -(-num_tiles // BLOCK_TILES)

    def scan(logits_ref, ranks_ref):
        row, block = lax.axis_index("row"), lax.axis_index("block")
        tiles = [block * BLOCK_TILES + i for i in range(BLOCK_TILES)]
        loaded = [_load(logits_ref, row, jnp.minimum(tile, num_tiles - 1))[0] for tile in tiles]
        for tile, x in zip(tiles, loaded, strict=True):
            ranks_ref[row, tile] = jnp.max(rank(x))

    return _compat.kernel(
        scan,
        target=target,
        out_type=jax.ShapeDtypeStruct((B, num_blocks * BLOCK_TILES), jnp.int32),
        grid=(num_blocks, B),
        grid_names=("block", "row"),
        name="sample_scan",
    )(logits)


def _search(
    logits: jax.Array,
    tiles: tuple[jax.Array, jax.Array],
    bounds: tuple[jax.Array, jax.Array, jax.Array],
    top: jax.Array,
    highest: jax.Array,
    rows: Rows,
    target: Target,
) -> jax.Array:
    """The rank from which each row's filters keep its tokens, int32 [B].

    Args:
      tiles: as `_by_rank` gives them.
      bounds: ranks from which all other filters, top-k and top-p certainly keep; [B] each.
      top, highest: the rank and the value of each row's largest logit.
    """

    integers = jnp.stack([*bounds, top, rows.top_ks], axis=1)
    floats = jnp.stack([highest, rows.inverse_temperatures, rows.top_ps], axis=1)

    def search(logits_ref, order_ref, ordered_ref, integers_ref, floats_ref, out_ref):
        row = lax.axis_index("row")
        lowest, from_k, from_p, top, k = (integers_ref[row, i] for i in range(5))
        peak, scale, p = (floats_ref[row, i] for i in range(3))
        above = jnp.maximum(top, lowest) + 1  # from here on nothing is left

        def measure(candidates: list[jax.Array], *, is_weighed: bool) -> list[jax.Array]:
            """For each candidate the number, or the weight, of the logits of at least that rank; the first is the lowest."""

            def reaches(state):
                return ordered_ref[row, state[0] * TURN_TILES] >= candidates[0]

            def turn(state):
                index, *totals = state
                for i in range(TURN_TILES):
                    x, _ = _load(logits_ref, row, order_ref[row, index * TURN_TILES + i])
                    weight = jnp.exp((x - peak) * scale) if is_weighed else 1.0
                    ranks = rank(x)
                    for j, candidate in enumerate(candidates):
                        totals[j] += jnp.where(ranks >= candidate, weight, 0.0)
                return index + 1, *totals

            start = plgpu.layout_cast(jnp.zeros((TILE,), jnp.float32), _layout())
            _, *totals = lax.while_loop(reaches, turn, (jnp.int32(0), *[start] * len(candidates)))
            return [jnp.sum(total) for total in totals]

        def narrow(low: jax.Array, is_wanted: jax.Array, wanted: jax.Array, *, is_weighed: bool) -> jax.Array:
            """The largest rank from which on there is at least `wanted`, `low` when there is nowhere; `low` if not `is_wanted`.

            A count ends early, once at most one token is in the bracket: all thresholds in it keep the same tokens.
            """

            def goes_on(state):
                low, high, at_low, at_high = state
                is_open = high - low != 1
                return is_open if is_weighed else is_open & (at_low - at_high > 1.5)

            def shrink(state):
                low, high, at_low, at_high = state
                width = high - low  # may be over 2**31; as bits it is right
                step = jnp.maximum(lax.shift_right_logical(width, jnp.int32(3)), 1)
                is_short = (width > 0) & (width <= CANDIDATES)
                candidates = [low + jnp.where(is_short, jnp.minimum(width - 1, j), step * j) for j in range(1, CANDIDATES + 1)]
                tried = list(zip(candidates, measure(candidates, is_weighed=is_weighed), strict=True))
                for candidate, amount in tried:
                    low, at_low = jnp.where(amount >= wanted, candidate, low), jnp.where(amount >= wanted, amount, at_low)
                for candidate, amount in reversed(tried):
                    high, at_high = jnp.where(amount < wanted, candidate, high), jnp.where(amount < wanted, amount, at_high)
                return low, high, at_low, at_high

            high = jnp.where(is_wanted, jnp.maximum(above, low + 1), low + 1)
            return lax.while_loop(goes_on, shrink, (low, high, jnp.float32(jnp.inf), jnp.float32(0.0)))[0]

        kept = narrow(jnp.where(k > 0, from_k, lowest), k > 0, k.astype(jnp.float32), is_weighed=False)
        (total,) = measure([jnp.where(p < 1, kept, above)], is_weighed=True)
        out_ref[row] = narrow(jnp.where(p < 1, jnp.maximum(kept, from_p), kept), p < 1, p * total, is_weighed=True)

    return _compat.kernel(
        search,
        target=target,
        out_type=jax.ShapeDtypeStruct(logits.shape[:1], jnp.int32),
        grid=logits.shape[:1],
        grid_names=("row",),
        approx_math=False,
        name="sample_search",
    )(logits, *tiles, integers, floats)


def _compete(
    logits: jax.Array, tile_ranks: jax.Array, threshold: jax.Array, highest: jax.Array, rows: Rows, target: Target
) -> tuple[jax.Array, jax.Array]:
    """The best noisy logit of each block of a row, and its token: float32 and int32 [B, blocks]; -inf and 0 where none is kept.

    Temperature 0 is no noise: `threshold` keeps the largest logits alone, and the first of them wins.
    """
    num_blocks = tile_ranks.shape[1] // BLOCK_TILES
    visited = jnp.maximum(threshold, rows.cannot_win(highest))
    integers = jnp.stack([threshold, visited, rows.first_keys, rows.second_keys], axis=1)
    floats = jnp.stack([highest, rows.inverse_temperatures, jnp.where(rows.is_greedy, 0.0, 1.0)], axis=1)

    def compete(logits_ref, ranks_ref, integers_ref, floats_ref, score_ref, token_ref):
        row, block = lax.axis_index("row"), lax.axis_index("block")
        threshold, visited, first, second = (integers_ref[row, i] for i in range(4))
        peak, scale, amplitude = (floats_ref[row, i] for i in range(3))

        def one_tile(i, best):
            tile = block * BLOCK_TILES + i

            def challenge(best):
                score, winner = best
                x, token = _load(logits_ref, row, tile)
                ours = (x - peak) * scale + amplitude * noise.gumbel(first, second, token)
                wins = (rank(x) >= threshold) & (ours > score)
                return jnp.where(wins, ours, score), jnp.where(wins, token, winner)

            return lax.cond(ranks_ref[row, tile] >= visited, challenge, lambda best: best, best)

        nothing = plgpu.layout_cast(jnp.full((TILE,), -jnp.inf, jnp.float32), _layout())
        nobody = plgpu.layout_cast(jnp.zeros((TILE,), jnp.int32), _layout())
        score, winner = lax.fori_loop(0, BLOCK_TILES, one_tile, (nothing, nobody))
        best = jnp.max(score)
        score_ref[row, block] = best
        token_ref[row, block] = jnp.min(jnp.where(score == best, winner, jnp.iinfo(jnp.int32).max))

    shape = (logits.shape[0], num_blocks)
    return _compat.kernel(
        compete,
        target=target,
        out_type=(jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape, jnp.int32)),
        grid=(num_blocks, shape[0]),
        grid_names=("block", "row"),
        approx_math=False,  # approximate logarithms are wrong near 1, where the winners are
        name="sample_compete",
    )(logits, tile_ranks, integers, floats)
