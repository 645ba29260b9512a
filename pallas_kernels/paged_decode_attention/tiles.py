"""How the Mosaic decode kernel cuts its work: tiles from static shapes, and chunks of rows from `kv_lens`, on the device.

Knows sizes and chips; refuses to know the kernel. Not one number here is measured on a GPU yet; each has its reason.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.target import Target

# Tokens that a chunk has at least: its partial result, written and read once more, is then under 1% of its keys and values.
CHUNK_TOKENS = 256
# Work items for every block that can be resident: rows of unequal length even out, and the last blocks to end are short.
WAVES = 2
MAX_ROWS = 64


class Tiles(NamedTuple):
    """Sizes known when the call is compiled."""

    num_rows: int  # packed query rows (T x G) of a block: 16, 32 or 64
    num_row_tiles: int  # blocks that share the rows of one key/value head
    num_tokens: int  # keys and values of one step of the loop
    num_stages: int  # tiles in shared memory
    num_items: int  # chunks of rows that the grid has room for
    chunk_tiles: int  # the smallest chunk, in tiles


def choose(
    target: Target,
    *,
    num_queries: int,
    batch_size: int,
    num_kv_heads: int,
    head_dim: int,
    context_tokens: int,
    query_bytes: int,
    page_bytes: int,
) -> Tiles:
    """Tiles for a call, from its static shapes alone.

    Args:
      num_queries: T * G, the query rows that share a key/value head.
      context_tokens: M * S, the most that a row can have.
      query_bytes, page_bytes: of one number.
    """
    # Sums of 64 rows of 256 numbers, or of three parts each, are more than a thread has registers for.
    max_rows = 32 if head_dim > 128 or 4 in (query_bytes, page_bytes) else MAX_ROWS
    num_rows = next(rows for rows in (16, 32, 64) if num_queries <= rows or rows == max_rows)
    if head_dim % 32 and num_rows == 16:
        num_rows = 32  # four warps share the columns of 16 rows, 8 each; two those of 32
    num_row_tiles = -(-num_queries // num_rows)
    num_tokens = _num_tokens(num_rows, head_dim, query_bytes, page_bytes)
    stage, fixed = _memory(num_rows, num_tokens, head_dim, query_bytes, page_bytes)
    # Three blocks on one multiprocessor hide each other's waits; the chips differ in how much each may then have. Two stages
    # are what a loop cannot do without, more than four bring nothing that more blocks would not.
    blocks = 3 if target.shared_memory_bytes > 128 * 1024 else 1
    num_stages = max(2, min(4, (target.shared_memory_bytes // blocks - 1024 - fixed) // stage))

    resident = target.num_sms * blocks
    # The interpreter's cases are tiny: a chunk of one tile splits them too.
    chunk_tiles = 1 if target.is_interpreted else max(1, CHUNK_TOKENS // num_tokens)
    most = batch_size * -(-context_tokens // (chunk_tiles * num_tokens))
    wanted = max(2 * batch_size, WAVES * resident // (num_kv_heads * num_row_tiles))
    return Tiles(num_rows, num_row_tiles, num_tokens, num_stages, min(most, wanted), chunk_tiles)


def fits(target: Target, *, head_dim: int, query_bytes: int, page_bytes: int) -> bool:
    """Whether two stages of tiles fit the chip's shared memory, whatever the number of query rows is."""
    num_tokens = (_num_tokens(rows, head_dim, query_bytes, page_bytes) for rows in (16, MAX_ROWS))
    needed = (_memory(MAX_ROWS, tokens, head_dim, query_bytes, page_bytes) for tokens in num_tokens)
    return all(2 * stage + fixed <= target.shared_memory_bytes for stage, fixed in needed)


def _num_tokens(num_rows: int, head_dim: int, query_bytes: int, page_bytes: int) -> int:
    """Of a tile: 64, or 32 where the numbers would not fit the registers; float32 is three 16-bit numbers each."""
    return 32 if 4 in (query_bytes, page_bytes) or head_dim > 128 or num_rows * head_dim > 32 * 128 else 64


def _memory(num_rows: int, num_tokens: int, head_dim: int, query_bytes: int, page_bytes: int) -> tuple[int, int]:
    """Bytes of shared memory that a stage needs, and that there are beside the stages."""
    fixed = num_rows * num_tokens * (6 if query_bytes == 4 else 2) + 4096
    if page_bytes != 2:
        fixed += num_tokens * head_dim * 2 * (3 if page_bytes == 4 else 1)  # values as 16-bit numbers
    return 2 * num_tokens * (head_dim * page_bytes + 4), fixed


class Items(NamedTuple):
    """The work list: tiles [start, stop) of a row for each item, and where the items of each row are.

    Item i of a row with count items starts at tile first_tile + i * chunk. Items beyond the last one of the last row have
    start == stop.
    """

    row: jax.Array  # int32 [W]
    start: jax.Array  # int32 [W]
    stop: jax.Array  # int32 [W]
    is_first: jax.Array  # int32 [W], 1 where the item is its row's first
    first_item: jax.Array  # int32 [B]
    count: jax.Array  # int32 [B]


def partition(kv_lens: jax.Array, first_tile: jax.Array, tiles: Tiles, context_tokens: int, fixed_chunk: int = 0) -> Items:
    """Cut rows into chunks of equal length, the shortest for which all chunks fit into `tiles.num_items`. No host sync.

    There always is one: num_items is at least the number of rows, and a chunk may be as long as a row.

    Args:
      first_tile: int32 [B], the first tile of each row that any query of it sees.
      fixed_chunk: tiles of a chunk whatever the batch is, for results that do not depend on it; num_items must then be
        B * ceil(context / chunk).
    """
    stop_tile = -(-kv_lens // tiles.num_tokens)
    length = jnp.maximum(stop_tile - first_tile, 0)
    if fixed_chunk:
        chunk = jnp.int32(fixed_chunk)
    else:
        longest = -(-context_tokens // tiles.num_tokens)
        sizes = [tiles.chunk_tiles]
        while sizes[-1] < longest:  # 1, 2, 3, 4, 6, 8, 12, ...
            step = len(sizes) // 2
            sizes.append(tiles.chunk_tiles * ((3 << (step - 1)) if len(sizes) % 2 == 0 else (2 << step)))
        candidates = jnp.array(sizes, jnp.int32)
        num_chunks = jnp.sum(-(-length[:, None] // candidates), axis=0)
        chunk = candidates[jnp.argmax(num_chunks <= tiles.num_items)]
    count = -(-length // chunk)
    ends = jnp.cumsum(count)
    first_item = ends - count

    item = jnp.arange(tiles.num_items, dtype=jnp.int32)
    # A search over a handful of rows: one comparison of all with all is one fused loop.
    row = jnp.minimum(jnp.sum(item[:, None] >= ends[None], axis=1, dtype=jnp.int32), len(kv_lens) - 1)
    index = item - first_item[row]
    start = first_tile[row] + index * chunk
    stop = jnp.where(item < ends[-1], jnp.minimum(start + chunk, stop_tile[row]), start)
    return Items(row, start, stop, (index == 0).astype(jnp.int32), first_item, count)


def whole(kv_lens: jax.Array, first_tile: jax.Array, tiles: Tiles) -> Items:
    """One item for each row, padding rows too: where a context has one chunk at most there is nothing to merge."""
    rows = jnp.arange(len(kv_lens), dtype=jnp.int32)
    stop = jnp.maximum(-(-kv_lens // tiles.num_tokens), first_tile)
    return Items(rows, first_tile, stop, jnp.ones_like(rows), rows, jnp.ones_like(rows))
