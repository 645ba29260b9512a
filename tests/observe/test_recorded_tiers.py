"""Engines with tiers, as they are looked at: recorded and replayed, counted, shown, and said in the log."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest
from busy import MODEL, PAGE, FakeRunner, busy_day, new_engine
from fake_runner import isolated

from jaxpaged.config import PREEMPTION_MODES
from jaxpaged.engine import Engine
from jaxpaged.host.request import SamplingParams
from jaxpaged.observe import Recording, Replay
from jaxpaged.observe.records import Decision, Kind, describe
from jaxpaged.observe.snapshot import VIEWS, snapshot
from jaxpaged.observe.tables import as_text

NUM_PAGES = 41


class CountingRunner(FakeRunner):
    """Keeps what it was told to move."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.moved, self.num_waits = [], 0

    def move(self, plan) -> None:
        self.moved.append(plan.transfers)
        super().move(plan)

    def fetched(self, *, wait: bool = False):
        self.num_waits += wait
        return super().fetched(wait=wait)


def tiered(num_slots: int = 24, *, has_disk: bool = True, seed: int = 0, fetch_fails: float = 0.1, **options) -> Engine:
    """An engine without a model whose pool has tiers below it."""
    runner = CountingRunner(NUM_PAGES, PAGE, seed=seed, fetch_fails=fetch_fails)
    swap_space = num_slots * MODEL.page_bytes(PAGE, MODEL.dtype) / 2**30
    options |= {"offload_dir": "the fake has its own"} if has_disk else {}
    return new_engine(NUM_PAGES, runner=runner, swap_space=swap_space, **options)


def recorded(engine: Engine, folder: Path) -> Recording:
    return Recording.load(engine.save_recording(folder / "a.recording"))


@pytest.mark.parametrize("limit", [2**26, 2**17])
@pytest.mark.parametrize("enable_prefix_caching", [True, False])
@pytest.mark.parametrize("mode", PREEMPTION_MODES)
def test_a_replay_is_equal(mode: str, enable_prefix_caching: bool, limit: int, tmp_path: Path) -> None:
    options = {"enable_prefix_caching": enable_prefix_caching, "preemption_mode": mode, "flight_recorder_bytes": limit}
    engine = tiered(**options)
    busy_day(engine, num_requests=150)
    stats, recording = engine.stats(), recorded(engine, tmp_path)
    assert stats["num_preemptions"] > 10 and (stats["num_swaps"] > 0) == (mode != "recompute")
    kinds = {frame.kind for frame in recording.frames}
    if enable_prefix_caching:
        assert stats["num_blocks_fetched"] > 0 and (Kind.FETCHED in kinds or limit == 2**17)
    replay = Replay(recording)
    assert replay.run(check=True) is None and replay.num_steps == engine.num_steps
    assert (replay.first_step > 0) == (limit == 2**17)
    for name in ("num_saved", "num_loaded", "num_spilled", "num_fetched", "num_fetch_misses"):
        assert getattr(replay.scheduler.pool.tier, name) == getattr(engine.pool.tier, name)


def test_a_page_that_came_otherwise_is_a_difference(tmp_path: Path) -> None:
    engine = tiered(fetch_fails=0.0)
    busy_day(engine, num_requests=150)
    recording = recorded(engine, tmp_path)
    at = next(at for at, frame in enumerate(recording.frames) if frame.kind is Kind.FETCHED)
    frames = list(recording.frames)
    frames[at] = dataclasses.replace(frames[at], payload=b"\0" + frames[at].payload[1:])
    found = Replay(dataclasses.replace(recording, frames=frames)).run()
    assert found is not None and found.recorded != found.replayed


def test_transfers_are_recorded_as_they_were_decided_and_read_as_text(tmp_path: Path) -> None:
    engine = tiered()
    busy_day(engine, num_requests=100)
    frames = recorded(engine, tmp_path).frames
    decided = [Decision.unpack(frame.payload).transfers for frame in frames if frame.kind is Kind.PLAN]
    assert decided == engine.runner.moved  # type: ignore[attr-defined]
    lines = [line.split()[0] for frame in frames for line in describe(frame, {})]
    for what, count in zip(
        ("spill", "save", "load", "fetch"), map(sum, zip(*(map(len, one) for one in decided), strict=True)), strict=True
    ):
        assert lines.count(what) == count > 0
    assert lines.count("fetched") == sum(frame.kind is Kind.FETCHED for frame in frames) > 0


def test_counters_are_what_was_moved() -> None:
    engine = tiered()
    busy_day(engine, num_requests=100, with_faults=False)
    stats, moved = engine.stats(), engine.runner.moved  # type: ignore[attr-defined]
    assert stats["num_blocks_swapped_out"] == sum(len(one.saves) for one in moved)
    assert stats["num_blocks_swapped_in"] == sum(len(one.loads) for one in moved)
    assert stats["num_blocks_spilled"] == sum(len(one.spills) for one in moved)
    assert stats["num_blocks_fetched"] + stats["num_fetch_misses"] == sum(len(one.fetches) for one in moved)
    assert stats["num_cpu_blocks"] == 24 and stats["cpu_cache_usage_perc"] == stats["cpu_blocks_used"] / 24
    hits = stats["host_prefix_cache_hits"] + stats["disk_prefix_cache_hits"]
    assert 0 < hits == stats["external_prefix_cache_hits"] <= stats["external_prefix_cache_queries"]
    assert stats["external_prefix_cache_queries"] == stats["prefix_cache_queries"] - stats["prefix_cache_hits"]
    without = new_engine().stats()
    assert stats.keys() == without.keys() and without["num_cpu_blocks"] == without["external_prefix_cache_queries"] == 0


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_the_engine_waits_for_a_fetch_only_when_nothing_else_is_to_do(async_scheduling: bool) -> None:
    engine = tiered(16, fetch_fails=0.0, async_scheduling=async_scheduling)
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    prompts = [[1000 * number + place for place in range(8 * PAGE + 1)] for number in range(8)]
    for prompt in prompts:
        engine.add_request(prompt, params)
        while engine.has_unfinished:
            engine.step()
    runner = engine.runner
    assert runner.num_waits == 0  # type: ignore[attr-defined]
    runner.is_slow = False
    request, tokens = engine.add_request(prompts[0], params), []
    while engine.has_unfinished:
        tokens += [event.token_id for event in engine.step()]
    assert tokens == isolated(prompts[0], request.max_len)
    assert engine.stats()["disk_prefix_cache_hits"] == 8 * PAGE and runner.num_waits <= 1  # type: ignore[attr-defined]


def test_the_views_tell_of_the_tiers() -> None:
    engine = tiered()
    busy_day(engine)
    for view in VIEWS:
        found = snapshot(engine.scheduler, view)
        assert found["tiers"]["num_blocks_swapped_out"] == engine.stats()["num_blocks_swapped_out"] > 0
        assert "24 pages of host memory: " in as_text(found).splitlines()[1]
    assert "tiers" not in snapshot(new_engine().scheduler, "scheduler")
    private = tiered(enable_prefix_caching=False)
    assert snapshot(private.scheduler, "prefix-cache")["is_enabled"] is False


def test_the_log_says_once_that_host_memory_is_too_small(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="jaxpaged")
    busy_day(tiered(1000, has_disk=False))
    assert "[Offload]" not in caplog.text
    engine = tiered(1)
    busy_day(engine)
    lines = [
        record.getMessage() for record in caplog.records if record.getMessage().startswith("[Offload] Host memory is too small: ")
    ]
    assert 1 <= len(lines) <= 1 + engine.num_steps // 256 and "each of its 1 slots in use (raise swap_space)" in lines[0]
