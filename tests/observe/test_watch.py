"""The log lines of trouble: each is said when it is true, once, and a quiet run says none."""

from __future__ import annotations

import logging
import re

import pytest
from busy import PAGE, FakeRunner, new_engine

from jaxpaged import SamplingParams
from jaxpaged.engine import Engine


@pytest.fixture(autouse=True)
def level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="jaxpaged")


def serve(engine: Engine, lengths: list[tuple[int, int]], *, same: bool = False) -> None:
    """Prompts of these lengths with so many new tokens, all at once, to the end."""
    for number, (num_prompt, num_new) in enumerate(lengths):
        engine.add_request([1 if same else number + 1] * num_prompt, SamplingParams(max_tokens=num_new, ignore_eos=True))
    while engine.has_unfinished:
        engine.step()


def lines(caplog: pytest.LogCaptureFixture, head: str) -> list[str]:
    return [record.message for record in caplog.records if record.message.startswith(head)]


def test_a_quiet_run_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    engine = new_engine(400)
    serve(engine, [(30, 10 + 5 * number) for number in range(12)])  # one after the other ends: no collapse
    serve(engine, [(50, 30)] * 8, same=True)
    assert engine.num_steps > 60 and not caplog.records


def test_requests_that_end_are_no_collapse(caplog: pytest.LogCaptureFixture) -> None:
    serve(new_engine(400), [(30, 5)] * 15 + [(30, 60)])
    assert not lines(caplog, "[Scheduler]")


def test_batches_that_end_together_are_no_collapse(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody runs between their commit and the next plan, but that plan admits those who wait."""
    engine = new_engine(400, max_num_seqs=8, max_num_batched_tokens=512)
    serve(engine, [(16, 24)] * 24)
    assert engine.num_steps < 80 and not lines(caplog, "[Scheduler]")


def test_prompts_that_wait_for_room_in_the_step_are_no_collapse(caplog: pytest.LogCaptureFixture) -> None:
    engine = new_engine(1000, max_model_len=512, max_num_batched_tokens=32)
    serve(engine, [(20, 12)] * 16 + [(400, 4)] * 20)
    assert not lines(caplog, "[Scheduler]")


def test_free_blocks_are_said_once_per_crossing(caplog: pytest.LogCaptureFixture) -> None:
    engine = new_engine(101, max_num_batched_tokens=512, enable_prefix_caching=False)
    serve(engine, [(92 * 5, 20), (92 * 5, 20), (92 * 5, 20)])  # 29 or 30 pages each, 87 to 90 of 100
    assert not lines(caplog, "[Allocator] Free")
    serve(engine, [(490, 20), (490, 20), (490, 20)])  # 31 or 32 each
    (line,) = lines(caplog, "[Allocator] Free")
    free = int(re.fullmatch(r"\[Allocator\] Free blocks: (\d+) / 100", line)[1])  # type: ignore[index]
    assert free < 10
    serve(engine, [(490, 20), (490, 20), (490, 20)])
    assert len(lines(caplog, "[Allocator] Free")) == 2


def test_free_blocks_that_hover_around_the_line_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    engine = new_engine(101, max_model_len=512)
    engine.add_request([1] * 16, SamplingParams(max_tokens=400, ignore_eos=True))
    taken = engine.pool.allocate(60)
    assert taken is not None

    def step_with(num_taken: int) -> None:
        extra = engine.pool.allocate(num_taken)
        for _ in range(8):  # the watch does not look at every step
            engine.step()
        engine.pool.free(extra or ())

    for num_taken in (10, 33, 20, 33, 15, 33):  # free: about 27, 4, 14, 3, 17, 1
        step_with(num_taken)
    assert len(lines(caplog, "[Allocator] Free")) == 1
    engine.pool.free(taken)
    step_with(10)
    taken = engine.pool.allocate(60)
    step_with(33)
    assert len(lines(caplog, "[Allocator] Free")) == 2


def test_fragmentation_is_said_when_it_matters(caplog: pytest.LogCaptureFixture) -> None:
    few = [(4, 60)] * 12
    serve(new_engine(100, block_size=64, runner=FakeRunner(100, 64)), few)
    assert not lines(caplog, "[Allocator]"), "an empty pool has room for waste"
    serve(new_engine(21, block_size=64, runner=FakeRunner(21, 64), async_scheduling=False), few)
    (line,) = lines(caplog, "[Allocator] Fragmentation")
    # At the 32nd step a sequence has 4 + 31 tokens in its page, and those that came in with the second step one less.
    wasted = 8 * 29 + 4 * 30
    assert line.startswith(f"[Allocator] Fragmentation: {wasted / 768:.2f} ({wasted} of 768 allocated token places are empty")


def test_a_batch_that_shrinks_by_preemption(caplog: pytest.LogCaptureFixture) -> None:
    engine = new_engine(33, max_num_batched_tokens=256)
    serve(engine, [(PAGE, 8 * PAGE)] * 16)
    first, *_ = lines(caplog, "[Scheduler] Batch size reduced")
    before, after = map(int, re.match(r"\[Scheduler\] Batch size reduced: (\d+) -> (\d+) \(\d+ preemptions", first).groups())  # type: ignore[union-attr]
    assert before == 16 and 4 < after <= 8
    (line,) = lines(caplog, "[Scheduler] Batch collapse detected")
    assert re.match(r"\[Scheduler\] Batch collapse detected: 16 -> [1-4] \(\d+ preemptions: the pool is too small", line)


def test_a_batch_that_shrinks_because_the_next_does_not_fit(caplog: pytest.LogCaptureFixture) -> None:
    engine = new_engine(33, max_num_batched_tokens=256, enable_prefix_caching=False)
    # Eight short ones end, and the long one behind them, which needs all pages but one, waits for the one that is left.
    serve(engine, [(20, 30)] + [(16, 8)] * 8 + [(31 * PAGE, 4)])
    (line,) = lines(caplog, "[Scheduler] Batch size reduced")
    assert line == "[Scheduler] Batch size reduced: 9 -> 1 (no pages for the next of 1 waiting requests)"
    assert engine.stats()["num_preemptions"] == 0
    assert len(lines(caplog, "[Scheduler] Batch collapse detected: 9 -> 1 (no pages")) == 1


def test_a_page_of_many_owners(caplog: pytest.LogCaptureFixture) -> None:
    engine = new_engine(500, max_num_seqs=80, max_num_batched_tokens=512)
    serve(engine, [(40, 2)], same=True)
    serve(engine, [(40, 20)] * 31, same=True)
    assert not lines(caplog, "[KV]")
    serve(engine, [(40, 20)] * 70, same=True)
    first, second = lines(caplog, "[KV] Refcount of page")
    assert re.fullmatch(r"\[KV\] Refcount of page \d+: (3[2-9]|[4-6]\d) owners", first)
    assert int(second.split()[-2]) >= 2 * int(first.split()[-2])


def test_pages_that_leak_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    engine = new_engine()
    engine.pool.allocate(2)
    serve(engine, [(20, 5)])
    serve(engine, [(20, 5)])
    assert lines(caplog, "[KV]") == ["[KV] Refcount: 2 pages have owners and no request is live"]
    assert caplog.records[-1].levelno == logging.ERROR


def test_a_wrong_count_is_said_when_a_step_fails(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(FakeRunner):
        def submit(self, plan):
            raise OSError("gone")

    engine = new_engine(runner=Broken(41, PAGE))
    engine.pool._refs[9] += 1
    with pytest.raises(OSError, match="gone"):
        serve(engine, [(20, 5)])
    (line,) = lines(caplog, "[KV] Refcount check failed")
    assert "page 9 has 1 owners and is in the free list" in line
