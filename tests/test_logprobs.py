"""Log-probabilities of new tokens and of prompts are the oracle's, in float64, however the tokens were computed."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import oracle
import pytest
from driving import another_engine, compilations
from families import FAMILIES, Family
from test_best_of import FAMILY, FEW_PAGES, OPTIONS
from text_model import FAST, write_text_model

from jaxpaged import LLM, Logprob, RequestError, RequestOutputKind, SamplingParams
from jaxpaged.outputs import RequestOutput

TOLERANCE = 1e-4
PROMPTS = FAMILY.prompts(6)
FAMILIES_HERE = [
    pytest.param(one, id=one.name, marks=[] if one.name in ("smollm", "mistral") else [pytest.mark.slow]) for one in FAMILIES
]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with LLM(
        FAMILY.save(tmp_path_factory.mktemp("logprobs")), skip_tokenizer_init=True, use_tqdm_on_load=False, **OPTIONS
    ) as llm:
        yield llm


def another(llm: LLM, **options) -> LLM:
    one = copy.copy(llm)
    one.engine, one._live, one._ids = another_engine(llm.engine, **options), {}, itertools.count()
    return one


def oracle_logprobs(token_ids: list[int], family: Family = FAMILY) -> np.ndarray:
    scores = oracle.logits(family.tensors(), family.config, token_ids)
    return scores - np.logaddexp.reduce(scores, axis=-1, keepdims=True)


def check_position(found: dict[int, Logprob], token_id: int, wanted: np.ndarray, count: int) -> None:
    """The token, then the likeliest, each where it belongs but for ties."""
    assert next(iter(found)) == token_id
    assert len(found) == count + (found[token_id].rank > count)
    for one, (logprob, rank, _) in found.items():
        assert logprob == pytest.approx(wanted[one], abs=TOLERANCE)
        assert np.sum(wanted > wanted[one] + TOLERANCE) < rank <= np.sum(wanted >= wanted[one] - TOLERANCE)
    ranks = {logprob.rank for logprob in found.values()}
    assert ranks == set(range(1, count + 1)) | {found[token_id].rank}


def check(output: RequestOutput, count: int | None, prompt_count: int | None) -> None:
    """One output against the oracle; cumulative_logprob is the sum."""
    prompt = output.prompt_token_ids
    for one in output.outputs:
        wanted = oracle_logprobs(prompt + one.token_ids)
        if count is None:
            assert one.logprobs is None
        else:
            assert len(one.logprobs) == len(one.token_ids)
            for place, (token_id, found) in enumerate(zip(one.token_ids, one.logprobs, strict=True), len(prompt) - 1):
                check_position(found, token_id, wanted[place], count)
            total = sum(found[token_id].logprob for token_id, found in zip(one.token_ids, one.logprobs, strict=True))
            assert one.cumulative_logprob == pytest.approx(total, abs=1e-9)
    if prompt_count is None:
        assert output.prompt_logprobs is None
        return
    assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(prompt)
    for place, token_id in enumerate(prompt[1:]):
        check_position(output.prompt_logprobs[place + 1], token_id, wanted[place], prompt_count)


VARIANTS = {
    "plain": {},
    "sync": {"async_scheduling": False},
    "one token a chunk": {"long_prefill_token_threshold": 1},
    "seven tokens a chunk": {"long_prefill_token_threshold": 7},
    "few pages": {"num_pages": FEW_PAGES},
    "few pages, sync": {"num_pages": FEW_PAGES, "async_scheduling": False},
    "no cache": {"enable_prefix_caching": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logprobs_are_the_oracles(llm: LLM, variant: str) -> None:
    """Twice, so that the second time the whole prompt is in the prefix cache; requests that ask beside those that do not."""
    one = another(llm, **VARIANTS[variant])
    asked = [(0, None), (5, 3), (None, 0), (20, 20), (1, 1), (None, None), (3, 0), (None, 2)]
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(len(asked))]
    params = [
        SamplingParams(
            seed=index, n=1 + (index % 4 == 1) * 2, max_tokens=10, top_k=9, logprobs=count, prompt_logprobs=prompt_count
        )
        for index, (count, prompt_count) in enumerate(asked)
    ]
    for _ in range(2):
        with compilations() as compiled:
            outputs = one.generate(prompts, params, use_tqdm=False)
        assert not compiled
        one.engine.scheduler.check()
        assert one.engine.pool.num_used == 0 and not one.engine._prompts
        for output, counts in zip(outputs, asked, strict=True):
            check(output, *counts)
    assert "few" not in variant or one.engine.scheduler.num_preemptions > 0
    hits = {
        output.num_cached_tokens for output, (_, prompt_count) in zip(outputs, asked, strict=True) if prompt_count is not None
    }
    assert hits == {0}, "a page of the prefix cache was read by a request that wants log-probabilities of its prompt"
    if variant != "no cache" and "few" not in variant:
        assert one.stats()["prefix_cache_hits"] > 0


def test_a_prompt_that_is_given_up_leaves_nothing_behind(llm: LLM) -> None:
    one = another(llm, long_prefill_token_threshold=7)
    engine = one.engine
    engine.add_request(PROMPTS[4], SamplingParams(prompt_logprobs=2), request_id="a")
    for _ in range(4):
        assert engine.step() == []
    assert len(engine._prompts["a"]) == 21
    engine.abort("a")
    while engine.has_unfinished:
        engine.step()
    assert not engine._prompts and engine.pool.num_used == 0


def test_a_prompt_is_told_once_though_it_is_computed_again(llm: LLM) -> None:
    engine = another(llm, num_pages=FEW_PAGES).engine
    params = SamplingParams(seed=1, max_tokens=30, logprobs=1, prompt_logprobs=1)
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(prompt, params, request_id=str(index))
    told = [0] * len(PROMPTS)
    while engine.has_unfinished:
        for event in engine.step():
            told[int(event.request_id)] += len(event.prompt_likelihoods)
    assert told == [len(prompt) - 1 for prompt in PROMPTS] and engine.scheduler.num_preemptions > 2


def test_deltas_add_up_to_the_whole(llm: LLM) -> None:
    params = SamplingParams(seed=3, n=2, max_tokens=9, logprobs=2, prompt_logprobs=1, output_kind=RequestOutputKind.DELTA)
    whole = llm.generate(PROMPTS[2], params, use_tqdm=False)[0]
    prompts, ids, logprobs = [], [[], []], [[], []]
    for output in llm.stream(PROMPTS[2], params):
        prompts += [output.prompt_logprobs] if output.prompt_logprobs is not None else []
        for one in output.outputs:
            assert one.token_ids
            ids[one.index] += one.token_ids
            logprobs[one.index] += one.logprobs
    assert len(prompts) == 1 and len(prompts[0]) == len(PROMPTS[2])
    assert ids == [one.token_ids for one in whole.outputs]
    for found, wanted in zip(logprobs, whole.outputs, strict=True):
        assert [list(one) for one in found] == [list(one) for one in wanted.logprobs]


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
def test_more_than_a_step_yields_is_refused(llm: LLM, name: str) -> None:
    with pytest.raises(RequestError, match=rf"{name}: got 21, the limit is max_logprobs 20"):
        llm.generate([1, 2], SamplingParams(**{name: 21}))
    for value in (-1, 1.5, True, "5"):
        with pytest.raises(RequestError, match=rf"{name}: got .*, expected a whole number"):
            SamplingParams(**{name: value})


def test_tokens_have_their_spelling_where_there_is_text(tmp_path: Path) -> None:
    with LLM(write_text_model(tmp_path / "model"), **FAST) as llm:
        output = llm.generate("hello wörld", SamplingParams(seed=1, max_tokens=8, logprobs=3, prompt_logprobs=2), use_tqdm=False)[
            0
        ]
        tokenizer = llm.get_tokenizer()
        for found in (*output.outputs[0].logprobs, *output.prompt_logprobs[1:]):
            assert {one: logprob.decoded_token for one, logprob in found.items()} == {
                one: tokenizer.decode([one], skip_special_tokens=False) for one in found
            }


@pytest.mark.parametrize("family", FAMILIES_HERE)
def test_the_score_of_a_text_is_that_of_its_decoding_and_the_oracles(family: Family, tmp_path: Path) -> None:
    with LLM(family.save(tmp_path / "model"), skip_tokenizer_init=True, use_tqdm_on_load=False, **OPTIONS) as llm:
        prompts = family.prompts(6)
        params = [SamplingParams(seed=index, max_tokens=12, logprobs=0) for index in range(6)]
        drawn = llm.generate(prompts, params, use_tqdm=False)
        texts = [prompt + output.outputs[0].token_ids for prompt, output in zip(prompts, drawn, strict=True)]
        apart = 0.0
        for prompt, output, text, score in zip(prompts, drawn, texts, llm.score(texts), strict=True):
            assert score.token_ids == text and len(score.logprobs) == len(text) - 1
            wanted = oracle_logprobs(text, family)
            np.testing.assert_allclose(score.logprobs, wanted[np.arange(len(text) - 1), text[1:]], rtol=0, atol=TOLERANCE)
            one = output.outputs[0]
            decoded = [found[token_id].logprob for token_id, found in zip(one.token_ids, one.logprobs, strict=True)]
            apart = max(apart, float(np.max(np.abs(np.subtract(score.logprobs[len(prompt) - 1 :], decoded)))))
            assert score.cumulative_logprob == pytest.approx(sum(score.logprobs))
    print(f"{family.name}: max |score - decode| {apart:.1e}")
    assert apart < 2e-5


def test_a_text_of_one_token_has_no_score_and_a_full_one_is_refused(llm: LLM) -> None:
    assert llm.score([5])[0].logprobs == []
    with pytest.raises(RequestError, match="prompt has 96 tokens"):
        llm.score([1] * OPTIONS["max_model_len"])
