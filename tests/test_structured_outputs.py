"""Outputs of a given form, through the engine: of that form, by somebody else's judgement, and the same whatever goes on beside.

The model's weights are random, so that it does nothing right by itself.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from driving import Ask, another_engine, compilations, outputs_of
from text_model import FAST, write_text_model

from jaxpaged import LLM, StructuredOutputsParams
from jaxpaged.adjuster import Adjuster
from jaxpaged.bench.forms import form, problem
from jaxpaged.engine import Engine
from jaxpaged.host.pages import PagePool
from jaxpaged.host.request import RequestError, SamplingParams
from jaxpaged.model.choice import Chosen, Masks, Rows, rechoose
from jaxpaged.model.sampler import SamplingInputs
from jaxpaged.observe import Recording, Replay

PROMPTS = ["hello world", "one day a small dog", "naïve café", "日本語"]
KEYS = {"first_long_name": {"type": "integer", "minimum": 0, "maximum": 99}, "second_long_name": {"enum": ["y", "some text"]}}
SCHEMA = {"type": "object", "properties": KEYS, "required": list(KEYS), "additionalProperties": False}
FIXED = StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True)
FEW_PAGES = 12
OPTIONS = {"dtype": "float32", "block_size": 16, "num_gpu_blocks_override": 80, "max_model_len": 256, "prefill_tile": 16}
STEPS = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "decode_row_buckets": (8,), "prefill_tile_buckets": (4,)}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def llm(directory: Path) -> Iterator[LLM]:
    with LLM(directory, **OPTIONS, **STEPS, use_tqdm_on_load=False) as one:  # type: ignore[arg-type]
        yield one


@pytest.fixture(scope="module")
def engine(llm: LLM) -> Engine:
    return llm.engine


def random_asks(count: int, seed: int, *, share: float = 0.6, **options) -> list[Ask]:
    """Prompts of any length, most of whose outputs have a form; the rest are plain."""
    rng = random.Random(seed)
    asks = []
    for _ in range(count):
        prompt = [rng.randrange(320) for _ in range(rng.choice([1, 7, 16, 33, 60]))]
        params = {
            "temperature": rng.choice([0.0, 1.0]),
            "seed": rng.randrange(99),
            "max_tokens": 24,
            "ignore_eos": rng.random() < 0.5,
        }
        if rng.random() < share:
            params |= {"structured_outputs": rng.choice([form(rng), FIXED]), "max_tokens": 60}
        asks.append(Ask(prompt, SamplingParams(**{**params, **options})))  # type: ignore[arg-type]
    return asks


def alone(engine: Engine, asks: list[Ask]) -> dict[tuple[str, int], list]:
    """The outputs of each request in an engine that has no other."""
    found = {}
    for number, ask in enumerate(asks):
        one = another_engine(engine, enable_prefix_caching=False, async_scheduling=False)
        found |= {(str(number), index): events for (_, index), events in outputs_of(one, [ask]).items()}
    return found


def test_every_output_is_of_its_form(llm: LLM) -> None:
    rng = random.Random(0)
    forms = [form(rng) for _ in range(40)]
    asks = [(prompt, one) for one in forms for prompt in rng.sample(PROMPTS, 2)]
    params = [
        SamplingParams(
            temperature=rng.choice([0.0, 0.7, 1.5]), top_k=rng.choice([0, 5]), max_tokens=180, structured_outputs=one, n=2
        )
        if number % 3 == 1
        else SamplingParams(temperature=1.0, max_tokens=180, structured_outputs=one, ignore_eos=rng.random() < 0.3)
        for number, (_, one) in enumerate(asks)
    ]
    params = [one if one.temperature or one.n == 1 else dataclasses.replace(one, n=1) for one in params]
    num_whole = 0
    for output, (_, one) in zip(llm.generate([prompt for prompt, _ in asks], params, use_tqdm=False), asks, strict=True):
        for completion in output.outputs:
            assert completion.finish_reason in ("stop", "length")
            if completion.finish_reason == "stop":
                num_whole += 1
                assert problem(one, completion.text) is None
                assert completion.text == llm.get_tokenizer().decode(completion.token_ids)
    assert num_whole > 85


def test_the_check_of_forms_can_fail() -> None:
    for one, good, bad in [
        (StructuredOutputsParams(regex="a+"), "aa", "aab"),
        (StructuredOutputsParams(choice=["a"]), "a", "b"),
        (FIXED, '{"first_long_name": 1, "second_long_name": "y"}', '{"first_long_name": 1}'),
        (StructuredOutputsParams(json_object=True), "{}", "[]"),
    ]:
        assert problem(one, good) is None and problem(one, bad) is not None


@pytest.mark.parametrize(
    "options",
    [
        {"async_scheduling": True},
        {"async_scheduling": False},
        {"async_scheduling": True, "enable_prefix_caching": False},
        {"async_scheduling": True, "num_pages": FEW_PAGES},
        {"async_scheduling": False, "num_pages": FEW_PAGES, "long_prefill_token_threshold": 5},
    ],
    ids=["async", "sync", "no cache", "few pages", "few pages, chunks"],
)
def test_who_else_is_there_changes_nothing(engine: Engine, options: dict) -> None:
    asks = random_asks(20, 1)
    asks += asks[:4]  # whose prompts are in the cache
    asks[2:4] = [Ask(one.prompt, dataclasses.replace(one.params, n=3, temperature=1.0)) for one in asks[2:4]]
    crowd = another_engine(engine, **options)
    found = outputs_of(crowd, asks)
    assert found == alone(engine, asks)
    assert crowd.pool.num_used == 0
    assert "num_pages" not in options or crowd.scheduler.num_preemptions > 0


def test_plain_neighbours_keep_their_tokens(engine: Engine) -> None:
    asks = random_asks(24, 2, logprobs=2)
    is_plain = [ask.params.structured_outputs is None for ask in asks]
    assert 4 < sum(is_plain) < 20

    def events_of(asks: list[Ask | None]) -> dict[str, list]:
        one, found = another_engine(engine), {}
        for number, ask in enumerate(asks):
            if ask is not None:
                one.add_request(ask.prompt, ask.params, request_id=str(number))
        while one.has_unfinished:
            for event in one.step():
                found.setdefault(event.request_id, []).append(event._replace(num_cached_tokens=0))
        return found

    found = events_of(list(asks))
    for number, events in events_of([ask if plain else None for ask, plain in zip(asks, is_plain, strict=True)]).items():
        assert [event[:3] for event in found[number]] == [event[:3] for event in events]
        for event, expected in zip(found[number], events, strict=True):
            assert event.likelihood.logprob == pytest.approx(expected.likelihood.logprob, abs=1e-3)


def test_anything_is_nothing(llm: LLM) -> None:
    anything = StructuredOutputsParams(regex="(?s).*")
    tokenizer, num_compared = llm.get_tokenizer(), 0
    texts = [one for one in sorted(tokenizer.known_ids - tokenizer.special_ids) if tokenizer.decode([one]).isascii()]
    for seed in range(12):
        some = {"logprobs": 3, "logit_bias": {40: 2.0}, "allowed_token_ids": texts if seed % 3 else None}
        plain = SamplingParams(temperature=1.0, seed=seed, max_tokens=30, **some)  # type: ignore[arg-type]
        both = [plain, dataclasses.replace(plain, structured_outputs=anything)]
        one, other = (output.outputs[0] for output in llm.generate([PROMPTS[seed % 4]] * 2, both, use_tqdm=False))
        # Up to the first token that is no text: a special one, or a byte that no character has there.
        count = next(
            (i for i, t in enumerate(one.token_ids) if t in tokenizer.special_ids or not is_text(llm, one.token_ids[: i + 1])), 30
        )
        assert other.token_ids[:count] == one.token_ids[:count]
        for place in range(count):
            ours, theirs = other.logprobs[place], one.logprobs[place]
            assert ours.keys() == theirs.keys()
            assert all(ours[key].logprob == pytest.approx(theirs[key].logprob, abs=1e-5) for key in ours)
            assert [ours[key].rank for key in ours] == [theirs[key].rank for key in theirs]
        num_compared += count
    assert num_compared > 100


def is_text(llm: LLM, token_ids: list[int]) -> bool:
    return "\ufffd" not in llm.get_tokenizer().decode(token_ids)


def test_log_probabilities_are_the_models_own(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=60, structured_outputs=FIXED, logprobs=0)
    (output,) = llm.generate(PROMPTS[0], params, use_tqdm=False)
    one, prompt = output.outputs[0], output.prompt_token_ids
    (score,) = llm.score([[*prompt, *one.token_ids]])
    found = [place[token_id].logprob for place, token_id in zip(one.logprobs, one.token_ids, strict=True)]
    assert found == pytest.approx(score.logprobs[-len(found) :], abs=1e-4)
    assert one.cumulative_logprob == pytest.approx(sum(found), abs=1e-4)
    assert min(found) < -3  # many of them it would never have chosen


OTHERS = [
    {"presence_penalty": 1.5, "frequency_penalty": 1.0, "repetition_penalty": 1.3},
    {"logit_bias": {40: 9.0, 41: -9.0, 300: 5.0}},
    {"bad_words": ["y"]},
    {"min_tokens": 20},
    {"n": 3},
    {"best_of": 3},
    {"logprobs": 3},
    {"prompt_logprobs": 1},
    {"top_k": 3, "top_p": 0.5, "min_p": 0.1},
    {"ignore_eos": True},
    {"stop_token_ids": [1]},
    {"stop": ["\x7f"]},
    {"stop": ["long"], "include_stop_str_in_output": True},
]


@pytest.mark.parametrize("options", OTHERS, ids=[" ".join(one) for one in OTHERS])
def test_with_every_other_option(llm: LLM, options: dict) -> None:
    some = {"max_tokens": 100, "seed": 5, "structured_outputs": FIXED, **options}
    params = [SamplingParams(temperature=temperature, **some) for temperature in ((0.5, 1.0) if "n" in options else (0.3, 1.0))]
    together = llm.generate(PROMPTS[:2] * 2, params * 2, use_tqdm=False)
    for output, other in zip(together[:2], together[2:], strict=True):
        assert [one.token_ids for one in output.outputs] == [one.token_ids for one in other.outputs]
        for one in output.outputs:
            if options.get("stop") == ["long"]:
                assert one.text.endswith("long") and one.stop_reason == "long"
            else:
                assert one.finish_reason == "stop" and problem(FIXED, one.text) is None
                assert one.stop_reason is None or one.stop_reason in options.get("stop_token_ids", ())
                assert "bad_words" not in options or '"y"' not in one.text


def test_a_word_that_is_bad_is_not_said(llm: LLM) -> None:
    form_ = StructuredOutputsParams(choice=["a", "b"])
    a, b = (llm.get_tokenizer().encode(one)[0] for one in "ab")
    for bad, left in ((a, "b"), (b, "a")):
        for how in ({"bad_words_token_ids": ((bad,),)}, {"allowed_token_ids": (a + b - bad, 77)}, {"logit_bias": {bad: -100.0}}):
            params = SamplingParams(temperature=1.0, max_tokens=9, structured_outputs=form_, **how)
            (output,) = llm.generate(PROMPTS[0], params, use_tqdm=False)
            assert (output.outputs[0].text, output.outputs[0].finish_reason) == (left, "stop")


def test_whoever_is_left_no_token_ends_alone(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=60, seed=1, structured_outputs=FIXED)
    nothing = dataclasses.replace(params, allowed_token_ids=(77, 78))
    outputs = llm.generate(PROMPTS[:3], [params, nothing, params], use_tqdm=False)
    assert [output.outputs[0].finish_reason for output in outputs] == ["stop", "error", "stop"]
    assert outputs[1].outputs[0].token_ids == []
    (expected,) = llm.generate(PROMPTS[2], params, use_tqdm=False)
    assert outputs[2].outputs[0].token_ids == expected.outputs[0].token_ids


def test_where_an_output_ends(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    eos = tokenizer.eos_token_id
    digits = StructuredOutputsParams(regex="[0-9]{1,3}")
    seen = set()
    for seed in range(20):
        params = SamplingParams(temperature=1.0, seed=seed, structured_outputs=digits, logit_bias={eos: 4.0 * (seed % 2)})
        for options in ({}, {"ignore_eos": True}, {"min_tokens": 2}, {"max_tokens": 3}):
            (output,) = llm.generate("a", dataclasses.replace(params, **options), use_tqdm=False)
            one = output.outputs[0]
            assert one.finish_reason == "stop" and one.text.isdigit() and len(one.text) <= 3
            ends_early = one.token_ids[-1] == eos
            assert one.text == tokenizer.decode(one.token_ids[:-1] if ends_early else one.token_ids)
            assert ends_early == (len(one.text) < 3)  # where nothing can follow it needs no token to say so
            assert not (ends_early and "ignore_eos" in options) and not (len(one.text) < 2 and "min_tokens" in options)
            seen.add((ends_early, *options))
    assert {(True,), (False,), (True, "min_tokens"), (False, "ignore_eos")} <= seen


def test_it_is_streamed_as_it_is_returned(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=2, max_tokens=80, structured_outputs=FIXED)
    (expected,) = llm.generate(PROMPTS[1], params, use_tqdm=False)
    texts = [output.outputs[0].text for output in llm.stream(PROMPTS[1], params)]
    assert texts[-1] == expected.outputs[0].text
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    (answer,) = llm.chat([{"role": "user", "content": "hello"}], params, use_tqdm=False)
    assert problem(FIXED, answer.outputs[0].text) is None


def test_tokens_that_are_forced_come_several_in_a_step(engine: Engine) -> None:
    asks = [
        Ask([7, 8, number], SamplingParams(temperature=1.0, seed=number, max_tokens=90, structured_outputs=FIXED))
        for number in range(3)
    ]
    for is_async in (False, True):
        one, plain = (another_engine(engine, async_scheduling=is_async, enable_prefix_caching=False) for _ in range(2))
        plain._forced = lambda: {}  # type: ignore[method-assign]
        assert outputs_of(one, asks) == outputs_of(plain, asks)
        assert one.num_steps < 0.6 * plain.num_steps


def test_a_failed_step_loses_nothing(engine: Engine) -> None:
    asks = random_asks(10, 4, share=0.9)
    expected = alone(engine, asks)
    for is_async in (False, True):
        one, steps = another_engine(engine, async_scheduling=is_async, enable_prefix_caching=False), [0]
        submit = one.runner.submit

        def faulty(plan, submit=submit, steps=steps):
            steps[0] += 1
            if steps[0] % 7 == 3:
                raise RuntimeError("before")
            wait = submit(plan)
            if steps[0] % 7 == 6:

                def fail():
                    raise RuntimeError("after")

                return fail
            return wait

        one.runner = SimpleNamespace(submit=faulty, num_pages=one.runner.num_pages, duel=None, matchers=one.runner.matchers)  # type: ignore[assignment]
        found: dict = {}
        for number, ask in enumerate(asks):
            one.add_request(ask.prompt, ask.params, request_id=str(number))
        for _ in range(2000):
            if not one.has_unfinished:
                break
            try:
                events = one.step()
            except RuntimeError:
                continue
            for event in events:
                found.setdefault((event.request_id, event.index), []).append((event.token_id, event.finish_reason))
        assert steps[0] > 20 and found == expected


def test_aborts_leave_nothing(engine: Engine) -> None:
    one, rng = another_engine(engine), random.Random(5)
    for number, ask in enumerate(random_asks(24, 6, share=0.9)):
        one.add_request(ask.prompt, ask.params, request_id=str(number))
        one.step()
        if rng.random() < 0.5:
            one.abort(str(rng.randrange(number + 1)))
    while one.has_unfinished:
        one.step()
        one.scheduler.check()
    assert one.pool.num_used == 0


def test_nothing_compiles(engine: Engine) -> None:
    asks = random_asks(16, 7)
    one = another_engine(engine)
    with compilations() as seen:
        outputs_of(one, asks)
    assert seen == []


def test_a_day_is_replayed(engine: Engine, tmp_path: Path) -> None:
    config = dataclasses.replace(engine.config, flight_recorder_bytes=4 << 20)
    one = Engine(config, engine.model, engine.runner, pool=PagePool(engine.runner.num_pages))
    one._forced = lambda: {}  # type: ignore[method-assign]  # a recording does not tell of drafts
    outputs_of(one, random_asks(12, 8))
    recording = Recording.load(one.save_recording(tmp_path / "day"))
    assert Replay(recording).run() is None


def test_who_cannot_have_a_grammar(llm: LLM, engine: Engine, directory: Path) -> None:
    bad = SamplingParams(structured_outputs=StructuredOutputsParams(regex="("))
    with pytest.raises(RequestError, match=r"prompts\[1\]: structured_outputs.regex: .*unclosed group") as caught:
        llm.generate(["a", "b"], [SamplingParams(), bad], use_tqdm=False)
    assert "\n" not in str(caught.value)
    assert not llm.engine.has_unfinished
    good = SamplingParams(structured_outputs=FIXED)
    with another_engine(engine) as plain:
        plain.matchers = None
        with pytest.raises(RequestError, match="structured_outputs: this engine knows no text"):
            plain.check_request([1], good)
        plain._is_closed = True  # its runner is another's
    with LLM(directory, **FAST, skip_tokenizer_init=True, enforce_eager=True) as blind:
        problem_ = pytest.raises(RequestError, match="structured_outputs: need the tokenizer")
        with problem_:
            blind.generate([[1, 2]], good, use_tqdm=False)


def test_steps_that_compile_when_they_are_needed(directory: Path) -> None:
    with LLM(directory, **FAST, enforce_eager=True, dtype="float32") as eager:
        (output,) = eager.generate("a", SamplingParams(max_tokens=90, structured_outputs=FIXED), use_tqdm=False)
        assert output.outputs[0].finish_reason == "stop" and problem(FIXED, output.outputs[0].text) is None


def test_rows_that_choose_again() -> None:
    """The program alone: the token is the likeliest that is allowed, of a row that is masked, and nothing else changes."""
    rng, R = np.random.default_rng(0), 6
    run = jax.jit(functools.partial(rechoose, max_logprobs=2))
    for V in (32, 70):
        logits = rng.normal(size=(R, V)).astype(np.float32)
        is_allowed = rng.random((R, V)) < 0.2
        is_allowed[0], is_allowed[1] = False, True
        words = np.packbits(np.pad(is_allowed, ((0, 0), (0, -V % 32))), axis=1, bitorder="little").view(np.uint32)
        is_masked = np.array([True, True, True, True, False, True])
        zeros, ones = np.zeros(R, np.float32), np.ones(R, np.float32)
        sampling = SamplingInputs(zeros, np.zeros(R, np.int32), ones, zeros, np.zeros((R, 2), np.uint32))  # type: ignore[arg-type]
        plain = Adjuster(num_sequences=2, vocab_size=V, max_model_len=9, num_fed=9).plain(R)
        rows = Rows(np.arange(R, dtype=np.int32), np.zeros(R, np.int32), sampling, zeros, np.ones(R, bool), plain)  # type: ignore[arg-type]
        many = np.full((R, 2), 7, np.int32), np.full((R, 2), -7, np.float32)
        before = Chosen(np.full(9, 7, np.int32), np.ones(R, bool), *many, np.full(R, -1, np.float32), np.full(R, 2, np.int32))  # type: ignore[arg-type]
        found = jax.tree.map(np.asarray, run(logits, before, Masks(rows, words, is_masked)))  # type: ignore[arg-type]
        assert found.is_finite[:5].tolist() == [False, True, True, True, True]
        assert (found.token_ids[4], found.logprobs[4], found.ranks[4]) == (7, -1, 2) and found.token_ids[6:].tolist() == [7] * 3
        for row in (1, 2, 3):
            expected = np.argmax(np.where(is_allowed[row], logits[row], -np.inf))
            assert found.token_ids[row] == expected
            assert found.logprobs[row] == pytest.approx(logits[row, expected] - np.log(np.sum(np.exp(logits[row]))), abs=1e-5)
            assert found.ranks[row] == 1 + np.sum(logits[row] > logits[row, expected])
