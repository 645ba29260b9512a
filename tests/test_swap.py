"""Tiers below the pool with a real model: what a request gets does not depend on where its pages have been."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import families
import pytest
from driving import Ask, ShuffledPool, greedy, run

from jaxpaged.config import EngineConfig
from jaxpaged.engine import Engine
from jaxpaged.host.preemption import SwapCosts

(FAMILY,) = [family for family in families.FAMILIES if family.name == "qwen2-window"]
MODEL = FAMILY.config
PAGE = 8
FEW_PAGES = MODEL.max_position_embeddings // PAGE + 8
OPTIONS = {
    **{"dtype": "float32", "block_size": PAGE, "max_num_seqs": 8, "max_num_batched_tokens": 64, "prefill_tile": 16},
    **{"decode_row_buckets": (8,), "prefill_tile_buckets": (4,), "num_gpu_blocks_override": FEW_PAGES},
}


def new_engine(*, num_slots: int = 0, **options) -> Engine:
    config = EngineConfig(**{**OPTIONS, "swap_space": num_slots * MODEL.page_bytes(PAGE, "float32") / 2**30, **options})
    return Engine.from_weights(config, MODEL, FAMILY.weights(), pool_type=ShuffledPool)


def asks(seed: int) -> list[Ask]:
    """Three conversations that are gone back to, long enough to push each other out."""
    rng = random.Random(seed)
    talks = [[rng.randrange(MODEL.vocab_size) for _ in range(80)] for _ in range(3)]
    return [Ask(rng.choice(talks)[: rng.randint(40, 80)], greedy(rng.randint(1, 40))) for _ in range(24)]


@pytest.fixture(scope="module")
def expected() -> list:
    with new_engine(num_gpu_blocks_override=16 * FEW_PAGES, enable_prefix_caching=False) as engine:
        return run(engine, asks(0))


@pytest.mark.parametrize(
    ("has_disk", "enable_prefix_caching", "async_scheduling"),
    [(False, False, True), (False, True, False), (True, False, False), (True, True, True)],
)
def test_pages_come_back_as_they_were(
    has_disk: bool, enable_prefix_caching: bool, async_scheduling: bool, expected: list, tmp_path: Path
) -> None:
    num_slots, options = (12, {"offload_dir": str(tmp_path)}) if has_disk else (200, {})
    options |= {"enable_prefix_caching": enable_prefix_caching, "async_scheduling": async_scheduling}
    with new_engine(num_slots=num_slots, preemption_mode="swap", **options) as engine:
        assert run(engine, asks(0), arrivals=lambda index: 3 * index) == expected
        stats = engine.stats()
        assert stats["num_preemptions"] > 0 and stats["num_blocks_swapped_in"] > 0
        if has_disk and enable_prefix_caching:
            assert stats["num_blocks_spilled"] > 0 and stats["num_blocks_fetched"] > 0
    assert not has_disk or not list(tmp_path.iterdir()), "the folder is removed"


def test_an_engine_that_was_built_with_tiers_says_what_it_was_built_with() -> None:
    with new_engine(num_slots=5, preemption_mode="auto") as engine:
        assert engine.pool.tier is not None and engine.pool.tier.num_slots == 5 == engine.stats()["num_cpu_blocks"]
        costs = engine.scheduler.costs
        assert 0 < costs.token_s < 1 and all(0 <= cost < 1 for cost in dataclasses.astuple(costs)), "measured here"
        assert costs != SwapCosts.guess(MODEL.page_bytes(PAGE, "float32"))
    with new_engine(num_slots=5, preemption_mode="swap") as engine:
        assert engine.scheduler.costs == SwapCosts.guess(MODEL.page_bytes(PAGE, "float32")), "nobody compares them"
