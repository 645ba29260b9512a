"""An engine around the fake runner, and a busy day for it: shared beginnings, forks, aborts, too few pages."""

from __future__ import annotations

import random
import sys
from pathlib import Path

from jaxpaged.config import EngineConfig, ModelConfig
from jaxpaged.engine import Engine
from jaxpaged.host.pages import PagePool
from jaxpaged.host.request import SamplingParams

sys.path.insert(0, str(Path(__file__).parents[1] / "host"))
from fake_runner import VOCAB_SIZE, FakeRunner

MODEL = ModelConfig("llama", VOCAB_SIZE, 8, 8, 1, 1, 1, 8, 512)
PAGE = 16


class Clock:
    """Seconds that pass when somebody looks."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


def new_engine(num_pages: int = 41, *, runner: FakeRunner | None = None, pool: PagePool | None = None, **options) -> Engine:
    """An engine without a model."""
    given = {"block_size": PAGE, "max_num_seqs": 16, "max_num_batched_tokens": 128, **options}
    config = EngineConfig(**given).resolved(MODEL, "cpu")
    return Engine(config, MODEL, runner or FakeRunner(num_pages, PAGE), pool=pool, clock=Clock())


def whose(number: int) -> dict:
    """A priority and a tenant."""
    return {"priority": number * 7 % 5, "tenant": "abc"[number % 3]}


def busy_day(engine: Engine, *, num_requests: int = 60, seed: int = 0, with_faults: bool = True) -> None:
    """Serve random requests to the end."""
    rng = random.Random(seed)
    beginnings = [[rng.randrange(VOCAB_SIZE) for _ in range(rng.choice((16, 32, 40)))] for _ in range(3)]
    num_added = num_steps = 0
    while num_added < num_requests or engine.has_unfinished:
        while num_added < num_requests and rng.random() < 0.4:
            prompt = rng.choice(beginnings) + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 40))]
            params = SamplingParams(max_tokens=rng.randint(1, 60), n=rng.choice((1, 1, 1, 3)))
            engine.add_request(
                prompt, params, request_id=f"r{num_added}", cache_salt=rng.choice((None, None, "a")), **whose(num_added)
            )
            num_added += 1
        if with_faults and rng.random() < 0.05:
            engine.abort(f"r{rng.randrange(num_requests)}")
        if with_faults and rng.random() < 0.01:
            engine.reset_prefix_cache()
        engine.step()
        num_steps += 1
        assert num_steps < 20_000
