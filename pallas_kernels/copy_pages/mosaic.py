"""Pages from one array to another on an NVIDIA GPU: the kernel of copy_pages, gather_pages and scatter_pages.

A page is cut into pieces, and each block of the grid moves one piece of one page of one layer: through shared memory by the bulk
copy engine where there is one (sm_90 and newer), through registers below. A block waits for nobody; the several blocks that fit
a multiprocessor keep its loads and stores in flight together, so a ring of buffers inside a block has nothing to add.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import _compat
from pallas_kernels._compat import plgpu
from pallas_kernels.target import Target

# Of a piece. 4.3 TB/s of copying over 132 multiprocessors are 16 bytes a nanosecond each way. If a piece takes 3 us from launch
# to exit (an estimate), 48 KiB must be in flight on a multiprocessor; six pieces of 32 KiB fit its memory, four times that.
# Through registers a thread holds 64 bytes of a piece, as 16 registers.
TMA_PIECE_BYTES = 32 * 1024
REGISTER_PIECE_BYTES = 8 * 1024
THREADS = 128


def unavailable(target: Target, shape: tuple[int, ...], dtype: str) -> str | None:
    """Why pages of this shape ([P, K, S, H]) and dtype cannot be moved on that GPU, or None when they can."""
    if jnp.dtype(dtype).itemsize > 4:
        return f"pages of {dtype} have more than 32 bits a number"
    if _piece(target, shape, dtype) is None:
        unit = "16 bytes" if target.has_tma else f"{THREADS} numbers"
        return f"a page of {math.prod(shape[1:])} numbers of {dtype} is no multiple of {unit}"
    return None


def copy_pages(pages: jax.Array, sources: jax.Array, targets: jax.Array, num_layers: int, *, target: Target) -> jax.Array:
    """See the contract in `pallas_kernels.copy_pages`."""
    pool = jax.new_ref(_in_pieces(pages, target))
    _move("copy_pages", target, pool, pool, sources, targets, num_layers)
    return jax.freeze(pool).reshape(pages.shape)


def gather_pages(pages: jax.Array, page_numbers: jax.Array, num_layers: int, *, target: Target) -> jax.Array:
    """See the contract in `pallas_kernels.gather_pages`."""
    shape = (page_numbers.shape[0], num_layers, *pages.shape[1:])
    pool = _in_pieces(pages, target)
    staged = jax.ShapeDtypeStruct((shape[0] * num_layers, *pool.shape[1:]), pool.dtype)
    return _move("gather_pages", target, pool, staged, page_numbers, None, num_layers).reshape(shape)


def scatter_pages(pages: jax.Array, staged: jax.Array, page_numbers: jax.Array, num_layers: int, *, target: Target) -> jax.Array:
    """See the contract in `pallas_kernels.scatter_pages`."""
    pool, pieces = jax.new_ref(_in_pieces(pages, target)), _in_pieces(staged.reshape(-1, *pages.shape[1:]), target)
    _move("scatter_pages", target, pieces, pool, None, page_numbers, num_layers)
    return jax.freeze(pool).reshape(pages.shape)


def _piece(target: Target, shape: tuple[int, ...], dtype: str) -> int | None:
    """Numbers in a piece: the largest part of a page that is small enough and that the copy engine, or 128 threads, can share."""
    size, numbers = jnp.dtype(dtype).itemsize, math.prod(shape[1:])
    limit, unit = (TMA_PIECE_BYTES, 16 // size) if target.has_tma else (REGISTER_PIECE_BYTES, THREADS)
    fitting = (piece for piece in range(min(limit // size, numbers), 0, -1) if numbers % piece == 0 and piece % unit == 0)
    return next(fitting, None)


def _in_pieces(pages: jax.Array, target: Target) -> jax.Array:
    """[rows, pieces of a page, numbers of a piece]; costs nothing."""
    return pages.reshape(pages.shape[0], -1, _piece(target, pages.shape, pages.dtype.name))  # type: ignore[arg-type]


def _move(
    name: str,
    target: Target,
    source: Any,
    destination: Any,
    reads: jax.Array | None,
    writes: jax.Array | None,
    num_layers: int,
) -> Any:
    """Copy page `reads[x]` of every layer of `source` to page `writes[x]` of `destination`.

    Args:
      source, destination: in pieces; jax refs for what is written in place, a jax.ShapeDtypeStruct for what is returned.
      reads, writes: int32 [X]; None for the side that is not a pool but staged pages [X * L, ...], of which pair x has its own.
    """
    indices = [x for x in (reads, writes) if x is not None]
    arrays = [source] if destination is source or isinstance(destination, jax.ShapeDtypeStruct) else [source, destination]
    _, num_pieces, size = source.shape

    def body(*refs: Any) -> None:
        index_refs, array_refs, buffers = refs[: len(indices)], refs[len(indices) :][:2], refs[len(indices) + 2 :]
        if destination is source:
            array_refs, buffers = (refs[len(indices)],) * 2, refs[len(indices) + 1 :]
        layer, piece, pair = (lax.axis_index(axis) for axis in ("layer", "piece", "pair"))
        pages = iter([ref[pair] for ref in index_refs])

        def row(numbers: jax.Array | None, array: Any) -> tuple[jax.Array, jax.Array]:
            """A side's page number and its row of the array; the kernel's addresses are 64 bits wide, rows need not be."""
            if numbers is None:
                return pair, pair * num_layers + layer
            page = next(pages)
            return page, layer * (array.shape[0] // num_layers) + page

        (read, from_row), (write, to_row) = row(reads, source), row(writes, destination)
        # Padding: a page onto itself, or staged pages onto the null page, which several blocks would write at once.
        is_padding = read == write if destination is source else write == 0 if reads is None else False

        @pl.when(jnp.logical_not(is_padding))
        def _() -> None:
            origin, goal = array_refs[0].at[from_row, piece], array_refs[1].at[to_row, piece]
            if not target.has_tma:
                _compat.store(goal, origin[...])
                return
            buffer, arrived = buffers
            plgpu.copy_gmem_to_smem(origin, buffer, arrived, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)
            plgpu.barrier_wait(arrived)
            plgpu.copy_smem_to_gmem(buffer, goal)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # a block that has exited has no shared memory to read from

    call = _compat.kernel(
        body,
        target=target,
        out_type=destination if isinstance(destination, jax.ShapeDtypeStruct) else (),
        scratch_types=[plgpu.SMEM((size,), source.dtype), plgpu.Barrier()] if target.has_tma else [],
        grid=(num_layers, num_pieces, indices[0].shape[0]),  # the last axis is the one without a limit of 65,535 blocks
        grid_names=("layer", "piece", "pair"),
        name=name,
    )
    return call(*indices, *arrays)
