"""logprobs_mode and logits processors: the numbers of vLLM's definitions over the oracle, and nothing where they are not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from driving import Ask, ShuffledPool, compilations, greedy, run
from model.test_sampler import kept_by_sorting
from test_adjust import EOS, FEW_STEPS, chain
from test_engine import FAMILY, MODEL, OPTIONS, V

from jaxpaged import ConfigError, LogitsProcessor, RequestError, SamplingParams
from jaxpaged.config import LOGPROBS_MODES, EngineConfig
from jaxpaged.engine import Engine
from jaxpaged.host.request import FinishReason
from jaxpaged.model import step as model_step

PROMPT = [5, 9, 11, 5, 5, 30, 2]
TENSORS = FAMILY.tensors()


def new_engine(**options) -> Engine:
    given = {**OPTIONS, **FEW_STEPS, **options}
    return Engine.from_weights(EngineConfig(**given), MODEL, FAMILY.weights(), pool_type=ShuffledPool)


def drawn_by(tokens: list[int], params: SamplingParams) -> np.ndarray:
    """The logits that a token after these is drawn by, float64 [V]."""
    scores = chain(oracle.logits(TENSORS, MODEL, tokens)[-1], PROMPT, tokens[len(PROMPT) :], params, EOS)
    if not params.temperature:
        return scores
    scores = scores / params.temperature
    return np.where(kept_by_sorting(scores, params.top_k, params.top_p, params.min_p), scores, -np.inf)


@pytest.mark.parametrize(
    "mode", [pytest.param(one, marks=[] if one == "processed_logprobs" else [pytest.mark.slow]) for one in LOGPROBS_MODES]
)
def test_logprobs_are_those_of_the_mode(mode: str) -> None:
    """Of greedy and drawn rows with penalties, biases and cuts; those of prompts and beams are raw in every mode."""
    options = {"frequency_penalty": 1.0, "logit_bias": {3: 2.0}, "logprobs": 5, "prompt_logprobs": 2, "max_tokens": 6}
    params = [
        SamplingParams(temperature=0.0, ignore_eos=True, **options),
        SamplingParams(temperature=0.7, top_k=4, seed=1, ignore_eos=True, **options),
        SamplingParams(temperature=1.3, top_p=0.8, min_p=0.05, seed=2, ignore_eos=True, **options),
        SamplingParams(temperature=1.0, seed=3, ignore_eos=True, logprobs=5, prompt_logprobs=2, max_tokens=6),
    ]
    with new_engine(logprobs_mode=mode) as engine:
        for index, one in enumerate(params):
            engine.add_request(PROMPT, one, request_id=str(index))
        search = SamplingParams(use_beam_search=True, n=2, temperature=0, max_tokens=4, ignore_eos=True)
        engine.add_request(PROMPT, search, request_id="beams")
        events = [event for _ in range(60) if engine.has_unfinished for event in engine.step()]
        if mode.endswith("logits"):
            with pytest.raises(RequestError, match="best_of: got 2"):
                engine.add_request(PROMPT, SamplingParams(best_of=2))
    for index, one in enumerate(params):
        mine = [event for event in events if event.request_id == str(index)]
        tokens = list(PROMPT)
        raw = oracle.logits(TENSORS, MODEL, PROMPT)
        raw -= np.logaddexp.reduce(raw, axis=-1, keepdims=True)
        found = [likelihood.logprob for likelihood in mine[0].prompt_likelihoods]
        np.testing.assert_allclose(found, raw[np.arange(len(PROMPT) - 1), PROMPT[1:]], atol=1e-4)
        for event in mine:
            wanted = drawn_by(tokens, one) if mode.startswith("processed") else oracle.logits(TENSORS, MODEL, tokens)[-1]
            wanted = wanted if mode.endswith("logits") else wanted - np.logaddexp.reduce(wanted)
            likelihood = event.likelihood
            assert likelihood.logprob == pytest.approx(wanted[event.token_id], abs=2e-4)
            assert likelihood.rank == pytest.approx(np.sum(wanted >= wanted[event.token_id] - 1e-5), abs=1)
            np.testing.assert_allclose([number for _, number in likelihood.likeliest], np.sort(wanted)[::-1][:5], atol=2e-4)
            tokens.append(event.token_id)
    for event in events:
        if event.request_id == "beams":
            tokens = [*PROMPT, *event.token_ids]
            raw = oracle.logits(TENSORS, MODEL, tokens)[len(PROMPT) - 1 : -1]
            raw -= np.logaddexp.reduce(raw, axis=-1, keepdims=True)
            assert event.cumulative_logprob == pytest.approx(raw[np.arange(4), event.token_ids].sum(), abs=1e-3)


def favour(logits: jax.Array, rows) -> jax.Array:
    """Never a token twice in a row; where a request says boost it likes token 5, the more the later."""
    is_last = jnp.arange(logits.shape[1]) == rows.token_ids[:, None]
    boost = rows.extra["boost"] * rows.positions.astype(jnp.float32)
    return jnp.where(is_last, -jnp.inf, logits).at[:, 5].add(boost)


def test_a_processor_is_compiled_in_and_reads_what_its_request_says() -> None:
    asks = [Ask(PROMPT[: 3 + index], greedy(12, extra_args={"boost": index / 4} if index else {})) for index in range(4)]
    asks.append(Ask(PROMPT, greedy(12, extra_args={"boost": 9.0}, bad_words_token_ids=[[5]])))
    with new_engine(logits_processors=[LogitsProcessor(favour, {"boost": 0.0})]) as engine:
        with compilations() as seen:
            answers = run(engine, asks)
        assert seen == []
        with pytest.raises(RequestError, match="extra_args: got 'bost', expected one of boost, did you mean 'boost'"):
            engine.add_request(PROMPT, SamplingParams(extra_args={"bost": 1.0}))
        plain = dict(logprobs=1, temperature=0.0, max_tokens=1)
        engine.add_request(PROMPT, SamplingParams(extra_args={"boost": 9.0}, **plain))
        (event,) = [event for _ in range(4) for event in engine.step()]
        assert event.token_id == 5 and event.likelihood.likeliest[0][0] != 5, "raw log-probabilities are the model's"
    for ask, answer in zip(asks, answers, strict=True):
        tokens = list(ask.prompt)
        for token_id in answer.token_ids:
            scores = oracle.logits(TENSORS, MODEL, tokens)[-1]
            scores[tokens[-1]] = -np.inf
            scores[5] += ask.params.extra_numbers.get("boost", 0.0) * len(tokens)
            if ask.params.bad_words_token_ids:
                scores[5] = -np.inf
            assert token_id == int(np.argmax(scores))
            tokens.append(token_id)
    assert 5 in answers[3].token_ids and 5 not in answers[4].token_ids


def test_what_a_processor_spoils_ends_its_own_request() -> None:
    def spoil(logits: jax.Array, rows) -> jax.Array:
        bad = jnp.array([0.0, jnp.nan, jnp.inf, -jnp.inf])[rows.extra["how"].astype(jnp.int32)]
        return jnp.where(rows.extra["how"][:, None] > 0, bad[:, None], logits)

    asks = [Ask(PROMPT, greedy(5, extra_args={"how": float(how)})) for how in (0, 1, 2, 3)]
    with new_engine(logits_processors=[LogitsProcessor(spoil, {"how": 0.0})]) as engine:
        answers = run(engine, asks)
    assert [answer.finish_reason for answer in answers] == [FinishReason.LENGTH, *[FinishReason.ERROR] * 3]


def wide(logits: jax.Array, rows) -> jax.Array:
    return logits[:, :-1]


def half(logits: jax.Array, rows) -> jax.Array:
    return logits.astype(jnp.bfloat16)


@pytest.mark.parametrize(
    ("processor", "problem"),
    [
        (wide, rf"logits_processors\[0\], wide: returned float32\[12, {V - 1}\], expected float32\[12, {V}\]"),
        (half, r"half: returned bfloat16\[12, "),
        (favour, r"favour: KeyError: 'boost'"),
        (lambda logits, rows: None, r"<lambda>: returned NoneType"),
        (lambda logits: logits, r"<lambda>: TypeError"),
        ("favour", r"logits_processors: got \['favour'\], expected a list of functions"),
        (LogitsProcessor(favour, {"boost": float("nan")}), r"extra_args: got 'boost': nan"),
    ],
)
def test_one_that_does_not_fit_is_refused_at_the_start(processor, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as error:
        new_engine(logits_processors=[processor])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mode", ["raw", "processed_logprob", None, 1])
def test_an_unknown_mode_is_refused(mode: object) -> None:
    with pytest.raises(ConfigError, match=r"logprobs_mode: got .*, expected one of raw_logprobs"):
        EngineConfig(logprobs_mode=mode)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "given", [5, "boost", {"boost": "1"}, {"boost": float("inf")}, {1: 1.0}, {"a": True}, {"a": 10**5000}, [("a", 1), ("a", 2)]]
)
def test_extra_args_are_names_and_finite_numbers(given: object) -> None:
    with pytest.raises(RequestError, match="extra_args"):
        SamplingParams(extra_args=given)  # type: ignore[arg-type]


def test_without_processors_the_step_is_the_same_program() -> None:
    """Options that are not set leave no trace in what is compiled."""
    with new_engine() as engine:
        runner = engine.runner
        padded, rest = runner._padding(runner.buckets[0])  # type: ignore[attr-defined]
        inputs = padded.whole(*rest)
        options = {"config": MODEL, "backend": "xla"}
        plain = jax.make_jaxpr(lambda *given: model_step.step(*given, **options))(runner.weights, runner.cache, inputs)  # type: ignore[attr-defined]
        named = jax.make_jaxpr(lambda *given: model_step.step(*given, **options, logprobs_mode="raw_logprobs", processors=()))(
            runner.weights, runner.cache, inputs
        )  # type: ignore[attr-defined]
        processed = jax.make_jaxpr(lambda *given: model_step.step(*given, **options, logprobs_mode="processed_logprobs"))(
            runner.weights, runner.cache, inputs
        )  # type: ignore[attr-defined]
    assert inputs.extra is None and str(plain) == str(named) != str(processed)
