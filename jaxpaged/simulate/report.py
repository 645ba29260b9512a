"""The numbers of a simulation, under the names of vLLM's `bench serve`, and their table. Knows no clock but the virtual one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxpaged.config import ConfigError, nearest
from jaxpaged.simulate.run import Life, Run

PERCENTILES = (50.0, 90.0, 95.0, 99.0)
# name in keys -> words of the table; vLLM writes e2el for the whole time of a request.
METRICS = {"ttft": "Time to first token", "tpot": "Time per output token", "itl": "Inter-token latency", "e2el": "End to end"}
_GOALS = ("ttft", "tpot", "e2el")


def check_goodput(goals: Mapping[str, float]) -> None:
    """Raise ConfigError unless each goal is a metric of a request and a number of milliseconds."""
    for name, limit in goals.items():
        if name not in _GOALS:
            raise ConfigError(f"goodput: got {name!r}{nearest(name, _GOALS)} (of: {', '.join(_GOALS)})")
        if not 0 < limit < math.inf:
            raise ConfigError(f"goodput: {name}: got {limit:g}, expected milliseconds above 0")


def check_percentiles(percentiles: Sequence[float]) -> None:
    """Raise ConfigError unless each is a percentage."""
    for percentile in percentiles:
        if not 0 <= percentile <= 100:
            raise ConfigError(f"metric_percentiles: got {percentile:g}, expected numbers in [0, 100]")


def summarise(
    run: Run, *, percentiles: Sequence[float] = PERCENTILES, goodput: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """All numbers. Where nothing was measured they are 0, as in vLLM; where requests name tenants, `tenants` has those of each.

    `kv_cache_usage_perc` is the share of pages with an owner, `kv_waste` the share of the token places in such pages that hold no
    token, `kv_saved_by_sharing` the share of the pages without sharing that there are not with it, `device_busy` the share of the
    time with a step running; means are over the time of steps.

    Args:
      goodput: milliseconds that a request may take at most to count as good: ttft, tpot, e2el.
    """
    goals = goodput or {}
    check_goodput(goals)
    check_percentiles(percentiles)
    lives, seconds = run.lives, run.duration_s or 1.0
    numbers = {
        "duration": run.duration_s,
        **_requests(lives, seconds, percentiles, goals),
        **spread("itl", [(gap * 1e3, count) for gap, count in run.gaps.items()], percentiles),
        "failed": len(run.refused),
        "max_output_tokens_per_s": max(run.tokens_in_second.values(), default=0),
        "max_concurrent_requests": run.peak_requests,
        **_pool(run),
    }
    tenants = sorted({life.tenant or "" for life in lives})
    if tenants not in ([], [""]):
        groups = {tenant: [life for life in lives if (life.tenant or "") == tenant] for tenant in tenants}
        numbers["tenants"] = {tenant: _requests(group, seconds, percentiles, goals) for tenant, group in groups.items()}
    return numbers


def _requests(lives: Sequence[Life], seconds: float, percentiles: Sequence[float], goals: Mapping[str, float]) -> dict[str, Any]:
    """What can be said of some requests alone."""
    num_output, num_input = sum(life.num_output for life in lives), sum(life.num_prompt for life in lives)
    numbers: dict[str, Any] = {
        "completed": len(lives),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(lives) / seconds,
        "request_goodput": sum(_is_good(life, goals) for life in lives) / seconds if goals else None,
        "output_throughput": num_output / seconds,
        "total_token_throughput": (num_input + num_output) / seconds,
    }
    for name in _GOALS:
        several = lives if name != "tpot" else [life for life in lives if life.num_output > life.n]
        numbers |= spread(name, [(_milliseconds(life, name), 1) for life in several], percentiles)
    return numbers


def _pool(run: Run) -> dict[str, Any]:
    scheduler, occupancy = run.scheduler, run.occupancy
    busy = occupancy.seconds or 1.0
    cache, num_pages = scheduler.pool.cache, scheduler.pool.num_usable
    queried = cache.num_queried_tokens if cache is not None else 0
    return {
        "num_gpu_blocks": num_pages,
        "kv_cache_usage_perc": occupancy.page_seconds / busy / num_pages,
        "max_kv_cache_usage_perc": occupancy.peak_pages / num_pages,
        "kv_waste": waste(occupancy.held_seconds, occupancy.allocated_seconds),
        "kv_saved_by_sharing": waste(occupancy.page_seconds, occupancy.lone_page_seconds),
        "num_preemptions": scheduler.num_preemptions,
        "prefix_cache_queries": queried,
        "prefix_cache_hits": cache.num_hit_tokens if cache is not None else 0,
        "num_steps": run.num_steps,
        "num_scheduled_tokens": run.num_scheduled_tokens,
        "mean_running_requests": occupancy.row_seconds / busy,
        "max_running_requests": occupancy.peak_rows,
        "device_busy": occupancy.seconds / run.duration_s if run.duration_s else 0.0,
    }


def waste(held: float, allocated: float) -> float:
    """The share of allocated places without a token; 0 where none was allocated."""
    return 1 - held / allocated if allocated else 0.0


def _milliseconds(life: Life, metric: str) -> float:
    if metric == "ttft":
        return (life.first_token_s - life.arrival_s) * 1e3
    if metric == "e2el":
        return (life.last_token_s - life.arrival_s) * 1e3
    num_gaps = life.num_output / life.n - 1  # its outputs have as many tokens each
    return (life.last_token_s - life.first_token_s) / num_gaps * 1e3 if num_gaps else 0.0


def _is_good(life: Life, goals: Mapping[str, float]) -> bool:
    return all(_milliseconds(life, metric) <= limit for metric, limit in goals.items())


def spread(name: str, weighted: list[tuple[float, int]], percentiles: Sequence[float]) -> dict[str, float]:
    """Mean, median, deviation and percentiles of values that occur so many times each, under vLLM's keys for milliseconds."""
    count = sum(times for _, times in weighted)
    mean = math.fsum(value * times for value, times in weighted) / count if count else 0.0
    variance = math.fsum((value - mean) ** 2 * times for value, times in weighted) / count if count else 0.0
    wanted = (50.0, *percentiles)
    median, *others = percentiles_of(weighted, wanted)
    keys = [f"p{percentile:g}_{name}_ms" for percentile in percentiles]
    found = {f"mean_{name}_ms": mean, f"median_{name}_ms": median, f"std_{name}_ms": math.sqrt(variance)}
    return found | dict(zip(keys, others, strict=True))


def percentiles_of(weighted: Iterable[tuple[float, int]], wanted: Sequence[float]) -> list[float]:
    """Percentiles of values that occur so many times each, by straight lines between neighbours, as numpy's; 0 without values."""
    values, ends, total = [], [], 0
    for value, times in sorted(weighted):
        total += times
        values.append(value)
        ends.append(total)
    if not values:
        return [0.0] * len(wanted)

    def at(index: int) -> float:
        """The value at this place of the sorted list in which each stands as often as it occurs."""
        low, high = 0, len(ends) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if ends[middle] > index else (middle + 1, high)
        return values[low]

    found = []
    for percentile in wanted:
        place = percentile / 100 * (total - 1)
        below = math.floor(place)
        lower, upper = at(below), at(min(below + 1, total - 1))
        found.append(lower + (upper - lower) * (place - below))
    return found


def table(numbers: Mapping[str, Any], goodput: Mapping[str, float] | None = None) -> str:
    """The numbers for a reader."""
    share = "{:.1%}".format
    lines = [
        ("requests completed", f"{numbers['completed']:,}"),
        ("requests refused", f"{numbers['failed']:,}"),
        ("duration", f"{numbers['duration']:,.2f} s"),
        ("tokens in, out", f"{numbers['total_input_tokens']:,}, {numbers['total_output_tokens']:,}"),
        ("request throughput", f"{numbers['request_throughput']:,.2f} /s"),
        ("output throughput", f"{numbers['output_throughput']:,.1f} tokens/s (peak {numbers['max_output_tokens_per_s']:,})"),
        ("total throughput", f"{numbers['total_token_throughput']:,.1f} tokens/s"),
        ("running requests", f"{numbers['mean_running_requests']:.1f} (peak {numbers['max_running_requests']:,})"),
        ("device busy", share(numbers["device_busy"])),
        ("pages in use", f"{share(numbers['kv_cache_usage_perc'])} (peak {share(numbers['max_kv_cache_usage_perc'])})"),
        ("waste of allocated places", f"{numbers['kv_waste']:.2%}"),
        ("preemptions", f"{numbers['num_preemptions']:,}"),
    ]
    if numbers["kv_saved_by_sharing"] > 0:
        lines.append(("pages saved by sharing", share(numbers["kv_saved_by_sharing"])))
    if numbers["prefix_cache_hits"]:
        lines.append(("prefix cache hits", share(numbers["prefix_cache_hits"] / numbers["prefix_cache_queries"])))
    if goodput:
        goals = ", ".join(f"{name} <= {limit:g} ms" for name, limit in goodput.items())
        good = numbers["request_goodput"] / numbers["request_throughput"] if numbers["completed"] else 0.0
        lines.append(("goodput", f"{numbers['request_goodput']:,.2f} /s, {share(good)} of requests ({goals})"))
    # p50 is the median, which vLLM reports under both names.
    names = [key.removesuffix("_ttft_ms") for key in numbers if key.endswith("_ttft_ms")]
    names = [name for name in names if name != "p50"]
    head = f"{'milliseconds':26}" + "".join(f"{name:>11}" for name in names)
    rows = [
        f"{words:26}" + "".join(f"{numbers[f'{name}_{metric}_ms']:11,.2f}" for name in names) for metric, words in METRICS.items()
    ]
    if "tenants" in numbers:
        rows += ["", _tenants(numbers["tenants"])]
    return "\n".join([*(f"{name:26} {value}" for name, value in lines), "", head, *rows])


def _tenants(tenants: Mapping[str, Mapping[str, Any]]) -> str:
    rows: list[tuple[str, ...]] = [("tenant", "requests", "tokens out", "mean ttft", "median", "mean tpot", "mean e2el")]
    for name, numbers in tenants.items():
        times = (numbers[f"{key}_ms"] for key in ("mean_ttft", "median_ttft", "mean_tpot", "mean_e2el"))
        counts = (f"{numbers['completed']:,}", f"{numbers['total_output_tokens']:,}")
        rows.append((name or "(none)", *counts, *(f"{time:,.2f}" for time in times)))
    return "\n".join(f"{row[0][:26]:26}" + "".join(f"{cell:>11}" for cell in row[1:]) for row in rows)
