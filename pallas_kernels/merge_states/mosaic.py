"""The Mosaic GPU kernel that merges parts of attention; the decode kernel's split rows come through here too.

A block owns 8 query rows and 32 columns of their results, and goes through the parts of its row `AT_ONCE` at a time: their loads
are in flight together, which is all that matters to a kernel that computes next to nothing.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import _compat
from pallas_kernels._compat import plgpu
from pallas_kernels.target import Target

AT_ONCE = 8
ROWS = 8
LOWEST = -1e30  # stands for -inf where a difference of two must not be NaN
LOG2_E = math.log2(math.e)


def unavailable(target: Target, *, head_dim: int, dtype: str) -> str | None:
    """Why the kernel cannot run on that GPU for this head size and dtype, or None."""
    if dtype not in ("float32", "bfloat16", "float16"):
        return f"its results are float32, bfloat16 or float16, not {dtype}"
    if head_dim % 16:
        return f"its heads are multiples of 16, not {head_dim}"
    return None


def merge(outs: jax.Array, lses: jax.Array, target: Target) -> tuple[jax.Array, jax.Array]:
    """Results [I, ..., H] and their LSEs [I, ...] as one."""
    num_parts, *axes, H = outs.shape
    X = math.prod(axes)
    padding = -X % ROWS  # a copy, but of calls whose rows are not a multiple of 8 alone

    def rows(x: jax.Array) -> jax.Array:
        return jnp.pad(
            x.reshape(num_parts, 1, X, *x.shape[1 + len(axes) :]),
            [(0, 0), (0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 1 - len(axes)),
        )

    everything = jnp.zeros(1, jnp.int32), jnp.full(1, num_parts, jnp.int32)
    out, lse = merge_ranges(rows(outs), rows(lses.astype(jnp.float32)), *everything, target, outs.dtype)
    return out[0, 0, :X].reshape(*axes, H), lse[0, 0, :X].reshape(*axes)


def merge_ranges(
    outs: jax.Array, lses: jax.Array, first: jax.Array, count: jax.Array, target: Target, dtype: jax.typing.DTypeLike
) -> tuple[jax.Array, jax.Array]:
    """Row b of the result merges parts first[b] .. first[b] + count[b] - 1; no part is 0 with LSE -inf.

    Args:
      outs: [W, K, X, H] with X a multiple of 8; parts that no row counts are never read.
      lses: float32 [W, K, X].
      first, count: int32 [B].

    Returns:
      [B, K, X, H] of that dtype and float32 [B, K, X].
    """
    (_, K, X, H), B = outs.shape, len(first)
    columns, m_warps = (32, 1) if H % 32 == 0 else (16, 2)
    # The layout of a float32 operand of `mma`: 8 rows, 8 columns of 4 bytes a sector, nothing held twice over 4 warps' columns.
    layout = plgpu.Layout.MMA_RHS(jnp.float32, m_warps=m_warps)
    by_row = layout.reduce(1)

    def body(outs_ref, lses_ref, first_ref, count_ref, out_ref, lse_ref):
        b, k, tile = lax.axis_index("row"), lax.axis_index("head"), lax.axis_index("tile")
        rows, cols = pl.ds(tile * ROWS, ROWS), pl.ds(lax.axis_index("columns") * columns, columns)
        first_item, num_items = first_ref[b], count_ref[b]

        def wide(x: jax.Array) -> jax.Array:
            return lax.broadcast_in_dim(x, (ROWS, columns), [0])

        def turn(index, carry):
            peak, total, acc = carry
            some = []
            for j in range(AT_ONCE):
                part = index * AT_ONCE + j
                item = first_item + jnp.minimum(part, num_items - 1)
                lse = plgpu.load(lses_ref.at[item, k, rows], layout=by_row, optimized=False)
                value = plgpu.load(outs_ref.at[item, k, rows, cols], layout=layout, optimized=False)
                beyond = jnp.where(part < num_items, 0.0, -jnp.inf).astype(jnp.float32)
                some.append((lse * LOG2_E + beyond, value))
            new_peak = peak
            for lse, _ in some:
                new_peak = jnp.maximum(new_peak, lse)
            rescale = jnp.exp2(peak - new_peak)
            total, acc = total * rescale, acc * wide(rescale)
            for lse, value in some:
                weight = jnp.exp2(lse - new_peak)
                total += weight
                # A weight of 0 times a NaN is a NaN: what an empty part holds is never multiplied.
                acc += wide(weight) * jnp.where(wide(weight) > 0, value.astype(jnp.float32), 0.0)
            return new_peak, total, acc

        start = (
            plgpu.layout_cast(jnp.full((ROWS,), LOWEST, jnp.float32), by_row),
            plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), by_row),
            plgpu.layout_cast(jnp.zeros((ROWS, columns), jnp.float32), layout),
        )
        num_turns = lax.div(num_items + (AT_ONCE - 1), jnp.int32(AT_ONCE))
        peak, total, acc = lax.fori_loop(0, num_turns, turn, start)
        divisor = jnp.where(total > 0, total, 1.0)
        _compat.store(out_ref.at[b, k, rows, cols], (acc / wide(divisor)).astype(dtype))

        @pl.when(lax.axis_index("columns") == 0)
        def _() -> None:
            lse = jnp.where(total > 0, peak * (1 / LOG2_E) + jnp.log(divisor), -jnp.inf)
            _compat.store(lse_ref.at[b, k, rows], lse)

    call = _compat.kernel(
        body,
        target=target,
        out_type=(jax.ShapeDtypeStruct((B, K, X, H), dtype), jax.ShapeDtypeStruct((B, K, X), jnp.float32)),
        grid=(B, K, X // ROWS, H // columns),
        grid_names=("row", "head", "tile", "columns"),
        name="merge_states",
    )
    return call(outs, lses, first, count)
