"""The numbers of a server measured from outside, under the keys of vLLM's `bench serve`, and their table.

The time between tokens is that between chunks, as in vLLM. Where chunks hold several tokens, `mean_tokens_per_chunk` says so, and
time per output token (from the first to the last, over the number of tokens less one) is the one to read.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpaged.bench.serve import Run, Seen
from jaxpaged.config import ConfigError, nearest
from jaxpaged.simulate.report import METRICS, percentiles_of, spread

LATE_MS = 10.0  # the 99th percentile of the client's own lateness from which its numbers are not to be trusted
_MANY_PER_CHUNK = 1.05


def check_metrics(names: Sequence[str]) -> None:
    """Raise ConfigError unless each is a metric."""
    for name in names:
        if name not in METRICS:
            raise ConfigError(f"percentile_metrics: got {name!r}{nearest(name, tuple(METRICS))} (of: {', '.join(METRICS)})")


def summarise(
    run: Run, *, metrics: Sequence[str], percentiles: Sequence[float], goodput: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """All numbers; 0 where nothing was measured, as in vLLM. Those of the client itself begin with `client_`."""
    goals, seconds = goodput or {}, max(run.ended_s - run.started_s, 1e-9)
    good = [seen for seen in run.seen if seen.error is None]
    num_input, num_output = sum(seen.num_prompt for seen in good), sum(seen.num_output for seen in good)
    failed = Counter(seen.error for seen in run.seen if seen.error is not None)
    num_chunks = sum(len(seen.tokens) for seen in good)
    numbers: dict[str, Any] = {
        "duration": run.ended_s - run.started_s,
        "completed": len(good),
        "failed": sum(failed.values()),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(good) / seconds,
        "request_goodput": sum(_is_good(seen, goals) for seen in good) / seconds if goals else None,
        "output_throughput": num_output / seconds,
        "total_token_throughput": (num_input + num_output) / seconds,
        "max_output_tokens_per_s": _busiest_second(good),
        "max_concurrent_requests": _most_at_once(good),
    }
    for name in metrics:
        times = [(value * 1e3, 1) for seen in good for value in times_s(seen, name)]
        numbers |= spread(name, times, percentiles)
    late = percentiles_of([(seen.late_s * 1e3, 1) for seen in run.seen], (50.0, 99.0, 100.0))
    beats = percentiles_of([(beat * 1e3, 1) for beat in run.beats_s], (99.0, 100.0))
    return numbers | {
        "failed_by_reason": dict(failed.most_common()),
        "num_interrupted": run.num_asked - len(run.seen),
        "mean_tokens_per_chunk": num_output / num_chunks if num_chunks else 0.0,
        "tokens_counted_by_chunk": bool(good) and all(seen.is_counted for seen in good),
        **dict(zip(("client_median_late_ms", "client_p99_late_ms", "client_max_late_ms"), late, strict=True)),
        **dict(zip(("client_p99_loop_lag_ms", "client_max_loop_lag_ms"), beats, strict=True)),
    }


def details(run: Run) -> dict[str, Any]:
    """vLLM's lists, one entry a request; in the order in which they ended."""
    return {
        "input_lens": [seen.num_prompt for seen in run.seen],
        "output_lens": [seen.num_output for seen in run.seen],
        "start_times": [seen.sent_s for seen in run.seen],
        "ttfts": [seen.ttft_s if seen.error is None else 0.0 for seen in run.seen],
        "itls": [seen.gaps_s if seen.error is None else [] for seen in run.seen],
        "generated_texts": [seen.text for seen in run.seen],
        "errors": [seen.message or seen.error or "" for seen in run.seen],
    }


def times_s(seen: Seen, metric: str) -> list[float]:
    """What a request adds to a metric, by vLLM's definitions."""
    if metric == "ttft":
        return [seen.ttft_s]
    if metric == "e2el":
        return [seen.end_s - seen.sent_s]
    if metric == "itl":
        return seen.gaps_s
    return [(seen.end_s - seen.sent_s - seen.ttft_s) / (seen.num_output - 1)] if seen.num_output > 1 else []


def _is_good(seen: Seen, goals: Mapping[str, float]) -> bool:
    return all(value * 1e3 <= limit for name, limit in goals.items() for value in times_s(seen, name))


def _busiest_second(good: Sequence[Seen]) -> float:
    """Tokens in the second with the most of them, counted from the first request on."""
    started_s = min((seen.sent_s for seen in good), default=0.0)
    in_second: defaultdict[int, float] = defaultdict(float)
    for seen in good:
        # Where chunks are not counted, each has its share of what the whole answer has.
        share = seen.num_output / sum(count for _, count in seen.tokens)
        for at_s, count in seen.tokens:
            in_second[int(at_s - started_s)] += count * share
    return max(in_second.values(), default=0.0)


def _most_at_once(good: Sequence[Seen]) -> int:
    edges = sorted([(seen.sent_s, 1) for seen in good] + [(seen.end_s, -1) for seen in good])
    most = now = 0
    for _, change in edges:
        now += change
        most = max(most, now)
    return most


def table(numbers: Mapping[str, Any], metrics: Sequence[str], goodput: Mapping[str, float] | None = None) -> str:
    """The numbers for a reader."""
    lines = [
        ("requests completed", f"{numbers['completed']:,}"),
        ("requests failed", f"{numbers['failed']:,}"),
        *((f"  {reason}", f"{count:,}") for reason, count in numbers["failed_by_reason"].items()),
        ("duration", f"{numbers['duration']:,.2f} s"),
        ("tokens in, out", f"{numbers['total_input_tokens']:,}, {numbers['total_output_tokens']:,}"),
        ("request throughput", f"{numbers['request_throughput']:,.2f} /s"),
        ("output throughput", f"{numbers['output_throughput']:,.1f} tokens/s (peak {numbers['max_output_tokens_per_s']:,.0f})"),
        ("total throughput", f"{numbers['total_token_throughput']:,.1f} tokens/s"),
        ("requests at a time", f"at most {numbers['max_concurrent_requests']:,}"),
        (
            "tokens in a chunk",
            f"{numbers['mean_tokens_per_chunk']:.2f}{'' if numbers['tokens_counted_by_chunk'] else ' by usage'}",
        ),
        (
            "the client itself",
            f"p99 {numbers['client_p99_late_ms']:.2f} ms late, {numbers['client_p99_loop_lag_ms']:.2f} ms slow",
        ),
    ]
    if numbers["num_interrupted"]:
        lines.insert(2, ("requests interrupted", f"{numbers['num_interrupted']:,}"))
    if goodput:
        goals = ", ".join(f"{name} <= {limit:g} ms" for name, limit in goodput.items())
        good = numbers["request_goodput"] / numbers["request_throughput"] if numbers["completed"] else 0.0
        lines.append(("goodput", f"{numbers['request_goodput']:,.2f} /s, {good:.1%} of requests ({goals})"))
    rows = []
    for metric in metrics:
        keys = [key for key in numbers if key.endswith(f"_{metric}_ms") and not key.startswith("client_")]
        if not rows:
            rows = ["", f"{'milliseconds':26}" + "".join(f"{key.removesuffix(f'_{metric}_ms'):>11}" for key in keys)]
        rows.append(f"{METRICS[metric]:26}" + "".join(f"{numbers[key]:11,.2f}" for key in keys))
    return "\n".join([*(f"{name:26} {value}" for name, value in lines), *rows])


def warnings(numbers: Mapping[str, Any], *, has_rate: bool) -> list[str]:
    """What a reader has to know before believing the numbers. `has_rate`: they were not sent all at once."""
    found, advice = [], "give it a core of its own, or several clients a part of the rate each"
    late, lag = numbers["client_p99_late_ms"], numbers["client_p99_loop_lag_ms"]
    if has_rate and late > LATE_MS:
        found.append(f"the client sent its requests up to {late:.1f} ms behind its own schedule (p99): {advice}")
    if lag > LATE_MS:
        found.append(f"the client itself was {lag:.1f} ms slow (p99), and its times hold that too: {advice}")
    if numbers["mean_tokens_per_chunk"] > _MANY_PER_CHUNK:
        many = f"{numbers['mean_tokens_per_chunk']:.2f} tokens came in a chunk on average"
        found.append(f"{many}: inter-token latency is between chunks, read the time per output token")
    return found
