"""`batch_invariant`: the same bits whatever is around a request, the same seed the same tokens anywhere. See invariance.py."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import invariance
import jax
import pytest
from invariance import Invariance

from jaxpaged.config import ConfigError, EngineConfig
from jaxpaged.engine import Engine
from jaxpaged.host.request import SamplingParams
from jaxpaged.model import attention, step
from jaxpaged.model import cache as kv_cache
from jaxpaged.model import weights as model_weights
from jaxpaged.model.transformer import of_rows
from jaxpaged.runner import JaxRunner


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with invariance.new_engine(batch_invariant=True) as engine:
        yield engine


@pytest.fixture(scope="module")
def law(engine: Engine) -> Invariance:
    return Invariance([engine])


def test_the_bits_of_a_request_are_its_own(law: Invariance) -> None:
    seen = law.compose(range(40))
    assert seen.differ == [] and seen.compositions == 40 and seen.outputs > 80
    assert min(seen.kinds[kind] for kind in ("alone", "preempted", "cached", "swapped")) > 0, seen.kinds


def test_without_it_they_are_not() -> None:
    """The very same compositions, and what they compare would show a difference of one bit.

    By XLA all differ; with C++, whose products and heads have a row's bits whatever is beside it, a quarter, by their chunks.
    """
    with invariance.new_engine(batch_invariant=False, attention_backend="xla") as engine:
        seen = Invariance([engine]).compose(range(4))
    assert len(seen.differ) > seen.outputs / 4


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["attention", "rows"])
def test_half_of_it_would_show(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles for the rows without attention token by token, on the backend whose rows are summed together, and the reverse."""
    if broken == "attention":
        monkeypatch.setattr(attention.PagedTokens, "apart", lambda self: self)
        monkeypatch.setattr(attention, "paged_prefill_attention", _without(attention.paged_prefill_attention))
    else:
        monkeypatch.setattr(step, "of_rows", lambda *given, batch_invariant: of_rows(*given, batch_invariant=False))
    with invariance.new_engine(batch_invariant=True, attention_backend="xla") as engine:
        assert Invariance([engine]).compose(range(4)).differ


def _without(operation):
    return lambda *given, batch_invariant, **options: operation(*given, **options)


def test_a_seed_means_the_same_tokens_in_another_process_and_in_a_crowd(engine: Engine) -> None:
    """Alone in a process of its own; here in a crowd, with preemptions, and once more after that."""
    prompt, count = [5, 6, 7] * 9, 20
    folder = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    script = f"""
import json, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import jax, invariance
from jaxpaged.host.request import SamplingParams
jax.config.update("jax_compilation_cache_dir", {folder!r})
engine = invariance.new_engine(batch_invariant=True)
engine.add_request({prompt!r}, SamplingParams(seed=2**40 + 1, max_tokens={count}, ignore_eos=True))
print(json.dumps([event.token_id for _ in range(100) for event in engine.step()]))
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=240)
    assert ran.returncode == 0, ran.stderr
    alone = json.loads(ran.stdout.splitlines()[-1])
    crowd = invariance.another_engine(engine, num_pages=18)
    params = SamplingParams(seed=2**40 + 1, max_tokens=count, ignore_eos=True)
    found: dict[str, list[int]] = {}
    for turn in range(2):
        for number in range(7):
            mate = dataclasses.replace(params, seed=number)
            crowd.add_request([number, *prompt][:20], mate, request_id=f"{turn} mate {number}")
        crowd.add_request(prompt, params, request_id=f"{turn} same")
        while crowd.has_unfinished:
            for event in crowd.step():
                found.setdefault(event.request_id, []).append(event.token_id)  # type: ignore[arg-type]
    assert crowd.scheduler.num_preemptions > 0
    assert len(alone) == count and found["0 same"] == found["1 same"] == alone
    assert found["0 mate 0"] != alone[:count]


@pytest.mark.parametrize("name", ["smollm", *(pytest.param(f.name, marks=pytest.mark.slow) for f in families.FAMILIES)])
def test_the_score_of_a_text_is_that_of_its_decoding_to_the_last_bit(name: str) -> None:
    (family,) = [one for one in families.FAMILIES if one.name == name]
    assert invariance.score_apart(family, batch_invariant=True, num_prompts=5) == 0.0


def test_no_step_copies_the_pool() -> None:
    """The temporaries stay under a twentieth of the pool, as those of the plain step."""
    (family,) = [one for one in families.FAMILIES if one.name == "qwen2-window"]
    model, num_pages = dataclasses.replace(family.config, head_dim=64), 16384
    shapes = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "decode_row_buckets": (4,), "prefill_tile_buckets": (2,)}
    options = {"dtype": "bfloat16", "block_size": 16, "num_gpu_blocks_override": num_pages, "batch_invariant": True}
    config = EngineConfig(**options, **shapes).resolved(model, "cpu")  # type: ignore[arg-type]
    pool_bytes = num_pages * kv_cache.page_bytes(model, 16, "bfloat16")
    runner = JaxRunner(config, model, model_weights.init(model, jax.random.key(0), "bfloat16"), num_pages=num_pages)
    runner.warm_up(use_tqdm=False)
    analyses: list[Any] = [compiled.memory_analysis() for compiled in runner.compiled.values()]
    runner.close()
    assert pool_bytes >= 256 << 20 and len(analyses) == 2
    assert max(analysis.temp_size_in_bytes for analysis in analyses) < pool_bytes / 20
    assert min(analysis.alias_size_in_bytes for analysis in analyses) >= pool_bytes


@pytest.mark.slow
def test_a_duel_and_another_backend_beside_it_change_no_bit(engine: Engine, tmp_path: Path) -> None:
    asks = invariance.asks(random.Random(1), engine.model.vocab_size, 6)
    named = [(str(number), ask) for number, ask in enumerate(asks)]
    wanted = invariance.serve(invariance.another_engine(engine), named)
    options = {"compare_with": "xla", "compare_dir": str(tmp_path), "decode_row_buckets": (8,), "async_scheduling": False}
    with invariance.new_engine(batch_invariant=True, **options) as one:
        assert invariance.serve(one, named) == wanted
        assert one.duel is not None and one.duel.breach is None and one.duel.num_steps > 0


def test_it_is_a_switch() -> None:
    with pytest.raises(ConfigError, match="batch_invariant: got 1, expected True or False"):
        EngineConfig(batch_invariant=1)  # type: ignore[arg-type]
