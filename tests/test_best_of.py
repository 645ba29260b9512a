"""best_of: of the outputs that n = best_of draws, the likeliest come back, whoever shares the pages and the batch.

How likely an output is, is judged by the oracle in float64, from the tokens alone.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
import random
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from driving import another_engine, compilations, few_steps, greedy
from families import FAMILIES
from safetensors.numpy import load_file
from text_model import CONFIG, write_text_model

from jaxpaged import LLM, RequestError, SamplingParams
from jaxpaged.cli import main
from jaxpaged.config import ModelConfig
from jaxpaged.engine import Engine
from jaxpaged.host.pages import PagePool
from jaxpaged.host.plan import StepPlan
from jaxpaged.host.request import FinishReason, TokenEvent
from jaxpaged.model.sampler import logprobs_of
from jaxpaged.observe import Recording, Replay
from jaxpaged.outputs import CompletionOutput, RequestOutput

FAMILY = next(family for family in FAMILIES if family.name == "qwen3")
V = FAMILY.config.vocab_size
PAGE = 8
MAX_LEN = 96
OPTIONS: dict[str, Any] = few_steps(PAGE, MAX_LEN)
FEW_PAGES = MAX_LEN // PAGE + 2  # room for one of the longest, so that the outputs of one prompt preempt each other
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = FAMILY.save(tmp_path_factory.mktemp("best-of"))
    with LLM(folder, skip_tokenizer_init=True, use_tqdm_on_load=False, **OPTIONS) as llm:
        yield llm


def another(llm: LLM, *, num_pages: int | None = None, **options) -> LLM:
    """The same model behind an engine of its own, as `driving.another_engine`."""
    one = copy.copy(llm)
    one.engine, one._live, one._ids = another_engine(llm.engine, num_pages=num_pages, **options), {}, itertools.count()
    return one


def generate(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[RequestOutput]:
    outputs = llm.generate(prompts, params, use_tqdm=False)
    llm.engine.scheduler.check()
    assert llm.engine.pool.num_used == 0
    return outputs


@functools.cache
def tensors() -> dict[str, np.ndarray]:
    return FAMILY.tensors()


def by_the_oracle(tensors: oracle.Tensors, config: ModelConfig, prompt: Seq[int], token_ids: Seq[int]) -> np.ndarray:
    """What the model itself gives each of the tokens that follow a prompt."""
    scores = oracle.logits(tensors, config, [*prompt, *token_ids][:-1])[len(prompt) - 1 :]
    top = scores.max(axis=-1, keepdims=True)
    logprobs = scores - top - np.log(np.exp(scores - top).sum(axis=-1, keepdims=True))
    return logprobs[np.arange(len(token_ids)), list(token_ids)]


@functools.cache
def token_logprobs(prompt: tuple[int, ...], token_ids: tuple[int, ...]) -> np.ndarray:
    return by_the_oracle(tensors(), FAMILY.config, prompt, token_ids)


def total(prompt: list[int], token_ids: list[int]) -> float:
    return float(token_logprobs(tuple(prompt), tuple(token_ids)).sum())


PROMPTS = [[random.Random(f"{i} {length}").randrange(V) for i in range(length)] for length in (1, 7, 8, 20, 41, 60)]


def draw(index: int, **options) -> SamplingParams:
    """Every kind of sampling, and ends of both kinds; each prompt has a seed of its own."""
    rng = random.Random(index)
    kinds = [{"temperature": 0.7}, {"temperature": 2.0, "top_k": 5}, {"temperature": 1.5, "top_p": 0.8}, {"min_p": 0.05}]
    stop_ids = rng.sample(range(V), 6)
    return SamplingParams(**{"seed": 100 * index, "max_tokens": 24, "stop_token_ids": stop_ids, **kinds[index % 4], **options})


def best(prompt: list[int], outputs: list[CompletionOutput], count: int) -> list[tuple]:
    """By the oracle: the tokens and the ends of the likeliest outputs."""
    ranked = sorted(outputs, key=lambda one: -total(prompt, one.token_ids))
    return [(one.token_ids, one.finish_reason, one.stop_reason) for one in ranked[:count]]


def drawn(output: RequestOutput) -> list[tuple]:
    return [(one.token_ids, one.finish_reason, one.stop_reason) for one in output.outputs]


@pytest.fixture(scope="module")
def all_five(llm: LLM) -> list[RequestOutput]:
    """What n = 5 draws of each prompt, in steps of one request alone."""
    one = another(llm, async_scheduling=False)
    return [generate(one, [prompt], [draw(index, n=5)])[0] for index, prompt in enumerate(PROMPTS)]


# --- which outputs come back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("has_cache", [False, True])
@pytest.mark.parametrize("num_pages", [None, FEW_PAGES])
def test_the_best_of_all_that_are_drawn_come_back(
    llm: LLM, all_five: list[RequestOutput], num_pages: int | None, has_cache: bool, is_async: bool
) -> None:
    """In a crowd, chunk by chunk, beside requests that want no log-probabilities, and set back when there are few pages."""
    options = {"enable_prefix_caching": has_cache, "async_scheduling": is_async, "long_prefill_token_threshold": 16}
    one = another(llm, num_pages=num_pages, **options)  # type: ignore[arg-type]
    asked = [draw(index, n=2, best_of=5) for index in range(len(PROMPTS))]
    neighbours = [greedy(9) for _ in PROMPTS]
    outputs = generate(one, PROMPTS + PROMPTS, asked + neighbours)
    assert (one.engine.scheduler.num_preemptions > 0) is (num_pages is not None)
    for prompt, found, all_drawn in zip(PROMPTS, outputs, all_five, strict=False):
        assert drawn(found) == best(prompt, all_drawn.outputs, 2)
        assert [output.index for output in found.outputs] == [0, 1] and found.finished
        for output in found.outputs:
            assert output.cumulative_logprob == pytest.approx(total(prompt, output.token_ids), abs=TOLERANCE)
    assert all(output.cumulative_logprob is None for other in outputs[len(PROMPTS) :] for output in other.outputs)


def test_the_choice_is_one(all_five: list[RequestOutput]) -> None:
    """Else the test above says little: the best are others than the first, and outputs end in both ways and at many lengths."""
    sums = [[total(prompt, output.token_ids) for output in one.outputs] for prompt, one in zip(PROMPTS, all_five, strict=True)]
    ranks = [tuple(np.argsort(row)[::-1][:2].tolist()) for row in sums]
    assert len(set(ranks)) > 3 and ranks.count((0, 1)) < 2
    outputs = [output for one in all_five for output in one.outputs]
    assert {output.finish_reason for output in outputs} == {"stop", "length"}
    assert len({len(output.token_ids) for output in outputs}) > 5


def test_without_best_of_outputs_come_as_they_are_drawn(llm: LLM, all_five: list[RequestOutput]) -> None:
    prompt, params = PROMPTS[3], draw(3)
    plain, ranked, single = generate(
        another(llm),
        [prompt] * 3,
        [dataclasses.replace(params, n=5), dataclasses.replace(params, n=5, best_of=5), dataclasses.replace(params, best_of=1)],
    )
    assert drawn(plain) == drawn(all_five[3])
    assert [output.cumulative_logprob for output in plain.outputs] == [None] * 5
    assert drawn(ranked) == best(prompt, plain.outputs, 5) != drawn(plain)
    assert [output.index for output in ranked.outputs] == list(range(5))
    sums = [output.cumulative_logprob for output in ranked.outputs]
    assert sums == sorted(sums, reverse=True)  # type: ignore[type-var]
    assert drawn(single) == drawn(plain)[:1]
    assert single.outputs[0].cumulative_logprob == pytest.approx(total(prompt, single.outputs[0].token_ids), abs=TOLERANCE)


def test_more_outputs_than_rows_take_turns(llm: LLM) -> None:
    prompt, params = PROMPTS[4], draw(1, max_tokens=6)
    wide = generate(another(llm), [prompt], [dataclasses.replace(params, n=20)])[0]
    found = generate(another(llm), [prompt], [dataclasses.replace(params, n=3, best_of=20)])[0]
    assert drawn(found) == best(prompt, wide.outputs, 3)


def test_beams_beside_it_are_those_of_a_search_alone(llm: LLM, all_five: list[RequestOutput]) -> None:
    search = SamplingParams(use_beam_search=True, n=3, temperature=0, max_tokens=9)
    (alone,) = generate(another(llm), [PROMPTS[2]], [search])
    beams, ranked = generate(another(llm), [PROMPTS[2], PROMPTS[3]], [search, draw(3, n=2, best_of=5)])
    assert drawn(beams) == drawn(alone) and drawn(ranked) == best(PROMPTS[3], all_five[3].outputs, 2)
    for output in beams.outputs:
        assert output.cumulative_logprob == pytest.approx(total(PROMPTS[2], output.token_ids), abs=TOLERANCE)


def test_outputs_that_were_cut_short_come_last(llm: LLM, all_five: list[RequestOutput]) -> None:
    """A row that was no number ends its output early, with a high sum: the others come first, though the best may be gone."""
    prompt, victim = PROMPTS[3], 2
    one = another(llm)

    class Failing:
        duel, num_pages = None, one.engine.runner.num_pages

        def submit(self, plan: StepPlan) -> Callable:
            wait = llm.engine.runner.submit(plan)
            rows = [chunk.sequence.index != victim or chunk.end < len(prompt) + 1 for chunk in plan.sampling()]

            def result() -> tuple:
                token_ids, is_finite, *rest = wait()
                return token_ids, [ours and theirs for ours, theirs in zip(is_finite, rows, strict=True)], *rest

            return result

        def clean(self, pages: list[int]) -> None:
            llm.engine.runner.clean(pages)

    one.engine.runner = Failing()  # type: ignore[assignment]
    found = generate(one, [prompt], [draw(3, n=5, best_of=5)])[0]
    others = [output for index, output in enumerate(all_five[3].outputs) if index != victim]
    assert drawn(found)[:4] == best(prompt, others, 4)
    last, token_ids = found.outputs[4], all_five[3].outputs[victim].token_ids[:1]
    assert last.finish_reason == "error" and last.token_ids == token_ids
    assert last.cumulative_logprob == pytest.approx(total(prompt, token_ids), abs=TOLERANCE)
    assert last.cumulative_logprob > found.outputs[0].cumulative_logprob  # type: ignore[operator]


# --- each token's log-probability ------------------------------------------------------------------------------------------


class Heard:
    """The events of requests, gathered by output."""

    def __init__(self) -> None:
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.logprobs: dict[tuple[str, int], list[float]] = {}

    def hear(self, events: list[TokenEvent]) -> None:
        for event in events:
            key = event.request_id, event.index
            assert (event.token_id is None) is (event.likelihood is None), "a token without its log-probability, or the reverse"
            if event.token_id is not None and event.likelihood is not None:
                self.tokens.setdefault(key, []).append(event.token_id)
                self.logprobs.setdefault(key, []).append(event.likelihood.logprob)

    def check(self, prompt: list[int], key: tuple[str, int]) -> None:
        wanted = token_logprobs(tuple(prompt), tuple(self.tokens[key]))
        np.testing.assert_allclose(self.logprobs[key], wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("num_pages", [None, FEW_PAGES])
def test_every_token_has_the_oracles_logprob(llm: LLM, num_pages: int | None, tmp_path: Path) -> None:
    """One by one; also of tokens that come while their output waits, set back. A recording of such a day replays."""
    pool = PagePool(num_pages or llm.engine.runner.num_pages)  # whose pages a replay can hand out again
    engine, heard, num_late = Engine(llm.engine.config, llm.engine.model, llm.engine.runner, pool=pool), Heard(), 0
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(prompt, draw(index, n=1, best_of=5), request_id=str(index))
    while engine.has_unfinished:
        events = engine.step()
        waiting = {(one.request.request_id, one.index) for one in engine.scheduler.waiting}
        num_late += sum((event.request_id, event.index) in waiting for event in events)
        heard.hear(events)
    for index, prompt in enumerate(PROMPTS):
        for output in range(5):
            heard.check(prompt, (str(index), output))
    assert (num_late > 0) is (num_pages is not None)
    replay = Replay(Recording.load(engine.save_recording(tmp_path / "best-of.recording")))
    assert replay.run(check=True) is None and replay.num_steps > 0


def test_an_id_used_again_while_a_step_runs_gets_its_own(llm: LLM) -> None:
    engine = another_engine(llm.engine)
    prompts = [PROMPTS[3], PROMPTS[2]]
    engine.add_request(prompts[0], draw(0, n=1, best_of=3), request_id="a")
    early, late = Heard(), Heard()
    for _ in range(4):
        early.hear(engine.step())
    assert engine._in_flight
    ended = engine.abort("a")
    assert [(event.token_id, event.finish_reason, event.index) for event in ended] == [
        (None, FinishReason.ABORT, i) for i in range(3)
    ]
    engine.add_request(prompts[1], draw(1, n=1, best_of=3), request_id="a")
    while engine.has_unfinished:
        late.hear(engine.step())
    for heard, prompt in zip((early, late), prompts, strict=True):
        for output in range(3):
            heard.check(prompt, ("a", output))
    assert engine.pool.num_used == 0


def test_logprobs_of_is_the_models_own_and_nothing_when_nobody_asks() -> None:
    """In float64, for logits of every size; what sampling has cut is still the model's."""
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(6, 97)) * [[1e-3], [1], [10], [1e3], [1e4], [0]]).astype(np.float32)
    token_ids = rng.integers(0, 97, 6).astype(np.int32)
    wide = logits.astype(np.float64)
    wanted = wide[np.arange(6), token_ids] - np.logaddexp.reduce(wide, axis=-1)
    asks = np.arange(6) == 4
    found = logprobs_of(jnp.asarray(logits), jnp.asarray(token_ids), jnp.asarray(asks))[0]
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-6)
    found = logprobs_of(jnp.asarray(logits), jnp.asarray(token_ids), jnp.zeros(6, bool))
    assert not any(map(np.any, found))


def test_nothing_compiles_for_it(llm: LLM) -> None:
    compiled = dict(llm.engine.runner.compiled)  # type: ignore[attr-defined]
    with compilations() as seen:
        generate(another(llm), PROMPTS, [draw(index, n=2, best_of=3 if index % 2 else None) for index in range(len(PROMPTS))])
    assert seen == [] and llm.engine.runner.compiled == compiled  # type: ignore[attr-defined]


# --- streams and aborts ----------------------------------------------------------------------------------------------------


def test_a_stream_has_it_once_and_other_requests_as_they_grow(llm: LLM) -> None:
    prompts, params = PROMPTS[2:5], [draw(2, n=2, best_of=4), draw(3, n=2), draw(0, best_of=1)]
    one = another(llm)
    whole, parts = generate(one, prompts, params), {}
    for output in another(llm).stream(prompts, params):
        parts.setdefault(int(output.request_id), []).append(output)
    assert len(parts[0]) == 1 and parts[0][0].finished
    assert len(parts[1]) >= max(len(output.token_ids) for output in whole[1].outputs) > 1
    for index, found in enumerate(whole):
        assert drawn(parts[index][-1]) == drawn(found)
    sums = [part.outputs[0].cumulative_logprob for part in parts[2]]
    assert sums == sorted(sums, reverse=True) and sums[0] > sums[-1]
    assert sums[-1] == pytest.approx(whole[2].outputs[0].cumulative_logprob, abs=TOLERANCE)
    stream = (one := another(llm)).stream(prompts, params)
    next(stream)
    stream.close()
    assert one.engine.pool.num_used == 0 and not one.engine.has_unfinished


def test_an_abort_leaves_what_has_ended_before_what_has_not(llm: LLM, all_five: list[RequestOutput]) -> None:
    """Somebody else takes all requests out of the engine after so many tokens that some of the outputs have ended."""
    index = next(i for i, one in enumerate(all_five) if len({len(output.token_ids) for output in one.outputs}) > 2)
    prompt, lens = PROMPTS[index], sorted(len(output.token_ids) for output in all_five[index].outputs)
    middle = next(length for length in lens if length > lens[0])
    one = another(llm)
    found = None
    for output in one.stream([prompt, [1]], [draw(index, n=5, best_of=5), greedy(50)]):
        if int(output.request_id) == 0:
            found = output
        elif len(output.outputs[0].token_ids) == middle + 3:
            for request_id in ("0", "1"):
                one.engine.abort(request_id)
    assert found is not None and found.finished and one.engine.pool.num_used == 0
    reasons = [output.finish_reason for output in found.outputs]
    num_ended = len(reasons) - reasons.count("abort")
    assert 0 < num_ended < 5 and reasons[num_ended:] == ["abort"] * (5 - num_ended)
    for part in (found.outputs[:num_ended], found.outputs[num_ended:]):
        assert [output.token_ids for output in part] == [tokens for tokens, *_ in best(prompt, part, 5)]
        for output in part:
            assert output.cumulative_logprob == pytest.approx(total(prompt, output.token_ids), abs=TOLERANCE)


def test_what_is_aborted_before_its_first_token_sums_to_nothing(llm: LLM) -> None:
    one = another(llm)
    stream = one.stream([[1], PROMPTS[5]], [greedy(9), draw(0, n=1, best_of=2)])
    next(stream)
    for request_id in ("0", "1"):
        one.engine.abort(request_id)
    last = {output.request_id: output.outputs for output in stream}["1"]
    assert [(output.token_ids, output.cumulative_logprob, output.finish_reason) for output in last] == [([], 0.0, "abort")]


# --- what may be asked -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"best_of": 0}, "best_of: got 0, expected a whole number in [1, 128]"),
        ({"best_of": 129}, "best_of: got 129, expected a whole number in [1, 128]"),
        ({"best_of": 2.0}, "best_of: got 2.0, expected a whole number in [1, 128]"),
        ({"best_of": True}, "best_of: got True, expected a whole number in [1, 128]"),
        ({"n": 3, "best_of": 2}, "best_of: got 2, expected at least n, which is 3"),
        ({"n": 2, "best_of": 3, "temperature": 0}, "best_of: got 3 for n 2 at temperature 0, where all outputs are equal"),
        ({"n": 2, "best_of": 2, "use_beam_search": True}, "best_of: got 2, expected None: beam search draws no tokens"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**options)
    assert str(caught.value) == message


def test_a_choice_of_all_is_allowed_at_any_temperature() -> None:
    assert SamplingParams(n=2, best_of=2, temperature=0).num_drawn == 2
    assert SamplingParams(best_of=1, temperature=0).num_drawn == SamplingParams().num_drawn == 1


def test_the_flag_of_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_text_model(tmp_path / "model")
    small = ["--max-num-seqs", "4", "--max-num-batched-tokens", "16", "--decode-row-buckets", "4", "--prefill-tile-buckets", "1"]
    asked = ["--best-of", "4", "--temperature", "1.5", "--max-tokens", "5", "--ignore-eos", "--dtype", "float32"]
    command = ["generate", "hello", "--json", "--model", str(folder), *small, *asked]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    ids = found["prompt_token_ids"], found["token_ids"]
    wanted = by_the_oracle(load_file(folder / "model.safetensors"), ModelConfig.from_hf(CONFIG), *ids).sum()
    assert len(found["token_ids"]) == 5 and found["cumulative_logprob"] == pytest.approx(wanted, abs=TOLERANCE)
    assert main([*command, "--n", "5"]) == 2
    assert "best_of: got 4, expected at least n, which is 5\n" in capsys.readouterr().err


def test_an_engine_that_samples_for_one_samples_for_its_neighbours_as_before(llm: LLM) -> None:
    """Tokens are the same whether or not somebody in the batch wants log-probabilities."""

    def tokens(engine: Engine, best_of: int | None) -> list:
        found = []
        engine.add_request(PROMPTS[4], draw(5, n=1, best_of=best_of, ignore_eos=True), request_id="asks")
        engine.add_request(PROMPTS[5], draw(1), request_id="other")
        while engine.has_unfinished:
            found += [event for event in engine.step() if event.request_id == "other"]
        return found

    assert tokens(another_engine(llm.engine), None) == tokens(another_engine(llm.engine), 1)
