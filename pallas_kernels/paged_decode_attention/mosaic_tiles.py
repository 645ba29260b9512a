"""What the Mosaic kernels of both attention operations share: layouts, copies of page tiles, exact products, soft cap, masks.

Knows tiles in shared memory and registers; refuses to know which rows or tokens a kernel works on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import _compat
from pallas_kernels._compat import plgpu
from pallas_kernels.target import Target

LOG2_E = math.log2(math.e)
LOWEST = -1e30  # stands for -inf where a difference of two must not be NaN


class Layouts(NamedTuple):
    """Where the numbers of `plgpu.mma` sit in a warpgroup: its operands, its sum, and one number for each row or column."""

    lhs: Any
    rhs: Any
    acc: Any
    row: Any
    column: Any


def layouts(dtype: Any, num_rows: int) -> Layouts:
    """For operands of a 16-bit dtype and `num_rows` = 16, 32 or 64: 4, 2 or 1 warps then share the columns."""
    L, m_warps = plgpu.Layout, num_rows // 16
    acc = L.MMA_ACC(dtype, m_warps=m_warps)
    return Layouts(L.MMA_LHS(dtype, m_warps=m_warps), L.MMA_RHS(dtype, m_warps=m_warps), acc, acc.reduce(1), acc.reduce(0))


def swizzle_bytes(head_dim: int, dtype: Any, copied_tokens: int = 0) -> int | None:
    """The widest swizzle that divides a row of a page: reads of a tile's columns then hit different banks.

    Args:
      copied_tokens: that one cp.async brings, whose tiles of 8 tokens by a swizzle have to divide among four warps; 0 where the
        copy engine brings them, which can do with 16 bytes. None is returned where nothing does.
    """
    row_bytes = head_dim * jnp.dtype(dtype).itemsize
    for width in (128, 64, 32) if copied_tokens else (128, 64, 32, 16):
        if row_bytes % width == 0 and copied_tokens // 8 * (row_bytes // width) % 4 == 0:
            return width
    return None


def transforms(width: int, dtype: Any, copied_tokens: int = 0) -> tuple[Any, ...]:
    """Of shared memory [..., rows, width] that copies write and `ldmatrix` reads: tiled and swizzled."""
    num_bytes = swizzle_bytes(width, dtype, copied_tokens)
    if num_bytes is None:
        raise NotImplementedError(f"{copied_tokens} tokens of {width} numbers do not divide among four warps")
    return plgpu.TilingTransform((8, num_bytes // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(num_bytes)


def page_memory(shape: tuple[int, ...], dtype: Any, copied_tokens: int = 0) -> Any:
    """Shared memory for tiles of pages, [..., tokens, H]."""
    return plgpu.SMEM(shape, dtype, transforms=transforms(shape[-1], dtype, copied_tokens))


def copy(target: Target, source: Any, to: Any, barrier: Any) -> None:
    """Start a copy from global to shared memory: by the copy engine, arriving at `barrier`, or below sm_90 by cp.async.

    What cp.async brings is waited for by `plgpu.wait_gmem_to_smem`, which counts calls of this function.
    """
    if target.has_tma:
        plgpu.copy_gmem_to_smem(source, to, barrier)
    else:
        plgpu.copy_gmem_to_smem(source, to, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)


def fence(target: Target) -> None:
    """Order all reads and writes of shared memory so far before copies that are started later."""
    if target.has_tma:
        _compat.fence_async_shared_cta()  # cp.async writes as threads do: the barrier that comes with each copy is enough


def pages_of_tile(
    tile: jax.Array, num_tokens: int, page_size: int, read_page: Callable[[jax.Array], jax.Array]
) -> list[jax.Array]:
    """The pages that a tile of `num_tokens` consecutive tokens lies in: several, or one that it is a part of.

    Args:
      tile: its index in the row.
      read_page: the page at an index of the row's block table; clamps the index to the row's last page. What lies beyond the
        row's tokens is masked by who uses the tile.
    """
    if page_size >= num_tokens:
        return [read_page(lax.div(tile, jnp.int32(page_size // num_tokens)))]
    count = num_tokens // page_size
    return [read_page(tile * count + j) for j in range(count)]


def tokens_in_page(tile: jax.Array, num_tokens: int, page_size: int) -> Any:
    """The slice of each page of a tile that belongs to it."""
    if page_size <= num_tokens:
        return slice(None)
    return pl.ds(lax.rem(tile, jnp.int32(page_size // num_tokens)) * num_tokens, num_tokens)


def convert(memory: Any, to: Any) -> None:
    """A tile [tokens, H] of 8-bit or float32 numbers into 16-bit parts [parts, tokens, H], in shared memory both.

    `mma` wants two tokens of a column of values in one register, which loads bring together for 16-bit numbers alone.
    """
    count, num_tokens, _ = to.shape
    layout = layouts(to.dtype, 32).acc
    for start in range(0, num_tokens, 32):  # few in registers at once
        some = pl.ds(start, 32)
        values = plgpu.load(memory.at[some], layout=layout, optimized=False)
        for j, part in enumerate(parts(values, to.dtype, count)):
            _compat.store(to.at[j, some], part)


def zero_rows_from(first: jax.Array, memory: Any) -> None:
    """Zero the rows of a tile [tokens, H] in shared memory from index `first` on: a weight of 0 times a NaN is a NaN."""
    num_tokens, head_dim = memory.shape
    # Few rows in registers at once: this is a branch that is rarely taken, and must not set how many the kernel needs.
    num_rows = 16 if head_dim % 32 == 0 else 32
    layout = layouts(jnp.bfloat16, num_rows).acc
    for start in range(0, num_tokens, num_rows):
        some = memory.at[pl.ds(start, num_rows)]
        values = plgpu.load(some, layout=layout, optimized=False)
        row = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=layout) + start
        # Through float32: not every chip selects between narrow floats.
        _compat.store(some, jnp.where(row < first, values.astype(jnp.float32), 0.0).astype(values.dtype))


def soft_capped(scores: jax.Array, cap: float) -> jax.Array:
    """cap * tanh(scores / cap) times log2(e), for an exp2 to come.

    tanh by exp2: the hardware's own is right to 11 bits only, which a cap of 30 turns into weights that are off by a percent.
    """
    return cap * LOG2_E - (2 * cap * LOG2_E) / (1.0 + jnp.exp2(scores * (2 * LOG2_E / cap)))


def num_parts(dtype: Any) -> int:
    """How many bfloat16 numbers hold one of this dtype exactly, or a 16-bit one as it is."""
    return 3 if jnp.dtype(dtype) == jnp.float32 else 1


def parts(x: jax.Array, dtype: Any, count: int) -> list[jax.Array]:
    """x as a sum of `count` arrays of a 16-bit dtype, largest first; one for what the dtype can hold, three for float32."""
    if x.dtype == dtype:
        return [x]
    result = []
    for _ in range(count):
        if result:
            x = x - result[-1].astype(jnp.float32)
        elif x.dtype != jnp.int8 and x.dtype != jnp.float32:
            x = x.astype(jnp.float32)  # jax 0.11 casts 8-bit floats only to float32
        result.append(x.astype(dtype))
    return result


def product(acc: jax.Array, a: list[jax.Array], b: list[jax.Array]) -> jax.Array:
    """acc + a @ b for operands in parts, smallest products first; those below float32's last bit are left out."""
    pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if i + j < max(len(a), len(b))]
    for i, j in sorted(pairs, key=sum, reverse=True):
        acc = plgpu.mma(acc, a[i], b[j])
    return acc
