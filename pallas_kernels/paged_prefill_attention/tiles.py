"""How the Mosaic prefill kernel cuts its work: query rows of a block, keys of a turn, stages. Nothing here is measured yet.

Knows sizes and chips; refuses to know the kernel.
"""

from __future__ import annotations

from typing import NamedTuple

from pallas_kernels.target import Target

ROWS = 64  # of one warpgroup's product


class Tiles(NamedTuple):
    """Sizes known when the call is compiled."""

    num_groups: int  # warpgroups that compute, ROWS packed query rows each, over the same keys
    num_blocks: int  # blocks that share the rows of one tile and key/value head
    num_tokens: int  # keys and values of one turn
    num_stages: int  # tiles of them in shared memory

    @property
    def block_rows(self) -> int:
        """Packed query rows of a block."""
        return ROWS * self.num_groups


def choose(target: Target, *, num_queries: int, head_dim: int, item_bytes: int) -> Tiles | None:
    """Tiles for a call, from its static shapes alone; None when not even two stages fit the chip's shared memory.

    Args:
      num_queries: T * G, the query rows that share a key/value head.
      item_bytes: of one number of q and of the pages.
    """
    # Two warpgroups and the producer leave 168 registers a thread: 64 for the sums of 128 head numbers, 32 for scores of 64
    # keys, 16 for weights. Heads of 256 want 128 for the sums: one warpgroup computes, with 255.
    num_groups = 1 if num_queries <= ROWS or head_dim > 128 else 2
    num_tokens = 64
    stage = 2 * num_tokens * head_dim * item_bytes
    fixed = num_groups * ROWS * head_dim * item_bytes + 2048
    num_stages = min(4, (target.shared_memory_bytes - fixed) // stage)
    if num_stages < 2:
        return None
    return Tiles(num_groups, -(-num_queries // (ROWS * num_groups)), num_tokens, num_stages)
