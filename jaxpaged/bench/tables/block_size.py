"""Sizes of a page."""

from __future__ import annotations

import contextlib
import random
from typing import Any

from jaxpaged.bench.tables.measuring import Row, Settings, StepProgram, drive, in_turn, jobs
from jaxpaged.simulate.lengths import LogUniform

name = "block_size"
title = "block_size"
text = (
    "Requests of mixed lengths with pages of so many tokens; and what of the pages is left empty at their ends, which is half a "
    "page for each sequence."
)


def run(settings: Settings) -> list[Row]:
    """An engine for each size, all of them open, in turn."""
    sizes, num_seqs, longest = settings.pick(((8, 16, 32, 64, 128), 16, 256), ((8, 16, 32, 64, 128), 8, 64), ((8, 16), 2, 8))
    draw = random.Random(0)
    lengths = [(LogUniform(8, 2 * longest).draw(draw), LogUniform(4, longest).draw(draw)) for _ in range(2 * num_seqs)]
    limits = {"max_num_seqs": num_seqs, "decode_row_buckets": (num_seqs,), "max_model_len": 3 * longest}
    limits |= {
        "prefill_tile_buckets": (settings.pick(512, 512, 32) // 16,),
        "max_num_batched_tokens": settings.pick(512, 512, 32),
    }
    with contextlib.ExitStack() as stack:
        engines = {size: stack.enter_context(settings.engine(block_size=size, prefill_tile=16, **limits)) for size in sizes}
        work = jobs(lengths, engines[sizes[0]].model.vocab_size)
        found = in_turn({size: lambda one=engine: drive(one, work) for size, engine in engines.items()}, settings.rounds)
        programs = {size: StepProgram(engine, num_seqs, 2 * longest) for size, engine in engines.items()}
        steps = in_turn({size: program.milliseconds for size, program in programs.items()}, settings.rounds)
    rows = []
    for size in sizes:
        ends = [len(job.prompt) + job.num_output - 1 for job in work]
        empty = sum(-end % size for end in ends) / sum(end + -end % size for end in ends)
        speed = found[size]["output_tokens_per_s"]
        rows.append({"block_size": size, "output_tokens_per_s": speed, **steps[size], "empty_at_the_end": empty})
    return rows


def figure(rows: list[Row], axes: Any) -> None:
    """Speed by size."""
    axes.plot([row["block_size"] for row in rows], [row["output_tokens_per_s"] for row in rows], marker="o")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of a page")
    axes.set_ylabel("output tokens a second")
