"""How long one batch takes in this process, again and again: vLLM's `bench latency`. Knows seconds alone of what it measures."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from jaxpaged.simulate.report import percentiles_of

PERCENTILES = (10, 25, 50, 75, 90, 99)  # vLLM's


def measure(
    batch: Callable[[], object],
    num_iters: int,
    num_iters_warmup: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    on_end: Callable[[], object] = lambda: None,
) -> list[float]:
    """Seconds of each of `num_iters` calls of `batch`, after `num_iters_warmup` that do not count.

    Ctrl-C ends it early: it gives what there is, and raises where there is nothing.
    """
    found: list[float] = []
    try:
        for turn in range(num_iters_warmup + num_iters):
            started = clock()
            batch()
            if turn >= num_iters_warmup:
                found.append(clock() - started)
            on_end()
    except KeyboardInterrupt:
        if not found:
            raise
    return found


def summarise(latencies: Sequence[float]) -> dict[str, Any]:
    """Under vLLM's keys, in seconds."""
    percentiles = percentiles_of([(value, 1) for value in latencies], PERCENTILES)
    return {
        "avg_latency": statistics.fmean(latencies),
        "latencies": list(latencies),
        "percentiles": {str(name): value for name, value in zip(PERCENTILES, percentiles, strict=True)},
    }


def table(numbers: dict[str, Any]) -> str:
    """The numbers for a reader."""
    lines = [f"{'average':12}{numbers['avg_latency'] * 1e3:12,.2f} ms"]
    lines += [f"{f'p{name}':12}{value * 1e3:12,.2f} ms" for name, value in numbers["percentiles"].items()]
    return "\n".join(lines)
