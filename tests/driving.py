"""Driving an engine from a test: pages handed out in random order, and requests run to their end with every invariant checked."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import jax

from jaxpaged.config import EngineConfig
from jaxpaged.engine import Engine
from jaxpaged.host.pages import PagePool
from jaxpaged.host.request import FinishReason, SamplingParams, TokenEvent
from jaxpaged.runner import JaxRunner


class ShuffledPool(PagePool):
    """Hands out its free pages in random order, so that no test passes because pages happen to be consecutive."""

    def __init__(self, num_pages: int):
        super().__init__(num_pages)
        self._random = random.Random(num_pages)

    def allocate(self, count: int) -> list[int] | None:
        self._random.shuffle(self._free)
        return super().allocate(count)


@dataclass
class Answer:
    """What became of one request."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None

    def add(self, event: TokenEvent) -> None:
        assert self.finish_reason is None, "an event after the end"
        if event.token_id is not None:
            self.token_ids.append(event.token_id)
        self.finish_reason, self.stop_reason = event.finish_reason, event.stop_reason


@dataclass(frozen=True)
class Ask:
    """One request to be."""

    prompt: list[int]
    params: SamplingParams


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """The traces, lowerings and compilations of the block, as jax itself reports them."""
    seen: list[str] = []
    is_on = True

    def listen(event: str, duration: float, **_: object) -> None:
        if is_on and event.startswith("/jax/core/compile/"):
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        is_on = False  # jax has no public way to take one listener back


def few_steps(page_size: int, max_model_len: int) -> dict[str, object]:
    """Options of an engine with two compiled steps, and pages for eight sequences of any length."""
    return {
        "dtype": "float32",
        "block_size": page_size,
        "max_model_len": max_model_len,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "prefill_tile": 16,
        "decode_row_buckets": (8,),
        "prefill_tile_buckets": (4,),
        "num_gpu_blocks_override": 8 * max_model_len // page_size + 1,
    }


def greedy(max_tokens: int = 16, **options) -> SamplingParams:
    """Greedy sampling that ends by length alone."""
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **{"ignore_eos": True, **options})


def another_engine(engine: Engine, *, num_pages: int | None = None, **options) -> Engine:
    """An engine with other options of the scheduler around the same runner, so that nothing compiles again.

    The pages keep what earlier sequences left in them, as in a long-running server.
    """
    config: EngineConfig = dataclasses.replace(engine.config, **options)
    runner: JaxRunner = engine.runner  # type: ignore[assignment]
    assert num_pages is None or num_pages <= runner.num_pages
    return Engine(config, engine.model, runner, pool=ShuffledPool(num_pages or runner.num_pages))


def outputs_of(engine: Engine, asks: Iterable[Ask]) -> dict[tuple[str, int], list]:
    """All outputs of requests that come together, each request named by its number: tokens, and why it ended with the last."""
    found: dict[tuple[str, int], list] = {}
    for number, ask in enumerate(asks):
        engine.add_request(ask.prompt, ask.params, request_id=str(number))
    while engine.has_unfinished:
        for event in engine.step():
            found.setdefault((event.request_id, event.index), []).append((event.token_id, event.finish_reason))
        engine.scheduler.check()
    return found


def run(engine: Engine, asks: Iterable[Ask], *, arrivals: Callable[[int], int] = lambda index: 0) -> list[Answer]:
    """Run requests to their end, the i-th added before step `arrivals(i)`; every invariant is checked after every step."""
    asks = list(asks)
    answers = [Answer() for _ in asks]
    waiting = sorted(range(len(asks)), key=arrivals)
    step = 0
    while waiting or engine.has_unfinished:
        while waiting and arrivals(waiting[0]) <= step:
            index = waiting.pop(0)
            engine.add_request(asks[index].prompt, asks[index].params, request_id=str(index))
        for event in engine.step():
            answers[int(event.request_id)].add(event)
        engine.scheduler.check()
        step += 1
        assert step < 100_000, "the engine does not come to an end"
    assert all(answer.finish_reason is not None for answer in answers)
    assert engine.pool.num_used == 0, "pages are owned after the last request"
    return answers
