"""Two attention backends side by side: right ones never breach, a planted bug is caught in its step and replays alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import families
import numpy as np
import pytest
from driving import Ask, greedy, run

from jaxpaged.config import ConfigError, EngineConfig
from jaxpaged.engine import Engine
from pallas_kernels import operations

sys.path.insert(0, str(Path(__file__).parent / "kernels"))
from planting import planted

(FAMILY,) = [family for family in families.FAMILIES if family.name == "qwen2-window"]
OPTIONS = {
    "dtype": "float32",
    "block_size": 8,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "prefill_tile": 16,
    "decode_row_buckets": (4,),
    "prefill_tile_buckets": (2,),
    "num_gpu_blocks_override": 64,
    "enforce_eager": True,
    "attention_backend": "xla",
}
XLA = "pallas_kernels.paged_decode_attention.xla"
# Each page in place of the one before it: what a kernel that counts pages from 1 reads.
WRONG_PAGE = ("jnp.pad(block_tables,", "jnp.pad(jnp.roll(block_tables, -1, axis=1),")
PROMPT = [5 + i % 40 for i in range(20)]


def new_engine(folder: Path, rival: str = "reference", **options) -> Engine:
    config = EngineConfig(**{**OPTIONS, "compare_with": rival, "compare_dir": str(folder), **options})
    return Engine.from_weights(config, FAMILY.config, FAMILY.weights())


@pytest.fixture(autouse=True)
def forget_compiled_operations() -> Iterator[None]:
    """`Operation.run` keeps what it has compiled, planted bugs included."""
    operations.Operation.compiled.cache_clear()
    yield
    operations.Operation.compiled.cache_clear()


def test_right_backends_never_breach_and_tokens_are_those_of_one_alone(tmp_path: Path) -> None:
    asks = [Ask(PROMPT[: 3 + 5 * i], greedy(12)) for i in range(4)]
    with new_engine(tmp_path) as engine:
        together = run(engine, asks)
        duel = engine.duel
        assert duel is not None
        assert duel.num_steps == engine.num_steps
        assert duel.errors.shape == (FAMILY.config.num_layers, FAMILY.config.num_heads)
        assert 0 < duel.errors.max() < duel.tolerance, "two orders of summation agree in every bit, or not at all"
        assert duel.breach is None
        assert duel.flip is None
        assert list(tmp_path.iterdir()) == []
    with new_engine(tmp_path, rival=None) as engine:
        assert engine.duel is None
        assert run(engine, asks) == together


@pytest.mark.parametrize(
    ("dtype", "prompt_len"), [("bfloat16", 20), ("float32", 1), pytest.param("float32", 20, marks=pytest.mark.slow)]
)
def test_a_wrong_page_is_caught_within_its_step_and_replays_alone(dtype: str, prompt_len: int, tmp_path: Path) -> None:
    with planted(XLA, *WRONG_PAGE), new_engine(tmp_path, dtype=dtype) as engine:
        engine.add_request(PROMPT[:prompt_len], greedy(20), request_id="mine")
        breach = None
        while breach is None and engine.has_unfinished:
            engine.step()
            breach = engine.duel.breach
        # A single page has no neighbour within its row to be mistaken for, but the table's padding: page 0, the null page.
        assert breach is not None
        assert breach.step == engine.num_steps == 1
        assert (breach.request_id, breach.position, breach.layer) == ("mine", prompt_len - 1, 0)
        assert breach.error > engine.duel.tolerance
        assert engine.duel.errors.max() >= breach.error

        (path,) = tmp_path.iterdir()
        assert str(path) == breach.path
        operation, call = operations.load(path)
        verdicts = operations.check(operation, call, "xla")
        assert not all(verdict.is_right for verdict in verdicts), "the file alone shows the bug"
    operations.Operation.compiled.cache_clear()
    for backend in ("xla", "reference"):
        assert all(verdict.is_right for verdict in operations.check(operation, call, backend)), "and its absence"


def test_a_wrong_page_in_a_decode_row_is_a_call_of_the_decode_operation(tmp_path: Path) -> None:
    with new_engine(tmp_path) as engine:
        engine.add_request(PROMPT, greedy(20), request_id="mine")
        engine.step()
        assert engine.duel.breach is None
        with planted(XLA, *WRONG_PAGE):
            engine.step()  # compiles the decode step with the bug
        breach = engine.duel.breach
        assert (breach.step, breach.position) == (2, len(PROMPT))
        operation, call = operations.load(Path(breach.path))
        assert operation.name == "paged_decode_attention"
        assert call.arrays["k_pages"].shape[0] == 1 + 3  # the null page and the row's own
        assert call.arrays["kv_lens"].tolist() == [len(PROMPT) + 1]


def test_the_first_token_that_differs_is_named(tmp_path: Path) -> None:
    with planted(XLA, *WRONG_PAGE), new_engine(tmp_path) as engine:
        run(engine, [Ask(PROMPT, greedy(40))])
        flip = engine.duel.flip
        assert flip is not None
        assert flip.token_id != flip.rival_token_id
        assert flip.position >= len(PROMPT)


def test_nan_is_a_breach(tmp_path: Path) -> None:
    bug = ("return by_token(out).astype(q.dtype)", "return jnp.full_like(q, jnp.nan)")
    with planted(XLA, *bug), new_engine(tmp_path) as engine:
        engine.add_request(PROMPT, greedy(2))
        engine.step()
        assert np.isinf(engine.duel.errors).all()
        assert np.isinf(engine.duel.breach.error)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rival": "xla"}, "compare_with: got 'xla', which is what attention_backend runs as well"),
        ({"rival": "fast"}, "compare_with: .*'fast', expected one of auto"),
        ({"rival": "mosaic"}, "compare_with: .*'mosaic' cannot run here"),
        ({"compare_tolerance": 0}, "compare_tolerance: got 0, expected a number above 0"),
        ({"compare_tolerance": "small"}, "compare_tolerance: got 'small'"),
        ({"compare_dir": 3}, "compare_dir: got 3, expected a string"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        new_engine(tmp_path, **options)
