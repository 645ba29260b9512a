"""Engines that keep the bits of every row of logits, on a pool where all that nobody owns is NaN.

Their executable is the engine's own step that also returns its logits. By default there is one alone, so that a request alone and
the same one in a crowd meet the same program. Behind the pool lies one page more, the guard, which nobody is ever given.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Iterable
from typing import NamedTuple
from unittest import mock

import families
import jax
import jax.numpy as jnp
import numpy as np
from driving import Ask, ShuffledPool

from jaxpaged import config as config_module
from jaxpaged.config import EngineConfig, ModelConfig
from jaxpaged.engine import Engine
from jaxpaged.host.plan import StepPlan
from jaxpaged.host.scheduler import Scheduler
from jaxpaged.model.cache import KVCache
from jaxpaged.model.step import StepOutputs, forward_paged, of_packed, sampled_logits
from jaxpaged.runner import JaxRunner, attention_backend


class Row(NamedTuple):
    """The logits of one place of a text, and what computed them."""

    bits: bytes
    kind: str  # row, a decode row, or tile
    executable: tuple[int, int]  # decode rows and tokens of the step

    def logits(self) -> np.ndarray:
        return np.frombuffer(self.bits, np.float32)


Bits = dict[tuple[str, int, int], Row]
"""By request, output and the number of tokens before."""


def step_with_logits(weights, cache, inputs, *, config, backend, max_logprobs):
    """`jaxpaged.model.step.step`, which also returns the logits."""
    hidden, cache = forward_paged(weights, cache, inputs.fed_tokens(), config=config, backend=backend)
    scores = sampled_logits(weights, hidden, inputs, config=config, backend=backend)
    outputs = StepOutputs.of(scores, inputs, max_logprobs)
    return (outputs.told(weights, hidden, inputs, max_logprobs, config=config), scores), cache


class Keeper:
    """Where a runner puts what its steps return beside their outputs: the place of a duel."""

    def __init__(self) -> None:
        self.bits: Bits = {}
        self.is_sick: Callable[[tuple[str, int, int]], bool] = lambda key: False  # rows that may be not finite

    def record(self, plan: StepPlan, inputs, rows: list[int], scores: jax.Array, cache: KVCache) -> None:
        """One step."""
        found = np.asarray(scores)
        for (chunk, num_drafts), row in zip(plan.outputs(), rows, strict=True):
            sequence = chunk.sequence
            key = sequence.request.request_id, sequence.index, chunk.end - len(chunk.drafts) + num_drafts
            is_finite = bool(np.isfinite(found[row]).all())
            assert is_finite or self.is_sick(key), f"{sequence.request.request_id}: a logit that is not finite"
            executable = len(inputs.fed), len(inputs.tokens.token_ids)
            self.bits[key] = Row(found[row].tobytes(), "row" if chunk.is_decode else "tile", executable)


class KeepingRunner(JaxRunner):
    """Its steps keep logits. Before each, all that no running sequence and not the prefix cache holds becomes NaN."""

    scheduler = None

    def __init__(self, config: EngineConfig, model: ModelConfig, weights, *, num_pages: int):
        super().__init__(config, model, weights, num_pages=num_pages)
        options = {"config": model, "backend": attention_backend(config, model), "max_logprobs": config.max_logprobs}
        self._jitted = jax.jit(of_packed(functools.partial(step_with_logits, **options)), donate_argnums=1)
        self.duel = Keeper()  # type: ignore[assignment]

    def submit(self, plan: StepPlan):
        """See JaxRunner.submit."""
        if self.scheduler is not None:
            self.cache = plant_nan(self.cache, self, self.scheduler)
        return super().submit(plan)

    def guard_is_untouched(self) -> bool:
        """Whether the last page of each layer is NaN all over, as it was."""
        pages = np.asarray(self.cache.k_pages), np.asarray(self.cache.v_pages)
        at = np.arange(self.model.num_layers) * self.num_pages + self.num_pages - 1
        return all(np.isnan(one[at]).all() for one in pages)


def plant_nan(cache: KVCache, runner: JaxRunner, scheduler: Scheduler) -> KVCache:
    """The cache with NaN in every slot that holds no token of a running sequence or of the prefix cache."""
    size: int = runner.config.block_size  # type: ignore[assignment]
    unused = np.ones((runner.model.num_layers, runner.num_pages, size), bool)
    for sequence in scheduler.running:
        places = np.arange(sequence.num_computed)
        unused[:, np.array(sequence.pages, int)[places // size], places % size] = False
    if scheduler.pool.cache is not None:
        unused[:, [page for page in range(runner.num_pages) if page in scheduler.pool.cache]] = False
    return _plant(cache, unused.reshape(-1, size))


@functools.partial(jax.jit, donate_argnums=0)
def _plant(cache: KVCache, unused: jax.Array) -> KVCache:
    return jax.tree.map(lambda pages: jnp.where(unused[:, None, :, None], jnp.nan, pages), cache)


def new_runner(
    family: str, page_size: int, *, tile: int, num_pages: int, tiles: int, rows: int = 8, has_buckets: bool = False
) -> KeepingRunner:
    """A runner of one executable: `rows` decode rows and `tiles` tiles; with `has_buckets`, of smaller ones too.

    Page sizes below the engine's smallest are for tests.
    """
    (found,) = [one for one in families.FAMILIES if one.name == family]
    model = found.config
    options = {"max_num_seqs": rows, "max_num_batched_tokens": max(rows, tile * tiles), "prefill_tile": tile}
    buckets = {"decode_row_buckets": (1, rows), "prefill_tile_buckets": (1, tiles)}
    with mock.patch.object(config_module, "BLOCK_SIZES", (page_size,)):
        given = EngineConfig(dtype="float32", block_size=page_size, num_gpu_blocks_override=num_pages, **options, **buckets)
        runner = KeepingRunner(given.resolved(model, "cpu"), model, found.weights(), num_pages=num_pages)
    if not has_buckets:
        runner.buckets = runner.buckets[-1:]
    runner.warm_up(use_tqdm=False)
    return runner


def new_engine(runner: KeepingRunner, *, num_pages: int | None = None, plants_nan: bool = False, **options) -> Engine:
    """An engine around this runner, whose bits it takes over. The last page of the runner is the guard."""
    with mock.patch.object(config_module, "BLOCK_SIZES", (runner.config.block_size,)):
        config = dataclasses.replace(runner.config, **options)
    pool = ShuffledPool(num_pages or runner.num_pages - 1)
    engine = Engine(config, runner.model, runner, pool=pool)
    runner.scheduler, runner.duel = engine.scheduler if plants_nan else None, Keeper()  # type: ignore[assignment]
    return engine


def serve(engine: Engine, asks: Iterable[Ask], *, per_step: float = 1.0, first: int = 0) -> Bits:
    """Serve requests to their end, `per_step` of them coming in a step, each named by its number: the bits of all logits."""
    asks = list(asks)
    rng, number = random.Random(len(asks)), 0
    while number < len(asks) or engine.has_unfinished:
        while number < len(asks) and (rng.random() < per_step or not engine.has_unfinished):
            engine.add_request(asks[number].prompt, asks[number].params, request_id=str(first + number))
            number += 1
            if per_step < 1:
                break
        for event in engine.step():
            assert event.finish_reason in (None, "stop", "length")
    assert engine.pool.num_used == 0
    return engine.runner.duel.bits  # type: ignore[attr-defined, union-attr]
