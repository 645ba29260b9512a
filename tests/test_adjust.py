"""Options that change logits: every one means what vLLM says, for its own request alone, whatever else goes on.

The reference is the whole chain in numpy and float64, written from vLLM's definitions, over the oracle's logits.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from driving import Ask, ShuffledPool, another_engine, compilations, greedy, outputs_of, run
from test_engine import FAMILY, FEW_PAGES, MODEL, OPTIONS, V
from text_model import FAST, write_text_model

from jaxpaged import LLM
from jaxpaged.adjuster import Adjuster
from jaxpaged.batch import Feed
from jaxpaged.config import EngineConfig
from jaxpaged.engine import Engine
from jaxpaged.host.plan import Chunk, StepPlan
from jaxpaged.host.request import MAX_RULES, FinishReason, Request, RequestError, SamplingParams, Sequence
from jaxpaged.model.adjust import adjust
from jaxpaged.observe.records import pack_request, unpack_request
from jaxpaged.prompts import with_bad_words

FEW_STEPS = {"decode_row_buckets": (8,), "prefill_tile_buckets": (4,)}  # few to compile
EOS = MODEL.eos_token_ids
PROMPT = [5, 9, 11, 5, 5, 30, 2]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.from_weights(EngineConfig(**{**OPTIONS, **FEW_STEPS}), MODEL, FAMILY.weights(), pool_type=ShuffledPool) as engine:
        yield engine


@functools.cache
def tensors() -> dict[str, np.ndarray]:
    return FAMILY.tensors()


def chain(logits: np.ndarray, prompt: list[int], output: list[int], params: SamplingParams, eos=EOS) -> np.ndarray:
    """vLLM's logits processors in vLLM's order, one row [V], one step at a time."""
    x = np.array(logits, np.float64)
    if params.allowed_token_ids is not None:
        x[[token_id for token_id in range(len(x)) if token_id not in params.allowed_token_ids]] = -np.inf
    for word in params.bad_words_token_ids:
        before = list(word[:-1])
        if len(before) <= len(output) and (not before or output[-len(before) :] == before):
            x[word[-1]] = -np.inf
    if len(output) < params.min_tokens:
        for token_id in (*params.stop_token_ids, *eos):
            x[token_id] = -np.inf
    for token_id, bias in params.biases:
        x[token_id] += bias
    for token_id in {*prompt, *output}:
        x[token_id] = x[token_id] / params.repetition_penalty if x[token_id] > 0 else x[token_id] * params.repetition_penalty
    for token_id in set(output):
        x[token_id] -= params.frequency_penalty * output.count(token_id)
        x[token_id] -= params.presence_penalty
    return x


def random_options(rng: random.Random, size: int = V) -> dict[str, Any]:
    """Any of the options, each as likely to be left alone."""
    every = {
        "presence_penalty": rng.uniform(-2, 2),
        "frequency_penalty": rng.uniform(-2, 2),
        "repetition_penalty": rng.choice([0.5, 1.2, 2.0]),
        "min_tokens": rng.randint(1, 4),
        "logit_bias": {token_id: rng.uniform(-9, 9) for token_id in rng.sample(range(size), rng.choice([1, 40]))},
        "allowed_token_ids": rng.sample(range(size), size // 2),
        "bad_words_token_ids": [[rng.randrange(size) for _ in range(rng.randint(1, 3))] for _ in range(9)],
    }
    return {name: value for name, value in every.items() if rng.random() < 0.5}


def random_asks(count: int, seed: int) -> list[Ask]:
    """Prompts of few different tokens, so that they repeat, half of them with options that change logits."""
    rng, asks = random.Random(seed), []
    for index in range(count):
        options = random_options(rng) if index % 2 else {}
        temperature, stops = rng.choice([0.0, 0.0, 1.0]), rng.sample(range(V), rng.choice([0, 3]))
        sampling = {"temperature": temperature, "top_p": rng.choice([1.0, 0.9]), "seed": rng.getrandbits(40)}
        length = rng.randint(5, 20)
        params = SamplingParams(max_tokens=length, stop_token_ids=stops, ignore_eos=rng.random() < 0.5, **sampling, **options)
        asks.append(Ask([rng.randrange(12) for _ in range(rng.randint(1, 60))], params))
    return asks


# --- what they mean ---------------------------------------------------------------------------------------------------


def test_the_chain_is_that_of_the_reference_over_random_rows() -> None:
    """Rows as decodes whose last token only the device knows, as decodes that the host knows, and as ends of prompts."""
    R, size, rng = 12, 50, random.Random(0)
    adjuster = Adjuster(num_sequences=R, vocab_size=size, max_model_len=40, num_fed=R)
    logits = np.random.default_rng(0).normal(size=(R, size)).astype(np.float32) * 5
    num_changed, jitted = 0, jax.jit(adjust)
    for _ in range(40):
        previous = np.array([rng.randrange(size) for _ in range(R)], np.int32)
        decodes, prefills, rows, last, wanted = [], [], {}, [], []
        for row in range(R):
            prompt = [rng.randrange(12) for _ in range(rng.randint(1, 20))]
            output = [rng.randrange(12) for _ in range(rng.randint(0, 15))]
            options = random_options(rng, size) if row % 4 else {}
            params = SamplingParams(temperature=0.0, stop_token_ids=rng.sample(range(size), 2), **options)
            request = checked(params, prompt, vocab_size=size, eos_token_ids=(7, 8))
            sequence = Sequence.first(request)
            sequence.tokens += output
            kind = row % 3 if output else 2
            if kind == 0:  # the last token is pending
                output[-1] = int(previous[row])
                sequence.tokens.pop()
                rows[sequence] = row
            num_tokens = len(prompt) + len(output)
            start = num_tokens - 1 if kind < 2 else 0
            (decodes if kind < 2 else prefills).append((row, Chunk(sequence, start, num_tokens - start, True)))
            last.append((prompt + output)[-1])
            wanted.append(chain(logits[row], prompt, output, params, (7, 8)))
        placed = decodes + prefills
        plan = StepPlan(tuple(chunk for _, chunk in decodes), tuple(chunk for _, chunk in prefills))
        found = adjuster.adjustments(plan, [row for row, _ in placed], R, Feed(previous, rows))
        changed, has_choice = jitted(jnp.asarray(logits), found, jnp.asarray(last, jnp.int32))
        np.testing.assert_allclose(changed, wanted, rtol=2e-6, atol=2e-6)
        assert np.asarray(has_choice).tolist() == [bool(np.isfinite(row).any()) for row in wanted]
        plain = [row for row in range(R) if row % 4 == 0]
        assert np.asarray(changed)[plain].tobytes() == logits[plain].tobytes()
        num_changed += int((np.asarray(changed) != logits).any(axis=1).sum())
    assert num_changed > 250


CASES = [
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.7},
    {"frequency_penalty": -0.5, "presence_penalty": 0.3},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"logit_bias": {3: 2.5, 40: -3.0, 7: 1.0}, "frequency_penalty": 0.5},
    {"allowed_token_ids": [1, 2, 3, 50, 51, 52], "repetition_penalty": 1.1},
    {"min_tokens": 12, "ignore_eos": False, "stop_token_ids": list(range(0, V, 2))},
]


@pytest.mark.parametrize("options", CASES, ids=lambda options: "+".join(options))
def test_greedy_is_the_likeliest_token_of_the_chain_over_the_oracle(engine: Engine, options: dict[str, Any]) -> None:
    params, output = greedy(20, **options), []
    while len(output) < 20:
        scores = oracle.logits(tensors(), MODEL, PROMPT + output)[-1]
        output.append(int(np.argmax(chain(scores, PROMPT, output, params))))
        if output[-1] in params.stop_token_ids or (not params.ignore_eos and output[-1] in EOS):
            break
    (answer,) = run(another_engine(engine), [Ask(PROMPT, params)])
    assert answer.token_ids == output
    (plain,) = run(another_engine(engine), [Ask(PROMPT, greedy(20))])
    assert plain.token_ids[: len(output)] != output, "the option changes nothing here"


def test_repetition_penalty_is_that_of_transformers(engine: Engine) -> None:
    torch = pytest.importorskip("torch")
    processor = pytest.importorskip("transformers").RepetitionPenaltyLogitsProcessor(1.4)
    output: list[int] = []
    while len(output) < 16:
        scores = oracle.logits(tensors(), MODEL, PROMPT + output)[-1]
        output.append(int(processor(torch.tensor([PROMPT + output]), torch.tensor(scores[None])).argmax()))
    (answer,) = run(another_engine(engine), [Ask(PROMPT, greedy(16, repetition_penalty=1.4))])
    assert answer.token_ids == output


def test_bad_words_never_come_whole(engine: Engine) -> None:
    """Words are taken from what the model says otherwise, of one token up to four."""
    (plain,) = run(another_engine(engine), [Ask(PROMPT, greedy(24))])
    for length in (1, 2, 3, 4):
        words = [plain.token_ids[at : at + length] for at in range(0, 12, 4)]
        params, output = greedy(24, bad_words_token_ids=words), []
        while len(output) < 24:
            scores = oracle.logits(tensors(), MODEL, PROMPT + output)[-1]
            output.append(int(np.argmax(chain(scores, PROMPT, output, params))))
        (answer,) = run(another_engine(engine), [Ask(PROMPT, params)])
        assert answer.token_ids == output != plain.token_ids
        assert not any(output[at : at + length] in words for at in range(24))


def test_no_end_comes_before_min_tokens(engine: Engine) -> None:
    ends = list(range(V - 1))
    params = [SamplingParams(seed=seed, max_tokens=9, min_tokens=seed, stop_token_ids=ends, ignore_eos=True) for seed in range(9)]
    answers = run(another_engine(engine), [Ask(PROMPT, one) for one in params])
    assert [len(answer.token_ids) for answer in answers] == [max(1, number + 1) for number in range(9)]
    assert all(set(answer.token_ids[:-1]) <= {V - 1} for answer in answers)


def test_a_row_with_nothing_left_to_choose_ends_alone(engine: Engine) -> None:
    """7 may come only where 8 has not been just before, and the other way round."""
    stuck = greedy(9, allowed_token_ids=[7, 8], bad_words_token_ids=[[7, 7], [7, 8], [8, 7], [8, 8]])
    others = random_asks(5, 1)
    answers = run(another_engine(engine), [*others, Ask(PROMPT, stuck)])
    assert answers[-1].finish_reason is FinishReason.ERROR and len(answers[-1].token_ids) == 1
    assert answers[:-1] == run(another_engine(engine), others)


def test_the_log_probabilities_of_best_of_are_those_of_the_model(engine: Engine) -> None:
    params = SamplingParams(best_of=2, n=1, seed=1, max_tokens=8, ignore_eos=True, frequency_penalty=2.0, logit_bias={3: 9.0})
    one = another_engine(engine)
    one.add_request(PROMPT, params)
    events = [event for _ in range(40) if one.has_unfinished for event in one.step()]
    for index in range(2):
        mine = [event for event in events if event.index == index]
        tokens = [event.token_id for event in mine]
        scores = oracle.logits(tensors(), MODEL, [*PROMPT, *tokens])[len(PROMPT) - 1 : -1]
        wanted = scores[np.arange(8), tokens] - np.logaddexp.reduce(scores, axis=-1)
        np.testing.assert_allclose([event.likelihood.logprob for event in mine], wanted, atol=1e-4)


# --- whatever else goes on --------------------------------------------------------------------------------------------


@functools.cache
def crowd() -> tuple[Ask, ...]:
    asks = random_asks(30, 2)
    for index in range(1, 30, 6):  # forks among them
        asks[index] = Ask(asks[index].prompt, dataclasses.replace(asks[index].params, n=3, temperature=1.0))
    return tuple(asks)


@pytest.fixture(scope="module")
def alone(engine: Engine) -> dict[tuple[str, int], list]:
    """What each output is with nobody beside it, its n taken apart, and nothing planned ahead."""
    found = {}
    for number, ask in enumerate(crowd()):
        for index in range(ask.params.n):
            params = dataclasses.replace(ask.params, n=1, seed=ask.params.seed + index)
            one = another_engine(engine, async_scheduling=False, enable_prefix_caching=False)
            found[str(number), index] = outputs_of(one, [Ask(ask.prompt, params)])["0", 0]
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"async_scheduling": False},
        {"num_pages": FEW_PAGES},
        {"num_pages": FEW_PAGES, "async_scheduling": False, "enable_prefix_caching": False},
        {"long_prefill_token_threshold": 7},
    ],
    ids=lambda options: "+".join(options) or "together",
)
def test_nobody_notices_the_others_nor_how_it_is_scheduled(engine: Engine, alone: dict, options: dict[str, Any]) -> None:
    """Outputs of one request count for themselves; half of the requests change no logits."""
    one = another_engine(engine, **options)
    with compilations() as seen:
        assert outputs_of(one, list(crowd())) == alone
    assert seen == [], "something compiled"
    assert "num_pages" not in options or one.scheduler.num_preemptions > 0
    if options.get("enable_prefix_caching", True) and "num_pages" not in options:
        assert outputs_of(one, list(crowd())) == alone, "not the same from the prefix cache"
        assert one.stats()["prefix_cache_hits"] > 0, one.stats()


def test_aborts_leave_the_others_alone(engine: Engine, alone: dict) -> None:
    one, rng, found = another_engine(engine), random.Random(0), {}
    for number, ask in enumerate(crowd()):
        one.add_request(ask.prompt, ask.params, request_id=str(number))
    while one.has_unfinished:
        for event in one.step():
            found.setdefault((event.request_id, event.index), []).append((event.token_id, event.finish_reason))
        if rng.random() < 0.2:
            one.abort(str(rng.randrange(30)))
    whole = {key: events for key, events in found.items() if events[-1][1] is not None}
    assert 8 < len(whole) < len(alone)
    assert whole == {key: alone[key] for key in whole}


class Flaky:
    """The runner of an engine, whose steps fail now and then, when they start or when they are waited for."""

    def __init__(self, runner: Any):
        self.runner, self.rng, self.num_failures = runner, random.Random(3), 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)

    def submit(self, plan: StepPlan):
        self.fail()
        wait = self.runner.submit(plan)

        def result():
            found = wait()
            self.fail()
            return found

        return result

    def fail(self) -> None:
        if self.rng.random() < 0.05:
            self.num_failures += 1
            raise OSError("gone")


@pytest.mark.parametrize("is_async", [False, True])
def test_a_step_that_fails_is_counted_anew(engine: Engine, alone: dict, is_async: bool) -> None:
    one, found = another_engine(engine, async_scheduling=is_async), {}
    one.runner = Flaky(engine.runner)  # type: ignore[assignment]
    for number, ask in enumerate(crowd()):
        one.add_request(ask.prompt, ask.params, request_id=str(number))
    while one.has_unfinished:
        try:
            for event in one.step():
                found.setdefault((event.request_id, event.index), []).append((event.token_id, event.finish_reason))
        except OSError:
            continue
    assert found == alone and one.runner.num_failures > 5  # type: ignore[attr-defined]


def test_a_line_that_was_lost_is_written_anew(engine: Engine, alone: dict) -> None:
    """Lines are taken away at random while the next token of their sequences is being sampled."""
    one, rng, marked, found = another_engine(engine), random.Random(0), engine.runner.adjuster._marked, {}  # type: ignore[attr-defined]
    num_lost = 0
    for number, ask in enumerate(crowd()):
        one.add_request(ask.prompt, ask.params, request_id=str(number))
    while one.has_unfinished:
        for event in one.step():
            found.setdefault((event.request_id, event.index), []).append((event.token_id, event.finish_reason))
        for sequence in list(marked):
            if rng.random() < 0.2:
                num_lost += sequence.finish_reason is None
                del marked[sequence]
    assert found == alone and num_lost > 20


# --- what is refused --------------------------------------------------------------------------------------------------


def checked(params: SamplingParams, prompt: list[int], *, vocab_size: int = V, eos_token_ids=EOS) -> Request:
    limits = {"vocab_size": vocab_size, "max_model_len": 64, "max_pool_len": 64}
    return Request.checked("r", prompt, params, eos_token_ids=eos_token_ids, **limits)


NAN, INF = float("nan"), float("inf")
NO_IDS = (-1, 2**31, 2**63, 1.5, True, "5", None)


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        *(("presence_penalty", value) for value in (NAN, INF, -2.1, 2.1, True, "1", None, 10**400)),
        *(("frequency_penalty", value) for value in (NAN, -INF, -2.1, 2.1, False, "1", None)),
        *(("repetition_penalty", value) for value in (NAN, INF, 0, -1.0, 1e-320, 1e9, True, "1", None)),
        *(("min_tokens", value) for value in (-1, 1.0, True, "1", None, 2**31, 17)),
        *(("logit_bias", {token_id: 1.0}) for token_id in NO_IDS),
        *(("logit_bias", {1: value}) for value in (NAN, INF, 100.5, -101, True, "1", None)),
        *(("logit_bias", value) for value in ("1", 3, [1], [(1, 2, 3)], [(1, 1.0), (1, 2.0)])),
        *(("allowed_token_ids", [token_id]) for token_id in NO_IDS),
        *(("allowed_token_ids", value) for value in ([], (), "12", 5, {1})),
        *(("bad_words_token_ids", [[1, token_id]]) for token_id in NO_IDS),
        *(("bad_words_token_ids", value) for value in ([[]], [3], "12", 5, [[1] * 65])),
        *(("bad_words", value) for value in ("word", [""], [" "], [3], 5)),
    ],
)
def test_what_no_request_may_ask(field: str, bad: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: bad})
    message = str(caught.value)
    assert message.startswith(f"{field}: ") and "\n" not in message and len(message) < 200


@pytest.mark.parametrize(
    "options",
    [
        {"logit_bias": {V: 1.0}},
        {"bad_words_token_ids": [[1]] * MAX_RULES, "logit_bias": {2: 1.0}},
        {"allowed_token_ids": [1, V]},
        {"allowed_token_ids": [1, 2], "bad_words_token_ids": [[1], [2]]},
        {"allowed_token_ids": [1], "stop_token_ids": [1], "min_tokens": 1},
        {"bad_words_token_ids": [[1, V + 1]]},
        {"bad_words": ["dog"]},
    ],
)
def test_what_this_model_cannot_serve(engine: Engine, options: dict[str, Any]) -> None:
    one, params = another_engine(engine), SamplingParams(**options)
    with pytest.raises(RequestError, match=r"^(logit_bias|allowed_token_ids|bad_words\w*): [^\n]*$"):
        one.add_request(PROMPT, params)
    assert not one.has_unfinished


@pytest.mark.parametrize(
    "name, value",
    [
        ("stop_token_ids", [1] * (MAX_RULES + 1)),
        ("logit_bias", {index: 1.0 for index in range(MAX_RULES + 1)}),
        ("bad_words", ["dog"] * (MAX_RULES + 1)),
        ("bad_words", ["d" * 257]),
        ("bad_words_token_ids", [[1]] * (MAX_RULES + 1)),
    ],
)
def test_more_than_a_step_has_room_for_is_refused_before_it_is_read(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"^{name}: got [^\n]*, the limit is (1,024|256)$"):
        SamplingParams(**{name: value})


def test_a_search_takes_none_of_them() -> None:
    for name, value in {"presence_penalty": 1.0, "min_tokens": 2, "logit_bias": {1: 1.0}, "allowed_token_ids": [1]}.items():
        with pytest.raises(RequestError, match=f"^{name}: .*beam search"):
            SamplingParams(use_beam_search=True, **{name: value})


def test_a_recorded_request_comes_back_whole() -> None:
    params = SamplingParams(logit_bias={3: -1.5}, allowed_token_ids=[1, 2], bad_words_token_ids=[[1], [2, 3]], min_tokens=3)
    request = checked(params, PROMPT)
    assert unpack_request(pack_request(request)) == request and hash(params) == hash(dataclasses.replace(params))
    assert SamplingParams(logit_bias=None, bad_words=None) == SamplingParams()  # type: ignore[arg-type]


# --- words --------------------------------------------------------------------------------------------------------------


def test_bad_words_are_tokens_with_and_without_a_space(tmp_path: Path) -> None:
    with LLM(write_text_model(tmp_path), **FAST, enforce_eager=True) as llm:
        encode = llm.get_tokenizer().encode
        params = with_bad_words(llm.tokenizer, SamplingParams(bad_words=["dog", " the"], bad_words_token_ids=[[9]]))
        plain, spaced = encode("dog", add_special_tokens=False), encode(" dog", add_special_tokens=False)
        assert params.bad_words_token_ids[:2] == ((9,), tuple(plain))
        assert (tuple(spaced) in params.bad_words_token_ids) == (len(spaced) == len(plain))
        ids = {token_id: 100.0 for token_id in encode("hello", add_special_tokens=False)}
        wanted = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True, logit_bias=ids)
        banned = dataclasses.replace(wanted, bad_words=["hello"])
        said, unsaid = (llm.generate("x", one, use_tqdm=False)[0].outputs[0].text for one in (wanted, banned))
        assert "hello" in said and "hello" not in unsaid
        llm.tokenizer = None
        with pytest.raises(RequestError, match=r"^bad_words: "):
            llm.generate([1, 2], banned, use_tqdm=False)
