"""Steps that fail (R11): on the way to the device, on it and when their result is fetched, with the pages lost or not.

The model and the device are real, on a thread of its own as in the server. `trials` raises when a law is broken and returns how
many it has seen; test_failing.py does a part, `make fuzz-server` all.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import random
from collections.abc import Callable, Iterable, Iterator
from unittest import mock

import jax
from bits import new_runner

from jaxpaged import config as config_module
from jaxpaged.admission import QueueOptions
from jaxpaged.async_llm import AsyncLLM
from jaxpaged.engine import Engine
from jaxpaged.host.request import SamplingParams
from jaxpaged.runner import JaxRunner
from jaxpaged.streams import StepFailedError

STAGES = ("before", "after", "fetch")
NUM_REQUESTS = 8
MOST_FAILURES = 2 + 2 * math.ceil(math.log2(NUM_REQUESTS))


class Breakable:
    """A runner's `submit` that fails where it is told to: at a stage, for steps whose requests are `is_bad`."""

    def __init__(self, runner: JaxRunner):
        self.runner, self._submit = runner, runner.submit
        runner.submit = self.submit  # type: ignore[method-assign]
        self.stage, self.loses_pages = STAGES[0], False
        self.is_bad: Callable[[set[str]], bool] = lambda request_ids: False
        self.failures: list[set[str]] = []
        self.num_recoveries = 0
        recover = runner.recover
        runner.recover = lambda: recover() or self._count()  # type: ignore[method-assign]

    def _count(self) -> bool:
        self.num_recoveries += 1
        return False

    def submit(self, plan):
        """See `Runner.submit`."""
        ids = {chunk.sequence.request.request_id for chunk in plan.chunks()}
        if not self.is_bad(ids):
            return self._submit(plan)
        if self.stage == "before":
            self._fail(ids)
        wait = self._submit(plan)
        if self.stage == "after":
            self._fail(ids)

        def waited():
            wait()
            self._fail(ids)

        return waited

    def _fail(self, ids: set[str]) -> None:
        self.failures.append(ids)
        if self.loses_pages:  # as after a step that was given them and has raised
            for array in jax.tree.leaves(self.runner.cache):
                array.delete()
        raise OSError("the device is gone")


@contextlib.contextmanager
def ward() -> Iterator[tuple[AsyncLLM, Breakable]]:
    """A small real model, served, which can be broken."""
    runner = new_runner("qwen2-window", 8, tile=16, tiles=2, num_pages=60)
    with mock.patch.object(config_module, "BLOCK_SIZES", (8,)):
        config = dataclasses.replace(runner.config, async_scheduling=True)
    breakable = Breakable(runner)
    llm = AsyncLLM(Engine(config, runner.model, runner), None, queue=QueueOptions())
    level = logging.getLogger("jaxpaged").level
    logging.getLogger("jaxpaged").setLevel(logging.CRITICAL)  # failures are what this is about
    try:
        yield llm, breakable
    finally:
        logging.getLogger("jaxpaged").setLevel(level)
        llm.shutdown()


def asks(seed: int, vocab_size: int) -> list[tuple[list[int], SamplingParams]]:
    """Requests that begin alike, greedy and drawn, with penalties or not, one with several outputs."""
    rng = random.Random(seed)
    beginning = [rng.randrange(vocab_size) for _ in range(24)]
    found = []
    for number in range(NUM_REQUESTS):
        prompt = beginning[: rng.choice((0, 8, 24))] + [rng.randrange(vocab_size) for _ in range(rng.randint(1, 20))]
        options = {"temperature": rng.choice((0.0, 1.0)), "seed": rng.getrandbits(40), "n": 2 if number == 3 else 1}
        options |= {"frequency_penalty": rng.choice((0.0, 0.5)), "max_tokens": rng.randint(4, 14)}
        found.append((prompt, SamplingParams(ignore_eos=True, detokenize=False, **options)))  # type: ignore[arg-type]
    return found


async def _tokens(llm: AsyncLLM, name: str, ask: tuple[list[int], SamplingParams]) -> list[list[int]]:
    async for output in llm.generate(*ask, request_id=name):
        last = output
    assert all(one.finish_reason == "length" for one in last.outputs)
    return [one.token_ids for one in last.outputs]


async def _trial(llm: AsyncLLM, breakable: Breakable, seed: int, expected: list[list[list[int]]]) -> None:
    """One fault that comes once, or one or two requests all of whose steps fail from some step on."""
    rng, llm_asks = random.Random(f"trial {seed}"), asks(seed // 12, llm.model_config.vocab_size)
    breakable.stage, breakable.loses_pages = STAGES[seed % 3], bool(seed % 2)
    num_poisoned = (0, 0, 1, 2)[seed // 3 % 4]
    poisoned = {str(number) for number in rng.sample(range(NUM_REQUESTS), num_poisoned)}
    countdown = rng.randrange(12)
    breakable.failures, breakable.num_recoveries = [], 0

    def is_bad(ids: set[str]) -> bool:
        nonlocal countdown
        if poisoned:
            countdown -= bool(poisoned & ids)
            return bool(poisoned & ids) and countdown < 0
        countdown -= 1
        return countdown == -1

    breakable.is_bad = is_bad
    names = map(str, range(NUM_REQUESTS))
    work = (_tokens(llm, name, ask) for name, ask in zip(names, llm_asks, strict=True))
    found = await asyncio.gather(*work, return_exceptions=True)
    breakable.is_bad = lambda ids: False
    for number, (one, wanted) in enumerate(zip(found, expected, strict=True)):
        if str(number) in poisoned and isinstance(one, Exception):
            assert isinstance(one, StepFailedError), one
        else:
            assert one == wanted, f"request {number}: {one!r}, expected {wanted}"
    if not poisoned:
        assert len(breakable.failures) <= 1, "a fault that came once has set back more than once"
    assert len(breakable.failures) <= MOST_FAILURES * max(1, num_poisoned), breakable.failures
    assert breakable.num_recoveries >= (len(breakable.failures) if breakable.loses_pages else 0)
    while llm.num_unfinished:
        await asyncio.sleep(0.001)
    assert llm._engine.pool.num_used == 0
    llm._engine.scheduler.check()
    llm.check_health()


def trials(seeds: Iterable[int]) -> int:
    """So many, on one engine."""
    count = 0

    async def main() -> None:
        nonlocal count
        known: dict[int, list[list[list[int]]]] = {}
        for seed in seeds:
            group = seed // 12
            if group not in known:
                some = asks(group, llm.model_config.vocab_size)
                known[group] = [await _tokens(llm, str(number), ask) for number, ask in enumerate(some)]
            try:
                await asyncio.wait_for(_trial(llm, breakable, seed, known[group]), 60)
            except Exception as error:
                raise AssertionError(f"trial {seed}: {error!r}") from error
            count += 1

    with ward() as (llm, breakable):
        asyncio.run(main())
    return count
