"""Laws of AsyncLLM: a crowd gets what each gets alone, whoever leaves takes nothing along, and one that fails fails alone.

The engine is real, the device is the fake runner's: pages of token ids. `jaxpaged.server` is tested with the bundled model.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import pytest
from text_model import write_tokenizer

from jaxpaged import async_llm
from jaxpaged.admission import Admission, QueueFullError, QueueOptions
from jaxpaged.async_llm import AsyncLLM
from jaxpaged.config import ConfigError
from jaxpaged.engine import Engine
from jaxpaged.growing import GrowingRequest
from jaxpaged.host.request import RequestError, RequestOutputKind, SamplingParams
from jaxpaged.streams import ClosedError, DeadlineError, RequestFaultError, StalledError, StepFailedError
from jaxpaged.tokenizer import Detokenizer, Tokenizer

sys.path.insert(0, str(Path(__file__).parent / "observe"))
sys.path.insert(0, str(Path(__file__).parent / "host"))
from busy import MODEL, PAGE
from fake_runner import FakeRunner

from jaxpaged.config import EngineConfig
from jaxpaged.host.scheduler import Scheduler

PROMPTS = [[number + 1] * (10 + 7 * number) for number in range(8)]
DELTA = RequestOutputKind.DELTA


class Gated(FakeRunner):
    """A device that runs only while its gate is open, and fails where it is told to."""

    def __init__(self, num_pages: int = 81):
        super().__init__(num_pages, PAGE)
        self.gate = threading.Event()
        self.gate.set()
        self.num_steps = 0
        self.pause_s = 0.0
        self.raises: Callable[[set[str]], bool] = lambda request_ids: False

    def submit(self, plan):
        wait = super().submit(plan)
        request_ids = {chunk.sequence.request.request_id for chunk in plan.chunks()}

        def waited():
            self.gate.wait(20)
            time.sleep(self.pause_s)
            self.num_steps += 1
            if self.raises(request_ids):
                raise OSError("the device is gone")
            return wait()

        return waited


def new_llm(runner: Gated | None = None, clock: Callable[[], float] = time.monotonic, **queue) -> tuple[AsyncLLM, Gated]:
    runner = runner or Gated()
    config = EngineConfig(block_size=PAGE, max_num_seqs=16, max_num_batched_tokens=128).resolved(MODEL, "cpu")
    return AsyncLLM(Engine(config, MODEL, runner, clock=clock), None, queue=QueueOptions(**queue)), runner


def served(task: Callable[[AsyncLLM, Gated], Awaitable[None]], **options) -> None:
    """Run a test's coroutine with an AsyncLLM that must be empty afterwards."""
    llm, runner = new_llm(**options)

    async def main() -> None:
        await asyncio.wait_for(task(llm, runner), 30)
        runner.gate.set()
        assert await llm.drain(10)
        engine = llm._engine
        assert (engine.pool.num_used, llm.admission.num_outputs, llm.admission.num_tokens) == (0, 0, 0)
        engine.scheduler.check()

    try:
        asyncio.run(main())
    finally:
        runner.gate.set()
        llm.shutdown()


def params(max_tokens: int = 20, **options) -> SamplingParams:
    return SamplingParams(**{"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True, **options})


async def tokens_of(llm: AsyncLLM, prompt: list[int], sampling: SamplingParams, **options) -> list[list[int]]:
    """The token ids of all outputs, put together from deltas where it streams them."""
    found: dict[int, list[int]] = {index: [] for index in range(sampling.n)}
    finished = False
    async for output in llm.generate(prompt, sampling, **options):
        assert not finished, "an output after the last"
        finished = output.finished
        for one in output.outputs:
            found[one.index] = found[one.index] + one.token_ids if sampling.output_kind is DELTA else one.token_ids
    assert finished
    return list(found.values())


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0.002)


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_a_crowd_gets_what_each_gets_alone(kind: RequestOutputKind) -> None:
    async def task(llm: AsyncLLM, runner: Gated) -> None:
        asked = [params(10 + number, n=1 + number % 3, output_kind=kind) for number in range(len(PROMPTS))]
        alone = [await tokens_of(llm, prompt, one) for prompt, one in zip(PROMPTS, asked, strict=True)]
        crowd = await asyncio.gather(*(tokens_of(llm, prompt, one) for prompt, one in zip(PROMPTS, asked, strict=True)))
        assert crowd == alone
        assert [len(one[0]) for one in alone] == [one.max_tokens for one in asked]

    served(task)


def test_what_is_refused_is_refused_before_it_is_queued() -> None:
    async def task(llm: AsyncLLM, runner: Gated) -> None:
        for prompt in ([], [-1], [MODEL.vocab_size], [1] * 600, "text", {"prompts": [1]}, [True]):
            with pytest.raises(RequestError):
                await llm.start(prompt)
        runner.gate.clear()
        stream = await llm.start([1], params(), request_id="mine")
        with pytest.raises(RequestError, match="already in use"):
            await llm.start([2], params(), request_id="mine")
        stream.close()

    served(task)


def test_what_the_engine_refuses_is_a_refusal_to_who_waits() -> None:
    """Somebody beside has given it a request of this id."""

    async def task(llm: AsyncLLM, runner: Gated) -> None:
        await llm.between_steps(lambda engine: engine.add_request([1], params(), request_id="mine"))
        with pytest.raises(RequestError, match="already in use"):
            await tokens_of(llm, [2], params(), request_id="mine")
        await llm.between_steps(lambda engine: engine.abort("mine"))

    served(task)


def test_a_slow_consumer_gets_more_at_once() -> None:
    async def task(llm: AsyncLLM, runner: Gated) -> None:
        stream = await llm.start([1, 2, 3], params(100, output_kind=DELTA))
        await until(lambda: stream.is_over)
        outputs = [output async for output in stream]
        assert len(outputs) == 1 and len(outputs[0].outputs[0].token_ids) == 100
        assert [outputs[0].outputs[0].token_ids] == await tokens_of(llm, [1, 2, 3], params(100))

    served(task)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("interval", [2, 7, 1000])
def test_an_interval_tells_the_same_tokens_less_often(interval: int, n: int) -> None:
    """The first at once, then as many together as it says or more, the rest at the end."""

    async def task(llm: AsyncLLM, runner: Gated) -> None:
        runner.pause_s = 0.01  # so that each step could be told by itself
        asked = params(50, n=n, output_kind=DELTA)
        pieces = [output async for output in llm.generate([1, 2, 3], asked)]
        sizes = [sum(len(one.token_ids) for one in piece.outputs) for piece in pieces]
        assert sum(sizes) == 50 * n and sizes[0] < 50 * n and pieces[-1].finished
        assert all(size >= interval for size in sizes[1:-1]), sizes
        assert len(sizes) > 2 or interval > 50 * n
        runner.pause_s = 0.0
        found = await tokens_of(llm, [1, 2, 3], asked)
        assert found == await tokens_of(llm, [1, 2, 3], params(50, n=n))

    served(task, stream_interval=interval, max_stream_events_per_s=0)


def test_tokens_are_told_when_the_device_has_its_next_step_and_no_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is let through one step at a time: it waits for no text, and no text waits for it."""
    record, begun = GrowingRequest.record, []

    def noted(self, event, now):
        begun.append(runner.num_begun)
        return record(self, event, now)

    class Counting(Gated):
        num_begun = 0
        room = threading.Semaphore(0)

        def submit(self, plan):
            self.num_begun += 1
            wait = super().submit(plan)

            def waited():
                self.room.acquire(timeout=20)
                return wait()

            return waited

    runner = Counting()

    async def task(llm: AsyncLLM, _: Gated) -> None:
        monkeypatch.setattr(GrowingRequest, "record", noted)
        stream = await llm.start([1, 2, 3], params(10, output_kind=DELTA))
        for number in range(1, 11):
            runner.room.release()
            output = await anext(stream)
            assert len(output.outputs[0].token_ids) == 1 and output.finished == (number == 10)
        assert begun == [min(number + 2, 10) for number in range(1, 11)]

    served(task, runner=runner, max_stream_events_per_s=0)


@pytest.mark.parametrize("how", ["cancel", "abort", "leave"])
def test_whoever_leaves_takes_nothing_along(how: str) -> None:
    async def task(llm: AsyncLLM, runner: Gated) -> None:
        runner.pause_s = 0.005  # long enough for both to be there for a while
        stayed = asyncio.create_task(tokens_of(llm, PROMPTS[2], params(400, output_kind=DELTA)))
        ends, num_seen = [], 0

        async def leaves() -> None:
            nonlocal num_seen
            outputs = llm.generate([7] * 40, params(450, output_kind=DELTA), "left")
            async for output in outputs:
                num_seen += 1
                ends.extend(one.finish_reason for one in output.outputs if output.finished)
                if how == "leave" and num_seen == 3:
                    break
            await outputs.aclose()

        leaving = asyncio.create_task(leaves())
        await until(lambda: num_seen >= 3)
        if how == "cancel":
            leaving.cancel()
        elif how == "abort":
            await llm.abort("left")
        await asyncio.wait([leaving])
        await until(lambda: llm._thread.find("left") is None)
        assert ends == (["abort"] if how == "abort" else [])
        runner.pause_s = 0.0
        assert await stayed == await tokens_of(llm, PROMPTS[2], params(400))

    served(task)


def test_pages_of_one_that_left_are_free_before_the_next_step() -> None:
    """Counted in steps of the device, which the test lets run one by one."""

    async def task(llm: AsyncLLM, runner: Gated) -> None:
        runner.pause_s = 0.01  # it does not end while nobody looks
        stream = await llm.start([7] * 40, params(400))
        await until(lambda: runner.num_steps > 3)
        runner.gate.clear()
        await asyncio.sleep(0.02)  # a step hangs now
        before = runner.num_steps
        stream.close()
        runner.gate.set()
        await until(lambda: llm._engine.pool.num_used == 0)
        assert runner.num_steps - before <= 2
        assert [output.outputs[0].finish_reason async for output in stream][-1] == "abort"

    served(task)


@pytest.mark.parametrize("where", ["queued", "running", "hanging", "tokenising"])
def test_a_deadline_ends_a_request_wherever_it_is_and_no_other(where: str) -> None:
    """In a step that hangs too: who waits is told then, the pages come back with the next step."""

    async def task(llm: AsyncLLM, runner: Gated) -> None:
        runner.pause_s = 0.002
        other = asyncio.create_task(tokens_of(llm, PROMPTS[2], params(100, output_kind=DELTA)))
        prompt, options = [7] * 40, params(450)
        if where == "queued":  # behind as many as there are rows
            for _ in range(16):
                await llm.start([7] * 4, params(30))
        elif where == "tokenising":
            prompt = lambda: time.sleep(0.3) or [1]  # type: ignore[assignment,return-value]  # noqa: E731
        if where == "hanging":
            await until(lambda: runner.num_steps > 0)
        started = time.monotonic()
        with pytest.raises(DeadlineError, match="timeout"):
            stream = await llm.start(prompt, options, request_id="late", timeout_s=0.1)
            if where == "hanging":
                runner.gate.clear()
            async for output in stream:
                assert not output.finished
        assert time.monotonic() - started < 5
        runner.gate.set()
        await until(lambda: llm._thread.find("late") is None)
        runner.pause_s = 0.0
        again = await llm.start([7] * 40, params(3), request_id="late", timeout_s=60)
        assert [len(one.outputs[0].token_ids) async for one in again][-1] == 3
        assert await other == await tokens_of(llm, PROMPTS[2], params(100))

    served(task)


def test_the_id_of_one_that_expired_is_taken_until_the_engine_is_rid_of_it() -> None:
    """It expires after a step was begun, so that the engine has tokens of it when somebody else comes with its id."""
    is_begun = threading.Event()

    class Slow(Gated):
        late = None

        def submit(self, plan):
            if self.late is not None and self.late.num_generated > 3 and not is_begun.is_set():
                self.gate.clear()
                is_begun.set()
                while self.late.error is None:
                    time.sleep(0.001)
            return super().submit(plan)

    runner = Slow()

    async def task(llm: AsyncLLM, _: Gated) -> None:
        alone = await tokens_of(llm, PROMPTS[1], params(5))
        runner.late = await llm.start([7] * 40, params(450, output_kind=DELTA), request_id="late")
        await until(is_begun.is_set)
        llm._thread.expire(runner.late)
        with pytest.raises(DeadlineError):
            async for _ in runner.late:
                pass
        await asyncio.sleep(0.02)  # the engine waits for the device, and has told what came before
        with pytest.raises(RequestError, match="already in use"):
            await llm.start(PROMPTS[1], params(5), request_id="late")
        runner.gate.set()
        await until(lambda: llm._thread.find("late") is None)
        assert await tokens_of(llm, PROMPTS[1], params(5), request_id="late") == alone

    served(task, runner=runner)


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_a_fault_in_the_last_text_is_no_success(kind: RequestOutputKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is told of ends is told of it too."""
    write_tokenizer(tmp_path)
    monkeypatch.setattr(Detokenizer, "finish", lambda *_: 1 / 0)
    ended = []

    async def task(llm: AsyncLLM, runner: Gated) -> None:
        llm.tokenizer = Tokenizer.load(tmp_path)
        llm.observe(SimpleNamespace(started=lambda _: 0, queued=lambda *_: 0, stepped=lambda *_: 0, ended=ended.append))  # type: ignore[arg-type]
        with pytest.raises(RequestFaultError):
            await tokens_of(llm, [1, 2, 3], params(5, output_kind=kind))
        await until(lambda: len(ended) == 1)
        assert isinstance(ended[0].error, RequestFaultError)

    served(task)


def test_a_fault_in_one_is_no_fault_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """R10: in taking an event, in telling it, with one and with several outputs."""
    record, news = GrowingRequest.record, GrowingRequest.news

    def faulty_record(self, event, now):
        if self.request.request_id.startswith("bad") and self.num_generated > 5:
            raise ZeroDivisionError("in the text")
        return record(self, event, now)

    def faulty_news(self):
        if self.request.request_id.startswith("mute") and self.num_generated > 5:
            raise KeyError("in the answer")
        return news(self)

    async def task(llm: AsyncLLM, runner: Gated) -> None:
        asked = params(30, n=2, output_kind=DELTA)
        alone = [await tokens_of(llm, prompt, asked) for prompt in PROMPTS]
        monkeypatch.setattr(GrowingRequest, "record", faulty_record)
        monkeypatch.setattr(GrowingRequest, "news", faulty_news)
        for trial in range(20):
            names = [f"good{number}" for number in range(8)]
            names[trial % 8], names[(trial + 3) % 8] = "bad", "mute"
            crowd = (tokens_of(llm, prompt, asked, request_id=name) for prompt, name in zip(PROMPTS, names, strict=True))
            found = await asyncio.gather(*crowd, return_exceptions=True)
            for name, one, expected in zip(names, found, alone, strict=True):
                if name in ("bad", "mute"):
                    assert isinstance(one, RequestFaultError) and "text" not in str(one) and "in the" not in str(one)
                else:
                    assert one == expected
            await until(lambda: not llm.num_unfinished)
        assert not llm._thread._num_failed and llm.is_ready
        llm.check_health()

    served(task)


def test_a_step_that_fails_once_is_computed_anew() -> None:
    async def task(llm: AsyncLLM, runner: Gated) -> None:
        alone = [await tokens_of(llm, prompt, params(30)) for prompt in PROMPTS]
        steps = iter(range(10**6))
        runner.raises = lambda request_ids: next(steps) % 13 == 7
        assert await asyncio.gather(*(tokens_of(llm, prompt, params(30)) for prompt in PROMPTS)) == alone

    served(task)


def test_one_whose_steps_fail_is_given_up_and_the_engine_goes_on() -> None:
    async def task(llm: AsyncLLM, runner: Gated) -> None:
        alone = [await tokens_of(llm, prompt, params(30)) for prompt in PROMPTS]
        tried: list[set[str]] = []
        runner.raises = lambda request_ids: "poison" in request_ids and not tried.append(request_ids)
        with pytest.raises(StepFailedError):
            await tokens_of(llm, [5] * 9, params(30), request_id="poison")
        assert len(tried) == 2
        assert [await tokens_of(llm, prompt, params(30)) for prompt in PROMPTS] == alone
        llm.check_health()
        assert llm._engine.scheduler.only is None

    served(task)


def test_one_that_had_a_token_in_its_trial_stands_for_nobody_else() -> None:
    """Two steps of both fail, then the second of a trial, in which one of them has had its token."""

    async def task(llm: AsyncLLM, runner: Gated) -> None:
        alone = [await tokens_of(llm, prompt, params(400)) for prompt in PROMPTS[:2]]
        num_failed, num_alone = 0, 0

        def raises(request_ids: set[str]) -> bool:
            nonlocal num_failed, num_alone
            num_alone += request_ids == {"a"}
            is_bad = num_failed < 2 or (request_ids == {"a"} and num_alone == 2)
            num_failed += is_bad
            return is_bad

        runner.pause_s = 0.002
        crowd = [
            asyncio.create_task(tokens_of(llm, prompt, params(400), request_id=name))
            for name, prompt in zip("ab", PROMPTS, strict=False)
        ]
        await until(lambda: all(one is not None and one.num_generated > 2 for one in map(llm._thread.find, "ab")))
        runner.raises = raises
        assert await asyncio.gather(*crowd) == alone and num_failed >= 2

    served(task)


def test_one_that_was_given_up_before_the_engine_had_it_never_runs() -> None:
    async def task(llm: AsyncLLM, runner: Gated) -> None:
        stream = await llm.start([1, 2, 3], params(5), request_id="first")
        await until(lambda: stream.is_over)
        runner.gate.clear()
        busy = asyncio.create_task(tokens_of(llm, PROMPTS[3], params(20)))
        await until(lambda: llm._engine.is_ahead)
        late = await llm.start([1, 2, 3], params(400), request_id="late")
        late.fail(StepFailedError("all were given up"))
        llm._thread._streams.pop("late")
        runner.gate.set()
        await busy
        assert "late" not in llm._engine.scheduler and not late.num_generated

    served(task)


def test_steps_that_all_fail_are_told_and_are_no_health(monkeypatch: pytest.MonkeyPatch) -> None:
    """What raises is the scheduler, so that no request can be named."""

    async def task(llm: AsyncLLM, runner: Gated) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Scheduler, "plan", lambda self, drafts=None: 1 // 0)
            with pytest.raises(StepFailedError):
                await tokens_of(llm, [5] * 9, params(30))
            with pytest.raises(StalledError, match="last 4 steps"):
                llm.check_health()
        assert len((await tokens_of(llm, [5] * 9, params(30)))[0]) == 30
        llm.check_health()

    served(task)


def test_a_device_that_hangs_is_seen_and_seen_to_be_back() -> None:
    now = 0.0

    async def task(llm: AsyncLLM, runner: Gated) -> None:
        nonlocal now
        stream = await llm.start([1, 2], params(400))
        await until(lambda: runner.num_steps > 2)
        llm.check_health()
        runner.gate.clear()
        await asyncio.sleep(0.02)
        now += 11.0
        with pytest.raises(StalledError, match=r"no step for 11\.0 s, the limit is 10 s"):
            llm.check_health()
        runner.gate.set()
        await until(lambda: llm._thread._beat_s == now)
        llm.check_health()
        stream.close()

    served(task, clock=lambda: now, stall_s=10.0)


def test_the_queue_has_an_end_and_is_told_before_a_prompt_is_looked_at() -> None:
    async def task(llm: AsyncLLM, runner: Gated) -> None:
        runner.gate.clear()
        streams = [await llm.start([1] * 10, params(5, n=2)) for _ in range(3)]
        with pytest.raises(QueueFullError) as full:
            await llm.start(lambda: pytest.fail("looked at"), params(5, n=2))  # type: ignore[arg-type]
        assert full.value.retry_after_s >= 1
        runner.gate.set()
        await until(lambda: not llm.admission.num_outputs)
        streams.append(await llm.start([1] * 10, params(5, n=2)))
        for stream in streams:
            assert [output async for output in stream][-1].finished
        runner.gate.clear()
        streams = [await llm.start([1] * 90, params(5))]
        with pytest.raises(QueueFullError, match="max_queued_tokens 100"):
            await llm.start([1] * 11, params(5))
        streams.append(await llm.start([1] * 10, params(5)))
        runner.gate.set()
        for stream in streams:
            stream.close()

    served(task, max_queued_requests=6, max_queued_tokens=100)


def test_admission_counts_what_its_tickets_count_for() -> None:
    now = 0.0
    admission = Admission(3, 100, lambda: now)
    whole = admission.admit(7, 1000)  # where nothing waits, any one is let in
    with pytest.raises(QueueFullError):
        admission.admit(1, 1)
    now = 5.5
    whole.release(is_served=True)
    whole.release(is_served=True)
    whole.resize(5)
    assert (admission.num_outputs, admission.num_tokens, admission.retry_after_s) == (0, 0, 6)
    tickets = [admission.admit(1, 10) for _ in range(3)]
    with pytest.raises(QueueFullError, match="3 requests with 30 tokens wait"):
        admission.admit(1, 1)
    tickets[0].resize(80)
    tickets[1].release()
    assert (admission.num_outputs, admission.num_tokens) == (2, 90)
    with pytest.raises(QueueFullError):
        admission.admit(1, 11)
    admission.admit(1, 10).release()


def test_draining_waits_for_what_runs_and_refuses_what_comes() -> None:
    async def task(llm: AsyncLLM, runner: Gated) -> None:
        runner.gate.clear()
        answer = asyncio.create_task(tokens_of(llm, [1, 2], params(40)))
        await until(lambda: llm.num_unfinished == 1)
        assert not await llm.drain(0.05) and not llm.is_ready
        with pytest.raises(ClosedError):
            await llm.start([1])
        runner.gate.set()
        assert await llm.drain(10) and len((await answer)[0]) == 40

    served(task)


def test_shutting_down_ends_what_runs_with_an_error() -> None:
    llm, runner = new_llm()

    async def main() -> None:
        runner.pause_s = 0.01  # they do not end while nobody looks
        streams = [await llm.start(prompt, params(400)) for prompt in PROMPTS]
        await until(lambda: runner.num_steps > 3)
        await asyncio.to_thread(llm.shutdown)
        for stream in streams:
            with pytest.raises(ClosedError):
                async for _ in stream:
                    pass
        with pytest.raises(ClosedError):
            await llm.start([1])
        with pytest.raises(ClosedError):
            await llm.stats()
        with pytest.raises(ClosedError):
            llm.check_health()

    asyncio.run(main())
    llm.shutdown()
    assert not llm._thread._thread.is_alive() and llm._engine.pool.num_used == 0


def test_a_step_that_hangs_holds_nobody_up_who_shuts_down() -> None:
    llm, runner = new_llm(stall_s=0.3)

    async def main() -> None:
        runner.gate.clear()
        streams = [await llm.start(prompt, params(400)) for prompt in PROMPTS]
        await until(lambda: bool(llm._engine.scheduler.running))
        ended = asyncio.ensure_future(asyncio.to_thread(llm.shutdown))
        for stream in streams:
            with pytest.raises(ClosedError):
                async for _ in stream:
                    pass
        await ended
        await asyncio.to_thread(llm.shutdown)  # twice is nothing, and no wait
        assert not runner.gate.is_set() and llm._thread._thread.is_alive()

    asyncio.run(asyncio.wait_for(main(), 10))
    runner.gate.set()
    llm._thread._thread.join(10)
    assert not llm._thread._thread.is_alive() and llm._engine.pool.num_used == 0


def test_what_waits_for_a_thread_is_told_that_it_was_closed() -> None:
    llm, _ = new_llm(num_text_threads=1)

    async def main() -> None:
        is_wanted = threading.Event()
        held = asyncio.ensure_future(llm.in_thread(is_wanted.wait, 20))
        queued = [asyncio.ensure_future(llm.in_thread(int)), asyncio.ensure_future(tokens_of(llm, [1] * 300, params()))]
        left = asyncio.ensure_future(llm.in_thread(int))
        await asyncio.sleep(0.01)
        left.cancel()
        llm.shutdown()
        is_wanted.set()
        assert await held
        for one in queued:
            with pytest.raises(ClosedError):
                await one
        with pytest.raises(asyncio.CancelledError):  # who was cancelled by its own caller is
            await left
        with pytest.raises(ClosedError):
            await llm.in_thread(int)

    asyncio.run(asyncio.wait_for(main(), 10))
    assert llm.admission.num_outputs == 0


def test_an_id_of_ours_is_none_that_somebody_chose() -> None:
    async def task(llm: AsyncLLM, runner: Gated) -> None:
        runner.gate.clear()
        chosen = await llm.start([1, 2], params(), request_id="req-0")
        ours = await llm.start([1, 2], params())
        assert ours.request.request_id != chosen.request.request_id
        runner.gate.set()
        assert [len([one async for one in stream]) > 0 for stream in (chosen, ours)] == [True, True]

    served(task)


def test_a_loop_that_is_gone_leaves_nothing_behind() -> None:
    llm, runner = new_llm()

    async def main() -> None:
        runner.pause_s = 0.01
        await llm.start([1, 2, 3], params(450))

    try:
        asyncio.run(main())
        deadline = time.monotonic() + 10
        while llm.num_unfinished and time.monotonic() < deadline:
            time.sleep(0.002)
        assert llm._engine.pool.num_used == 0 and runner.num_steps < 400
    finally:
        llm.shutdown()


def test_stats_and_the_prefix_cache_are_asked_between_steps() -> None:
    async def task(llm: AsyncLLM, runner: Gated) -> None:
        runner.pause_s = 0.01
        stream = await llm.start([9] * 64, params(300))
        await until(lambda: runner.num_steps > 3)
        found = await llm.stats()
        assert found["num_requests_running"] == 1 and found["num_queued_requests"] == 0
        stream.close()
        await tokens_of(llm, [9] * 64, params(3))
        assert (await llm.stats())["prefix_cache_hits"] > 0
        await llm.reset_prefix_cache()
        assert (await llm.stats())["kv_blocks_cached"] == 0

    served(task)


@pytest.mark.parametrize("name", ["max_queued_requests", "max_queued_tokens", "num_text_threads", "stream_interval", "stall_s"])
@pytest.mark.parametrize("value", [0, -1, True, "4", 2**60, float("nan")])
def test_options_of_the_queue_are_checked(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        QueueOptions(**{name: value})  # type: ignore[arg-type]


def test_what_takes_long_to_look_at_is_not_looked_at_on_the_loop() -> None:
    """A short prompt is, but with words or rules beside it, which may be many, a thread looks."""
    short, long = "a" * 256, "a" * 257
    for prompt in (short, [1] * 256, {"prompt": short}, MappingProxyType({"prompt": short})):
        assert async_llm._is_quick(prompt, params())
        for options in ({"bad_words": ["b"]}, {"logit_bias": {1: 1.0}}, {"allowed_token_ids": [1]}, {"min_tokens": 2}):
            assert not async_llm._is_quick(prompt, params(**options))
    for prompt in (long, [1] * 257, {"prompt": long}, MappingProxyType({"prompt": long}), lambda: short, None):
        assert not async_llm._is_quick(prompt, params())  # type: ignore[arg-type]
    assert not async_llm._is_quick(short, {"n": 1})  # type: ignore[arg-type]
