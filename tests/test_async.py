"""Asynchronous scheduling: a step is planned while the one before it runs, and nobody can tell by the outputs.

The laws hold on random days with a fake runner, and on a tiny random model where the tokens are fed on the device.
"""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from driving import ShuffledPool, another_engine, greedy, outputs_of, run
from test_engine import FAMILY, FEW_PAGES, MODEL, OPTIONS, random_asks

from jaxpaged.config import EngineConfig
from jaxpaged.engine import Engine
from jaxpaged.host.pages import PagePool
from jaxpaged.host.plan import StepPlan
from jaxpaged.host.request import FinishReason, SamplingParams
from jaxpaged.observe import Recording, Replay
from jaxpaged.runner import Result

sys.path.insert(0, str(Path(__file__).parent / "observe"))
sys.path.insert(0, str(Path(__file__).parent / "host"))
from busy import PAGE, new_engine
from fake_runner import FakeRunner


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.from_weights(EngineConfig(**OPTIONS), MODEL, FAMILY.weights(), pool_type=ShuffledPool) as engine:
        yield engine


@pytest.mark.parametrize("num_pages", [None, FEW_PAGES])
def test_outputs_are_those_of_synchronous_scheduling(engine: Engine, num_pages: int | None) -> None:
    asks = random_asks(24, 3)
    for index in range(0, 24, 4):  # forks among them
        asks[index] = dataclasses.replace(asks[index], params=dataclasses.replace(asks[index].params, n=3))
    found = []
    for is_async in (False, True):
        one = another_engine(engine, num_pages=num_pages, async_scheduling=is_async)
        found.append(outputs_of(one, asks))
        assert one.pool.num_used == 0 and (num_pages is None or one.scheduler.num_preemptions > 0)
    assert found[0] == found[1] and len(found[0]) == 24 + 6 * 2


def test_searches_beside_others_are_those_of_synchronous_scheduling(engine: Engine) -> None:
    search = SamplingParams(use_beam_search=True, n=3, temperature=0.0, max_tokens=9, ignore_eos=True)
    found = []
    for is_async in (False, True):
        one = another_engine(engine, num_pages=FEW_PAGES, async_scheduling=is_async)
        events = []
        for number in range(8):
            one.add_request([number + 1, 5, 7] * 6, search if number % 2 else greedy(9), request_id=str(number))
        while one.has_unfinished:
            events += one.step()
            one.scheduler.check()
        found.append(sorted(events, key=lambda event: (event.request_id, event.index)))  # a stable sort
    # Which rows share a step is another matter, and with it the last bits of a sum.
    assert [event._replace(cumulative_logprob=None) for event in found[0]] == [
        event._replace(cumulative_logprob=None) for event in found[1]
    ]


class Eager(FakeRunner):
    """Writes down when steps start and when they are waited for."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        super().__init__(num_pages, page_size)
        self.log: list[str] = []

    def submit(self, plan: StepPlan) -> Callable[[], Result]:
        self.log.append(f"start {self.count('start')}")
        wait, number = super().submit(plan), self.count("start") - 1

        def result() -> Result:
            self.log.append(f"wait {number}")
            return wait()

        return result

    def count(self, word: str) -> int:
        return sum(line.startswith(word) for line in self.log)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_step_starts_before_the_one_before_it_is_waited_for(is_async: bool) -> None:
    engine = new_engine(runner=Eager(41, PAGE), async_scheduling=is_async)
    engine.add_request([1, 2, 3], greedy(4))
    events = [engine.step() for _ in range(4)]
    if not is_async:
        assert engine.runner.log == [f"{word} {number}" for number in range(4) for word in ("start", "wait")]
        assert [len(found) for found in events] == [1, 1, 1, 1]
        return
    assert engine.runner.log == ["start 0", "start 1", "wait 0", "start 2", "wait 1", "start 3", "wait 2"]
    assert [len(found) for found in events] == [0, 1, 1, 1] and engine.has_unfinished
    assert engine.step()[0].finish_reason is FinishReason.LENGTH  # and nothing was started after the last token
    assert engine.runner.count("start") == engine.runner.count("wait") == 4 and not engine.has_unfinished


def test_what_runs_for_nobody_is_not_waited_for() -> None:
    engine = new_engine(runner=Eager(41, PAGE))
    engine.add_request([1, 2, 3], greedy(9), request_id="a")
    engine.step()
    (event,) = engine.step()
    engine.add_request([1, 2, 3], greedy(9, stop_token_ids=[event.token_id]), request_id="b")
    (event,) = engine.abort("a")
    assert event.finish_reason is FinishReason.ABORT
    while engine.has_unfinished:
        events = engine.step()
    assert events[-1].finish_reason is FinishReason.STOP and engine.pool.num_used == 0
    assert engine.runner.count("wait") < engine.runner.count("start") == engine.num_steps
    assert engine.step() == [] and not engine._in_flight


@pytest.mark.parametrize("is_async", [False, True])
def test_what_is_ended_before_a_wait_takes_nothing_along(is_async: bool, tmp_path: Path) -> None:
    """Between the plan of a step and the commit of the one before it: others' tokens stay, and the recording knows."""

    def day(seed: int | None) -> tuple[Engine, dict]:
        engine, outputs, rng, ended = new_engine(async_scheduling=is_async), {}, random.Random(seed), set()

        def before_waiting() -> None:
            seen = [one for one in outputs if one not in ended]
            if seed is not None and seen and rng.random() < 0.2:
                request_id, index = one = rng.choice(seen)
                ended.add(one)
                if rng.random() < 0.5:
                    engine.stop(request_id, index)
                else:
                    ended.update((event.request_id, event.index) for event in engine.abort(request_id))
                engine.scheduler.check()

        for number in range(40):
            engine.add_request([number % 7 + 1] * (20 + number % 30), greedy(30, n=1 + number % 3), request_id=str(number))
        while engine.has_unfinished:
            for event in engine.step(before_waiting):
                assert (event.request_id, event.index) not in ended
                outputs.setdefault((event.request_id, event.index), []).append(event.token_id)
        assert engine.pool.num_used == 0
        return engine, outputs

    whole = day(None)[1]
    for seed in range(5):
        engine, outputs = day(seed)
        num_whole = sum(found == whole[one] for one, found in outputs.items())
        assert all(found == whole[one][: len(found)] for one, found in outputs.items()) and 10 < num_whole < len(whole) - 10
        replay = Replay(Recording.load(engine.save_recording(tmp_path / f"{seed}.recording")))
        assert replay.run(check=True) is None


def test_what_a_failed_step_left_untold_is_told_with_the_end() -> None:
    """Of that request, in front of its end; what is of others is left."""
    engine = new_engine()
    for name in "ab":
        engine.add_request([1, 2, 3], greedy(9), request_id=name)
    engine.step()
    untold = engine.step()
    assert [event.request_id for event in untold] == ["a", "b"]
    engine._untold = list(untold)
    first, last = engine.abort("a")
    assert first == untold[0] and last.finish_reason is FinishReason.ABORT
    events = engine.step()
    assert events[0] == untold[1] and all(event.request_id == "b" for event in events)


def test_who_is_ended_while_a_step_runs_is_told_all_before_the_end() -> None:
    """Also what the steps before have left untold; and nothing of it comes again."""
    engine = new_engine()
    for name in "ab":
        engine.add_request([1, 2, 3], greedy(9), request_id=name)
    engine.step()
    untold, ended = engine.step(), []
    engine._untold = list(untold)
    assert engine.num_generation_tokens == 2
    events = engine.step(lambda: ended.extend(engine.abort("a")))
    assert engine.num_generation_tokens == 3
    assert ended[0] == untold[0] and [event.finish_reason for event in ended] == [None, FinishReason.ABORT]
    assert events[0] == untold[1] and all(event.request_id == "b" for event in events)


class Flaky(FakeRunner):
    """Fails at random: when a step is to start, or when it is waited for."""

    def __init__(self, seed: int, error: type[BaseException]) -> None:
        super().__init__(41, PAGE)
        self.rng, self.error, self.num_failures = random.Random(seed), error, 0

    def submit(self, plan: StepPlan) -> Callable[[], Result]:
        self.fail()
        wait = super().submit(plan)

        def result() -> Result:
            self.fail()
            return wait()

        return result

    def fail(self) -> None:
        if self.rng.random() < 0.05:
            self.num_failures += 1
            raise self.error("gone")


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("is_async", [False, True])
def test_a_step_that_fails_is_computed_anew(is_async: bool, error: type[BaseException], tmp_path: Path) -> None:
    """Whoever goes on after an error, or after Ctrl-C, gets the tokens of a day without."""

    def day(runner: FakeRunner, pool: PagePool | None = None) -> tuple[Engine, dict]:
        engine, outputs = new_engine(runner=runner, pool=pool, async_scheduling=is_async), {}
        for number in range(40):
            prompt = [number % 7 + 1] * (20 + number % 30)
            engine.add_request(prompt, greedy(30, n=1 + number % 3), request_id=str(number))
        while engine.has_unfinished:
            try:
                events = engine.step()
            except error:
                events = []
            engine.scheduler.check()
            for event in events:
                outputs.setdefault((event.request_id, event.index), []).append(event.token_id)
        assert engine.pool.num_used == 0
        return engine, outputs

    flaky = Flaky(1, error)
    broken, whole = day(flaky), day(FakeRunner(41, PAGE))
    assert broken[1] == whole[1] and flaky.num_failures > 5
    assert max(map(len, whole[1].values())) == 30
    replay = Replay(Recording.load(broken[0].save_recording(tmp_path / "broken.recording")))
    assert replay.run(check=True) is None and replay.num_steps > whole[0].num_steps


def test_a_third_step_is_refused() -> None:
    engine = new_engine()
    engine.add_request([1, 2, 3], greedy(9))
    first, _ = engine.scheduler.plan(), engine.scheduler.plan()
    with pytest.raises(RuntimeError, match="2 steps are in flight"):
        engine.scheduler.plan()
    assert first is not None
    with pytest.raises(RuntimeError, match="not the oldest in flight"):
        engine.scheduler.commit(StepPlan((), ()), [], [])


def test_a_duel_is_synchronous() -> None:
    assert EngineConfig(**OPTIONS).resolved(MODEL, "cpu").async_scheduling
    assert not EngineConfig(**OPTIONS, compare_with="reference").resolved(MODEL, "cpu").async_scheduling


def test_requests_that_arrive_at_any_step_get_their_own_tokens(engine: Engine) -> None:
    asks = random_asks(12, 8)
    whole = run(another_engine(engine, async_scheduling=False), asks)
    assert run(another_engine(engine), asks, arrivals=lambda index: 3 * index) == whole
