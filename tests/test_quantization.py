"""`quantization="int8"`: the numbers are those of the definition, the bytes those that are told, and what cannot be is refused.

The definition is the oracle in float64 on weights that are what the int8 numbers stand for, its rows rounded to int8 wherever
they meet a matrix. float32 and float64 agree to seven digits until a number lies between two steps and is rounded up by one and
down by the other; from there on a text is as far off as rounding itself takes it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import weakref
from pathlib import Path
from typing import Any

import checkpoints
import families
import invariance
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from checkpoints import refused, write_shards
from driving import Ask, few_steps, greedy, run
from invariance import Invariance

from jaxpaged import LLM, load_weights
from jaxpaged import runner as runner_module
from jaxpaged.bench import int8_accuracy
from jaxpaged.checkpoint import CheckpointError, load, open_checkpoint
from jaxpaged.config import ConfigError, EngineConfig, ModelConfig
from jaxpaged.drafter import Draft
from jaxpaged.engine import Engine
from jaxpaged.host import scheduler
from jaxpaged.host.pages import PagePool
from jaxpaged.model import cache as kv_cache
from jaxpaged.model import weights as model_weights
from jaxpaged.model.cache import init_cache
from jaxpaged.model.layers import linear, lookup
from jaxpaged.model.quantization import QuantizedMatrix, quantized
from jaxpaged.model.step import prefill
from jaxpaged.runner import plan_memory
from jaxpaged.simulate import cost, shapes
from jaxpaged.simulate.gpus import GPUS

BY_NAME = {family.name: family for family in families.FAMILIES}
IN_SHORT = ("smollm", "llama-biases", "phi3")  # tied with odd sizes, all biases, fused matrices
EACH = [pytest.param(f, id=f.name, marks=[] if f.name in IN_SHORT else pytest.mark.slow) for f in families.FAMILIES]
LENGTH = 40


def int8_of(tensor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and scales of a matrix [out, in] by the definition."""
    wide = tensor.astype(np.float32)
    scales = np.abs(wide).max(axis=1) / np.float32(127)
    return np.rint(wide / scales[:, None]).astype(np.int8), scales


def check_rounded(matrix: QuantizedMatrix, floats: np.ndarray) -> None:
    """Each number is the nearest step, either of two when it lies between them, and each output's largest is 127 steps."""
    wide = floats.astype(np.float64)
    values, scales = np.asarray(matrix.values, np.float64), np.asarray(matrix.scales, np.float64)
    assert matrix.values.dtype == jnp.int8 and matrix.scales.dtype == jnp.float32
    np.testing.assert_allclose(scales, np.abs(wide).max(-1) / 127, rtol=1e-6)
    assert (np.abs(values * scales[..., None] - wide) <= scales[..., None] * 0.50001).all()
    assert (np.abs(values).max(-1) == 127).all()


def stood_for(config: ModelConfig, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors in float64 with what the int8 numbers of each matrix stand for."""
    found = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    for parameter in model_weights.declare(config):
        for name, _ in parameter.parts if parameter.is_matrix else ():
            values, scales = int8_of(tensors[name])
            found[name] = values * scales[:, None].astype(np.float64)
    return found


def distances(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Of each token's logits, over the largest of them."""
    return np.abs(got - want).max(axis=-1) / np.abs(want).max(axis=-1)


# --- the numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", EACH)
def test_logits_are_those_of_the_definition(family: families.Family) -> None:
    config, ids = family.config, family.prompts(5)[4][:LENGTH]
    weights = model_weights.quantize(family.weights(), config)

    @jax.jit
    def compute(weights, ids: jax.Array) -> jax.Array:
        tables, count = jnp.arange(1, 1 + LENGTH // 8)[None], jnp.array([LENGTH])
        return prefill(weights, init_cache(config, 1 + LENGTH // 8, 8), ids[None], tables, count, config=config)[0][0]

    got, tensors = np.asarray(compute(weights, jnp.asarray(ids))), family.tensors()
    want = oracle.logits(stood_for(config, tensors), config, ids, oracle.int8)
    apart = distances(got, want)
    assert np.mean(apart < 1e-5) > 0.5 and apart.max() < 0.1, apart
    # The models are sharp: they show any rounding that is left out, and a text is still much like what it was.
    unrounded = distances(oracle.logits(stood_for(config, tensors), config, ids), want)
    plain = distances(oracle.logits(tensors, config, ids), want)
    assert np.median(unrounded) > 1e-3 and np.median(plain) > 1e-3 and np.median(plain) < 0.15 and plain.max() < 0.4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_product_is_exact_but_for_the_rounding_of_rows(dtype: str) -> None:
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(0, 1, (3, 5, 90)).astype(np.float32), rng.normal(0, 1, (3, 5)).astype(np.float32)
    weight[1, 2], weight[0, 0, 3] = 0, 40  # an output of zeros, and one with a number that leaves the others few steps
    x = jnp.asarray(rng.normal(0, 1, (7, 90)) * 10.0 ** rng.integers(-6, 6, (7, 1)), dtype).at[4].set(0)
    matrix = quantized(jnp.asarray(weight))
    assert not np.asarray(matrix.values)[1, 2].any() and matrix.scales[1, 2] == 1
    check_rounded(quantized(jnp.asarray(np.delete(weight, 1, 0))), np.delete(weight, 1, 0))
    wide = np.asarray(x, np.float32)
    steps = np.where(np.abs(wide).max(-1, keepdims=True) == 0, 1, np.abs(wide).max(-1, keepdims=True)) * np.float32(1 / 127)
    rows = np.rint(wide / steps).astype(np.float64) * steps
    want = np.einsum("xi,abi->xab", rows, np.asarray(matrix.values, np.float64) * np.asarray(matrix.scales)[..., None]) + bias
    got = linear(x, matrix, jnp.asarray(bias, dtype))
    assert got.dtype == dtype and got.shape == (7, 3, 5)
    tolerance = {"float32": 1e-6, "bfloat16": 2e-2}[dtype]
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=tolerance, atol=tolerance * np.abs(bias).max())


def test_rows_of_a_table_are_what_its_numbers_stand_for() -> None:
    table = jnp.asarray(np.random.default_rng(0).normal(0, 1, (30, 8)), jnp.float32)
    matrix, ids = quantized(table), jnp.array([3, 29, 3])
    want = np.asarray(matrix.values, np.float32)[ids] * np.asarray(matrix.scales)[ids, None]
    np.testing.assert_array_equal(lookup(matrix, ids, "float32"), want)
    assert np.abs(want - np.asarray(table)[ids]).max() <= np.asarray(matrix.scales).max() / 2 * 1.0001
    assert lookup(matrix, ids, "bfloat16").dtype == jnp.bfloat16


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so_and_where_it_was(value: float) -> None:
    weight = np.random.default_rng(0).normal(0, 1, (6, 32)).astype(np.float32)
    weight[2, 5] = value
    x = np.random.default_rng(1).normal(0, 1, (4, 32)).astype(np.float32)
    clean = np.asarray(linear(jnp.asarray(x), quantized(jnp.asarray(np.delete(weight, 2, 0)))))
    x_bad = x.copy()
    x_bad[1, 7] = value
    found = np.asarray(linear(jnp.asarray(x_bad), quantized(jnp.asarray(weight))))
    assert not np.isfinite(found[:, 2]).any() and not np.isfinite(found[1]).any()
    np.testing.assert_array_equal(np.delete(np.delete(found, 2, 1), 1, 0), np.delete(clean, 1, 0))


# --- the engine ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def law() -> Any:
    with invariance.new_engine("smollm", batch_invariant=True, quantization="int8", enforce_eager=True) as engine:
        engine.runner.buckets = engine.runner.buckets[-1:]  # type: ignore[attr-defined]  # a program takes seconds to compile
        yield Invariance([engine], num_targets=8)


def test_the_bits_of_a_request_are_its_own(law: Invariance) -> None:
    """In any company, chunked, cached, preempted and swapped: see invariance.py."""
    seen = law.compose(range(16))
    assert seen.differ == [] and seen.outputs > 30
    assert min(seen.kinds[kind] for kind in ("preempted", "cached", "swapped")) > 0, seen.kinds


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_of_a_product_is_its_own(dtype: str) -> None:
    """To the last bit, alone and among any number of others."""
    rng = np.random.default_rng(0)
    matrix, x = quantized(jnp.asarray(rng.normal(0, 1, (33, 72)), jnp.float32)), jnp.asarray(rng.normal(0, 1, (40, 72)), dtype)
    whole = np.asarray(jax.jit(linear)(x, matrix))
    for start, end in ((0, 1), (3, 4), (3, 5), (7, 24), (30, 40)):
        np.testing.assert_array_equal(np.asarray(jax.jit(linear)(x[start:end], matrix)), whole[start:end])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_they_are_for_long(dtype: str) -> None:
    with invariance.new_engine("qwen2-window", dtype=dtype, batch_invariant=True, quantization="int8") as engine:
        assert Invariance([engine]).compose(range(150)).differ == []


def test_pages_and_batches_change_nothing_of_the_text(law: Invariance) -> None:
    """Each token is the oracle's likeliest, or as good as that: of a tied model, from texts of all lengths in one batch."""
    family = BY_NAME["smollm"]
    tensors = stood_for(family.config, family.tensors())
    engine = invariance.another_engine(law.engines[0])
    prompts = family.prompts(6)
    answers = run(engine, [Ask(prompt, greedy(8)) for prompt in prompts])
    num_best = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        text = prompt + answer.token_ids
        scores = oracle.logits(tensors, family.config, text, oracle.int8)[len(prompt) - 1 : -1]
        taken = scores[np.arange(8), answer.token_ids]
        num_best += int(np.sum(taken == scores.max(-1)))
        assert (scores.max(-1) - taken < 0.1 * np.abs(scores).max(-1)).all()
    assert num_best >= 44, num_best  # of 48


def test_a_draft_model_is_quantised_too() -> None:
    family = BY_NAME["llama3"]
    speculative = {"method": "draft_model", "model": "of the test", "num_speculative_tokens": 3}
    options: dict[str, Any] = {**few_steps(8, 64), "enforce_eager": True, "speculative_config": speculative}
    draft = Draft(family.config, family.weights())
    config = EngineConfig(**options, quantization="int8")
    with Engine.from_weights(config, family.config, family.weights(), draft=draft) as engine:
        leaves = jax.tree.leaves(engine.runner.drafter.weights)  # type: ignore[union-attr]
        matrices = [leaf for leaf in leaves if leaf.ndim == 4 and leaf.dtype == jnp.int8 and leaf.shape[2:] == (16, 4)]
        of_panels = sum(64 * len(panels) for panels in matrices)  # what their sums start with
        assert sum(leaf.nbytes for leaf in leaves) == model_weights.num_bytes(family.config, "float32", "int8") + of_panels


@pytest.mark.slow
def test_a_quantised_draft_model_changes_no_token() -> None:
    family = BY_NAME["llama3"]
    options: dict[str, Any] = {
        **few_steps(8, 96),
        "quantization": "int8",
        "prefill_tile_buckets": (4,),
        "decode_row_buckets": (8,),
    }
    options |= {"max_num_seqs": 2, "batch_invariant": True}
    asks = [Ask(prompt[:50], greedy(12)) for prompt in family.prompts(4)]
    with Engine.from_weights(EngineConfig(**options), family.config, family.weights()) as engine:
        plain = run(engine, asks)
    speculative = {"method": "draft_model", "model": "of the test", "num_speculative_tokens": 3, "adaptive": False}
    config = EngineConfig(**options, speculative_config=speculative)
    draft = Draft(family.config, family.weights())
    with Engine.from_weights(config, family.config, family.weights(), draft=draft) as engine:
        assert isinstance(engine.runner.drafter.weights.layers[0].qkv, QuantizedMatrix)  # type: ignore[union-attr]
        assert [answer.token_ids for answer in run(engine, asks)] == [answer.token_ids for answer in plain]
        stats = engine.stats()
        assert stats["spec_decode_num_accepted_tokens"] > 0.8 * stats["spec_decode_num_draft_tokens"] > 0


def test_floats_are_deleted_and_quantised_weights_need_the_option() -> None:
    family = BY_NAME["llama3"]
    config = EngineConfig(**few_steps(8, 64), enforce_eager=True)  # type: ignore[arg-type]
    weights = family.weights()
    with Engine.from_weights(dataclasses.replace(config, quantization="int8"), family.config, weights) as engine:
        held = engine.runner.weights  # type: ignore[attr-defined]
        assert isinstance(held.lm_head, QuantizedMatrix) and held.norm is weights.norm
        given: list[jax.Array] = [weights.layers[0].down, weights.embed, weights.norm]  # type: ignore[list-item]
        assert [array.is_deleted() for array in given] == [True, True, False]
    with pytest.raises(ConfigError, match=r"quantization: got None, the weights are quantised"):
        Engine.from_weights(config, family.config, model_weights.quantize(family.weights(), family.config))


def test_quantised_and_not_share_no_pages() -> None:
    model = BY_NAME["llama3"].config
    contexts = []
    for options in ({}, {"quantization": "int8"}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "quantization": "int8"}):
        pool = PagePool(9)
        given = {"dtype": "float32", "kv_cache_dtype": "float32", "max_model_len": 64, **options}
        scheduler.build(EngineConfig(**given).resolved(model, "cpu"), model, pool)  # type: ignore[arg-type]
        contexts.append(pool.cache.context)  # type: ignore[union-attr]
    assert len(set(contexts)) == 4


# --- the bytes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", EACH)
def test_bytes_are_those_of_the_arrays(family: families.Family) -> None:
    floats = jax.eval_shape(lambda: jax.tree.map(lambda x: x.astype("bfloat16"), family.weights()))
    leaves = jax.tree.leaves(jax.eval_shape(lambda weights: model_weights.quantize(weights, family.config), floats))
    assert model_weights.num_bytes(family.config, "bfloat16", "int8") == sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    assert {leaf.dtype.name for leaf in leaves if leaf.size > 1000} == {"int8"}
    config = EngineConfig(dtype="bfloat16", quantization="int8", max_model_len=64).resolved(family.config, "gpu")
    assert shapes.num_weight_bytes(family.config, config) == model_weights.num_bytes(family.config, "bfloat16", "int8")
    plain = dataclasses.replace(config, quantization=None)
    assert shapes.num_weight_bytes(family.config, plain) == model_weights.num_bytes(family.config, "bfloat16")


def test_the_pool_gets_what_the_weights_leave(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model = BY_NAME["llama3"].config
    monkeypatch.setattr(runner_module, "_memory", lambda: (1 << 20, 1 << 20))
    page_bytes, found = kv_cache.page_bytes(model, 8, "float32"), {}
    for kind in (None, "int8"):
        options = {"gpu_memory_utilization": 0.5, "block_size": 8, "dtype": "float32", "quantization": kind}
        config = EngineConfig(**options).resolved(model, "cpu")  # type: ignore[arg-type]
        found[kind] = plan_memory(config, model)
        left = (1 << 19) - model_weights.num_bytes(model, "float32", kind) - config.marks_bytes(model)
        assert found[kind] == int(left * 0.95) // page_bytes
    assert found["int8"] > found[None]
    monkeypatch.undo()
    caplog.set_level(logging.INFO, "jaxpaged")
    config = EngineConfig(**few_steps(8, 64), quantization="int8", enforce_eager=True)  # type: ignore[arg-type]
    with Engine.from_weights(config, model, BY_NAME["llama3"].weights()) as engine:
        kept = sum(array.nbytes for array in jax.tree.leaves(engine.runner.weights))  # type: ignore[attr-defined]
    assert kept < 0.5 * model_weights.num_bytes(model, "float32")
    told = f"{kept / 2**20:,.1f} MiB"
    assert any("weights (int8, float32)" in message and message.endswith(told) for message in caplog.messages)


def test_a_simulated_step_reads_int8() -> None:
    model = shapes.named_model("llama-3-8b")
    configs = {kind: EngineConfig(max_model_len=1024, quantization=kind).resolved(model, "gpu") for kind in (None, "int8")}
    read = {kind: shapes.num_step_bytes(model, config) for kind, config in configs.items()}
    assert 0.5 < read["int8"] / read[None] < 0.501
    seconds = [cost.Roofline(GPUS["H100"], model, config)._weights_s for config in configs.values()]
    assert seconds[1] / seconds[0] == pytest.approx(read["int8"] / read[None])


# --- checkpoints -----------------------------------------------------------------------------------------------------

SCHEME = {
    "config_groups": {
        "group_0": {
            "input_activations": {
                "actorder": None, "block_structure": None, "dynamic": True, "group_size": None, "num_bits": 8,
                "observer": None, "observer_kwargs": {}, "strategy": "token", "symmetric": True, "type": "int",
            },
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None, "block_structure": None, "dynamic": False, "group_size": None, "num_bits": 8,
                "observer": "minmax", "observer_kwargs": {}, "strategy": "channel", "symmetric": True, "type": "int",
            },
        }
    },
    "format": "int-quantized", "global_compression_ratio": 1.2, "ignore": ["lm_head"], "kv_cache_scheme": None,
    "quant_method": "compressed-tensors", "quantization_status": "compressed",
}  # fmt: skip
"""What llm-compressor writes for W8A8."""


def write_compressed(directory: Path, family: str, drop: str = "", **changes: Any) -> dict[str, np.ndarray]:
    """A checkpoint as llm-compressor writes it: int8 in the layers, each with scales [out, 1]; its tensors."""
    plain = checkpoints.write_model(directory, family)
    values = {**checkpoints.config_values(family, dtype="bfloat16"), "quantization_config": {**SCHEME, **changes}}
    (directory / "config.json").write_text(json.dumps(values))
    tensors = {}
    for name, tensor in plain.items():
        tensors[name] = tensor
        if name.endswith("proj.weight"):
            tensors[name], scales = int8_of(tensor)
            tensors[name + "_scale"] = scales[:, None].astype(tensor.dtype)
    tensors.pop(drop, None)
    int8_aware = {np.dtype(np.int8): "I8"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints.safetensors, "NAMES", {**checkpoints.safetensors.NAMES, **int8_aware})
        write_shards(directory, tensors)
    return tensors


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_a_quantised_checkpoint_is_loaded_as_it_is(tmp_path: Path, family: str) -> None:
    tensors = write_compressed(tmp_path / "m", family)
    checkpoint = open_checkpoint(tmp_path / "m")
    assert checkpoint.config.quantization == "int8"
    weights = load(checkpoint, "bfloat16")
    for parameter in model_weights.declare(checkpoint.config):
        found = model_weights.get(weights, parameter.path)
        if not parameter.is_matrix:
            continue
        assert found.shape == parameter.shape and found.scales.dtype == jnp.float32
        if len(parameter.path) == 3:  # the numbers and scales of the file; the rest is quantised here
            parts = [tensors[name] for name, _ in parameter.parts]
            scales = [tensors[name + "_scale"].astype(np.float32) for name, _ in parameter.parts]
            np.testing.assert_array_equal(found.values, parameter.pack(parts))
            np.testing.assert_array_equal(found.scales, parameter.pack(scales)[..., 0])
        else:
            check_rounded(found, tensors[parameter.parts[0][0]])
    for asked in (None, "int8", "compressed-tensors"):
        config = EngineConfig(quantization=asked).resolved(checkpoint.config, "cpu")
        assert (config.quantization, config.dtype) == ("int8", "bfloat16")


def test_engines_are_of_what_is_asked_for_and_of_what_there_is(tmp_path: Path) -> None:
    write_compressed(tmp_path / "m", "llama")
    options = {**few_steps(8, 64), "enforce_eager": True, "skip_tokenizer_init": True, "use_tqdm_on_load": False}
    for model, asked, is_quantised in ((tmp_path / "m", None, True), (None, "int8", True), (None, None, False)):
        with LLM(model, quantization=asked, **options) as llm:  # type: ignore[arg-type]
            weights = llm.engine.runner.weights  # type: ignore[attr-defined]
            assert (llm.config.quantization == "int8") == isinstance(weights.layers[1].down, QuantizedMatrix) == is_quantised
            assert isinstance(weights.embed, QuantizedMatrix) == is_quantised


@pytest.mark.slow
def test_an_engine_of_a_quantised_checkpoint_says_what_the_definition_says(tmp_path: Path) -> None:
    tensors = write_compressed(tmp_path / "m", "llama")
    ids = [5, 9, 30, 31, 2, 44, 90, 1, 17, 60]
    options = {**few_steps(8, 64), "enforce_eager": True}  # one step of one shape
    with LLM(tmp_path / "m", skip_tokenizer_init=True, use_tqdm_on_load=False, **options) as llm:  # type: ignore[arg-type]
        assert llm.config.quantization == "int8"
        [score] = llm.score([ids])
        config = llm.model_config
    for name in [name for name in tensors if name.endswith("_scale")]:
        weight = tensors[name.removesuffix("_scale")].astype(np.float64)
        tensors[name.removesuffix("_scale")] = weight * tensors.pop(name).astype(np.float64)
    loaded = load(open_checkpoint(tmp_path / "m"), "bfloat16")
    for name, matrix in (("model.embed_tokens.weight", loaded.embed), ("lm_head.weight", loaded.lm_head)):
        tensors[name] = np.asarray(matrix.values, np.float64) * np.asarray(matrix.scales, np.float64)[:, None]  # type: ignore[union-attr]
    logits = oracle.logits(tensors, config, ids, oracle.int8)
    want = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = want[np.arange(9), ids[1:]]
    apart = np.abs(np.asarray(score.logprobs) - want)
    assert np.median(apart) < 1e-4 and apart.max() < 0.3, apart


GROUP = SCHEME["config_groups"]["group_0"]


def changed(part: str, **fields: Any) -> dict[str, Any]:
    return {"config_groups": {"group_0": {**GROUP, part: {**GROUP[part], **fields}}}}


REFUSED = [
    ({"quant_method": "gptq"}, "quant_method: got 'gptq'"),
    ({"format": "pack-quantized"}, "format: got 'pack-quantized'"),
    ({"format": None}, "format: got None"),
    ({"quantization_status": "frozen"}, "quantization_status: got 'frozen'"),
    ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme: got"),
    ({"ignore": ["lm_head", "re:.*down_proj"]}, "ignore: got 're:.*down_proj', expected lm_head alone"),
    ({"config_groups": {}}, "config_groups: got 0, expected one"),
    ({"config_groups": {"a": GROUP, "b": GROUP}}, "config_groups: got 2, expected one"),
    ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config: got format 'sparse-24-bitmask'"),
    ({"config_groups": {"a": {**GROUP, "targets": ["re:.*q_proj"]}}}, "targets: got ['re:.*q_proj']"),
    ({"config_groups": {"a": {**GROUP, "input_activations": None}}}, "input_activations: got None"),
    (changed("weights", num_bits=4), "weights: num_bits: got 4"),
    (changed("weights", strategy="group"), "weights: strategy: got 'group'"),
    (changed("weights", symmetric=False), "weights: symmetric: got False"),
    (changed("weights", type="float"), "weights: type: got 'float'"),
    (changed("input_activations", dynamic=False), "input_activations: dynamic: got False"),
    (changed("input_activations", dynamic=1), "input_activations: dynamic: got 1"),
    (changed("input_activations", strategy="tensor"), "input_activations: strategy: got 'tensor'"),
]


@pytest.mark.parametrize(("change", "needle"), REFUSED, ids=[needle for _, needle in REFUSED])
def test_other_quantised_checkpoints_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], needle: str
) -> None:
    checkpoints.write_model(tmp_path / "m")
    values = checkpoints.config_values(quantization_config={**SCHEME, **change})
    (tmp_path / "m" / "config.json").write_text(json.dumps(values))
    where = f"{tmp_path / 'm' / 'config.json'}: quantization_config: "
    refused(tmp_path / "m", capsys, where, needle, "int8 weights, symmetric, one scale per channel")


@pytest.mark.parametrize(
    ("drop", "needle"),
    [
        ("model.layers.1.mlp.down_proj.weight_scale", "missing tensor model.layers.1.mlp.down_proj.weight_scale"),
        ("model.layers.1.mlp.down_proj.weight", "down_proj.weight"),
    ],
)
def test_a_quantised_checkpoint_with_a_hole_is_refused(tmp_path: Path, drop: str, needle: str) -> None:
    write_compressed(tmp_path / "m", "llama", drop)
    with pytest.raises(CheckpointError, match=needle):
        load(open_checkpoint(tmp_path / "m"), "bfloat16")


def test_int8_without_a_word_in_the_configuration_is_refused(tmp_path: Path) -> None:
    write_compressed(tmp_path / "m", "llama")
    (tmp_path / "m" / "config.json").write_text(json.dumps(checkpoints.config_values("llama", dtype="bfloat16")))
    with pytest.raises(CheckpointError, match="unexpected tensors"):
        load(open_checkpoint(tmp_path / "m"), "bfloat16")
    checkpoints.write_model(tmp_path / "floats", quantization_config=SCHEME)
    with pytest.raises(CheckpointError, match="has a quantization_config, but no tensor is I8"):
        load(open_checkpoint(tmp_path / "floats"), "bfloat16")


def test_a_quantised_checkpoint_is_not_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_compressed(tmp_path / "m", "llama")
    assert checkpoints.main([str(tmp_path / "m"), str(tmp_path / "out"), "--quiet"]) == 3
    assert "a quantised checkpoint is not converted" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["llama", "llama-tied", "phi3"])
def test_matrices_are_quantised_one_at_a_time_from_what_is_saved(tmp_path: Path, family: str) -> None:
    """Of float matrices there is never more than the one that is being read, and no other dtype comes in between."""
    tensors = checkpoints.write_model(tmp_path / "m", family)
    alive: list[weakref.ref] = []
    most = 0

    def place(parameter: model_weights.Parameter, array: np.ndarray) -> jax.Array:
        nonlocal most
        placed = jnp.asarray(array)
        if parameter.is_matrix:
            assert array.dtype.name == "bfloat16"
            alive.append(weakref.ref(placed))
            most = max(most, sum(one() is not None for one in alive))
        return placed

    weights = load(open_checkpoint(tmp_path / "m"), "float32", quantization="int8", place=place)
    assert most <= 2 and len(alive) > 8  # the one before may be in the caller's frame still
    for parameter in model_weights.declare(open_checkpoint(tmp_path / "m").config):
        found = model_weights.get(weights, parameter.path)
        if parameter.is_matrix:
            check_rounded(found, parameter.pack([tensors[name] for name, _ in parameter.parts]))
        else:
            assert found.dtype == jnp.float32


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["in8", "INT8", "fp8", "", 8, True, ["int8"]])
def test_an_unknown_quantization_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"quantization: got .*, expected one of int8, compressed-tensors") as caught:
        EngineConfig(quantization=value)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value) and ("did you mean 'int8'?" in str(caught.value)) == (value in ("in8", "INT8"))


def test_compressed_tensors_of_a_plain_checkpoint_is_refused() -> None:
    with pytest.raises(ConfigError, match="the checkpoint is not quantised; int8 quantises it"):
        EngineConfig(quantization="compressed-tensors").resolved(BY_NAME["llama3"].config, "cpu")
    with pytest.raises(ConfigError, match="the checkpoint is not quantised"):
        load_weights(None, quantization="compressed-tensors")
    weights, config = load_weights(None, quantization="int8")
    assert config.quantization is None and isinstance(weights.embed, QuantizedMatrix)


# --- how accurate it is ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_bundled_model_is_as_good_as_in_float32(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A part of what `python -m jaxpaged.bench.int8_accuracy` tells."""
    assert int8_accuracy.main(["--rows", "4", "--length", "255", "--json", str(tmp_path / "x.json")]) == 0
    assert "int8, bfloat16" in capsys.readouterr().out
    exact, half, *int8 = json.loads((tmp_path / "x.json").read_text())["variants"]
    assert (exact["kl_divergence"], exact["greedy_agreement"], exact["max_abs_logprob_difference"]) == (0, 1, 0)
    assert 0 < half["kl_divergence"] < int8[0]["kl_divergence"]
    for one in int8:
        assert one["kl_divergence"] < 2e-3 and one["greedy_agreement"] > 0.95
        assert abs(one["perplexity"] / exact["perplexity"] - 1) < 0.01 and one["weight_bytes"] < 0.53 * half["weight_bytes"]
