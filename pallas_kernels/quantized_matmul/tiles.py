"""The tiles of the Mosaic kernel: how many outputs, bytes and rows one turn takes. Chosen from shapes, before any lowering."""

from __future__ import annotations

from dataclasses import dataclass

from pallas_kernels.target import Target

# Bytes of a weight's row in one turn, widest first: fewer waits for the same bytes. The narrowest is the smallest swizzle.
ROW_BYTES = (256, 128, 64, 32)
PRODUCT = 16  # numbers that one tensor core product takes from a row
OUTPUTS = 32  # the fewest outputs of a block: eight for each of its four warps
MAX_STAGES = 6
MAX_ROWS = 64  # of x in one block; more are another block, which finds the weight in the L2 cache


@dataclass(frozen=True)
class Tiles:
    """One block: `rows` of x times `outputs`, by `slices` warpgroups that each take every slices-th tile of `row_bytes` bytes."""

    rows: int
    loaded_rows: int  # of x that are copied; what tensor cores take beyond them is never stored
    outputs: int
    row_bytes: int
    slices: int
    stages: int


def choose(num_rows: int, num_outputs: int, row_bytes: int, group_bytes: int, packing: int, target: Target) -> Tiles | None:
    """The tiles for X rows and F outputs whose weights have rows of `row_bytes` bytes, or None when none divide them.

    Nothing here was measured on a chip; the reasons are arithmetic:
    - 64 outputs halve what is read of x for each byte of weight, 32 make twice the blocks: 64 once every multiprocessor has one.
    - A block alone on its multiprocessor needs many warps to hide the conversion, so D is cut over up to four warpgroups, fewer
      when many rows keep many sums in registers. They add up in shared memory: a second kernel for the sums would cost as long
      as reading half a weight of 4096x4096.
    - Stages fill half the shared memory, so that two blocks fit; a wide turn is given up for a third stage.
    """
    widths = [w for w in ROW_BYTES if row_bytes % w == 0 and (group_bytes % w == 0 or w % group_bytes == 0)]
    if not widths or num_outputs % OUTPUTS or group_bytes % PRODUCT:
        return None
    fewest_rows = PRODUCT
    if not target.has_tma:
        # Each of four warps copies whole swizzle tiles, eight rows of up to 128 bytes of x: narrow turns take 32 rows.
        widths = [w for w in widths if w >= 128] or widths
        fewest_rows = PRODUCT if widths[-1] >= 128 else 2 * PRODUCT
    rows = next((m for m in (PRODUCT, 2 * PRODUCT) if max(num_rows, fewest_rows) <= m), MAX_ROWS)
    loaded_rows = 8 if target.has_tma and num_rows <= 8 else rows
    has_many = num_outputs % (2 * OUTPUTS) == 0 and num_outputs // (2 * OUTPUTS) >= target.num_sms
    outputs = 2 * OUTPUTS if has_many and rows == PRODUCT else OUTPUTS

    def stages(slices: int, width: int, num_blocks: int) -> int:
        room = target.shared_memory_bytes // num_blocks - slices * rows * outputs * 4 - 2048
        return min(room // (slices * width * (outputs + 2 * packing * rows)), MAX_STAGES)

    # Two blocks on a multiprocessor before one, three stages before two, turns of 64 bytes or more before many slices, and many
    # slices before wide turns.
    for num_blocks, enough in ((2, 3), (1, 3), (1, 2)):
        for slices, width in sorted(((s, w) for s in (4, 2, 1) for w in widths), key=lambda pair: pair[1] < 64):
            turns = row_bytes // width // slices
            fit = stages(slices, width, num_blocks)
            if turns and slices * rows <= 128 and fit >= min(enough, turns + 1):
                return Tiles(rows, loaded_rows, outputs, width, slices, max(2, min(fit, turns + 1)))
    return None


def shared_bytes(tiles: Tiles, packing: int) -> int:
    """Shared memory of one block."""
    stage = tiles.row_bytes * (tiles.outputs + 2 * packing * tiles.rows)
    return tiles.slices * (tiles.stages * stage + tiles.rows * tiles.outputs * 4) + 1024
