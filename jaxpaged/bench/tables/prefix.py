"""Requests that begin alike, with the prefix cache and without."""

from __future__ import annotations

import contextlib
from typing import Any

from jaxpaged.bench.tables.measuring import Row, Settings, drive, in_turn, jobs
from jaxpaged.engine import Engine

name = "prefix"
title = "A shared prefix"
text = (
    "Requests whose prompts begin with the same tokens and go on each in its own way. The cache is empty when a turn "
    "begins: requests of the first step compute the prefix, those after them find it."
)


def run(settings: Settings) -> list[Row]:
    """By length of the prefix."""
    prefixes, num_seqs, count = settings.pick(((0, 128, 512), 8, 48), ((128, 512), 8, 24), ((32,), 2, 4))
    own, num_output = settings.pick((32, 32), (32, 16), (4, 4))
    limits = {"max_num_seqs": num_seqs, "decode_row_buckets": (num_seqs,), "max_model_len": max(prefixes) + own + num_output}
    sides = {}
    with contextlib.ExitStack() as stack:
        for is_on in (True, False):
            engine = stack.enter_context(settings.engine(enable_prefix_caching=is_on, **limits))
            for size in prefixes:
                prefix = jobs([(size, 1)], engine.model.vocab_size, seed=1)[0].prompt
                work = jobs([(own, num_output)] * count, engine.model.vocab_size, prefix=prefix)
                sides["on" if is_on else "off", size] = lambda engine=engine, work=work: _from_nothing(engine, work)
        found = in_turn(sides, settings.rounds)
    keys = "requests_per_s", "output_tokens_per_s", "mean_ttft_s"
    return [{"prefix_cache": way, "prefix": size, **{key: row[key] for key in keys}} for (way, size), row in found.items()]


def _from_nothing(engine: Engine, work: Any) -> Row:
    engine.reset_prefix_cache()
    return drive(engine, work)


def figure(rows: list[Row], axes: Any) -> None:
    """A line for each."""
    for way in dict.fromkeys(row["prefix_cache"] for row in rows):
        own = [row for row in rows if row["prefix_cache"] == way]
        axes.plot([row["prefix"] for row in own], [row["requests_per_s"] for row in own], marker="o", label=f"prefix cache {way}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens that all prompts share")
    axes.set_ylabel("requests a second")
    axes.legend()
