"""The report: each number beside numpy's or a pencil's."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from jaxpaged.config import ConfigError
from jaxpaged.host.pages import PagePool
from jaxpaged.host.plan import Limits
from jaxpaged.host.scheduler import Scheduler
from jaxpaged.simulate.report import METRICS, percentiles_of, summarise, table
from jaxpaged.simulate.run import Life, Occupancy, Run


def a_run(*lives: Life, **other) -> Run:
    found = Run(Scheduler(PagePool(11), Limits(16, 8, 64, 16, 4)), list(lives), **other)
    found.duration_s = max((life.last_token_s for life in lives), default=0.0)
    return found


# TTFT 1, 2 and 4 s; TPOT 0.5, none and 2 s.
LIVES = (
    Life(0.0, 10, 5, 1.0, 3.0),
    Life(1.0, 20, 1, 3.0, 3.0),
    Life(4.0, 30, 2, 8.0, 10.0),
)
GAPS: Counter[float] = Counter({0.5: 4, 2.0: 1})


@pytest.mark.parametrize("seed", range(5))
def test_percentiles_are_numpys(seed: int):
    rng = random.Random(seed)
    weighted = [(rng.choice((rng.random(), 1.0, 2.0)), rng.randint(1, 5)) for _ in range(rng.randint(1, 40))]
    wanted = [0, 1, 25, 50, 90, 95, 99, 99.9, 100]
    values = [value for value, times in weighted for _ in range(times)]
    assert percentiles_of(weighted, wanted) == pytest.approx(np.percentile(values, wanted).tolist())
    assert percentiles_of([], wanted) == [0.0] * len(wanted)


def test_numbers_by_hand():
    numbers = summarise(a_run(*LIVES, gaps=GAPS, refused=["why"], peak_requests=3), goodput={"ttft": 2000, "tpot": 600})
    assert (numbers["completed"], numbers["failed"], numbers["duration"]) == (3, 1, 10.0)
    assert (numbers["total_input_tokens"], numbers["total_output_tokens"]) == (60, 8)
    assert (numbers["request_throughput"], numbers["output_throughput"], numbers["total_token_throughput"]) == (0.3, 0.8, 6.8)
    assert numbers["request_goodput"] == 0.2  # one token has no time per token that could be too long
    assert numbers["mean_ttft_ms"] == pytest.approx(7000 / 3) and numbers["median_ttft_ms"] == 2000
    assert numbers["std_ttft_ms"] == pytest.approx(np.std([1000, 2000, 4000]))
    assert numbers["mean_tpot_ms"] == 1250 and numbers["mean_itl_ms"] == 800 and numbers["median_itl_ms"] == 500
    assert numbers["mean_e2el_ms"] == pytest.approx(11000 / 3) and numbers["p99_itl_ms"] == pytest.approx(1940)


@pytest.mark.parametrize(
    ("goals", "good"), [({"ttft": 1000}, 1), ({"ttft": 999}, 0), ({"tpot": 500}, 2), ({"e2el": 3000}, 2), ({"e2el": 6000}, 3)]
)
def test_goodput_counts_requests_within_their_limits(goals: dict[str, float], good: int):
    assert summarise(a_run(*LIVES), goodput=goals)["request_goodput"] == pytest.approx(good / 10)


def test_names_are_vllms():
    numbers = summarise(a_run(*LIVES), percentiles=(50, 99, 99.9))
    ours = {"duration", "completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput"}
    ours |= {"request_goodput", "output_throughput", "total_token_throughput", "max_output_tokens_per_s"}
    ours |= {"max_concurrent_requests", "num_preemptions", "kv_cache_usage_perc"}
    for metric in METRICS:
        ours |= {f"{name}_{metric}_ms" for name in ("mean", "median", "std", "p50", "p99", "p99.9")}
    assert ours <= numbers.keys() and not any(key.startswith("p90") for key in numbers)


def test_the_pool_is_a_mean_over_time():
    busy = Occupancy()
    busy.add(1.0, num_pages=2, num_held=20, num_allocated=32, num_rows=1)
    busy.add(3.0, num_pages=4, num_held=60, num_allocated=64, num_rows=2)
    numbers = summarise(a_run(*LIVES, occupancy=busy))
    assert numbers["kv_cache_usage_perc"] == pytest.approx((2 * 1 + 4 * 3) / 4 / 10)
    assert numbers["max_kv_cache_usage_perc"] == 0.4 and numbers["max_running_requests"] == 2
    assert numbers["kv_waste"] == pytest.approx(1 - (20 + 180) / (32 + 192))
    assert numbers["mean_running_requests"] == pytest.approx(7 / 4) and numbers["device_busy"] == pytest.approx(0.4)


def test_tenants_are_told_apart():
    lives = [dataclasses.replace(life, tenant=tenant) for life, tenant in zip(LIVES, ("a", None, "a"), strict=True)]
    numbers = summarise(a_run(*lives), goodput={"ttft": 1000})
    assert numbers["tenants"].keys() == {"", "a"}
    found = numbers["tenants"]["a"]
    assert (found["completed"], found["total_output_tokens"], found["total_input_tokens"]) == (2, 7, 40)
    assert found["mean_ttft_ms"] == 2500 and found["mean_tpot_ms"] == 1250 and found["request_goodput"] == 0.1
    assert numbers["tenants"][""]["median_ttft_ms"] == 2000
    for key in ("completed", "request_throughput", "request_goodput", "output_throughput", "total_token_throughput"):
        assert numbers[key] == pytest.approx(sum(tenant[key] for tenant in numbers["tenants"].values()))
    shown = table(numbers).splitlines()[-3:]
    assert shown[0].startswith("tenant ") and "(none)" in shown[1] and "2,500.00   2,500.00   1,250.00   4,500.00" in shown[2]
    assert "tenants" not in summarise(a_run(*LIVES))


def test_nobody_came():
    numbers = summarise(a_run())
    assert numbers["completed"] == numbers["p99_ttft_ms"] == numbers["request_throughput"] == 0
    assert "requests completed" in table(numbers)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"goodput": {"tfft": 1}}, "goodput: got 'tfft', did you mean 'ttft'"),
        ({"goodput": {"itl": 1}}, "of: ttft, tpot, e2el"),
        ({"goodput": {"ttft": 0}}, "goodput: ttft: got 0"),
        ({"percentiles": (101,)}, "metric_percentiles: got 101"),
    ],
)
def test_questions_out_of_range(options: dict, problem: str):
    with pytest.raises(ConfigError, match=problem):
        summarise(a_run(*LIVES), **options)


def test_the_table_tells_what_was_asked(tmp_path: Path):
    goals = {"ttft": 2000.0, "tpot": 600.0}
    shown = table(summarise(a_run(*LIVES, gaps=GAPS), percentiles=(50, 99.9), goodput=goals), goals)
    assert "0.20 /s, 66.7% of requests (ttft <= 2000 ms, tpot <= 600 ms)" in shown
    assert "p99.9" in shown and "p90" not in shown
    assert len({len(line) for line in shown.splitlines()[-5:]}) == 1  # columns stand under each other
