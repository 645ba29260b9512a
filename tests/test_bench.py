"""The benchmarks measure what they say: the hits that were asked for, parts that add up, and no trace of the clock afterwards."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from jaxpaged.bench import prefix_cache, scheduling
from jaxpaged.bench.stopwatch import Stopwatch
from jaxpaged.engine import Engine
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


@pytest.mark.parametrize("main", [prefix_cache.main, scheduling.main])
def test_nothing_cannot_be_measured(main, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        main(["--rounds", "0"])
    assert "of at least 1" in capsys.readouterr().err
