"""Laws of the whole engine with a tiny random model: what a request gets depends on nothing but the request.

One engine is compiled for the file; each test drives its own scheduler and pool around the same runner.
"""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Iterator

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bits import plant_nan
from driving import Answer, Ask, ShuffledPool, another_engine, compilations, greedy, run

from jaxpaged import batch
from jaxpaged import runner as runner_module
from jaxpaged.config import Bucket, ConfigError, EngineConfig, ModelConfig
from jaxpaged.engine import Engine
from jaxpaged.host.plan import StepPlan
from jaxpaged.host.request import FinishReason, RequestError, SamplingParams
from jaxpaged.model import cache as kv_cache
from jaxpaged.model import weights as model_weights
from jaxpaged.model.cache import KVCache
from jaxpaged.model.panels import PanelMatrix
from jaxpaged.model.step import StepInputs, forward_paged, sampled_logits
from jaxpaged.model.weights import Weights
from jaxpaged.runner import JaxRunner, ResourceError, plan_memory
from pallas_kernels.matmul.panels import LANES

# Grouped heads, biases, one layer that sees everything and one with a window: the most that a single family asks of a step.
(FAMILY,) = [family for family in families.FAMILIES if family.name == "qwen2-window"]
MODEL = FAMILY.config
V = MODEL.vocab_size
PAGE = 8
MAX_LEN = MODEL.max_position_embeddings
OPTIONS = {
    "dtype": "float32",
    "block_size": PAGE,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "prefill_tile": 16,
    "decode_row_buckets": (2,),
    "prefill_tile_buckets": (1,),
    "num_gpu_blocks_override": 8 * MAX_LEN // PAGE + 1,
}
# So few that eight sequences of this file preempt each other, and enough for one of the longest.
FEW_PAGES = MAX_LEN // PAGE + 8


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.from_weights(EngineConfig(**OPTIONS), MODEL, FAMILY.weights(), pool_type=ShuffledPool) as engine:
        yield engine


def random_asks(count: int, seed: int, *, max_prompt: int = 60, max_tokens: int = 20) -> list[Ask]:
    """Prompts of all lengths with every kind of sampling, each with a seed of its own."""
    rng = random.Random(seed)
    asks = []
    for _ in range(count):
        params = SamplingParams(
            temperature=rng.choice([0.0, 0.0, 0.5, 1.0, 2.0]),
            top_k=rng.choice([0, -1, 1, 5, V]),
            top_p=rng.choice([1.0, 0.9, 0.3]),
            min_p=rng.choice([0.0, 0.05]),
            seed=rng.getrandbits(63),
            max_tokens=rng.randint(1, max_tokens),
            stop_token_ids=rng.sample(range(V), rng.choice([0, 0, 3])),
            ignore_eos=rng.random() < 0.5,
        )
        asks.append(Ask([rng.randrange(V) for _ in range(rng.randint(1, max_prompt))], params))
    return asks


def alone(engine: Engine, asks: list[Ask]) -> list[Answer]:
    return [run(another_engine(engine), [ask])[0] for ask in asks]


# --- compilation ----------------------------------------------------------------------------------------------------


def test_nothing_compiles_after_warm_up(engine: Engine) -> None:
    small = another_engine(engine, num_pages=FEW_PAGES)
    with compilations() as seen:
        run(small, random_asks(500, seed=0, max_tokens=12), arrivals=lambda index: index // 2)
        assert small.scheduler.num_preemptions > 0
        assert seen == []
        jax.jit(lambda x: x * 3 + len(seen))(jnp.arange(7)).block_until_ready()
        assert "/jax/core/compile/backend_compile_duration" in seen, "the listener cannot see a compilation"
        assert "/jax/core/compile/jaxpr_trace_duration" in seen
    assert set(engine.runner.compiled) == set(engine.config.buckets())


def test_enforce_eager_compiles_a_bucket_at_its_first_use() -> None:
    with Engine.from_weights(EngineConfig(**OPTIONS, enforce_eager=True), MODEL, FAMILY.weights()) as lazy:
        compiled = lazy.runner.compiled
        assert not compiled
        run(lazy, [Ask([1, 2, 3], greedy(1))])
        assert set(compiled) == {Bucket(2, 1)}
        run(lazy, [Ask([1, 2, 3], greedy(3))])
        assert set(compiled) == {Bucket(2, 0), Bucket(2, 1)}


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [("float32", "auto"), ("bfloat16", "auto"), ("bfloat16", "xla"), pytest.param("float32", "xla", marks=pytest.mark.slow)],
)
def test_no_step_copies_the_pool(dtype: str, backend: str) -> None:
    """The temporaries of every step, of one row as of many, stay under a twentieth of the pool."""
    model = dataclasses.replace(MODEL, head_dim=64)
    num_pages = 8192 if dtype == "float32" else 16384
    shapes = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "decode_row_buckets": (1,), "prefill_tile_buckets": (2,)}
    options = {**OPTIONS, **shapes, "block_size": 16, "num_gpu_blocks_override": num_pages}
    config = EngineConfig(**{**options, "dtype": dtype, "attention_backend": backend}).resolved(model, "cpu")
    pool_bytes = num_pages * kv_cache.page_bytes(model, 16, dtype)
    assert pool_bytes >= 256 << 20
    runner = JaxRunner(config, model, model_weights.init(model, jax.random.key(0), dtype), num_pages=num_pages)
    runner.warm_up(use_tqdm=False)
    analyses = {bucket: compiled.memory_analysis() for bucket, compiled in runner.compiled.items()}
    runner.close()
    temporary = {bucket: analysis.temp_size_in_bytes for bucket, analysis in analyses.items()}
    assert set(temporary) == {Bucket(1, 0), Bucket(4, 0), Bucket(1, 2), Bucket(4, 2)}
    assert {bucket: size for bucket, size in temporary.items() if size >= pool_bytes / 20} == {}
    assert all(analysis.alias_size_in_bytes >= pool_bytes for analysis in analyses.values()), "the pool is not donated"


# --- what is in the pool beside one's own tokens --------------------------------------------------------------------


class WatchedRunner(JaxRunner):
    """The engine's own compiled steps on a pool of its own; keeps the bits of all logits that a token was drawn from.

    With `plants_nan`, every slot of the pool that holds no token of a running sequence or of the prefix cache is NaN before each
    step: pages that nobody owns, the null page, and the rest of pages that are not full. So what the step reads there would show.
    """

    def __init__(self, runner: JaxRunner, *, plants_nan: bool = False):
        self.__dict__.update(vars(runner))
        self.cache = jax.tree.map(jnp.zeros_like, runner.cache)
        self.plants_nan = plants_nan
        self.logits: list[bytes] = []
        self.scheduler = None

    def submit(self, plan: StepPlan):
        if self.plants_nan:
            self.cache = plant_nan(self.cache, self, self.scheduler)
        padded = self._pad(plan, batch.fit(plan, self.buckets, self.config.prefill_tile), self._feed)
        self.logits.append(np.asarray(_logits(self.weights, self.cache, padded.inputs))[padded.rows].tobytes())
        return super().submit(plan)


@jax.jit
def _logits(weights: Weights, cache: KVCache, inputs: StepInputs) -> jax.Array:
    hidden, _ = forward_paged(weights, cache, inputs.fed_tokens(), config=MODEL)
    return sampled_logits(weights, hidden, inputs, config=MODEL)


def watched(engine: Engine, *, num_pages: int | None = None, plants_nan: bool = False) -> Engine:
    runner = WatchedRunner(engine.runner, plants_nan=plants_nan)
    engine = Engine(engine.config, engine.model, runner, pool=ShuffledPool(num_pages or runner.num_pages))
    runner.scheduler = engine.scheduler
    return engine


def test_nan_in_every_unused_slot_changes_no_bit(engine: Engine) -> None:
    asks = random_asks(200, seed=1, max_tokens=10)
    clean = watched(engine, num_pages=FEW_PAGES)
    dirty = watched(engine, num_pages=FEW_PAGES, plants_nan=True)
    answers = [run(one, asks, arrivals=lambda index: index // 2) for one in (clean, dirty)]
    assert np.isnan(np.asarray(dirty.runner.cache.k)).mean() > 0.5, "the NaN were not planted"
    assert clean.scheduler.num_preemptions > 0
    assert answers[0] == answers[1]
    assert len(clean.runner.logits) > 100
    assert clean.runner.logits == dirty.runner.logits


def with_nan_embedding(engine: Engine, token_id: int) -> Engine:
    sick = watched(engine)
    embed = sick.runner.weights.embed
    if isinstance(embed, PanelMatrix):
        panels = embed.panels.at[token_id // LANES, :, token_id % LANES].set(jnp.nan)
        embed = dataclasses.replace(embed, panels=panels)
    else:
        embed = embed.at[token_id].set(jnp.nan)
    sick.runner.weights = dataclasses.replace(sick.runner.weights, embed=embed)
    return sick


@pytest.mark.parametrize("token_id", [7, 0])
def test_logits_that_are_not_finite_end_their_own_request_alone(engine: Engine, token_id: int) -> None:
    """A NaN in the embedding of one token; token 0 is also what padding is made of."""
    candidates = [ask for ask in random_asks(60, seed=2) if token_id not in ask.prompt]
    healthy = [
        (ask, answer)
        for ask, answer in zip(candidates, run(another_engine(engine), candidates), strict=True)
        if token_id not in answer.token_ids
    ][:12]
    assert len(healthy) == 12
    sick = [Ask([*ask.prompt, token_id, 3], ask.params) for ask, _ in healthy[:6]]
    asks = [ask for pair in zip([ask for ask, _ in healthy], sick + sick, strict=True) for ask in pair]
    one = with_nan_embedding(engine, token_id)
    for _ in range(2):  # the second time on pages that hold the first one's NaN
        answers = run(one, asks)
        assert answers[::2] == [answer for _, answer in healthy]
        assert answers[1::2] == [Answer([], FinishReason.ERROR)] * 12


def test_a_request_that_turns_bad_while_it_decodes_keeps_its_tokens(engine: Engine) -> None:
    ask = Ask([5, 6, 7], greedy(20))
    (want,) = run(another_engine(engine), [ask])
    token_id = want.token_ids[8]
    count = want.token_ids.index(token_id) + 1
    assert token_id not in ask.prompt
    (got,) = run(with_nan_embedding(engine, token_id), [ask])
    assert got == Answer(want.token_ids[:count], FinishReason.ERROR)


# --- neighbours, preemption, seeds ----------------------------------------------------------------------------------


def test_a_request_in_a_crowd_gets_what_it_gets_alone(engine: Engine) -> None:
    asks = random_asks(40, seed=3)
    want = alone(engine, asks)
    assert run(another_engine(engine), asks) == want
    assert run(another_engine(engine), asks, arrivals=lambda index: index * 7 % 50) == want
    assert run(another_engine(engine, long_prefill_token_threshold=5), asks, arrivals=lambda index: index) == want


def test_a_preempted_request_gets_what_it_gets_undisturbed(engine: Engine) -> None:
    asks = [Ask(ask.prompt, dataclasses.replace(ask.params, max_tokens=50, stop_token_ids=())) for ask in random_asks(24, seed=4)]
    want = run(another_engine(engine), asks)
    assert {answer.finish_reason for answer in want} == {FinishReason.LENGTH}
    small = another_engine(engine, num_pages=FEW_PAGES)
    assert run(small, asks) == want
    assert small.scheduler.num_preemptions >= 8


def test_a_seed_repeats_its_tokens_and_another_does_not(engine: Engine) -> None:
    prompt = [3, 1, 4, 1, 5]
    params = [SamplingParams(temperature=2.0, max_tokens=30, seed=seed) for seed in (1, 1, 2, -1, 2**63 - 1)]
    noise = random_asks(20, seed=5)
    asks = [Ask(prompt, one) for one in params]
    want = [answer.token_ids for answer in alone(engine, asks)]
    assert want[0] == want[1]
    assert len({tuple(tokens) for tokens in want}) == 4
    crowd = run(another_engine(engine, num_pages=FEW_PAGES), [*noise, *asks, *noise])
    assert [answer.token_ids for answer in crowd[20:25]] == want


def test_requests_without_a_seed_follow_the_engines(engine: Engine) -> None:
    asks = [Ask([9, 8, 7], SamplingParams(temperature=2.0, max_tokens=20))] * 2
    first, again, other = (run(another_engine(engine, seed=seed), asks) for seed in (11, 11, 12))
    assert first == again
    assert first[0] != first[1], "two requests draw different seeds"
    assert first != other


# --- ends -----------------------------------------------------------------------------------------------------------

PROMPT = [11, 22, 33, 44]


def greedy_tokens(engine: Engine) -> tuple[list[int], int, int]:
    """30 greedy tokens, and one of them that comes first at an index above 4, with that index."""
    (answer,) = run(another_engine(engine), [Ask(PROMPT, greedy(30))])
    tokens = answer.token_ids
    index = next(i for i in range(5, 30) if tokens[i] not in tokens[:i])
    return tokens, tokens[index], index


def test_max_tokens(engine: Engine) -> None:
    tokens, _, _ = greedy_tokens(engine)
    for count in (1, 2, 17):
        (answer,) = run(another_engine(engine), [Ask(PROMPT, greedy(count))])
        assert answer == Answer(tokens[:count], FinishReason.LENGTH)


def test_stop_token_ids_end_with_the_token_and_name_it(engine: Engine) -> None:
    tokens, stop, index = greedy_tokens(engine)
    want = Answer(tokens[: index + 1], FinishReason.STOP, stop)
    absent = next(token for token in range(V) if token not in tokens)
    for params in (greedy(30, stop_token_ids=[absent, stop]), greedy(index + 1, stop_token_ids=[stop])):
        assert run(another_engine(engine), [Ask(PROMPT, params)]) == [want]
    # A stop id in the prompt ends nothing.
    assert run(another_engine(engine), [Ask(PROMPT, greedy(3, stop_token_ids=PROMPT))])[0].token_ids[:1] == tokens[:1]


def test_end_of_sequence_ids_of_the_model(engine: Engine) -> None:
    tokens, eos, index = greedy_tokens(engine)
    model = dataclasses.replace(MODEL, eos_token_ids=(eos,))

    def answer(**options) -> Answer:
        one = Engine(engine.config, model, engine.runner, pool=ShuffledPool(engine.runner.num_pages))
        return run(one, [Ask(PROMPT, greedy(30, **options))])[0]

    assert answer(ignore_eos=False) == Answer(tokens[: index + 1], FinishReason.STOP)
    assert answer(ignore_eos=True) == Answer(tokens, FinishReason.LENGTH)
    assert answer(ignore_eos=True, stop_token_ids=[eos]) == Answer(tokens[: index + 1], FinishReason.STOP, eos)
    assert answer(ignore_eos=False, stop_token_ids=[eos]) == Answer(tokens[: index + 1], FinishReason.STOP, eos)


def test_max_model_len_is_prompt_and_output_together(engine: Engine) -> None:
    for num_prompt, num_new in ((MAX_LEN - 8, 8), (MAX_LEN - 1, 1)):
        for max_tokens in (None, 1000):
            (answer,) = run(another_engine(engine), [Ask([1] * num_prompt, greedy(max_tokens))])
            assert len(answer.token_ids) == num_new
            assert answer.finish_reason is FinishReason.LENGTH
    shorter = another_engine(engine, max_model_len=50)
    assert len(run(shorter, [Ask(PROMPT, greedy(None))])[0].token_ids) == 46
    with pytest.raises(RequestError, match=r"prompt has 50 tokens, the limit is 49 \(max_model_len 50"):
        shorter.add_request([1] * 50)


def test_the_whole_pool_can_be_one_sequence(engine: Engine) -> None:
    """The last token needs no page: it is never computed."""
    tiny = another_engine(engine, num_pages=4)
    (answer,) = run(tiny, [Ask([1, 2, 3], greedy(None))])
    assert len(answer.token_ids) == 3 * PAGE + 1 - 3
    assert answer.finish_reason is FinishReason.LENGTH
    want = run(another_engine(engine), [Ask([1, 2, 3], greedy(len(answer.token_ids)))])
    assert [answer] == want


def test_abort(engine: Engine) -> None:
    asks = [Ask([index + 1] * 30, greedy(20)) for index in range(12)]
    want = run(another_engine(engine), asks)
    one = another_engine(engine)
    answers = {str(index): Answer() for index in range(12)}
    for index, ask in enumerate(asks):
        one.add_request(ask.prompt, ask.params, request_id=str(index))
    for step, victims in enumerate(([], ["11"], ["0", "10"], [], [], [], [], [], ["3"])):
        for victim in victims:
            num_used = one.pool.num_used
            owned = next((len(s.pages) for s in one.scheduler.running if s.request.request_id == victim), 0)
            (event,) = one.abort(victim)
            assert event.finish_reason is FinishReason.ABORT
            assert event.token_id is None
            assert one.pool.num_used == num_used - owned, f"step {step}: its pages are not free"
            answers[victim].add(event)
            assert one.abort(victim) == []
            one.scheduler.check()
        for event in one.step():
            answers[event.request_id].add(event)
    assert one.abort("nobody") == []
    while one.has_unfinished:
        for event in one.step():
            answers[event.request_id].add(event)
    for index, answer in enumerate(answers.values()):
        if index in (0, 3, 10, 11):
            assert answer.token_ids == want[index].token_ids[: len(answer.token_ids)]
            assert answer.finish_reason is FinishReason.ABORT
        else:
            assert answer == want[index]
    assert one.pool.num_used == 0
    one.add_request(PROMPT, greedy(1), request_id="0")  # its name is free again


# --- refusals -------------------------------------------------------------------------------------------------------


def test_what_cannot_be_served_is_refused_before_it_takes_a_page(engine: Engine) -> None:
    one = another_engine(engine, num_pages=4)
    one.add_request([1, 2], greedy(1), request_id="twice")
    for prompt, name, message in (
        ([1] * (3 * PAGE + 1), "a", "prompt has 25 tokens, the whole page pool holds 24"),
        ([1] * MAX_LEN, "b", "max_model_len"),
        ([], "c", "prompt is empty"),
        ([1, V], "d", rf"prompt_token_ids: got {V}, expected token ids in \[0, {V - 1}\]"),
        ([1, -1], "e", "prompt_token_ids"),
        ("text", "f", "prompt_token_ids"),
        ([1], "twice", "request_id"),
    ):
        with pytest.raises(RequestError, match=message):
            one.add_request(prompt, greedy(1), request_id=name)
        assert one.pool.num_used == 0
        one.scheduler.check()
    assert one.stats()["num_requests_waiting"] == 1
    assert [event.request_id for event in (*one.step(), *one.step())] == ["twice"]
    assert not one.has_unfinished


def test_close_ends_requests_and_deletes_arrays() -> None:
    weights = FAMILY.weights()
    engine = Engine.from_weights(EngineConfig(**OPTIONS, enforce_eager=True), MODEL, weights)
    engine.add_request(PROMPT, greedy(50))
    engine.step()
    cache = copy.copy(engine.runner.cache)
    engine.close()
    assert all(array.is_deleted() for array in jax.tree.leaves((weights, cache)))
    assert not engine.has_unfinished
    assert engine.pool.num_used == 0
    with pytest.raises(RequestError, match="closed"):
        engine.add_request(PROMPT)
    engine.close()


def test_stats_count_what_happened(engine: Engine) -> None:
    one = another_engine(engine, num_pages=FEW_PAGES)
    asks = random_asks(20, seed=6)
    answers = run(one, asks)
    stats = one.stats()
    assert stats["prompt_tokens"] == sum(len(ask.prompt) for ask in asks)
    assert stats["generation_tokens"] == sum(len(answer.token_ids) for answer in answers)
    assert stats["num_gpu_blocks"] == FEW_PAGES - 1
    assert stats["num_preemptions"] == one.scheduler.num_preemptions
    assert stats["kv_blocks_active"] == stats["kv_tokens"] == stats["num_requests_running"] == stats["num_requests_waiting"] == 0


# --- memory ---------------------------------------------------------------------------------------------------------

GIB = 1 << 30


def pages_for(monkeypatch: pytest.MonkeyPatch, *, total: int = 8 * GIB, free: int = 8 * GIB, **options) -> int:
    monkeypatch.setattr(runner_module, "_memory", lambda: (total, free))
    config = EngineConfig(**{"dtype": "float32", "block_size": PAGE, "max_num_seqs": 4, **options}).resolved(MODEL, "cpu")
    return plan_memory(config, MODEL)


def test_pool_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    page_bytes = kv_cache.page_bytes(MODEL, PAGE, "float32")
    useful = 4 * MAX_LEN // PAGE + 1  # every sequence at its full length, and the null page
    weight_bytes = model_weights.num_bytes(MODEL, "float32")
    assert pages_for(monkeypatch, num_gpu_blocks_override=77) == 77
    assert pages_for(monkeypatch, kv_cache_memory_bytes=1000 * page_bytes + 1) == 1000
    assert pages_for(monkeypatch, kv_cache_memory_bytes=1000 * page_bytes, kv_cache_dtype="bfloat16") == 2000
    assert pages_for(monkeypatch) == useful
    assert pages_for(monkeypatch, gpu_memory_utilization=0.5) == useful
    # Too little for that: the named share of all memory, less the weights, never more than is free, or a quarter of the free.
    half = (1 << 20) // 2 - weight_bytes
    assert pages_for(monkeypatch, total=1 << 20, free=1 << 20, gpu_memory_utilization=0.5) == int(half * 0.95) // page_bytes
    assert pages_for(monkeypatch, total=1 << 20, free=9 * page_bytes, gpu_memory_utilization=1.0) == int(9 * 0.95)
    assert pages_for(monkeypatch, total=1 << 20, free=40 * page_bytes) == 10


def test_a_pool_that_memory_cannot_hold_is_refused_with_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    for options in ({"kv_cache_memory_bytes": 16 * GIB}, {"num_gpu_blocks_override": 2**29}):
        with pytest.raises(ResourceError, match=r"needs [\d.]+ GiB \([\d,]+ pages\), 8.00 GiB are free"):
            pages_for(monkeypatch, **options)
    for options in ({"kv_cache_memory_bytes": 1}, {"free": 1000}):
        with pytest.raises(ConfigError, match="at least 2 are needed"):
            pages_for(monkeypatch, **options)
    monkeypatch.undo()
    huge = EngineConfig(**{**OPTIONS, "num_gpu_blocks_override": 2**30})
    with pytest.raises(ResourceError, match="GiB"):
        Engine.from_weights(huge, MODEL, None)  # the weights are not even looked at


# --- options --------------------------------------------------------------------------------------------------------

BAD_OPTIONS = [
    *((name, value) for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "prefill_tile") for value in (0, -1)),
    *((name, value) for name in ("max_num_seqs", "num_gpu_blocks_override", "seed") for value in (1.5, "8", True, 2**63)),
    ("max_model_len", 1),
    ("num_gpu_blocks_override", 1),
    ("kv_cache_memory_bytes", 0),
    ("kv_cache_memory_bytes", 2**60),
    ("long_prefill_token_threshold", -1),
    *(("block_size", value) for value in (0, 1, 7, 24, 256, "16", -16, 16.0, True, [16])),
    *(("gpu_memory_utilization", value) for value in (0, 0.0, -0.5, 1.01, 92, float("nan"), float("inf"), "0.9", True)),
    *(("dtype", value) for value in ("int8", "fp8", "", 32, None, ["float32"])),
    ("kv_cache_dtype", "fp8"),
    *(("enforce_eager", value) for value in (1, "true", None)),
    ("skip_tokenizer_init", "no"),
    ("model", 7),
    ("compilation_cache_dir", 7),
    *(("decode_row_buckets", value) for value in ((0,), (-1,), (1.5,), "8", 8, ("8",), (True,))),
    *(("prefill_tile_buckets", value) for value in ((-1,), (1.5,), "8", 8)),
]


@pytest.mark.parametrize(("name", "value"), BAD_OPTIONS, ids=lambda value: repr(value))
def test_a_bad_option_is_named(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        EngineConfig(**{name: value})
    assert "\n" not in str(caught.value)
    assert repr(value) in str(caught.value) or value in (None, ""), "the value is not in the message"


@pytest.mark.parametrize("name", ["fast", "", None, 3])
def test_an_unknown_backend_is_refused_before_anything_compiles(name: object) -> None:
    with pytest.raises(ConfigError, match=r"attention_backend: .*expected one of auto"):
        Engine.from_weights(EngineConfig(**OPTIONS, attention_backend=name), MODEL, FAMILY.weights())


def test_an_unknown_option_names_its_neighbour() -> None:
    for wrong, right in (
        ("max_num_seq", "max_num_seqs"),
        ("gpu-memory-utilization", "gpu_memory_utilization"),
        ("blocksize", "block_size"),
    ):
        with pytest.raises(ConfigError, match=f"{wrong}.*did you mean '{right}'"):
            EngineConfig.from_options(**{wrong: 1})
    with pytest.raises(ConfigError, match=r"unknown option 'zzz'$"):
        EngineConfig.from_options(zzz=1)


def test_options_that_contradict_each_other_or_the_model() -> None:
    with pytest.raises(ConfigError, match="max_model_len: got 129, the model's max_position_embeddings is 128"):
        EngineConfig(max_model_len=129).resolved(MODEL, "cpu")
    with pytest.raises(ConfigError, match="max_num_batched_tokens: got 4, expected at least max_num_seqs 8"):
        EngineConfig(max_num_seqs=8, max_num_batched_tokens=4).resolved(MODEL, "cpu")
    with pytest.raises(ConfigError, match="buckets"):
        EngineConfig().buckets()


def test_resolved_options_leave_nothing_open_and_the_largest_step_has_a_bucket() -> None:
    for platform in ("cpu", "gpu"):
        config = EngineConfig().resolved(MODEL, platform)
        for name in (
            "max_model_len",
            "block_size",
            "max_num_seqs",
            "max_num_batched_tokens",
            "prefill_tile",
            "decode_row_buckets",
        ):
            assert getattr(config, name) is not None
        assert config.dtype == config.kv_cache_dtype == "float32"
        buckets = config.buckets()
        assert buckets[-1] == Bucket(config.max_num_seqs, config.max_prefill_tiles)
        assert buckets == sorted(set(buckets), key=lambda bucket: (bucket.prefill_tiles, bucket.decode_rows))
        assert config.max_prefill_tiles * config.prefill_tile >= config.max_num_batched_tokens
        assert config.resolved(MODEL, platform) == config


BAD_FIELDS = [
    ("model_type", "gpt2"),
    ("model_type", None),
    ("architectures", ["GPT2LMHeadModel"]),
    ("hidden_size", None),
    ("hidden_size", "64"),
    ("hidden_size", 64.0),
    ("hidden_size", 0),
    ("hidden_size", 65),
    ("num_attention_heads", 3),
    ("num_key_value_heads", -2),
    ("head_dim", 15),
    ("num_hidden_layers", True),
    ("vocab_size", 2**40),
    ("rms_norm_eps", 0),
    ("rms_norm_eps", float("nan")),
    ("hidden_act", "gelu"),
    ("tie_word_embeddings", "yes"),
    ("dtype", "int8"),
    ("eos_token_id", V),
    ("eos_token_id", [1, -1]),
    ("bos_token_id", "1"),
    ("quantization_config", {"bits": 4}),
    ("layer_types", ["full_attention"]),
    ("layer_types", ["full_attention", "chunked_attention"]),
    ("sliding_window", -1),
    ("sliding_window", 1.5),
    ("use_sliding_window", 1),
    ("rope_parameters", "linear"),
    ("rope_type", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}),
    ("factor", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}),
    ("rope_theta", {"rope_parameters": {"rope_type": "default", "rope_theta": -1}}),
    ("high_freq_factor", {"rope_parameters": {**families._LLAMA3_ROPE, "high_freq_factor": 1.0}}),
    ("partial_rotary_factor", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
]


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS, ids=lambda value: repr(value)[:50])
def test_a_bad_field_of_config_json_is_named(name: str, value: object) -> None:
    changed = value if isinstance(value, dict) and "rope_parameters" in value else {name: value}
    with pytest.raises(ConfigError, match=f"here/config.json: .*{name}"):
        ModelConfig.from_hf({**FAMILY.hf_config, **changed}, "here/config.json")


# --- shared prefixes ------------------------------------------------------------------------------------------------


def test_cached_equals_cold(engine: Engine) -> None:
    """Conversations that go on: the second question is the first, its answer and more. Pages in random order."""
    rng = random.Random(5)
    first = [Ask([rng.randrange(V) for _ in range(rng.randint(1, 40))], greedy(12)) for _ in range(12)]
    caching = another_engine(engine)
    answers = run(caching, first)
    second = [
        Ask([*ask.prompt, *answer.token_ids, rng.randrange(V)], greedy(12)) for ask, answer in zip(first, answers, strict=True)
    ]
    before = caching.stats()["prefix_cache_hits"]
    warm = run(caching, [*second, *first])
    assert caching.stats()["prefix_cache_hits"] > before + 100
    cold = run(another_engine(engine, num_pages=FEW_PAGES, enable_prefix_caching=False), [*second, *first])
    assert warm == cold
    # So few pages that most of them are evicted before they are asked for again.
    assert run(another_engine(engine, num_pages=FEW_PAGES), [*first, *second, *first])[12:] == cold
    caching.reset_prefix_cache()
    assert caching.stats()["kv_blocks_cached"] == 0
    assert run(caching, first) == answers


# --- forks ----------------------------------------------------------------------------------------------------------


def forked(engine: Engine, asks: list[Ask]) -> list[list[list[int]]]:
    """The tokens of every output of each request."""
    outputs: dict[str, list[list[int]]] = {}
    for index, ask in enumerate(asks):
        engine.add_request(ask.prompt, ask.params, request_id=str(index))
        outputs[str(index)] = [[] for _ in range(ask.params.n)]
    while engine.has_unfinished:
        for event in engine.step():
            if event.token_id is not None:
                outputs[event.request_id][event.index].append(event.token_id)
        engine.scheduler.check()
    assert engine.pool.num_used == 0
    return list(outputs.values())


@pytest.mark.parametrize("caches", [False, True])
def test_forked_outputs_are_those_of_requests_of_their_own(engine: Engine, caches: bool) -> None:
    """R03: prompts that end at every place of two pages and a bit, 2 to 8 outputs each: output i is that of seed + i alone."""
    page_size: int = engine.config.block_size  # type: ignore[assignment]
    rng = random.Random(6)
    asks = []
    for num_prompt in range(1, 2 * page_size + 3):
        params = SamplingParams(
            n=rng.randint(2, 8), temperature=2.0, max_tokens=rng.randint(1, 2 * page_size), seed=rng.getrandbits(40)
        )
        asks.append(Ask([rng.randrange(V) for _ in range(num_prompt)], params))
    options = {"enable_prefix_caching": caches}
    singles = [
        Ask(ask.prompt, dataclasses.replace(ask.params, n=1, seed=ask.params.seed + index))  # type: ignore[operator]
        for ask in asks
        for index in range(ask.params.n)
    ]
    alone = iter([answer.token_ids for answer in run(another_engine(engine, enable_prefix_caching=False), singles)])
    want = [[next(alone) for _ in range(ask.params.n)] for ask in asks]
    crowd = another_engine(engine, **options)
    assert forked(crowd, asks) == want
    assert crowd.scheduler.num_copies > 20
    small = another_engine(engine, num_pages=FEW_PAGES, **options)
    assert forked(small, asks) == want
    assert small.scheduler.num_preemptions > 0
