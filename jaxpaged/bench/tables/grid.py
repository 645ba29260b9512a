"""Throughput over lengths of prompts and outputs."""

from __future__ import annotations

from typing import Any

from jaxpaged.bench.tables.measuring import Row, Settings, drive, in_turn, jobs

name = "grid"
title = "Throughput by length of prompt and output"
text = "Requests that are all there from the beginning, all of one length. Output tokens a second; prompts are computed too."


def run(settings: Settings) -> list[Row]:
    """Each length of prompt with each of output."""
    inputs = settings.pick((32, 128, 512), (32, 128, 256), (8, 16))
    outputs = settings.pick((16, 64, 256), (16, 64), (4,))
    num_seqs = settings.pick(16, 16, 2)
    limits = {"max_num_seqs": num_seqs, "decode_row_buckets": (num_seqs,), "max_model_len": max(inputs) + max(outputs)}
    with settings.engine(**limits) as engine:
        sides = {}
        for size in inputs:
            for count in outputs:
                work = jobs([(size, count)] * num_seqs, engine.model.vocab_size)
                sides[size, count] = lambda work=work: drive(engine, work)
        found = in_turn(sides, settings.rounds)
    keys = "output_tokens_per_s", "total_tokens_per_s", "requests_per_s"
    return [{"input": size, "output": count, **{key: found[size, count][key] for key in keys}} for size, count in found]


def figure(rows: list[Row], axes: Any) -> None:
    """A field of numbers."""
    inputs, outputs = sorted({row["input"] for row in rows}), sorted({row["output"] for row in rows})
    speed = {(row["input"], row["output"]): row["output_tokens_per_s"] for row in rows}
    axes.imshow([[speed[size, count] for count in outputs] for size in inputs], aspect="auto")
    for y, size in enumerate(inputs):
        for x, count in enumerate(outputs):
            axes.text(x, y, f"{speed[size, count]:,.0f}", ha="center", va="center", color="white")
    axes.set_xticks(range(len(outputs)), outputs)
    axes.set_yticks(range(len(inputs)), inputs)
    axes.set_xlabel("tokens of each output")
    axes.set_ylabel("tokens of each prompt")
