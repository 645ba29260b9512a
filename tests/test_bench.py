"""The benchmarks measure what they say: the hits that were asked for, parts that add up, and no trace of the clock afterwards."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxpaged.bench import batch_invariant, prefix_cache, scheduling, speculation, swap
from jaxpaged.bench.ratios import spread
from jaxpaged.bench.stopwatch import Stopwatch
from jaxpaged.engine import Engine
from jaxpaged.host.pages import PagePool
from jaxpaged.host.preemption import SwapCosts
from jaxpaged.llm import LLM

SMALL = {"max_num_seqs": 4, "max_model_len": 128, "max_num_batched_tokens": 64}


def engine(**options) -> Engine:
    return LLM(**SMALL, **options, skip_tokenizer_init=True, use_tqdm_on_load=False).engine


@pytest.fixture(scope="module")
def plain() -> Iterator[Engine]:
    with engine(async_scheduling=False) as found:
        yield found


# --- the clock ---------------------------------------------------------------------------------------------------


class Thing:
    def __init__(self, watch: Stopwatch):
        self.now, self.watch = 0.0, watch
        self.own = lambda: self.spend(4.0)

    def spend(self, seconds: float) -> float:
        self.now += seconds
        return seconds

    def fail(self) -> None:
        self.spend(1.0)
        raise ValueError("no")

    def later(self):
        self.spend(2.0)
        return lambda: self.spend(8.0)


def test_a_stopwatch_adds_up_and_leaves_no_trace():
    watch = Stopwatch()
    thing = Thing(watch)
    watch.clock = lambda: thing.now
    before = dict(vars(thing))
    with watch:
        watch.watch(thing, "spend", "spend")
        watch.watch(thing, "fail", "fail")
        watch.watch(thing, "own", "own")
        watch.watch(thing, "later", "later", lambda call: watch.timed(call, "wait"))
        assert thing.spend(0.5) == 0.5 and thing.own() == 4.0
        with pytest.raises(ValueError, match="no"):
            thing.fail()
        thing.spend(100.0)
        wait = thing.later()
        thing.now += 50.0
        assert wait() == 8.0
    assert watch.seconds == {"spend": 0.5 + 4 + 1 + 100 + 2 + 8, "own": 4.0, "fail": 1.0, "later": 2.0, "wait": 8.0}
    assert vars(thing) == {**before, "now": thing.now} and "spend" not in vars(thing)


# --- batch invariance ---------------------------------------------------------------------------------------------


def test_prompts_and_decoding_count_apart(plain: Engine, monkeypatch: pytest.MonkeyPatch):
    """On a clock that moves by one in each step: a prompt of 16 takes one step, and each further token one."""
    step, clock = plain.step, iter(range(1000))
    now = [next(clock)]
    monkeypatch.setattr(plain, "step", lambda: (now.append(next(clock)), step())[1])
    monkeypatch.setattr(batch_invariant.time, "perf_counter", lambda: now[-1])
    prompts = [[seed + 1] * 16 for seed in range(2)]
    assert batch_invariant.take_turn(plain, prompts, 6) == {"prompt_tokens_per_s": 32, "new_tokens_per_s": 2}
    with pytest.raises(RuntimeError, match="raise --output-len"):
        batch_invariant.take_turn(plain, prompts, 1)
    while plain.has_unfinished:
        plain.step()
    rows = batch_invariant.compare({False: plain, True: plain}, [1, 2], rounds=2, length=16, num_tokens=4)
    assert [row["num_seqs"] for row in rows] == [1, 2]
    assert all(row[metric]["ratio"] == 1 for row in rows for metric in batch_invariant.METRICS)
    assert len(batch_invariant.table(rows).splitlines()) == 5


# --- the prefix cache --------------------------------------------------------------------------------------------


def test_prompts_hit_what_was_asked(plain: Engine):
    with engine(enable_prefix_caching=False) as without:
        sizes = {"rounds": 2, "num_prompts": 3, "num_alone": 2, "length": 96, "num_tokens": 4}
        turns, shares_inside = prefix_cache.compare({True: plain, False: without}, **sizes)
    for share, both in turns.items():
        assert [turn["hits"] for turn in both[False]] == [0.0, 0.0]
        # The prompts' own tokens of the page where the share ends are not known, and the last token is always computed.
        assert [turn["hits"] for turn in both[True]] == pytest.approx([round(share * 6) / 6] * 2)
        assert all(turn[metric] > 0 for turn in (*both[True], *both[False]) for metric in prefix_cache.METRICS)
    assert len(shares_inside) == 2 and all(0 < share < 0.5 for share in shares_inside)
    assert "record" not in vars(plain.pool.cache)
    rows = [prefix_cache.summary(both) for both in turns.values()]
    assert "50%" in prefix_cache.table(rows, shares_inside) and json.dumps(rows)


def test_a_ratio_is_of_neighbours_in_time():
    turns = {True: [{"ttft_ms": 1.0, "tokens_per_s": 30.0, "hits": 0.5}, {"ttft_ms": 20.0, "tokens_per_s": 3.0, "hits": 0.5}]}
    turns[False] = [{"ttft_ms": 2.0, "tokens_per_s": 10.0, "hits": 0.0}, {"ttft_ms": 40.0, "tokens_per_s": 1.0, "hits": 0.0}]
    found = prefix_cache.summary(turns)
    assert (found["ttft_ms"]["ratio"], found["tokens_per_s"]["ratio"]) == (0.5, 3.0)
    assert (found["ttft_ms"]["on"], found["tokens_per_s"]["off"], found["hits"]) == (10.5, 5.5, 0.5)


# --- scheduling --------------------------------------------------------------------------------------------------


def test_parts_of_a_step_add_up(plain: Engine):
    with engine(async_scheduling=True) as ahead:
        rows = scheduling.compare({False: plain, True: ahead}, [1, 4], rounds=1, length=20, num_tokens=12)
        assert not {"plan", "commit"} & vars(ahead.scheduler).keys() and "step" not in vars(ahead)
    assert [row["num_seqs"] for row in rows] == [1, 4]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["asynchronous"]["tokens_per_s"] / row["synchronous"]["tokens_per_s"])
        for name in scheduling.NAMES.values():
            found = row[name]
            assert sum(found[f"{part}_ms"] for part in scheduling.PARTS) == pytest.approx(found["step_ms"])
            assert all(found[f"{part}_ms"] > 0 for part in scheduling.PARTS)
            assert found["host_share"] == pytest.approx(1 - found["wait_ms"] / found["step_ms"])
            # A step of four sequences yields four tokens.
            assert found["tokens_per_s"] * found["step_ms"] / 1e3 == pytest.approx(row["num_seqs"])
    assert "asynchronous over synchronous" in scheduling.table(rows)


# --- recompute and swap ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiered() -> Iterator[Engine]:
    with swap.open_engine("draft", "float32", 72) as found:
        yield found


def test_a_sequence_comes_back_by_both_ways(
    tiered: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(swap, "open_engine", lambda *_: contextlib.nullcontext(tiered))
    sizes = ["--models", "draft", "--lengths", "24,72", "--rounds", "4"]
    assert swap.main([*sizes, "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    (report,) = found["reports"]
    assert [(row["tokens"], row["pages"], row["turns"]) for row in report["rows"]] == [(24, 1, 4), (72, 4, 4)]
    for row in report["rows"]:
        for way in swap.WAYS:
            assert 0 < row["device"][f"{way}_ms"] < row["request"][f"{way}_ms"]
        assert row["is_right"] == ((row["auto"] == "swap") == (row["request"]["ratio"] < 1))
    begins = float("inf") if report["auto_begins"] == "never" else report["auto_begins"]
    assert [row["auto"] for row in report["rows"]] == ["swap" if tokens >= begins else "recompute" for tokens in (16, 64)]
    assert report["auto_loss"] >= 0 and len(found["load_average"]) == 2
    assert "swap is sooner from" in capsys.readouterr().out


def test_pages_that_do_not_travel_are_no_measurement(tiered: Engine, monkeypatch: pytest.MonkeyPatch):
    tiered.add_request([1] * 23)
    tiered.step()
    for way in swap.WAYS:
        assert swap.come_back(tiered, way).keys() == {*swap.METRICS}
    assert "plan" not in vars(tiered.scheduler) and "submit" not in vars(tiered.runner)
    allocate = PagePool.allocate
    monkeypatch.setattr(PagePool, "allocate", lambda pool, count: None if count == pool.num_usable else allocate(pool, count))
    for way in swap.WAYS:  # nothing is evicted: the sequence finds its page where it was
        with pytest.raises(RuntimeError, match=f"{way}: pages saved"):
            swap.come_back(tiered, way)


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([0.9, 0.5, 0.1], "always"),
        ([0.9, 1.0, 1.5], "never"),
        ([1.5, 0.5, 0.1], 20),
        ([0.9, 1.1, 0.8], 30 + 10 / 3),
    ],
)
def test_where_swap_begins_to_win(ratios: list[float], expected: float | str):
    found = swap.crossover([10, 30, 40], ratios)
    assert found == (expected if isinstance(expected, str) else pytest.approx(expected))


def test_what_auto_would_have_done():
    costs = SwapCosts(token_s=1e-3, save_fixed_s=0.02, save_page_s=1e-3, load_fixed_s=0.02, load_page_s=1e-3)
    assert swap.auto_begins(100, 16, costs) == 48  # 0.04 + 0.002 n < 0.016 n from 3 pages on
    assert swap.auto_begins(40, 16, costs) == "never"
    turn = {"recompute": {"request": 1.0, "device": 1.0}, "swap": {"request": 2.0, "device": 2.0}}
    turns = [turn, turn]
    few, many = (swap.summary(length, turns, 16, costs) for length in (48, 49))
    assert (few["pages"], few["auto"], few["is_right"]) == (2, "recompute", True)
    assert (many["pages"], many["auto"], many["is_right"], many["is_clear"]) == (3, "swap", False, True)
    assert many["request"]["ratio"] == 2 and spread([3.0])["quartiles"] == [3.0, 3.0]


@pytest.mark.parametrize("main", [batch_invariant.main, prefix_cache.main, scheduling.main, swap.main])
def test_nothing_cannot_be_measured(main, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        main(["--rounds", "0"])
    assert "of at least 1" in capsys.readouterr().err


# --- speculation -------------------------------------------------------------------------------------------------


def test_where_speculation_stops_paying_is_told():
    def rows(*ratios: float) -> list[dict]:
        return [{"tokens": tokens, "ratio": ratio} for tokens, ratio in enumerate(ratios)]

    assert speculation.verdict(rows(9.0, 1.1, 1.4, 0.9, 0.8)) == "pays best with 2 (1.40), and no more from 3 on"
    assert speculation.verdict(rows(9.0, 1.1, 1.4)) == "pays best with 2 (1.40)"
    assert speculation.verdict(rows(1.0, 0.5, 0.7)) == "never pays: 0.70 at best, with 2"


def test_turns_with_and_without_speculation(plain: Engine):
    rows = speculation.compare({None: plain, 3: plain}, [[5, 6, 7], [8, 9]], 2, temperature=0.0, rounds=2, num_tokens=6)
    (row,) = [{"workload": "repeats", "method": "ngram", **row} for row in rows]
    assert row["tokens_per_step"] == 1.0 and row["acceptance"] == 0.0 and row["tokens"] == 3
    assert row["ratio"] > 0 and "ratio" in speculation.table([row]) and json.dumps(row)
