"""Weights as panels: the engine computes the same bits as with those of the checkpoint, and keeps no second copy of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from driving import few_steps, greedy
from families import FAMILIES, Family

from jaxpaged import engine as engine_module
from jaxpaged.config import EngineConfig
from jaxpaged.drafter import Draft
from jaxpaged.embedder import Embedder
from jaxpaged.engine import Engine
from jaxpaged.host.request import SamplingParams
from jaxpaged.model import weights as model_weights
from jaxpaged.model.panels import PanelMatrix
from jaxpaged.model.weights import Weights, num_bytes
from pallas_kernels.matmul.packed import is_packed
from pallas_kernels.matmul.panels import has_panels
from pallas_kernels.native import building
from pallas_kernels.native import matmul as native

BY_NAME = {family.name: family for family in FAMILIES}


@pytest.fixture(autouse=True)
def _needs_native() -> None:
    if (reason := native.unavailable()) is not None:
        pytest.skip(reason)


def weights_of(family: Family, dtype: str) -> Weights:
    return jax.tree.map(lambda array: array.astype(dtype), family.weights())


def computed(family: Family, dtype: str, quantization: str | None = None) -> tuple[list[Any], np.ndarray, list[Any]]:
    """All events of some requests, an embedding, and what the engine keeps of its matrices."""
    config = EngineConfig(**{**few_steps(8, 96), "dtype": dtype, "quantization": quantization})  # type: ignore[arg-type]
    asked = [(prompt, greedy(8)) for prompt in family.prompts(6)]
    asked.append((family.prompts(5)[4], SamplingParams(max_tokens=8, ignore_eos=True, seed=3, logprobs=3, prompt_logprobs=1)))
    with Engine.from_weights(config, family.config, weights_of(family, dtype)) as engine:
        vectors = np.asarray(Embedder(engine).embed([family.prompts(5)[4]]))
        for number, (prompt, params) in enumerate(asked):
            engine.add_request(prompt, params, request_id=str(number))
        events = []
        while engine.has_unfinished:
            events += engine.step()
        weights = engine.runner.weights  # type: ignore[attr-defined]
        return (
            events,
            vectors,
            [weights.embed, weights.lm_head, *(getattr(weights.layers[0], name) for name in ("qkv", "o", "gate_up", "down"))],
        )


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama3", "bfloat16"),
        ("qwen2", "float32"),  # tied
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("llama-biases", "float32"), ("llama3", "float32"))),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("llama-biases", "bfloat16"), ("qwen2", "bfloat16"))),
    ],
)
def test_an_engine_computes_the_same_bits(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    events, vectors, kept = computed(BY_NAME[name], dtype)
    monkeypatch.setattr(engine_module, "is_native", lambda backend: False)
    plain_events, plain_vectors, plain_kept = computed(BY_NAME[name], dtype)
    there = [one for one in kept if one is not None]
    assert [isinstance(one, PanelMatrix) for one in there] == [has_panels(one.shape, dtype) for one in there]
    if dtype == "bfloat16" and "avx512_bf16" in building._processor():
        assert all(is_packed(one.panels) for one in there if isinstance(one, PanelMatrix))
    assert isinstance(there[0], PanelMatrix) and all(one is None or isinstance(one, jax.Array) for one in plain_kept)
    assert events == plain_events and any(event.likelihood is not None for event in events)
    np.testing.assert_array_equal(vectors, plain_vectors)


def test_int8_has_the_same_bits_in_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    events, vectors, kept = computed(BY_NAME["qwen2"], "bfloat16", "int8")
    monkeypatch.setattr(model_weights, "in_panels", lambda matrix: matrix)
    plain_events, plain_vectors, plain_kept = computed(BY_NAME["qwen2"], "bfloat16", "int8")
    for one, plain in zip(kept, plain_kept, strict=True):
        assert (one is None) == (plain is None)
        if one is not None:
            assert isinstance(one.values, PanelMatrix) == has_panels(one.shape, "int8") and isinstance(plain.values, jax.Array)
            assert one.shape == plain.shape
    assert isinstance(kept[0].values, PanelMatrix)  # the embedding, whose rows are looked up
    assert events == plain_events
    np.testing.assert_array_equal(vectors, plain_vectors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_matrices_that_came_are_gone(dtype: str) -> None:
    family = BY_NAME["llama3"]
    given = weights_of(family, dtype)
    jax.block_until_ready(given)
    before = {id(array) for array in jax.live_arrays()}
    config = EngineConfig(**{**few_steps(8, 96), "dtype": dtype}, enforce_eager=True)  # type: ignore[arg-type]
    with Engine.from_weights(config, family.config, given) as engine:
        weights, cache = engine.runner.weights, engine.runner.cache  # type: ignore[attr-defined]
        kept = jax.tree.leaves(weights)
        num_whole = num_bytes(family.config, dtype)
        if any(is_packed(one.panels) for one in (weights.embed, weights.layers[0].down)):
            assert 0.75 * num_whole < sum(array.nbytes for array in kept) < num_whole
        else:
            assert sum(array.nbytes for array in kept) == num_whole
        others = [
            array
            for array in jax.live_arrays()
            if id(array) not in before | {id(one) for one in (*kept, *jax.tree.leaves(cache))}
        ]
        largest = max(array.nbytes for array in jax.tree.leaves(weights.layers))
        assert all(array.nbytes < largest // 2 for array in others)  # nor is what they were on the way
        assert given.embed.is_deleted() and given.layers[-1].down.is_deleted()  # type: ignore[union-attr]
        assert given.norm is engine.runner.weights.norm  # type: ignore[attr-defined]
    assert all(array.is_deleted() for array in kept)


def test_two_backends_that_are_compared_have_the_weights_of_the_checkpoint() -> None:
    """Each multiplies them in its own way, and panels are for one."""
    family = BY_NAME["llama3"]
    config = EngineConfig(**few_steps(8, 96), enforce_eager=True, compare_with="xla")  # type: ignore[arg-type]
    with Engine.from_weights(config, family.config, family.weights()) as engine:
        assert isinstance(engine.runner.weights.embed, jax.Array)  # type: ignore[attr-defined]


def test_a_matrix_in_two_places_stays_one() -> None:
    """A head that is the embedding's array, and a draft model that is the model itself."""
    family = BY_NAME["llama3"]
    given = family.weights()
    given = dataclasses.replace(given, lm_head=given.embed)
    speculative = {"method": "draft_model", "model": "of the test", "num_speculative_tokens": 2}
    config = EngineConfig(**few_steps(8, 96), enforce_eager=True, speculative_config=speculative)  # type: ignore[arg-type]
    with Engine.from_weights(config, family.config, given, draft=Draft(family.config, given)) as engine:
        kept, drafting = engine.runner.weights, engine.runner.drafter.weights  # type: ignore[attr-defined]
        assert kept.embed.panels is kept.lm_head.panels is drafting.embed.panels
        assert not any(array.is_deleted() for array in jax.tree.leaves((kept, drafting)))
