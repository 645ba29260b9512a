"""What paging costs: pages anywhere against a run of memory for each sequence."""

from __future__ import annotations

import contextlib
from typing import Any

from jaxpaged.bench.tables.measuring import Row, Settings, StepProgram, in_turn
from jaxpaged.config import BLOCK_SIZES

name = "paging"
title = "A paged against a contiguous cache"
text = (
    "One decode step over pages of 16 tokens in no order, and over the largest pages, of 128, one after the other and as many as "
    "the longest sequence has for each: as near to a contiguous cache as pages come."
)

PAGE, LARGEST = 16, BLOCK_SIZES[-1]


def run(settings: Settings) -> list[Row]:
    """Milliseconds of a step by context."""
    longest, num_seqs = settings.pick((1024, 16), (512, 8), (32, 2))
    contexts = settings.pick((64, 256, 1024), (64, 512), (32,))
    limits = {"max_num_seqs": num_seqs, "decode_row_buckets": (num_seqs,), "max_model_len": longest}
    sides = {}
    with contextlib.ExitStack() as stack:
        for way, size in (("paged", PAGE), ("contiguous", min(LARGEST, longest))):
            num_pages = num_seqs * -(-longest // size) + 1
            engine = stack.enter_context(settings.engine(block_size=size, num_gpu_blocks_override=num_pages, **limits))
            for context in contexts:
                sides[way, context] = StepProgram(engine, num_seqs, context, in_order=way == "contiguous").milliseconds
        found = in_turn(sides, settings.rounds)
    return [{"cache": way, "context": context, "rows": num_seqs, **row} for (way, context), row in found.items()]


def figure(rows: list[Row], axes: Any) -> None:
    """A line for each."""
    for way in dict.fromkeys(row["cache"] for row in rows):
        own = [row for row in rows if row["cache"] == way]
        axes.plot([row["context"] for row in own], [row["step_ms"] for row in own], marker="o", label=way)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of each sequence")
    axes.set_ylabel("ms a step")
    axes.legend()
