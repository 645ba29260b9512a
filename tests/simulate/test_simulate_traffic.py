"""Traffic: distributions have the means and spreads they are named for, and files are read or refused in one line."""

from __future__ import annotations

import itertools
import logging
import math
import random
import statistics
from pathlib import Path

import pytest

from jaxpaged.config import ConfigError
from jaxpaged.simulate.arrivals import VOCAB_SIZE, Arrival, Ramp, arrival_times, random_traffic
from jaxpaged.simulate.lengths import DATASETS, Fixed, Lengths, LogNormal, Uniform
from jaxpaged.simulate.trace import read_trace

TEN = Fixed(10)


def gaps(**options) -> list[float]:
    times = [arrival.arrival_s for arrival in random_traffic(20_000, TEN, TEN, **options)]
    return [after - before for before, after in itertools.pairwise(times)]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_rate_and_the_burstiness(burstiness: float):
    found = gaps(request_rate=5.0, burstiness=burstiness, seed=1)
    assert statistics.fmean(found) == pytest.approx(0.2, rel=0.05)
    # A gamma distribution of shape k has a coefficient of variation of 1 / sqrt(k).
    assert statistics.pstdev(found) / statistics.fmean(found) == pytest.approx(burstiness**-0.5, rel=0.05)


def test_another_rate_is_the_same_requests_closer_together():
    slow, fast = (list(random_traffic(50, *DATASETS["alpaca"], request_rate=rate, seed=3)) for rate in (1.0, 2.0))
    assert [(a.num_prompt, a.num_output) for a in slow] == [(a.num_prompt, a.num_output) for a in fast]
    assert [a.arrival_s for a in slow] == pytest.approx([2 * a.arrival_s for a in fast])
    assert slow[0].arrival_s == 0.0


def test_a_seed_is_one_traffic_and_another_seed_another():
    one, same, other = (list(random_traffic(50, *DATASETS["sharegpt"], request_rate=2, seed=seed)) for seed in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize("ramp", [Ramp("linear", 0.0, 8.0), Ramp("exponential", 0.5, 32.0), Ramp("linear", 3.0, 3.0)])
def test_a_ramp_grows_from_its_first_rate_to_its_last(ramp: Ramp):
    count = 40_000
    times = list(arrival_times(count, ramp, 1.0, random.Random(2)))
    found = [after - before for before, after in itertools.pairwise(times)]
    for first in range(0, count - 4000, 4000):
        places = range(first + 1, first + 4001)
        if ramp.strategy == "linear":
            rates = [ramp.start_rps + (ramp.end_rps - ramp.start_rps) * place / (count - 1) for place in places]
        else:
            rates = [ramp.start_rps * (ramp.end_rps / ramp.start_rps) ** (place / (count - 1)) for place in places]
        # Gap times rate is exponential with a mean of 1, whatever the rate.
        assert statistics.fmean(gap * rate for gap, rate in zip(found[first:], rates, strict=False)) == pytest.approx(1, rel=0.06)
    assert times[0] == 0.0 and (ramp.rate(0, count), ramp.rate(count - 1, count)) == (ramp.start_rps, pytest.approx(ramp.end_rps))
    steady = random_traffic(50, TEN, TEN, request_rate=3.0, seed=4)
    same = arrival_times(50, Ramp("linear", 3.0, 3.0), 1.0, random.Random("gaps 4"))
    assert [arrival.arrival_s for arrival in steady] == list(same)


def test_an_infinite_rate_is_all_at_once():
    assert {arrival.arrival_s for arrival in random_traffic(9, TEN, TEN)} == {0.0}


@pytest.mark.parametrize(
    ("lengths", "mean"),
    [
        (DATASETS["sharegpt"][0], 161.31),
        (DATASETS["sharegpt"][1], 337.99),
        (DATASETS["alpaca"][0], 19.31),
        (DATASETS["alpaca"][1], 58.45),
        (Uniform(10, 20), 15.0),
        (Fixed(7), 7.0),
    ],
)
def test_lengths_have_their_mean(lengths: Lengths, mean: float):
    rng = random.Random(5)
    assert statistics.fmean(lengths.draw(rng) for _ in range(40_000)) == pytest.approx(mean, rel=0.02)


def test_lengths_keep_their_bounds():
    rng = random.Random(5)
    assert {Uniform(3, 5).draw(rng) for _ in range(200)} == {3, 4, 5}
    assert min(LogNormal(1.0, 3.0).draw(rng) for _ in range(2000)) == 1
    drawn = sorted(LogNormal(1000.0, 1.0).draw(rng) for _ in range(20_000))
    assert drawn[len(drawn) // 2] == pytest.approx(1000 * math.exp(-0.5), rel=0.05)


def test_requests_share_their_prefix_and_nothing_else():
    a, b, c = (Arrival(0.0, 6, 1, prefix_id=prefix, prefix_len=4) for prefix in (1, 1, 2))
    one, two, three = a.prompt_token_ids(1), b.prompt_token_ids(2), c.prompt_token_ids(3)
    assert len(one) == 6 and one[:4] == two[:4] and not set(one[4:]) & set(two[4:]) and not set(one) & set(three)
    assert len(Arrival(0.0, 3, 1, prefix_len=9).prompt_token_ids(1)) == 3
    assert max(one + three) < VOCAB_SIZE


def test_prefixes_are_added_and_drawn():
    found = list(random_traffic(300, TEN, TEN, prefix_len=100, num_prefixes=3))
    assert {arrival.num_prompt for arrival in found} == {110} and {arrival.prefix_id for arrival in found} == {0, 1, 2}
    assert {arrival.num_prompt for arrival in random_traffic(3, TEN, TEN, max_model_len=8)} == {7}


@pytest.mark.parametrize(
    "options",
    [{"num_prompts": 0}, {"request_rate": 0.0}, {"request_rate": math.nan}, {"burstiness": math.inf}, {"num_prefixes": 0}],
    ids=str,
)
def test_traffic_out_of_range(options: dict):
    with pytest.raises(ConfigError, match=next(iter(options))):
        random_traffic(**{"num_prompts": 1, "input_len": TEN, "output_len": TEN, **options})


@pytest.mark.parametrize(
    ("kind", "values"), [(Fixed, (0,)), (Uniform, (5, 4)), (Uniform, (0, 4)), (LogNormal, (0.5, 1)), (LogNormal, (9, -1))]
)
def test_lengths_out_of_range(kind, values: tuple):
    with pytest.raises(ConfigError, match="expected"):
        kind(*values)


# --- traces ------------------------------------------------------------------------------------------------------

OURS = "arrival_s,prompt_tokens,output_tokens,tenant,priority,prefix_id,prefix_tokens\n"
JSONL = (
    '{"arrival_s": 5, "prompt_tokens": 7, "output_tokens": 3, "tenant": "b"}\n\n'
    '{"arrival_s": 2.5, "prompt_tokens": 9, "output_tokens": 1, "priority": -1, "prefix_id": 4, "prefix_tokens": 8, "x": 1}\n'
)


def write(tmp_path: Path, text: str, name: str = "trace.csv") -> str:
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def test_a_csv_trace(tmp_path: Path):
    text = OURS + "3.5,9,2,acme,1,system,8\n3,7,5,,,,\n10,9,2,,,other,4\n11,9,2,,,system,8\n"
    assert read_trace(write(tmp_path, text)) == [
        Arrival(0.0, 7, 5, prefix_id=1),
        Arrival(0.5, 9, 2, "acme", 1, 0, 8),
        Arrival(7.0, 9, 2, prefix_id=2, prefix_len=4),
        Arrival(8.0, 9, 2, prefix_id=0, prefix_len=8),
    ]


def test_a_jsonl_trace(tmp_path: Path):
    first, second = read_trace(write(tmp_path, JSONL, "trace.jsonl"))
    assert (first.arrival_s, first.num_prompt, first.priority, first.prefix_len) == (0.0, 9, -1, 8)
    assert (second.arrival_s, second.num_prompt, second.tenant, second.prefix_len) == (2.5, 7, "b", 0)


def test_public_traces_are_read_as_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    azure = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:16:50.9951690,396,109\n"
    found = read_trace(write(tmp_path, azure))
    assert [(a.num_prompt, a.num_output) for a in found] == [(374, 44), (396, 109)]
    assert [a.arrival_s for a in found] == pytest.approx([0.0, 64.314579])
    burst = (
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,472,18,490,API log\n9,GPT-4,5,0,5,x\n"
    )
    with caplog.at_level(logging.WARNING, "jaxpaged"):
        assert read_trace(write(tmp_path, burst)) == [Arrival(0.0, 472, 18)]
    assert "1 requests without prompt or answer are left out" in caplog.text


@pytest.mark.parametrize(
    ("text", "name", "problem"),
    [
        ("", "a.csv", "no requests"),
        (OURS, "a.csv", "no requests"),
        (
            "arrival_s,promt_tokens,output_tokens\n1,2,3\n",
            "a.csv",
            "a.csv:2: column prompt_tokens is missing, did you mean 'promt",
        ),
        (OURS + "1,2\n", "a.csv", "a.csv:2: column output_tokens is missing"),
        (OURS + "1,2,3\n1,x,3\n", "a.csv", "a.csv:3: prompt_tokens: got 'x', expected a whole number"),
        (OURS + "1,2,-3\n", "a.csv", "output_tokens: got '-3'"),
        (OURS + "nan,2,3\n", "a.csv", "arrival_s: got 'nan', expected a finite"),
        (OURS + "soon,2,3\n", "a.csv", "arrival_s: got 'soon', expected seconds, or a date"),
        (OURS + "1,2,3,a,high\n", "a.csv", "priority: got 'high'"),
        ("{\n", "a.jsonl", "not a JSONL file"),
        ("[1]\n", "a.jsonl", "a.jsonl:1: got list, expected an object"),
        ('{"arrival_s": true, "prompt_tokens": 1, "output_tokens": 1}\n', "a.jsonl", "arrival_s: got True"),
        ('{"arrival_s": 1, "prompt_tokens": 1.5, "output_tokens": 1}\n', "a.jsonl", "prompt_tokens: got 1.5"),
    ],
)
def test_a_damaged_trace_is_refused(text: str, name: str, problem: str, tmp_path: Path):
    with pytest.raises(ConfigError) as caught:
        read_trace(write(tmp_path, text, name))
    assert problem in str(caught.value) and "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path):
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe\x00")
    for name in ("a.csv", "a.jsonl", "missing.csv"):
        with pytest.raises(ConfigError, match=name):
            read_trace(str(tmp_path / name))
