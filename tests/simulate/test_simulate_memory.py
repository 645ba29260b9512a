"""Contiguous against paged: the arithmetic by hand, and shares that cannot be more than the whole."""

from __future__ import annotations

import random

import pytest

from jaxpaged.config import ConfigError, EngineConfig
from jaxpaged.simulate import memory, run, shapes
from jaxpaged.simulate.arrivals import Arrival
from jaxpaged.simulate.lengths import Fixed
from jaxpaged.simulate.memory import LOADS, Outcome, compare, random_load

LLAMA = shapes.named_model("llama-3-8b")


class Second:
    """Every step takes a second."""

    def step_s(self, plan) -> float:
        return 1.0


def outcomes(loads=tuple(LOADS), *, num_pages: int = 4097, num_prompts: int = 150, **options) -> list[Outcome]:
    config = EngineConfig(**{"block_size": 16, "max_num_seqs": 1024, **options}).resolved(LLAMA, "gpu")
    return compare(config, LLAMA, Second(), num_pages=num_pages, num_prompts=num_prompts, seed=0, loads=loads)


def test_the_arithmetic_by_hand():
    config = EngineConfig(block_size=16, kv_cache_dtype="bfloat16").resolved(LLAMA, "gpu")
    shown = memory.arithmetic(config, LLAMA, 8192)
    assert "16 tokens x 2 (key, value) x 8 heads x 128 x 32 layers x 2 bytes (bfloat16) = 2,097,152 bytes" in shown
    assert "16.00 GiB / 2,097,152 bytes = 8,192 pages x 16 = 131,072 tokens" in shown
    assert "131,072 tokens / 8,192 set aside for each request, whatever it needs = 16 requests" in shown


def test_one_load_by_hand(monkeypatch: pytest.MonkeyPatch):
    """Three equal requests of 20 + 4 tokens, places for 64: contiguous takes 32 for each, so two fit; paged two pages, so all do.

    The first step computes two prompts (or three), then three steps follow with one token more each: 20, 21, 22, 23 tokens.
    """
    monkeypatch.setitem(memory.LOADS, "one", ((1.0, Fixed(20), Fixed(4)),))
    (contiguous, paged) = outcomes(("one",), num_pages=4, num_prompts=3, max_model_len=32)
    assert contiguous.pool_tokens == 64 and contiguous.peak_requests == 2
    assert contiguous.allocated == 64 and contiguous.held == 2 * (20 + 21 + 22 + 23) / 4
    assert contiguous.utilisation == pytest.approx(43 / 64) and contiguous.waste == pytest.approx(21 / 64)
    # Page 0 is the null page: three pages are one request of two pages at a time.
    assert paged.peak_requests == 1 and paged.allocated == 32 and paged.held == (20 + 21 + 22 + 23) / 4


def test_no_share_is_more_than_the_whole(monkeypatch: pytest.MonkeyPatch):
    add, states = run.Occupancy.add, []

    def watch(self: run.Occupancy, *state) -> None:
        states.append(state[2:4])
        add(self, *state)

    monkeypatch.setattr(run.Occupancy, "add", watch)
    found = outcomes(("medium chat", "mixed"), num_pages=600, num_prompts=40, max_num_seqs=256)
    pool_tokens = 600 * 16
    assert len(states) > 1000 and all(0 < held <= allocated <= pool_tokens for held, allocated in states)
    for outcome in found:
        assert 0 < outcome.utilisation <= outcome.allocated / outcome.pool_tokens <= 1 and 0 <= outcome.waste < 1


def test_paged_wastes_less_than_a_page_for_each_request_and_contiguous_most():
    found = outcomes(num_pages=1024, num_prompts=100, max_model_len=8192)
    by_name = {(outcome.load, outcome.kind): outcome for outcome in found}
    assert len(by_name) == 2 * len(LOADS) == 8
    for load in LOADS:
        contiguous, paged = by_name[load, "contiguous"], by_name[load, "paged"]
        assert contiguous.peak_requests == 1024 * 16 // 8192 == 2
        assert paged.allocated - paged.held <= 15 * paged.mean_requests
        assert paged.utilisation > contiguous.utilisation and paged.waste < contiguous.waste
        assert paged.output_throughput > contiguous.output_throughput
    assert by_name["mixed", "paged"].waste < 0.04


def test_a_load_is_its_shares_and_its_seed():
    found = random_load(LOADS["mixed"], 4000, 1, 8192)
    assert sum(arrival.num_prompt >= 2000 for arrival in found) / 4000 == pytest.approx(0.2, abs=0.03)
    assert sum(arrival.num_prompt < 200 for arrival in found) / 4000 == pytest.approx(0.5, abs=0.03)
    assert found == random_load(LOADS["mixed"], 4000, 1, 8192) != random_load(LOADS["mixed"], 4000, 2, 8192)
    assert all(arrival.num_prompt + arrival.num_output <= 300 for arrival in random_load(LOADS["mixed"], 500, 1, 300))


def test_contiguous_memory_is_one_page_for_each_request():
    """The tokens that a request will never have are set aside for it all the same."""
    rng = random.Random(0)
    limits = run.Limits(64, 8, 64, 16, 4)
    scheduler = run.Scheduler(run.PagePool(4), limits)
    arrivals = [Arrival(0.0, rng.randint(1, 60), 3) for _ in range(30)]
    found = run.simulate(scheduler, arrivals, Second(), max_model_len=64)
    assert found.occupancy.peak_rows == found.occupancy.peak_pages == 3 and scheduler.num_preemptions == 0


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"num_pages": 400}, "max_model_len: got 8,192, the pool holds 6,400 tokens"),
        ({"num_prompts": 2}, "short chat: all requests fit at once"),
    ],
)
def test_a_comparison_of_nothing_is_refused(options: dict, problem: str):
    with pytest.raises(ConfigError, match=problem):
        outcomes(**options)
