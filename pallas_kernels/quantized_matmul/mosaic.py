"""The Mosaic GPU kernel: streams a quantised weight once, widens it in registers, multiplies on tensor cores with float32 sums.

x is the left operand, so that its few rows pad one product of 16, 32 or 64 rows and the four warps share the outputs: each
number of the weight is widened once. Every format becomes x's 16-bit dtype exactly; scales multiply float32 sums, for each
group where there are groups. Knows nothing of how weights are made.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import _compat
from pallas_kernels._compat import plgpu
from pallas_kernels.quantized_matmul import tiles as tile_choice
from pallas_kernels.quantized_matmul.formats import ZERO, Operands, by_group, floats, packing, shape_of
from pallas_kernels.quantized_matmul.tiles import PRODUCT, Tiles
from pallas_kernels.target import Target


def unavailable(target: Target, operands: Operands, activations: str | None) -> str | None:
    """Why these operands cannot be multiplied on that GPU, or None."""
    x, weight = operands.x, operands.weight
    if activations is not None:
        return "int8 activations are for CPUs; reading the weight is what a GPU waits for, not the product"
    if x.dtype == jnp.float32:
        return "x of float32 has no exact tensor core product; bfloat16, float16 and float8_e4m3fn do"
    tiles = _tiles(operands, target)
    if tiles is None:
        F, _, group = shape_of(operands)
        return (
            f"F of {F} must be a multiple of {tile_choice.OUTPUTS}, a row of {weight.shape[1]} bytes one of"
            f" {tile_choice.ROW_BYTES[-1]}, a group of {group // packing(weight)} bytes one of {PRODUCT} that fits in tiles"
        )
    needed = tile_choice.shared_bytes(tiles, packing(weight))
    if needed > target.shared_memory_bytes:
        return f"it needs {needed} bytes of shared memory, {target} has {target.shared_memory_bytes}"
    return None


def _tiles(operands: Operands, target: Target) -> Tiles | None:
    weight = operands.weight
    F, _, group = shape_of(operands)
    return tile_choice.choose(operands.x.shape[0], F, weight.shape[1], group // packing(weight), packing(weight), target)


def matmul(operands: Operands, dtype: jnp.dtype, target: Target) -> jax.Array:
    """[X, F] in `dtype`."""
    tiles = _tiles(operands, target)
    if tiles is None:
        raise ValueError("quantized_matmul: no tiles for these shapes; ask `unavailable` first")
    F, groups, group = shape_of(operands)
    x, weight, scales, zeros, x_scales = by_group(operands)
    X, D = x.shape
    rows = jnp.bfloat16 if x.dtype == jnp.float8_e4m3fn else x.dtype
    num_padded = -(-X // tiles.rows) * tiles.rows
    num_copied = num_padded if tiles.loaded_rows == tiles.rows else tiles.loaded_rows
    # One small fused pass: rows padded to tiles, and for two numbers a byte the even ones apart from the odd ones.
    wide = jnp.pad(x.astype(rows), ((0, num_copied - X), (0, 0)))
    halves = jnp.moveaxis(wide.reshape(num_copied, -1, packing(weight)), 2, 0)
    extras = {}
    if zeros is not None:
        # Numbers come out less ZERO; the rest of a zero point multiplies the sum of the rows, which is taken here once.
        span = min(group, tiles.row_bytes * packing(weight))
        sums = jnp.sum(x.astype(jnp.float32).reshape(X, D // span, span), axis=-1).T
        extras = {"zeros": zeros, "sums": jnp.pad(sums, ((0, 0), (0, num_padded - X)))}
    if x_scales is not None:
        extras["x_scales"] = jnp.pad(x_scales, (0, num_padded - X))
    call = _kernel(tiles, target, rows, weight.dtype, dtype, (num_padded, F, weight.shape[1]), groups, tuple(extras))
    return call(halves, weight, scales, *extras.values())[:X]


def _kernel(
    tiles: Tiles,
    target: Target,
    rows: Any,
    weight_dtype: Any,
    dtype: Any,
    shape: tuple[int, int, int],
    groups: int,
    names: tuple[str, ...],
):
    X, F, row_bytes = shape
    halves = 2 if weight_dtype == jnp.uint8 else 1
    num_tiles, group_bytes = row_bytes // tiles.row_bytes, row_bytes // groups
    span_bytes = min(group_bytes, tiles.row_bytes)
    num_spans = tiles.row_bytes // span_bytes
    is_grouped = groups > 1 or "zeros" in names
    layout = plgpu.Layout
    of_x, of_weight, of_sums = (kind(rows, m_warps=1) for kind in (layout.MMA_LHS, layout.MMA_RHS, layout.MMA_ACC))

    def body(x_ref, weight_ref, scales_ref, *refs):
        extras = dict(zip(names, refs, strict=False))
        out_ref, x_smem, weight_smem, sums_smem, *barriers = refs[len(names) :]
        piece = lax.axis_index("slice")
        first_row, first_output = lax.axis_index("rows") * tiles.rows, lax.axis_index("outputs") * tiles.outputs
        outputs = pl.ds(first_output, tiles.outputs)
        # Products of 16 rows each: of more, Mosaic gives each warp its own rows, and every warp would widen the whole weight.
        bands = [pl.ds(first_row + band * PRODUCT, PRODUCT) for band in range(tiles.rows // PRODUCT)]
        count = lax.div(num_tiles - piece + (tiles.slices - 1), jnp.int32(tiles.slices))

        def fetch(turn: jax.Array) -> None:
            slot = lax.rem(turn, jnp.int32(tiles.stages))
            if not target.has_tma:
                turn = jnp.minimum(turn, count - 1)  # a copy too many keeps the number in flight; nobody reads its slot again
            start = (turn * tiles.slices + piece) * tiles.row_bytes
            columns = pl.ds(start, tiles.row_bytes)
            pairs = [(weight_ref.at[outputs, columns], weight_smem.at[piece, slot])]
            loaded = pl.ds(first_row, tiles.loaded_rows)
            for half in range(halves):
                # Rows beyond the loaded ones hold anything: a row of x reaches no row of the result but its own.
                to = x_smem.at[piece, slot, half, pl.ds(0, tiles.loaded_rows)]
                pairs.append((x_ref.at[half, loaded, columns], to))
            for source, to in pairs:
                if target.has_tma:
                    plgpu.copy_gmem_to_smem(source, to, barriers[0].at[piece, slot])
                else:
                    plgpu.copy_gmem_to_smem(source, to, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)

        def constants(turn: jax.Array) -> list[tuple[jax.Array, ...]]:
            """Of each span of a tile: its scales, and with zero points those and the sums of the rows."""
            if not is_grouped:
                return []
            tile = jnp.minimum(turn, count - 1) * tiles.slices + piece
            found = []
            for index in range(num_spans):
                span = tile * num_spans + index
                group = lax.div(span * span_bytes, jnp.int32(group_bytes))
                found.append((_row(scales_ref.at[group, outputs], of_sums.reduce(0)),))
                if "zeros" in names:
                    found[-1] += (_row(extras["zeros"].at[group, outputs], of_sums.reduce(0)) - float(ZERO),)
                    found[-1] += tuple(_row(extras["sums"].at[span, some], of_sums.reduce(1)) for some in bands)
            return found

        def nothing() -> jax.Array:
            return plgpu.layout_cast(jnp.zeros((PRODUCT, tiles.outputs), jnp.float32), of_sums)

        def step(turn: jax.Array, carry):
            totals, now = carry
            slot = lax.rem(turn, jnp.int32(tiles.stages))
            following = constants(turn + 1)  # read a turn ahead: nothing waits for them
            if target.has_tma:
                plgpu.barrier_wait(barriers[0].at[piece, slot])
            else:
                plgpu.wait_gmem_to_smem((tiles.stages - 2) * (1 + halves))
            numbers = plgpu.load(weight_smem.at[piece, slot].transpose((1, 0)), layout=of_weight, optimized=False)
            columns = _widened(numbers, rows, target)

            def band_sums(band: int, total: jax.Array, part: slice, group: Sequence[jax.Array]) -> jax.Array:
                """total and what one span adds to the sums of 16 rows."""
                sums = nothing() if is_grouped else total
                for half in range(halves):
                    from_band = x_smem.at[piece, slot, half, pl.ds(band * PRODUCT, PRODUCT)]
                    x_rows = plgpu.load(from_band, layout=of_x, optimized=False)
                    sums = plgpu.mma(sums, x_rows[:, part], columns[half][part])
                if not is_grouped:
                    return sums
                if len(group) > 1:
                    sums = sums - _across(group[2 + band], sums, 0) * _across(group[1], sums, 1)
                return total + sums * _across(group[0], sums, 1)

            for index in range(num_spans):
                part = slice(index * span_bytes, (index + 1) * span_bytes)
                totals = [band_sums(band, totals[band], part, now[index] if is_grouped else ()) for band in range(len(bands))]
            if target.has_tma:
                _compat.fence_async_shared_cta()
            ahead = turn + (tiles.stages - 1)
            if target.has_tma:
                pl.when(ahead < count)(lambda: fetch(ahead))
            else:
                fetch(ahead)
            return totals, following

        for ahead in range(tiles.stages - 1):
            if target.has_tma:
                pl.when(ahead < count)(lambda ahead=ahead: fetch(jnp.int32(ahead)))
            else:
                fetch(jnp.int32(ahead))
        totals, _ = lax.fori_loop(0, count, step, ([nothing() for _ in bands], constants(jnp.int32(0))))
        if not target.has_tma:
            plgpu.wait_gmem_to_smem(0)

        def finish(totals: list[jax.Array]) -> None:
            for some, total in zip(bands, totals, strict=True):
                if not is_grouped:
                    total = total * _across(_row(scales_ref.at[0, outputs], of_sums.reduce(0)), total, 1)
                if "x_scales" in names:
                    total = total * _across(_row(extras["x_scales"].at[some], of_sums.reduce(1)), total, 0)
                _compat.store(out_ref.at[some, outputs], total.astype(dtype))

        if tiles.slices == 1:
            return finish(totals)
        for band, total in enumerate(totals):
            _compat.store(sums_smem.at[piece, band], total)
        plgpu.barrier_arrive(barriers[-1])

        @pl.when(piece == 0)
        def _():
            plgpu.barrier_wait(barriers[-1])

            def summed(band: int) -> jax.Array:
                parts = [plgpu.load(sums_smem.at[i, band], layout=of_sums, optimized=False) for i in range(tiles.slices)]
                return functools.reduce(jnp.add, parts)

            finish([summed(band) for band in range(len(bands))])

    ring = (tiles.slices, tiles.stages)
    scratch = [
        plgpu.SMEM((*ring, halves, tiles.rows, tiles.row_bytes), rows, transforms=_swizzled(2 * tiles.row_bytes, 2)),
        plgpu.SMEM((*ring, tiles.outputs, tiles.row_bytes), weight_dtype, transforms=_swizzled(tiles.row_bytes, 1)),
        plgpu.SMEM((tiles.slices, tiles.rows // PRODUCT, PRODUCT, tiles.outputs), jnp.float32),
    ]
    if target.has_tma:
        scratch.append(plgpu.Barrier(num_arrivals=1 + halves, num_barriers=ring))
    if tiles.slices > 1:
        scratch.append(plgpu.Barrier(num_arrivals=tiles.slices))
    return _compat.kernel(
        body,
        target=target,
        out_type=jax.ShapeDtypeStruct((X, F), dtype),
        scratch_types=scratch,
        # Blocks of the same outputs come one after the other: the second finds the weight in the L2 cache.
        grid=(F // tiles.outputs, X // tiles.rows),
        grid_names=("outputs", "rows"),
        num_threads=tiles.slices,
        thread_name="slice",
        name="quantized_matmul",
    )


def _widened(numbers: jax.Array, rows: Any, target: Target) -> tuple[jax.Array, ...]:
    """Numbers of a weight in x's dtype, exact: all of them, or those of the low and of the high four bits less ZERO."""
    if numbers.dtype == jnp.float8_e4m3fn:
        if not target.has_fp8_conversion:
            return (floats(numbers).astype(rows),)
        return (numbers.astype(rows) if rows == jnp.float16 else numbers.astype(jnp.float32).astype(rows),)
    if numbers.dtype == jnp.int8:
        if rows == jnp.bfloat16 and target.has_tma:
            return (numbers.astype(rows),)
        # Below sm_90 there is no bfloat16 subtraction, which that cast takes (and casts in steps are made one again). The float
        # whose last bits are the number, 2^23 + 128 + n, less 2^23 + 128.
        shifted = lax.bitcast_convert_type(numbers.astype(jnp.int32) + jnp.int32(0x4B000080), jnp.float32)
        return ((shifted - float((1 << 23) + 128)).astype(rows),)
    # A float whose last bits are the number: 128 + n in bfloat16, 1024 + n in float16.
    bits, base = (0x4300, 128) if rows == jnp.bfloat16 else (0x6400, 1024)
    pairs = numbers.astype(jnp.int16)
    halves = (pairs & jnp.int16(15), lax.shift_right_logical(pairs, jnp.int16(4)))
    shifted = (lax.bitcast_convert_type(half | jnp.int16(bits), rows) for half in halves)
    if rows == jnp.float16 or target.has_tma:
        return tuple(half - jnp.asarray(base + ZERO, rows) for half in shifted)
    return tuple((half.astype(jnp.float32) - float(base + ZERO)).astype(rows) for half in shifted)


def _row(ref: Any, layout: Any) -> jax.Array:
    return plgpu.load(ref, layout=layout, optimized=False)


def _across(vector: jax.Array, like: jax.Array, axis: int) -> jax.Array:
    return lax.broadcast_in_dim(vector, like.shape, [axis])


def _swizzled(row_bytes: int, itemsize: int) -> tuple[Any, Any]:
    swizzle = min(row_bytes, 128)
    return plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle)
