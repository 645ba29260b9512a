"""The options of the tiers below the pool: what is allowed, what an error says, and what is built of them."""

from __future__ import annotations

import dataclasses
import math

import pytest

from jaxpaged.cli.options import described_fields
from jaxpaged.config import ConfigError, EngineConfig, ModelConfig
from jaxpaged.host.pages import PagePool
from jaxpaged.host.preemption import SwapCosts
from jaxpaged.host.scheduler import build

MODEL = ModelConfig("llama", 100, 8, 8, 1, 1, 1, 8, 512)
PAGE_BYTES = MODEL.page_bytes(16, "bfloat16")
OPTIONS = ("swap_space", "kv_offloading_size", "preemption_mode", "offload_dir", "offload_num_threads", "offload_threshold",
           "prefetch_blocks")  # fmt: skip


def built(**options):
    """The scheduler of an engine with these options."""
    config = EngineConfig(block_size=16, **options).resolved(MODEL, "cpu")
    return build(config, MODEL, PagePool(9), costs=SwapCosts(token_s=7.0))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("swap_space", value) for value in (-1, -0.1, math.nan, math.inf, 2**21, "4", True, None)),
        *(("kv_offloading_size", value) for value in (-1, math.nan, "4", False)),
        *(("preemption_mode", value) for value in ("", "Swap", None, 1, ["swap"])),
        *(("offload_dir", value) for value in (7, True)),
        *(("offload_num_threads", value) for value in (0, 65, 1.0, "4")),
        *(("offload_threshold", value) for value in (-1, 0.5)),
        *(("prefetch_blocks", value) for value in (0, -1, 1.5)),
    ],
    ids=repr,
)
def test_a_bad_value_is_named(name: str, value: object) -> None:
    with pytest.raises(
        ConfigError, match=rf"^{name}: got {repr(value).replace('[', '.').replace(']', '.')}.*, expected"
    ) as caught:
        EngineConfig(**{name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offload_dir": "/x"}, "offload_dir: got '/x', expected none without swap_space: set swap_space too"),
        ({"preemption_mode": "swap"}, "preemption_mode: got 'swap', expected recompute or auto without swap_space: set swap"),
        ({"preemption_mode": "swop"}, "expected one of recompute, swap, auto, did you mean 'swap'"),
        (
            {"swap_space": 1, "kv_offloading_size": 2},
            "kv_offloading_size: got 2 and swap_space 1, expected one of them: they are two names of one option",
        ),
    ],
    ids=str,
)
def test_options_that_do_not_go_together(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**options)


def test_the_two_names_are_one_option() -> None:
    for options in ({"swap_space": 2}, {"kv_offloading_size": 2}, {"swap_space": 2, "kv_offloading_size": 2.0}):
        config = EngineConfig(**options)
        assert config.swap_space == 2 and dataclasses.replace(config, swap_space=3).swap_space == 3


def test_a_tier_too_small_for_a_page_is_refused_with_the_numbers() -> None:
    config = EngineConfig(block_size=16, swap_space=(PAGE_BYTES - 1) / 2**30).resolved(MODEL, "cpu")
    with pytest.raises(
        ConfigError, match=f"swap_space: got .* GiB, expected 0 or at least .* GiB, one page of {PAGE_BYTES} bytes"
    ):
        config.num_host_pages(MODEL)


def test_what_is_built() -> None:
    plain = built()
    assert plain.pool.tier is None and plain.pool.cache is not None and not plain.recall.has_disk
    assert built(enable_prefix_caching=False).pool.cache is None
    swap_space = 5.5 * PAGE_BYTES / 2**30
    below = built(swap_space=swap_space, preemption_mode="swap")
    assert below.pool.tier.options == {"num_slots": 5, "has_disk": False, "threshold": 0, "max_fetches": 32}
    assert not below.pool.cache.is_private and below.preemption_mode == "swap" and below.costs.token_s == 7.0
    options = {"offload_dir": "x", "offload_threshold": 32, "prefetch_blocks": 3, "enable_prefix_caching": False}
    deep = built(kv_offloading_size=swap_space, **options)
    assert deep.pool.tier.options == {"num_slots": 5, "has_disk": True, "threshold": 32, "max_fetches": 3}
    assert deep.pool.cache.is_private and deep.recall.has_disk and deep.preemption_mode == "auto"


def test_every_option_is_described() -> None:
    described = described_fields(EngineConfig)
    assert all(described[name] for name in OPTIONS)
