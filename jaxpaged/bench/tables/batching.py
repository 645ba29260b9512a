"""Static against continuous batching."""

from __future__ import annotations

import random
from typing import Any

from jaxpaged.bench.tables.measuring import Row, Settings, drive, in_turn, jobs
from jaxpaged.simulate.lengths import LogUniform

name = "batching"
title = "Static against continuous batching"
text = (
    "The same requests of mixed lengths: as many at a time as there are rows, the next when all of them have ended; and each "
    "as soon as one has ended. Utilisation is the share of rows that hold a sequence, over all steps."
)


def run(settings: Settings) -> list[Row]:
    """Both on one engine."""
    num_seqs, count = settings.pick((8, 64), (8, 32), (2, 4))
    longest = settings.pick(256, 128, 8)
    draw = random.Random(0)
    lengths = [(LogUniform(8, 64).draw(draw), LogUniform(4, longest).draw(draw)) for _ in range(count)]
    limits = {"max_num_seqs": num_seqs, "decode_row_buckets": (num_seqs,), "max_model_len": 64 + longest}
    with settings.engine(**limits) as engine:
        work = jobs(lengths, engine.model.vocab_size)
        sides = {"static": lambda: drive(engine, work, group=num_seqs), "continuous": lambda: drive(engine, work)}
        found = in_turn(sides, settings.rounds)
    keys = "requests_per_s", "output_tokens_per_s", "mean_latency_s", "utilisation"
    return [{"batching": side, **{key: row[key] for key in keys}} for side, row in found.items()]


def figure(rows: list[Row], axes: Any) -> None:
    """Bars."""
    axes.bar([row["batching"] for row in rows], [row["requests_per_s"] for row in rows])
    axes.set_ylabel("requests a second")
