"""The Mosaic GPU kernel: one warpgroup a chunk of a row, tiles of keys and values in flight, parts merged by their LSEs.

Knows the pages, the copies and the online softmax. Which tiles and chunks there are is decided in `tiles.py`.

A block owns a key/value head and the query rows that share it, T x G of them, packed and padded to 16, 32 or 64 for `mma.sync`,
which Ampere and all later chips have. Its loop:

    wait for tile i | scores, softmax (keys of tile i are read) | refill keys: tile i + stages
                    | weights x values (values of tile i are read), and in the next turn | refill values: tile i + stages

The weights go through shared memory, as the warps share the columns of few rows; the fence that this needs is also the one that
orders reads of the tiles before their refills, so that a turn has one.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import _compat
from pallas_kernels._compat import plgpu
from pallas_kernels.merge_states import mosaic as merging
from pallas_kernels.paged_decode_attention import mosaic_tiles as mt
from pallas_kernels.paged_decode_attention import tiles as tiling
from pallas_kernels.paged_decode_attention.dispatch import Arrays, Options
from pallas_kernels.target import Target

PAGE_SIZES = (8, 16, 32, 64, 128, 256)


def unavailable(target: Target, *, head_dim: int, page_size: int, dtypes: tuple[str, str]) -> str | None:
    """Why the kernel cannot run on that GPU for these sizes and dtypes (of queries, of pages), or None."""
    query, page = dtypes
    if query not in ("float32", "bfloat16", "float16"):
        return f"its queries are float32, bfloat16 or float16, not {query}"
    if page not in ("float32", "bfloat16", "float16", "float8_e4m3fn", "int8"):
        return f"it has no pages of {page}"
    if "float16" in dtypes and page != query and page not in ("float8_e4m3fn", "int8"):
        return f"it does not mix queries of {query} with pages of {page}"
    if page == "float8_e4m3fn" and not target.has_fp8_conversion:
        return f"pages of {page} need compute capability 8.9, {target} has no instruction that converts them"
    if page == "int8" and not target.has_tma:
        return f"pages of {page} need compute capability 9.0, {target} has no instruction that converts them"
    if head_dim % 16 or head_dim > 256:
        return f"its heads are multiples of 16 up to 256, not {head_dim}"
    sizes = {name: jnp.dtype(name).itemsize for name in dtypes}
    if not tiling.fits(target, head_dim=head_dim, query_bytes=sizes[query], page_bytes=sizes[page]):
        return f"heads of {head_dim} in pages of {page} need more than {target.shared_memory_bytes} bytes of shared memory"
    if page_size not in PAGE_SIZES:
        return f"its pages have {', '.join(map(str, PAGE_SIZES))} tokens, not {page_size}"
    if not target.has_tma and mt.swizzle_bytes(head_dim, page, min(page_size, 32)) is None:
        return f"heads of {head_dim} in pages of {page_size} tokens do not divide among the warps that copy them"
    return None


def attend(arrays: Arrays, options: Options, target: Target) -> tuple[jax.Array, jax.Array]:
    """Causal attention of T consecutive queries per row, the first at `first_positions[b]`: [B, T, N, H] and LSE [B, T, N]."""
    q, k_pages, _, block_tables, kv_lens, first_positions, sinks, _, _ = arrays
    (B, T, N, H), (_, K, S, _) = q.shape, k_pages.shape
    G, context_tokens = N // K, block_tables.shape[1] * S
    tiles = tiling.choose(
        target,
        num_queries=T * G,
        batch_size=B,
        num_kv_heads=K,
        head_dim=H,
        context_tokens=context_tokens,
        query_bytes=q.dtype.itemsize,
        page_bytes=k_pages.dtype.itemsize,
    )
    rows = tiles.num_rows * tiles.num_row_tiles

    def packed(x: jax.Array) -> jax.Array:
        """[B, T, N, ...] to [B, K, rows, ...]: the rows of a key/value head, token by token, padded."""
        x = jnp.moveaxis(x.reshape(B, T, K, G, *x.shape[3:]), 2, 1).reshape(B, K, T * G, *x.shape[3:])
        return jnp.pad(x, [(0, 0), (0, 0), (0, rows - T * G)] + [(0, 0)] * (x.ndim - 3))

    def unpacked(x: jax.Array) -> jax.Array:
        x = x[:, :, : T * G].reshape(B, K, T, G, *x.shape[3:])
        return jnp.moveaxis(x, 1, 2).reshape(B, T, N, *x.shape[4:])

    first_tile = jnp.zeros_like(kv_lens)
    if options.window:
        first_tile = jnp.maximum(first_positions - options.window + 1, 0) // tiles.num_tokens
    is_whole = tiles.num_items == B and tiles.chunk_tiles * tiles.num_tokens >= context_tokens
    items = tiling.whole(kv_lens, first_tile, tiles) if is_whole else tiling.partition(kv_lens, first_tile, tiles, context_tokens)
    packed_sinks = None
    if sinks is not None:
        by_token = jnp.broadcast_to(sinks.astype(jnp.float32), (1, T, N))
        packed_sinks = jnp.pad(jnp.moveaxis(by_token.reshape(1, T, K, G), 2, 1).reshape(K, T * G), [(0, 0), (0, rows - T * G)])
    out, lse = _chunks(arrays, options, target, tiles, packed(q), items, packed_sinks, q.dtype if is_whole else jnp.float32)
    if not is_whole:
        # Shapes are static and lengths are not: whether rows happen to have one chunk each is not known here. A result that is
        # written directly would save rows x H x 4 bytes, under 1% of the keys and values, but not the second kernel.
        out, lse = merging.merge_ranges(out, lse, items.first_item, items.count, target, q.dtype)
    return unpacked(out), unpacked(lse)


def _chunks(
    arrays: Arrays,
    options: Options,
    target: Target,
    tiles: tiling.Tiles,
    q: jax.Array,
    items: tiling.Items,
    sinks: jax.Array | None,
    out_dtype: Any,
) -> tuple[jax.Array, jax.Array]:
    """Attention of every item's query rows over its tiles alone: [W, K, rows, H] and LSE [W, K, rows].

    What an idle item would write is left undefined.
    """
    _, k_pages, v_pages, block_tables, kv_lens, first_positions, _, k_scales, v_scales = arrays
    (_, K, rows, H), S = q.shape, k_pages.shape[2]
    R, C, stages = tiles.num_rows, tiles.num_tokens, tiles.num_stages
    G = arrays.q.shape[2] // K
    W = tiles.num_items
    dtype = jnp.bfloat16 if q.dtype == jnp.float32 else q.dtype  # what the tensor cores multiply
    q_parts, kv_parts = mt.num_parts(q.dtype), mt.num_parts(k_pages.dtype)
    at = mt.layouts(dtype, R)
    pieces, piece = max(1, C // S), min(C, S)
    is_converted = v_pages.dtype != dtype
    has_head_scales = k_scales is not None and k_scales.ndim == 1
    has_token_scales = k_scales is not None and k_scales.ndim == 3
    copies = pieces * (1 + (has_token_scales and target.has_tma))

    inputs: dict[str, Any] = {
        "q": q,
        "k": k_pages,
        "v": v_pages,
        "tables": block_tables,
        "lens": kv_lens,
        "first": first_positions,
    }
    inputs |= {"row": items.row, "start": items.start, "stop": items.stop, "is_first": items.is_first}
    if sinks is not None:
        inputs["sinks"] = sinks
    if k_scales is not None and v_scales is not None and has_token_scales and not target.has_tma:
        # cp.async wants more bytes at once than the scales of a page: they are brought into token order beforehand.
        inputs |= {"k_scales": _in_order(k_scales, block_tables, C), "v_scales": _in_order(v_scales, block_tables, C)}
    elif k_scales is not None:
        inputs |= {"k_scales": k_scales, "v_scales": v_scales}
    scratch: dict[str, Any] = {
        "k_tiles": mt.page_memory((stages, C, H), k_pages.dtype, 0 if target.has_tma else piece),
        "v_tiles": mt.page_memory((stages, C, H), v_pages.dtype, 0 if target.has_tma else piece),
        "weights": plgpu.SMEM((q_parts, R, C), dtype, transforms=mt.transforms(C, dtype)),
    }
    if is_converted:
        scratch["value_parts"] = mt.page_memory((kv_parts, C, H), dtype)
    if has_token_scales and target.has_tma:
        scratch |= {f"{x}_scale_tiles": plgpu.SMEM((stages, C), jnp.float32) for x in "kv"}
    if target.has_tma:
        scratch |= {f"{x}_barriers": plgpu.Barrier(num_arrivals=copies, num_barriers=stages) for x in "kv"}

    def body(*refs: Any) -> None:
        ref = dict(zip([*inputs, "out", "lse", *scratch], refs, strict=True))
        item, head, row_tile = lax.axis_index("item"), lax.axis_index("head"), lax.axis_index("tile")
        row, start, stop = ref["row"][item], ref["start"][item], ref["stop"][item]
        mine = pl.ds(row_tile * R, R)

        def attend_chunk() -> None:
            kv_len, first_position = ref["lens"][row], ref["first"][row]
            last_page = jnp.maximum(lax.div(kv_len + (S - 1), jnp.int32(S)) - 1, 0)

            def read_page(index: jax.Array) -> jax.Array:
                return ref["tables"][row, jnp.minimum(index, last_page)]

            def pages_of(tile: jax.Array) -> list:
                return mt.pages_of_tile(tile, C, S, read_page)

            def slot_of(tile: jax.Array) -> jax.Array:
                return lax.rem(tile - start, jnp.int32(stages))

            def fetch(x: str, tile: jax.Array, pages: list) -> None:
                """Start the copies of the tile of keys (x = "k") or values ("v") that lies in these pages."""
                slot = slot_of(tile)
                barrier = ref[f"{x}_barriers"].at[slot] if target.has_tma else None
                tokens = mt.tokens_in_page(tile, C, S)
                for j, page in enumerate(pages):
                    to = pl.ds(j * piece, piece)
                    mt.copy(target, ref[x].at[page, head, tokens], ref[f"{x}_tiles"].at[slot, to], barrier)
                    if has_token_scales and target.has_tma:
                        scales = ref[f"{x}_scales"].at[page, head, tokens]
                        mt.copy(target, scales, ref[f"{x}_scale_tiles"].at[slot, to], barrier)

            def wait(x: str, tile: jax.Array, is_full: jax.Array, allowed: int) -> None:
                """Until that tile is there; by cp.async with the later copies in flight that a full loop has `allowed`."""
                if target.has_tma:
                    plgpu.barrier_wait(ref[f"{x}_barriers"].at[slot_of(tile)])
                    return
                pl.when(is_full)(lambda: plgpu.wait_gmem_to_smem(allowed * copies))
                pl.when(jnp.logical_not(is_full))(lambda: plgpu.wait_gmem_to_smem(0))

            def by_row(x: jax.Array, width: int) -> jax.Array:
                return lax.broadcast_in_dim(x, (R, width), [0])

            def by_column(x: jax.Array) -> jax.Array:
                return lax.broadcast_in_dim(x, (R, C), [1])

            def scales_of(x: str, tile: jax.Array) -> jax.Array:
                if target.has_tma:
                    scales = ref[f"{x}_scale_tiles"].at[slot_of(tile)]
                else:
                    scales = ref[f"{x}_scales"].at[row, head, pl.ds(tile * C, C)]
                return plgpu.load(scales, layout=at.column, optimized=False)

            # --- the first tiles, keys one tile ahead of values as in the loop ---
            pages = [pages_of(start + j) for j in range(stages)]
            for j in range(stages):
                pl.when(start + j < stop)(lambda j=j: fetch("k", start + j, pages[j]))
                if j < stages - 1:
                    pl.when(start + j < stop)(lambda j=j: fetch("v", start + j, pages[j]))

            queries = mt.parts(plgpu.load(ref["q"].at[row, head, mine], layout=at.lhs, optimized=False), dtype, q_parts)
            scale = options.scale
            if has_head_scales:
                scale = ref["k_scales"][head] * scale
            # The last position that each packed row sees; all of them see no further than the row's tokens.
            token = lax.div(plgpu.broadcasted_iota(jnp.int32, (R,), 0, layout=at.row) + row_tile * R, jnp.int32(G))
            last_seen = jnp.minimum(first_position + token, kv_len - 1)

            def turn(tile: jax.Array, carry: tuple) -> tuple:
                acc, peak, total, ahead = carry
                slot, last = slot_of(tile), tile + stages - 1
                next_ahead = pages_of(last + 1)
                is_full = last < stop

                wait("k", tile, is_full, 2 * stages - 2)
                keys = plgpu.load(ref["k_tiles"].at[slot].transpose((1, 0)), layout=at.rhs, optimized=False)
                scores = plgpu.layout_cast(jnp.zeros((R, C), jnp.float32), at.acc)
                scores = mt.product(scores, queries, mt.parts(keys, dtype, kv_parts))
                if has_token_scales:
                    scores = scores * by_column(scales_of("k", tile))
                if options.soft_cap:
                    scores = mt.soft_capped(scores * scale, options.soft_cap)
                else:
                    scores = scores * (scale * mt.LOG2_E)
                position = plgpu.broadcasted_iota(jnp.int32, (R, C), 1, layout=at.acc) + tile * C
                sees = position <= by_row(last_seen, C)
                if options.window:
                    sees &= position > by_row(first_position + token - options.window, C)
                scores = jnp.where(sees, scores, -jnp.inf)

                new_peak = jnp.maximum(peak, scores.max(axis=1))
                rescale = jnp.exp2(peak - new_peak)
                weights = jnp.exp2(scores - by_row(new_peak, C))
                total = total * by_row(rescale, C) + weights
                if has_token_scales:
                    column = plgpu.broadcasted_iota(jnp.int32, (C,), 0, layout=at.column) + tile * C
                    weights = weights * by_column(jnp.where(column < kv_len, scales_of("v", tile), 0.0))
                for j, part in enumerate(mt.parts(weights, dtype, q_parts)):
                    ref["weights"][j] = part

                wait("v", tile, is_full, 2 * stages - 3)
                values = [ref["v_tiles"].at[slot]]
                if is_converted:
                    mt.convert(values[0], ref["value_parts"])
                    values = [ref["value_parts"].at[j] for j in range(kv_parts)]
                if v_pages.dtype != jnp.int8:  # which has no NaN that a weight of 0 would let through

                    @pl.when((tile + 1) * C > kv_len)
                    def _() -> None:
                        for part in values:
                            mt.zero_rows_from(kv_len - tile * C, part)

                mt.fence(target)
                pl.when(last < stop)(lambda: fetch("v", last, ahead))
                pl.when(last + 1 < stop)(lambda: fetch("k", last + 1, next_ahead))

                weights = [plgpu.load(ref["weights"].at[j], layout=at.lhs, optimized=False) for j in range(q_parts)]
                values = [plgpu.load(x, layout=at.rhs, optimized=False) for x in values]
                acc = mt.product(acc * by_row(rescale, H), weights, values)
                return acc, new_peak, total, next_ahead

            start_carry = (
                plgpu.layout_cast(jnp.zeros((R, H), jnp.float32), at.acc),
                plgpu.layout_cast(jnp.full((R,), mt.LOWEST, jnp.float32), at.row),
                plgpu.layout_cast(jnp.zeros((R, C), jnp.float32), at.acc),
                pages[-1],
            )
            acc, peak, parts_of_total, _ = lax.fori_loop(start, stop, turn, start_carry)
            total = parts_of_total.sum(axis=1)
            if sinks is not None:
                # A score without a value, counted by the first chunk of a row alone.
                sink = plgpu.load(ref["sinks"].at[head, mine], layout=at.row, optimized=False) * mt.LOG2_E
                is_counted = (ref["is_first"][item] == 1) & (kv_len > 0)
                sink = jnp.maximum(sink + jnp.where(is_counted, 0.0, -jnp.inf).astype(jnp.float32), mt.LOWEST)
                new_peak = jnp.maximum(peak, sink)
                rescale = jnp.exp2(peak - new_peak)
                total = total * rescale + jnp.where(sink > mt.LOWEST, jnp.exp2(sink - new_peak), 0.0)
                acc, peak = acc * by_row(rescale, H), new_peak
            divisor = jnp.where(total > 0, total, 1.0)
            out = acc / by_row(divisor, H)
            if has_head_scales:
                out = out * ref["v_scales"][head]
            _compat.store(ref["out"].at[item, head, mine], out.astype(out_dtype))
            lse = jnp.where(total > 0, peak * (1 / mt.LOG2_E) + jnp.log(divisor), -jnp.inf)
            _compat.store(ref["lse"].at[item, head, mine], lse)

        # An idle item is no chunk of any row; a row of no tokens writes its zeros only where no merge does.
        pl.when((start < stop) | (ref["is_first"][item] == 1))(attend_chunk)

    call = _compat.kernel(
        body,
        target=target,
        out_type=(jax.ShapeDtypeStruct((W, K, rows, H), out_dtype), jax.ShapeDtypeStruct((W, K, rows), jnp.float32)),
        scratch_types=list(scratch.values()),
        grid=(W, K, tiles.num_row_tiles),
        grid_names=("item", "head", "tile"),
        name="paged_decode_attention",
    )
    return call(*inputs.values())


def _in_order(scales: jax.Array, block_tables: jax.Array, multiple: int) -> jax.Array:
    """Scales [P, K, S] of each row's tokens: [B, K, M*S], padded to a multiple."""
    by_page = jnp.moveaxis(scales[block_tables], 2, 1)
    by_token = by_page.reshape(*by_page.shape[:2], -1)
    return jnp.pad(by_token, [(0, 0), (0, 0), (0, -by_token.shape[-1] % multiple)])
