"""What a step costs: by hand, beside the engine's own numbers, and as laws over random plans."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest

from jaxpaged import batch, runner
from jaxpaged.config import ConfigError, EngineConfig, ModelConfig
from jaxpaged.host.plan import Chunk, StepPlan
from jaxpaged.model import cache as kv_cache
from jaxpaged.model import weights as model_weights
from jaxpaged.simulate import cost, shapes
from jaxpaged.simulate.cost import MeasuredSteps, Roofline
from jaxpaged.simulate.gpus import GPUS, Gpu, named_gpu

LLAMA = shapes.named_model("llama-3-8b")
TINY = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 8,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def plan_of(decodes: list[int], prefills: list[tuple[int, int]], copies: int = 0) -> StepPlan:
    """A plan with rows at these positions and chunks (start, tokens). A cost model asks no more of a chunk."""
    rows = tuple(Chunk(None, start, 1, True) for start in decodes)  # type: ignore[arg-type]
    chunks = tuple(Chunk(None, start, num_tokens, True) for start, num_tokens in prefills)  # type: ignore[arg-type]
    return StepPlan(rows, chunks, tuple((1, 2) for _ in range(copies)))


def roofline(model: ModelConfig = LLAMA, gpu: Gpu = GPUS["H100"], **options) -> Roofline:
    peaks = {"bandwidth_efficiency": 1.0, "flops_efficiency": 1.0, "overhead_s": 0.0}
    efficiency = {name: options.pop(name, value) for name, value in peaks.items()}
    return Roofline(gpu, model, EngineConfig(**options).resolved(model, "gpu"), **efficiency)


# --- by hand -----------------------------------------------------------------------------------------------------

# Llama-3-8B: layers of 4096x4096 twice, 4096x1024 twice, 4096x14336 three times and two norms; a head of 128256x4096.
LAYER = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
HEAD = 128256 * 4096
READ = 2 * (32 * LAYER + HEAD)  # bytes
KV = 2 * 8 * 128 * 2  # bytes of a token in a layer
SCORE = 4 * 32 * 128  # operations of a query and a key in a layer


def test_one_row_reads_the_weights_and_its_context():
    seconds = roofline().step_s(plan_of([99], []))
    assert seconds == pytest.approx((READ + 32 * 100 * KV) / 3.35e12, rel=1e-12)


def test_a_long_chunk_is_bound_by_operations():
    # 2,048 tokens are 32 tiles of 64, and the smallest bucket beside them has one decode row.
    products = 2 * 32 * LAYER * (2048 + 1) + 2 * HEAD * (32 + 1)
    scores = 32 * SCORE * sum(range(1001, 1001 + 2048))
    assert products / 989.4e12 > READ / 3.35e12
    assert scores / 989.4e12 > 32 * KV * 3048 / 3.35e12
    seconds = roofline().step_s(plan_of([], [(1000, 2048)]))
    assert seconds == pytest.approx((products + scores) / 989.4e12, rel=1e-12)


def test_padding_is_paid_for():
    """9 tiles take the bucket of 32, as in the engine."""
    price = roofline()
    nine, thirty_two = (price.step_s(plan_of([], [(0, 64)] * count)) for count in (9, 32))
    attention = 32 * 23 * max(64 * KV / 3.35e12, SCORE * 64 * 65 / 2 / 989.4e12)
    assert thirty_two - nine == pytest.approx(attention, rel=1e-9)
    assert roofline(prefill_tile_buckets=(9, 32)).step_s(plan_of([], [(0, 64)] * 9)) < nine


def test_what_is_assumed_has_its_effect():
    plan = plan_of([99] * 3, [])
    full = roofline().step_s(plan)
    assert roofline(bandwidth_efficiency=0.5).step_s(plan) == pytest.approx(2 * full)
    assert roofline(overhead_s=0.001).step_s(plan) == pytest.approx(full + 0.001)
    prompt = plan_of([], [(0, 2048)])
    assert roofline(flops_efficiency=0.5).step_s(prompt) == pytest.approx(2 * roofline().step_s(prompt))
    # A page is read and written: 64 tokens of 32 layers.
    assert roofline().step_s(plan_of([99] * 3, [], copies=5)) - full == pytest.approx(5 * 2 * 64 * 32 * KV / 3.35e12)


def test_a_window_bounds_what_is_read_and_scored():
    mistral = shapes.named_model("mistral-7b")
    price = roofline(mistral)
    assert set(mistral.windows) == {4096}
    assert price.step_s(plan_of([4095], [])) == price.step_s(plan_of([30_000], []))
    assert price.step_s(plan_of([4000], [])) < price.step_s(plan_of([4095], []))
    # Two tokens of a chunk see 4,097 keys; the first two of a sequence see two.
    late, first = (price.step_s(plan_of([], [(start, 2)])) for start in (9000, 0))
    assert late - first == pytest.approx(32 * (4097 - 2) * KV / 3.35e12, rel=1e-6)
    for window in (0, 1, 3, 8):
        for start in range(12):
            for end in range(start, 12):
                pairs = sum(1 for q in range(start, end) for k in range(q + 1) if not window or q - k < window)
                assert cost._num_seen(end, window) - cost._num_seen(start, window) == pairs


# --- laws --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["llama-3-8b", "mistral-7b", "smollm-135m"])
def test_more_tokens_never_cost_less(model: str):
    rng = random.Random(model)
    for gpu in (GPUS["H100"], GPUS["L40S"]):
        price = roofline(shapes.named_model(model), gpu, overhead_s=1e-4)
        for _ in range(200):
            decodes = [rng.randrange(2000) for _ in range(rng.randrange(100))]
            prefills = [(rng.randrange(1000), rng.randint(2, 300)) for _ in range(rng.randrange(1, 5))]
            before = price.step_s(plan_of(decodes, prefills))
            more = rng.choice(("row", "tokens", "context", "chunk"))
            start, num_tokens = prefills[0]
            after = {
                "row": (([*decodes, 5]), prefills),
                "tokens": (decodes, [(start, num_tokens + rng.randint(1, 200)), *prefills[1:]]),
                "context": ([position + 10 for position in decodes], [(start + 10, num_tokens), *prefills[1:]]),
                "chunk": (decodes, [*prefills, (0, 7)]),
            }[more]
            assert price.step_s(plan_of(*after)) >= before > 0


def test_the_bucket_is_the_engines():
    rng = random.Random(0)
    config = EngineConfig(max_num_seqs=64, max_num_batched_tokens=1024).resolved(LLAMA, "gpu")
    for _ in range(200):
        plan = plan_of([0] * rng.randrange(65), [(0, rng.randint(2, 200)) for _ in range(rng.randrange(4))])
        assert cost._bucket(plan, config.buckets(), 64) == batch.fit(plan, config.buckets(), 64)
    with pytest.raises(ConfigError, match="no step holds 65 decode rows"):
        cost._bucket(plan_of([0] * 65, []), config.buckets(), 64)


FAMILIES = [
    {},
    {"tie_word_embeddings": True},
    {"attention_bias": True, "mlp_bias": True},
    {"model_type": "qwen2"},
    {"model_type": "qwen3", "head_dim": 6},
    {"model_type": "phi3"},
]


@pytest.mark.parametrize("other", FAMILIES, ids=str)
def test_weights_are_counted_as_they_are_declared(other: dict):
    config = ModelConfig.from_hf({**TINY, **other})
    assert shapes.num_parameters(config) * 2 == model_weights.num_bytes(config, "bfloat16")


@pytest.mark.parametrize(
    ("name", "billions"), [("llama-3-8b", 8.03), ("llama-3-70b", 70.55), ("llama-2-7b", 6.74), ("qwen2.5-7b", 7.62)]
)
def test_named_shapes_have_the_size_they_are_named_for(name: str, billions: float):
    assert shapes.num_parameters(shapes.named_model(name)) / 1e9 == pytest.approx(billions, abs=0.005)


def test_every_named_shape_is_a_model():
    for name in shapes.MODELS:
        assert shapes.named_model(name).dtype == "bfloat16"


@pytest.mark.parametrize("options", [{}, {"gpu_memory_utilization": 0.5}, {"kv_cache_memory_bytes": 2**34}, {"block_size": 16}])
def test_the_pool_is_as_large_as_the_engines(options: dict, monkeypatch: pytest.MonkeyPatch):
    gpu = GPUS["A100"]
    monkeypatch.setattr(runner.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(runner, "_memory", lambda: (gpu.memory_bytes, gpu.memory_bytes))
    config = EngineConfig(**options).resolved(LLAMA, "gpu")
    assert shapes.plan_pages(config, LLAMA, gpu) == runner.plan_memory(config, LLAMA)


def test_sixteen_gibibytes_are_8192_pages():
    """Not 65,536, as tutorials have it."""
    assert LLAMA.page_bytes(16, "bfloat16") == 16 * 2 * 8 * 128 * 32 * 2 == 2 * 2**20
    assert kv_cache.page_bytes(LLAMA, 16, "bfloat16") == 2 * 2**20
    config = EngineConfig(block_size=16, kv_cache_memory_bytes=16 * 2**30).resolved(LLAMA, "gpu")
    assert shapes.plan_pages(config, LLAMA, GPUS["H100"]) == 8192


def test_a_model_that_does_not_fit_is_refused_with_the_numbers():
    model = shapes.named_model("llama-3-70b")
    with pytest.raises(ConfigError, match=r"H100: 80 GiB x 0.92 less 131.4 GiB of weights leaves room for 0 pages"):
        shapes.plan_pages(EngineConfig().resolved(model, "gpu"), model, GPUS["H100"])


@pytest.mark.parametrize(
    ("options", "problem"),
    [({"bandwidth_efficiency": 0.0}, "bandwidth_efficiency"), ({"flops_efficiency": 1.1}, "1.1"), ({"overhead_s": -1}, "-1")],
)
def test_assumptions_out_of_range(options: dict, problem: str):
    with pytest.raises(ConfigError, match=problem):
        roofline(**options)


def test_names_are_found_or_the_nearest_is_told():
    assert named_gpu("rtx4090") is GPUS["RTX4090"]
    with pytest.raises(ConfigError, match="did you mean 'H200'"):
        named_gpu("h20")
    with pytest.raises(ConfigError, match="did you mean 'llama-3-8b'"):
        shapes.named_model("llama-3-8bb")


def test_float32_is_at_half_the_speed_and_twice_the_bytes():
    plan, prompt = plan_of([0], []), plan_of([], [(0, 2048)])
    assert roofline(dtype="float32").step_s(plan) == pytest.approx(2 * roofline().step_s(plan), rel=1e-6)
    assert roofline(dtype="float32").step_s(prompt) == pytest.approx(2 * roofline().step_s(prompt), rel=1e-6)


# --- measured steps ----------------------------------------------------------------------------------------------

STEPS = [(8, 0, 100, 0.010), (8, 0, 300, 0.014), (8, 4, 100, 0.030), (32, 0, 100, 0.020), (32, 4, 100, 0.050)]


def test_measured_steps_are_given_back_and_joined_by_lines():
    table = MeasuredSteps(STEPS, tile=16)
    assert table.step_s(plan_of([99], [])) == 0.010
    assert table.step_s(plan_of([10], [])) == 0.010
    assert table.step_s(plan_of([99, 99], [])) == pytest.approx(0.012)
    assert table.step_s(plan_of([99, 99, 99], [])) == pytest.approx(0.014)
    assert table.step_s(plan_of([199, 199], [])) == pytest.approx(0.016)
    # The smallest shape that holds it: 9 rows take 32, a chunk of 17 two tiles.
    assert table.step_s(plan_of([0] * 9, [])) == 0.020
    assert table.step_s(plan_of([0], [(0, 17)])) == 0.030
    assert table.step_s(plan_of([0] * 9, [(0, 17)])) == 0.050
    with pytest.raises(ConfigError, match="no step holds 0 decode rows and 5 prefill tiles; the largest is 32 and 4"):
        table.step_s(plan_of([], [(0, 65)]))


def test_a_line_that_falls_does_not_go_below_its_end():
    table = MeasuredSteps([(8, 0, 100, 0.010), (8, 0, 200, 0.008)], tile=16)
    assert table.step_s(plan_of([149], [])) == pytest.approx(0.009)
    assert table.step_s(plan_of([10_000], [])) == 0.008


def test_a_table_is_read_from_a_file(tmp_path: Path):
    names = ("decode_rows", "prefill_tiles", "num_context", "seconds")
    path = tmp_path / "steps.json"
    path.write_text(json.dumps({"steps": [dict(zip(names, row, strict=True)) for row in STEPS]}))
    table = MeasuredSteps.from_file(str(path), 16)
    assert table.step_s(plan_of([99, 99], [])) == pytest.approx(0.012)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "not JSON"),
        ("[]", 'a list "steps"'),
        ('{"steps": []}', 'a list "steps"'),
        ('{"steps": [3]}', r"steps\[0\]: got int"),
        ('{"steps": [{"decode_rows": 1.5}]}', r"decode_rows: got 1.5"),
        ('{"steps": [{"decode_rows": 1, "prefill_tiles": 0, "num_context": 1, "seconds": 0}]}', "seconds: got 0"),
        ('{"steps": [{"decode_rows": 1, "prefill_tiles": 0, "num_context": 1, "seconds": NaN}]}', "seconds: got nan"),
    ],
)
def test_a_damaged_table_is_refused(text: str, problem: str, tmp_path: Path):
    path = tmp_path / "steps.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=problem) as caught:
        MeasuredSteps.from_file(str(path), 16)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="No such file"):
        MeasuredSteps.from_file(str(tmp_path / "other"), 16)


def test_peaks_are_those_of_dense_products():
    """A ratio of operations to bytes above 400 would mean that somebody copied the sparse number."""
    for gpu in GPUS.values():
        assert 100 < gpu.flops_per_s / gpu.bytes_per_s < 450, gpu
        assert dataclasses.replace(gpu, memory_gib=1).memory_bytes == 2**30
