"""The prefill kernel for Hopper: a warpgroup that copies pages, one or two that multiply, barriers between them.

Knows the pages, the barriers and the online softmax; tiles are chosen in `tiles.py`, rows are packed in `mosaic.py`.

Keys and values have `num_stages` slots each and, for each slot, a barrier that says "full" and one that says "free":

    copying     wait free | start the copies of tile i into its slot, which fill it and arrive at full            | i + 1
    computing   wait full keys | scores | free keys | softmax | wait full values | weights x values | free values | i + 1

Two computing warpgroups own 64 rows each of the same tile and take turns: one's softmax runs while the other multiplies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import _compat
from pallas_kernels._compat import plgpu
from pallas_kernels.paged_decode_attention import mosaic_tiles as mt
from pallas_kernels.paged_decode_attention.dispatch import Arrays, Options
from pallas_kernels.paged_prefill_attention.tiles import ROWS, Tiles
from pallas_kernels.target import Target


def attend(
    q: jax.Array, sinks: jax.Array | None, arrays: Arrays, options: Options, target: Target, tiles: Tiles
) -> tuple[jax.Array, jax.Array]:
    """Attention of packed query rows [B, K, rows, H], row r being token r // G: the result, like q, and LSE [B, K, rows].

    Args:
      sinks: float32 [K, rows].
      arrays: for all but q and sinks; no scales.
    """
    (B, K, _, H), S = q.shape, arrays.k_pages.shape[2]
    G = arrays.q.shape[2] // K
    C, stages, groups = tiles.num_tokens, tiles.num_stages, tiles.num_groups
    window, pieces = options.window, max(1, C // S)

    inputs: dict[str, Any] = {"q": q, "k": arrays.k_pages, "v": arrays.v_pages, "tables": arrays.block_tables}
    inputs |= {"lens": arrays.kv_lens, "first": arrays.first_positions}
    if sinks is not None:
        inputs["sinks"] = sinks
    scratch: dict[str, Any] = {
        "queries": mt.page_memory((groups, ROWS, H), q.dtype),
        "k_tiles": mt.page_memory((stages, C, H), q.dtype),
        "v_tiles": mt.page_memory((stages, C, H), q.dtype),
        "q_full": plgpu.Barrier(num_barriers=groups),
        "k_full": plgpu.Barrier(num_arrivals=pieces, num_barriers=stages),
        "v_full": plgpu.Barrier(num_arrivals=pieces, num_barriers=stages),
        "k_free": plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
        "v_free": plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
        "landed": plgpu.Barrier(num_arrivals=pieces, num_barriers=1),
        "turns": plgpu.Barrier(num_arrivals=groups, num_barriers=1),
    }

    def body(*refs: Any) -> None:
        ref = dict(zip([*inputs, "out", "lse", *scratch], refs, strict=True))
        # The last tiles of a prompt see the most: they start first, and the short ones fill the end.
        row = B - 1 - lax.axis_index("row")
        head, block, group = lax.axis_index("head"), lax.axis_index("block"), lax.axis_index("group")
        kv_len, first_position = ref["lens"][row], ref["first"][row]

        # Positions of the block's first and last query, and the tiles that any, or each, of its rows sees.
        first_query = first_position + lax.div(block * tiles.block_rows, jnp.int32(G))
        last_query = first_position + lax.div(block * tiles.block_rows + (tiles.block_rows - 1), jnp.int32(G))
        start = _tiles(jnp.maximum(first_query - window + 1, 0), C) if window else jnp.int32(0)
        stop = jnp.maximum(_tiles(jnp.minimum(last_query + 1, kv_len) + (C - 1), C), start)
        whole = jnp.clip(_tiles(jnp.minimum(first_query + 1, kv_len), C), start, stop)
        inside = jnp.minimum(_tiles(jnp.maximum(last_query - window + 1, 0) + (C - 1), C), whole) if window else start

        def slot_of(tile: jax.Array) -> jax.Array:
            return lax.rem(tile - start, jnp.int32(stages))

        @pl.when(group == groups)
        def _copy_pages() -> None:
            last_page = jnp.maximum(lax.div(kv_len + (S - 1), jnp.int32(S)) - 1, 0)

            def pages_of(tile: jax.Array) -> list[jax.Array]:
                return mt.pages_of_tile(tile, C, S, lambda index: ref["tables"][row, jnp.minimum(index, last_page)])

            def fetch(x: str, tile: jax.Array, pages: list[jax.Array], barrier: Any) -> None:
                tokens = mt.tokens_in_page(tile, C, S)
                for j, page in enumerate(pages):
                    to = ref[f"{x}_tiles"].at[slot_of(tile), pl.ds(j * (C // pieces), C // pieces)]
                    mt.copy(target, ref[x].at[page, head, tokens], to, barrier)

            def turn(tile: jax.Array, pages: list[jax.Array]) -> list[jax.Array]:
                slot = slot_of(tile)
                ahead = pages_of(tile + 1)  # read while this tile's slots are waited for
                is_refill = tile - start >= stages
                pl.when(is_refill)(lambda: plgpu.barrier_wait(ref["k_free"].at[slot]))
                fetch("k", tile, pages, ref["k_full"].at[slot])
                pl.when(is_refill)(lambda: plgpu.barrier_wait(ref["v_free"].at[slot]))
                is_ragged = (tile + 1) * C > kv_len

                @pl.when(jnp.logical_not(is_ragged))
                def _() -> None:
                    fetch("v", tile, pages, ref["v_full"].at[slot])

                @pl.when(is_ragged)
                def _() -> None:
                    # A weight of 0 times a NaN is a NaN: what lies beyond the row's tokens is cleared before anybody is told.
                    fetch("v", tile, pages, ref["landed"].at[0])
                    plgpu.barrier_wait(ref["landed"].at[0])
                    mt.zero_rows_from(kv_len - tile * C, ref["v_tiles"].at[slot])
                    plgpu.commit_smem()
                    for _ in range(pieces):
                        plgpu.barrier_arrive(ref["v_full"].at[slot])

                return ahead

            lax.fori_loop(start, stop, turn, pages_of(start))

            def drain(tile: jax.Array, _: None) -> None:
                # Nobody leaves before all that was announced to it has come.
                plgpu.barrier_wait(ref["k_free"].at[slot_of(tile)])
                plgpu.barrier_wait(ref["v_free"].at[slot_of(tile)])

            lax.fori_loop(jnp.maximum(stop - stages, start), stop, drain, None)

        @pl.when(group < groups)
        def _compute() -> None:
            first_row = block * tiles.block_rows + group * ROWS
            mine, queries = pl.ds(first_row, ROWS), ref["queries"].at[group]
            plgpu.copy_gmem_to_smem(ref["q"].at[row, head, mine], queries, ref["q_full"].at[group])
            acc_layout = plgpu.Layout.WGMMA
            row_layout = acc_layout.reduce(1)
            position = lax.div(plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=row_layout) + first_row, jnp.int32(G))
            position = position + first_position
            last_seen = jnp.minimum(position, kv_len - 1)

            def by_row(x: jax.Array, width: int) -> jax.Array:
                return lax.broadcast_in_dim(x, (ROWS, width), [0])

            def meet() -> None:
                if groups == 2:
                    plgpu.barrier_arrive(ref["turns"].at[0])
                    plgpu.barrier_wait(ref["turns"].at[0])

            # Scores are kept as they come out of the product; this turns them, times log2(e), into exponents for exp2.
            factor = 1.0 if options.soft_cap else options.scale * mt.LOG2_E

            def turn(tile: jax.Array, carry: tuple, is_masked: bool) -> tuple:
                acc, peak, total = carry
                slot = slot_of(tile)

                def multiply(scores_ref: Any) -> jax.Array:
                    plgpu.wgmma(scores_ref, queries, ref["k_tiles"].at[slot].transpose((1, 0)))
                    meet()
                    return scores_ref[...]

                scores = pl.run_scoped(multiply, plgpu.ACC((ROWS, C), jnp.float32))
                plgpu.barrier_arrive(ref["k_free"].at[slot])
                if options.soft_cap:
                    scores = mt.soft_capped(scores * options.scale, options.soft_cap)
                if is_masked:
                    key = plgpu.broadcasted_iota(jnp.int32, (ROWS, C), 1, layout=acc_layout) + tile * C
                    sees = key <= by_row(last_seen, C)
                    if window:
                        sees &= key > by_row(position - window, C)
                    scores = jnp.where(sees, scores, -jnp.inf)

                new_peak = jnp.maximum(peak, scores.max(axis=1) * factor)
                rescale = jnp.exp2(peak - new_peak)
                weights = jnp.exp2(scores * factor - by_row(new_peak, C))
                total = total * rescale + weights.sum(axis=1)
                acc = acc * by_row(rescale, H)
                narrow = weights.astype(q.dtype)

                acc, total, new_peak, narrow = lax.optimization_barrier((acc, total, new_peak, narrow))
                if groups == 2:
                    plgpu.barrier_arrive(ref["turns"].at[0])
                plgpu.barrier_wait(ref["v_full"].at[slot])
                if groups == 2:
                    plgpu.barrier_wait(ref["turns"].at[0])

                has_next, next_slot = tile + 1 < stop, slot_of(tile + 1)

                def wait_for_keys() -> None:
                    pl.when(has_next)(lambda: plgpu.barrier_wait(ref["k_full"].at[next_slot]))

                acc = _compat.wgmma_onto(acc, narrow, ref["v_tiles"].at[slot], target=target, meanwhile=wait_for_keys)
                plgpu.barrier_arrive(ref["v_free"].at[slot])
                return acc, new_peak, total

            # LOWEST, not -inf: a row that a tile shows nothing to has a difference of two of them. A sink is a first score.
            peak, total = jnp.full((ROWS,), mt.LOWEST, jnp.float32), jnp.zeros((ROWS,), jnp.float32)
            peak, total = plgpu.layout_cast(peak, row_layout), plgpu.layout_cast(total, row_layout)
            if sinks is not None:
                sink = plgpu.load(ref["sinks"].at[head, mine], layout=row_layout, optimized=False) * mt.LOG2_E
                peak = jnp.maximum(sink, mt.LOWEST)
                total = jnp.where(sink > mt.LOWEST, 1.0, 0.0)
            carry = plgpu.layout_cast(jnp.zeros((ROWS, H), jnp.float32), acc_layout), peak, total

            plgpu.barrier_wait(ref["q_full"].at[group])
            pl.when(start < stop)(lambda: plgpu.barrier_wait(ref["k_full"].at[slot_of(start)]))
            if groups == 2:
                pl.when(group == 1)(meet)
            for begin, end, is_masked in ((start, inside, True), (inside, whole, False), (whole, stop, True)):
                if begin is not end:
                    carry = lax.fori_loop(begin, end, _bound(turn, is_masked), carry)
            if groups == 2:
                pl.when(group == 0)(meet)

            acc, peak, total = carry
            is_empty = (total == 0.0) | (kv_len == 0)
            acc = acc * by_row(jnp.where(is_empty, 0.0, 1.0 / jnp.where(is_empty, 1.0, total)), H)
            lse = jnp.where(is_empty, -jnp.inf, peak / mt.LOG2_E + jnp.log(jnp.where(is_empty, 1.0, total)))
            _compat.store(ref["lse"].at[row, head, mine], lse)
            queries[...] = acc.astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(queries, ref["out"].at[row, head, mine])
            plgpu.wait_smem_to_gmem(0)

    call = _compat.kernel(
        body,
        target=target,
        out_type=(jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)),
        scratch_types=list(scratch.values()),
        # Blocks of one tile run together and read the same pages; then the tiles of one head, whose keys stay in the L2 cache.
        grid=(K, B, tiles.num_blocks),
        grid_names=("head", "row", "block"),
        num_threads=groups + 1,
        thread_name="group",
        name="paged_prefill_attention",
    )
    return call(*inputs.values())


def _tiles(num_tokens: jax.Array, C: int) -> jax.Array:
    return lax.div(num_tokens, jnp.int32(C))


def _bound(turn: Callable[..., tuple], is_masked: bool) -> Callable[..., tuple]:
    return lambda tile, carry: turn(tile, carry, is_masked)
