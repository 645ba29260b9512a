"""How every table measures: sides in turn, requests until all have ended, a step again and again. Refuses to know any table."""

from __future__ import annotations

import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Protocol

import jax

from jaxpaged.bench.models import open_engine
from jaxpaged.bench.step_times import full_plan, give_back
from jaxpaged.config import Bucket
from jaxpaged.engine import Engine
from jaxpaged.host.request import SamplingParams
from jaxpaged.runner import JaxRunner

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What all tables are asked for.

    Args:
      model: as `open_engine` takes it; None is the bundled one.
      scale: of the workloads; "quick" is minutes for all tables, "tiny" seconds, for tests.
      rounds: turns of each side after one that does not count.
    """

    model: str | None = None
    dtype: str = "float32"
    scale: str = "full"
    rounds: int = 5

    def pick(self, full: Any, quick: Any, tiny: Any) -> Any:
        """What belongs to the scale."""
        return {"full": full, "quick": quick, "tiny": tiny}[self.scale]

    def engine(self, *, model: str | None = None, **options: Any) -> Engine:
        """An engine that compiles what it needs at its first use, with no cache of prefixes unless asked.

        Args:
          model: instead of the bundled one, where none was asked for.
        """
        defaults = {"dtype": self.dtype, "enforce_eager": True, "enable_prefix_caching": False, "flight_recorder_bytes": 0}
        return open_engine(self.model or model, **{**defaults, **options})


class Table(Protocol):
    """One table of the report: a module of this folder."""

    name: str
    title: str
    text: str  # what is measured, and what is to be seen

    def run(self, settings: Settings) -> list[Row]:
        """Measure."""
        ...

    def figure(self, rows: list[Row], axes: Any) -> None:
        """Draw the rows into matplotlib's axes."""
        ...


def in_turn(sides: Mapping[Any, Callable[[], Row]], rounds: int) -> dict[Any, Row]:
    """Medians of the numbers of each side, which run one after the other, every second time in the other order."""
    found: dict[Any, list[Row]] = {side: [] for side in sides}
    for turn in range(rounds + 1):
        for side in list(sides) if turn % 2 else reversed(list(sides)):
            row = sides[side]()
            if turn:  # the first compiles
                found[side].append(row)
    return {side: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for side, rows in found.items()}


@dataclass(frozen=True)
class Job:
    """A request: a prompt, and so many tokens after it."""

    prompt: list[int]
    num_output: int


def jobs(lengths: Seq[tuple[int, int]], vocab_size: int, *, seed: int = 0, prefix: Seq[int] = ()) -> list[Job]:
    """Random prompts of these lengths, after a prefix; and how many tokens are wanted."""
    draw = random.Random(seed)
    return [Job([*prefix, *(draw.randrange(3, vocab_size) for _ in range(size))], count) for size, count in lengths]


def drive(engine: Engine, work: Seq[Job], *, group: int | None = None) -> Row:
    """Run requests to their end, all there from the beginning.

    Args:
      group: so many at a time, the next when all of these have ended: static batching. None is continuous.
    """
    waiting, size = deque(work), group or len(work)
    started = time.perf_counter()
    last: dict[str, float] = {}
    first: dict[str, float] = {}
    gaps: list[float] = []
    num_tokens = used = num_steps = 0
    while waiting or engine.has_unfinished:
        if not engine.has_unfinished:
            for _ in range(min(size, len(waiting))):
                job = waiting.popleft()
                engine.add_request(job.prompt, SamplingParams(temperature=0, max_tokens=job.num_output, ignore_eos=True))
        events = engine.step()
        now = time.perf_counter() - started
        used, num_steps = used + len(engine.scheduler.running), num_steps + 1
        for event in events:
            num_tokens += event.token_id is not None
            if event.request_id in last:
                gaps.append(now - last[event.request_id])
            first.setdefault(event.request_id, now)
            last[event.request_id] = now
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "requests_per_s": len(work) / seconds,
        "output_tokens_per_s": num_tokens / seconds,
        "total_tokens_per_s": (num_tokens + sum(len(job.prompt) for job in work)) / seconds,
        "mean_latency_s": statistics.fmean(last.values()),
        "mean_ttft_s": statistics.fmean(first.values()),
        "longest_gap_ms": 1e3 * max(gaps, default=0.0),
        "utilisation": used / num_steps / engine.config.max_num_seqs,  # type: ignore[operator]
    }


class StepProgram:
    """The compiled step on full rows: so many sequences that decode behind so many tokens, on pages in no order."""

    def __init__(self, engine: Engine, rows: int, context: int, *, in_order: bool = False):
        """`in_order`: the pages of a sequence lie one after the other. Raises ValueError where the pool has too few."""
        runner: JaxRunner = engine.runner  # type: ignore[assignment]
        bucket = Bucket(rows, 0)
        plan = full_plan(engine, bucket, context)
        if plan is None:
            raise ValueError(f"the pool has too few pages for {rows} rows of {context} tokens")
        draw = random.Random(0)
        for chunk in plan.decodes:
            chunk.sequence.pages.sort() if in_order else draw.shuffle(chunk.sequence.pages)
        self._inputs = runner._pad(plan, bucket, runner._feed).packed(runner.adjuster.plain(rows), None)
        give_back(engine, plan.decodes)
        if bucket not in runner.compiled:
            runner.compiled[bucket] = runner._compile(bucket)
        self._runner, self._compiled = runner, runner.compiled[bucket]

    def milliseconds(self, steps: int = 5) -> Row:
        """The median of a few steps."""
        found, runner = [], self._runner
        for _ in range(steps):
            started = time.perf_counter()
            outputs, runner.cache = self._compiled(runner.weights, runner.cache, self._inputs)
            jax.block_until_ready((outputs, runner.cache))
            found.append(time.perf_counter() - started)
        return {"step_ms": 1e3 * statistics.median(found)}
