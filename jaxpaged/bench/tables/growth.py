"""How the time of a step grows, with sequences, with context and with the pool, and the floor of each."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import cache
from typing import Any

from jaxpaged.bench import machine
from jaxpaged.bench.models import LONG
from jaxpaged.bench.step_profile import floor_s
from jaxpaged.bench.tables.measuring import Row, Settings, StepProgram, in_turn


@dataclass(eq=False)
class Growth:
    """One table of the three: what grows, and what does not meanwhile."""

    name: str
    title: str
    text: str
    x: str
    label: str

    def run(self, settings: Settings) -> list[Row]:
        """Milliseconds of the compiled step and their floor."""
        limits = _limits(settings.dtype, settings.scale == "tiny")
        sides, floors = {}, {}
        with contextlib.ExitStack() as stack:
            for size, (rows, context, num_pages) in self._points(settings).items():
                options: dict[str, Any] = {"max_num_seqs": rows, "decode_row_buckets": (rows,), "max_model_len": context + 1}
                options |= {"block_size": 16, "num_gpu_blocks_override": num_pages or rows * -(-context // 16) + 1}
                engine = stack.enter_context(settings.engine(model=LONG, **options))
                sides[size] = StepProgram(engine, rows, context).milliseconds
                floors[size] = floor_s(engine, rows, context, limits)
            found = in_turn(sides, settings.rounds)
        return [{self.x: size, **row, "floor_ms": 1e3 * floors[size]} for size, row in found.items()]

    def _points(self, settings: Settings) -> dict[int, tuple[int, int, int]]:
        """What grows -> rows, context, and the pool's pages; 0 for as many as are needed."""
        if self.x == "sequences":
            sizes = settings.pick((1, 2, 4, 8, 16, 32, 64, 128), (1, 8, 32, 128), (1, 4))
            return {size: (size, settings.pick(512, 256, 32), 0) for size in sizes}
        if self.x == "context":
            sizes = settings.pick((128, 256, 512, 1024, 2048, 4096, 8192), (128, 1024, 8192), (32, 64))
            return {size: (settings.pick(8, 4, 2), size, 0) for size in sizes}
        rows, context = settings.pick(8, 8, 2), settings.pick(512, 512, 32)
        least = rows * context // 16 + 1
        return {least * factor: (rows, context, least * factor) for factor in settings.pick((1, 4, 16, 64), (1, 8, 64), (1, 4))}

    def figure(self, rows: list[Row], axes: Any) -> None:
        """The time and its floor."""
        sizes = [row[self.x] for row in rows]
        axes.plot(sizes, [row["step_ms"] for row in rows], marker="o", label="measured")
        axes.plot(sizes, [row["floor_ms"] for row in rows], linestyle="--", label="floor")
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(self.label)
        axes.set_ylabel("ms a step")
        axes.legend()


@cache
def _limits(dtype: str, is_tiny: bool) -> machine.Limits:
    return machine.measure(dtype, turns=1, num_bytes=1 << 20, side=64) if is_tiny else machine.measure(dtype)


_TEXT = "Milliseconds of the compiled step of sequences that decode, and the least that memory and products allow here. "
sequences = Growth(
    "growth_sequences",
    "Time of a step by sequences",
    _TEXT + "The weights are read once for all of them.",
    "sequences",
    "sequences",
)
context = Growth(
    "growth_context",
    "Time of a step by context",
    _TEXT + "What is attended to is read once by each.",
    "context",
    "tokens of each sequence",
)
pool = Growth(
    "growth_pool",
    "Time of a step by size of the pool",
    _TEXT + "It must be flat: a step touches its own pages.",
    "pages",
    "pages",
)
