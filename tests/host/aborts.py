"""Aborts at every point of a small day (R09): an engine on the fake runner, one request aborted at one moment, everything judged.

A day is lived once undisturbed, then once for each request, each moment of each step and each way to abort: before the step, when
the device has begun it, and when its results are waited for; once, twice, or with the id taken again at once.
"""

from __future__ import annotations

import itertools
import random
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fake_runner import BEAM_VOCAB_SIZE, VOCAB_SIZE, FakeRunner, isolated, isolated_beams, watched

from jaxpaged.config import EngineConfig, ModelConfig
from jaxpaged.engine import Engine
from jaxpaged.host.pages import PagePool
from jaxpaged.host.prefix_cache import PrefixCache
from jaxpaged.host.request import FinishReason, Request, SamplingParams, TokenEvent

MODEL = ModelConfig("llama", VOCAB_SIZE, 8, 8, 1, 1, 1, 8, 64)
PAGE = 8
MOMENTS = ("before the step", "begun", "awaited")
WAYS = ("once", "twice", "id taken again")
MAX_STEPS_TO_FREE = 2


@dataclass(frozen=True)
class Day:
    """What is asked, by arrival: (step, prompt, params); the i-th has the id r<i>."""

    seed: int
    num_pages: int
    options: dict[str, Any]
    asks: list[tuple[int, list[int], SamplingParams]]


@dataclass(frozen=True)
class Abort:
    """When, of whom and how."""

    step: int
    moment: str
    victim: str
    way: str


def some_day(seed: int, *, is_async: bool) -> Day:
    """Six requests and hardly pages for three: prompts in chunks, equal beginnings, forks, beams, often tiers below."""
    rng = random.Random(f"day {seed}")
    asks, step = [], 0
    num_pages = rng.choice((9, 12, 20))
    beginning = [rng.randrange(VOCAB_SIZE) for _ in range(20)]
    for number in range(6):
        step += rng.choice((0, 0, 1, 3))
        prompt = beginning[: rng.choice((0, 8, 18, 20))] + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 16))]
        options: dict[str, Any] = {"max_tokens": rng.randint(1, 16), "ignore_eos": True}
        kind = (number + seed) % 3
        if kind == 1:
            options |= {"n": rng.randint(2, 4)}
        elif kind == 2 and num_pages == 20:
            stops = tuple(rng.sample(range(BEAM_VOCAB_SIZE), 2))
            options |= {"n": rng.randint(2, 3), "use_beam_search": True, "temperature": 0, "stop_token_ids": stops}
        asks.append((step, prompt, SamplingParams(**options)))
    options = {
        "long_prefill_token_threshold": rng.choice((0, 5, 7)),
        "scheduling_policy": rng.choice(("fcfs", "fcfs", "sjf", "lifo")),
        "enable_prefix_caching": rng.random() < 0.7,
        "async_scheduling": is_async,
    }
    if rng.random() < 0.5:
        options |= {"swap_space": rng.choice((1, 1, 2, 3)) * MODEL.page_bytes(PAGE, "float32") / 2**30, "preemption_mode": "swap"}
        if rng.random() < 0.8:
            options["offload_dir"] = "nowhere"  # the fake runner's disk has no folder
    return Day(seed, num_pages, options, asks)


class Interrupted(FakeRunner):
    """The fake runner; somebody may be called when a step has begun and when its results are asked for."""

    def __init__(self, num_pages: int, page_size: int):
        super().__init__(num_pages, page_size, is_slow=True)
        self.interrupt = lambda moment: None

    def submit(self, plan):
        """See FakeRunner.submit."""
        wait = super().submit(plan)
        self.interrupt(MOMENTS[1])

        def awaited():
            self.interrupt(MOMENTS[2])
            return wait()

        return awaited


class Life:
    """A day lived through, undisturbed or with one abort."""

    def __init__(self, day: Day, abort: Abort | None = None):
        self.day, self.abort = day, abort
        given = {"block_size": PAGE, "max_num_seqs": 8, "max_num_batched_tokens": 32, "flight_recorder_bytes": 0, **day.options}
        config = EngineConfig(**given).resolved(MODEL, "cpu")
        runner = Interrupted(day.num_pages, PAGE)
        runner.interrupt = self.at
        is_private = not config.enable_prefix_caching
        cache = None if is_private and not config.swap_space else PrefixCache(PAGE, is_private=is_private)
        pool = watched(PagePool, day.num_pages, order="newest", on_free=runner.poison, cache=cache)
        self.engine = Engine(config, MODEL, runner, pool=pool)
        self.requests: dict[str, Request] = {}
        self.found: dict[tuple[str, int], tuple[list[int], TokenEvent | None]] = {}  # of each output: its tokens, its end
        self.ends: dict[str, int] = {}  # request -> the step in which its last output ended
        self.step = 0
        self.state = ""  # of the victim, when it was aborted
        self.num_steps_to_free: int | None = None
        self._victims: list[Request] = []

    def live(self) -> None:
        """To the end of the last request; AssertionError when something is wrong."""
        coming = [(step, f"r{number}", prompt, params) for number, (step, prompt, params) in enumerate(self.day.asks)]
        since_abort = 0
        while coming or self.engine.has_unfinished or (self.abort is not None and self.step <= self.abort.step):
            while coming and coming[0][0] <= self.step:
                _, request_id, prompt, params = coming.pop(0)
                self.add(request_id, prompt, params)
            self.at(MOMENTS[0])
            self.take(self.engine.step())
            self.engine.scheduler.check()
            if self._victims and self.num_steps_to_free is None:
                live = (*self.engine.scheduler.running, *self.engine.scheduler.waiting)
                if not any(sequence.request in self._victims for sequence in live):
                    self.num_steps_to_free = since_abort
                since_abort += 1
                assert since_abort <= MAX_STEPS_TO_FREE, "pages of an aborted request are not free"
            self.step += 1
            assert self.step < 500, "it does not come to an end"
        self.judge()

    def add(self, request_id: str, prompt: list[int], params: SamplingParams) -> None:
        self.requests[request_id] = self.engine.add_request(prompt, params, request_id=request_id)
        for index in range(params.n):
            self.found[request_id, index] = [], None

    def take(self, events: list[TokenEvent]) -> None:
        for event in events:
            tokens, end = self.found[event.request_id, event.index]
            assert end is None, "an event after the end"
            tokens += event.token_ids or ([] if event.token_id is None else [event.token_id])
            if event.finish_reason is not None:
                self.found[event.request_id, event.index] = tokens, event
                self.ends[event.request_id] = self.step

    def at(self, moment: str) -> None:
        """A moment of a step: perhaps the one for the abort."""
        if self.abort is None or (self.abort.step, self.abort.moment) != (self.step, moment):
            return
        victim, way = self.abort.victim, self.abort.way
        if self.state:
            return  # more than one step may be begun, or awaited, in one call
        self.state = self.state_of(victim)
        unended = {key for key, (_, end) in self.found.items() if key[0] == victim and end is None}
        events = self.engine.abort(victim)
        assert {(event.request_id, event.index) for event in events} == unended and len(events) == len(unended)
        assert all(event.finish_reason is FinishReason.ABORT and event.token_id is None for event in events)
        self.take(events)
        if unended:
            self._victims.append(self.requests[victim])
        if way == "twice":
            assert self.engine.abort(victim) == [] and self.engine.abort("nobody") == []
        if way == "id taken again" and victim in self.requests:
            self.judge_outputs(victim)
            self.add(victim, [number * 7 for number in range(1, 10)], SamplingParams(max_tokens=5, ignore_eos=True))
        self.engine.scheduler.check()

    def state_of(self, victim: str) -> str:
        """Where a request is in its life."""
        if victim not in self.requests:
            return "unknown"
        sequences = self.engine.scheduler._by_id.get(victim)
        if not sequences:
            return "over"
        plans = [plan for plan, _ in self.engine._in_flight]
        in_flight = {chunk.sequence for plan in plans for chunk in plan.chunks()}
        copied = {target for plan in plans for _, target in plan.copies}
        loaded = {page for plan in plans for _, page in plan.transfers.loads}
        if any(sequence in self.engine.scheduler.recall._holds for sequence in sequences):
            return "fetching"
        running = [sequence for sequence in sequences if sequence in self.engine.scheduler.running]
        where = " in flight" if in_flight.intersection(sequences) else ""
        if not running:
            return ("preempted" if any(sequence.num_preemptions for sequence in sequences) else "queued") + where
        if any(copied.intersection(sequence.pages) for sequence in running):
            return "copying" + where
        if any(loaded.intersection(sequence.pages) for sequence in running):
            return "loading" + where
        if any(sequence.num_computed < sequence.num_prompt for sequence in running):
            return "in a chunk" + where
        return ("search" if sequences[0].group else "forked" if len(sequences) > 1 else "decoding") + where

    def judge(self) -> None:
        """All have ended once, nothing is left, and nobody else has noticed."""
        for request_id in self.requests:
            self.judge_outputs(request_id)
        assert not self.engine.has_unfinished and self.engine.pool.num_used == 0 and not self.engine._in_flight
        self.engine.pool.check([])
        if self._victims:
            assert self.num_steps_to_free is not None

    def judge_outputs(self, request_id: str) -> None:
        request = self.requests[request_id]
        prompt, params, max_len = list(request.prompt_token_ids), request.params, request.max_len
        wanted = (
            [tokens for tokens, _ in isolated_beams(prompt, max_len, params.n, request.stop_ids, 1.0, False)]
            if params.use_beam_search
            else [isolated(prompt, max_len, request.stop_ids, index) for index in range(params.n)]
        )
        for index in range(params.n):
            tokens, end = self.found[request_id, index]
            assert end is not None, "an output has no end"
            if end.finish_reason is FinishReason.ABORT:
                assert request in self._victims and array("I", tokens) == array("I", wanted[index][: len(tokens)])
            else:
                assert tokens == wanted[index], "an output is not that of its isolated run"


def cases(day: Day) -> Iterator[Abort]:
    """Every abort of a day."""
    undisturbed = Life(day)
    undisturbed.live()
    for step, moment, number, way in itertools.product(range(undisturbed.step + 1), MOMENTS, range(len(day.asks)), WAYS):
        # Of what is long over, or has not come, once is enough.
        if (step > undisturbed.ends[f"r{number}"] + 2 or step < day.asks[number][0]) and (step + number) % 7:
            continue
        yield Abort(step, moment, f"r{number}", way)


def run(seed: int, *, is_async: bool, every: int = 1) -> tuple[Counter[str], int]:
    """All aborts of a day, or every so-manieth. How many in which state, and the most steps until pages were free."""
    day, states, most = some_day(seed, is_async=is_async), Counter(), 0
    for number, abort in enumerate(cases(day)):
        if number % every != seed % every:
            continue
        life = Life(day, abort)
        try:
            life.live()
        except Exception as error:
            error.add_note(f"some_day({seed}, is_async={is_async}), {abort}")
            raise
        states[life.state or "nothing was in flight"] += 1
        most = max(most, life.num_steps_to_free or 0)
    return states, most
