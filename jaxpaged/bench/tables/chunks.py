"""Sizes of a step: how many tokens of prompts are computed beside those who decode."""

from __future__ import annotations

import contextlib
import random
from typing import Any

from jaxpaged.bench.tables.measuring import Row, Settings, drive, in_turn, jobs
from jaxpaged.simulate.lengths import LogUniform

name = "chunks"
title = "max_num_batched_tokens"
text = (
    "Long prompts among requests that decode. A large step computes prompts at once, and all who decode wait for it: the longest "
    "time between two tokens of one request grows with it."
)


def run(settings: Settings) -> list[Row]:
    """An engine for each size, in turn."""
    sizes, num_seqs, longest = settings.pick(((64, 128, 256, 512, 1024), 16, 768), ((64, 256, 512), 8, 384), ((16, 32), 2, 24))
    num_output = settings.pick(64, 32, 4)
    draw = random.Random(0)
    lengths = [(LogUniform(longest // 8, longest).draw(draw), LogUniform(2, num_output).draw(draw)) for _ in range(3 * num_seqs)]
    with contextlib.ExitStack() as stack:
        sides = {}
        for size in sizes:
            limits = {"max_num_seqs": num_seqs, "decode_row_buckets": (num_seqs,), "max_model_len": longest + num_output}
            limits |= {"max_num_batched_tokens": max(size, num_seqs), "prefill_tile": 16}
            engine = stack.enter_context(settings.engine(**limits))
            work = jobs(lengths, engine.model.vocab_size)
            sides[size] = lambda engine=engine, work=work: drive(engine, work)
        found = in_turn(sides, settings.rounds)
    keys = "requests_per_s", "output_tokens_per_s", "mean_ttft_s", "longest_gap_ms"
    return [{"max_num_batched_tokens": size, **{key: row[key] for key in keys}} for size, row in found.items()]


def figure(rows: list[Row], axes: Any) -> None:
    """Speed, and the longest wait."""
    sizes = [row["max_num_batched_tokens"] for row in rows]
    axes.plot(sizes, [row["output_tokens_per_s"] for row in rows], marker="o", label="output tokens a second")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("max_num_batched_tokens")
    axes.set_ylabel("output tokens a second")
    other = axes.twinx()
    other.plot(sizes, [row["longest_gap_ms"] for row in rows], marker="s", color="tab:red")
    other.set_ylim(bottom=0)
    other.set_ylabel("longest ms between two tokens", color="tab:red")
