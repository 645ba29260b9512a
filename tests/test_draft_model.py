"""Speculation by a draft model: the tokens are those without it, and a draft that is the target itself is always right.

The second law is the sharp one: a key or value of the draft's that is missing, stale or another sequence's makes it propose
something else. Before each step all that no running sequence and not the prefix cache holds becomes NaN, in the pages of both.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import random
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from typing import Any

import bits
import families
import jax
import numpy as np
import pytest
import speculation
from driving import Ask, ShuffledPool, greedy, outputs_of

from jaxpaged import LLM, drafter
from jaxpaged.config import Bucket, ConfigError, EngineConfig
from jaxpaged.drafter import Draft
from jaxpaged.engine import Engine
from jaxpaged.host.request import SamplingParams, Sequence
from jaxpaged.host.scheduler import Scheduler
from jaxpaged.model.cache import KVCache
from jaxpaged.model.draft import BACKLOG
from jaxpaged.runner import JaxRunner, plan_memory

PAGE, PAGES, K = 8, 60, 3
FEW_PAGES = 14
OPTIONS = {
    "dtype": "float32",
    "block_size": PAGE,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 24,  # less than some prompts
    "prefill_tile": 8,
    "prefill_tile_buckets": (3,),
    "num_gpu_blocks_override": PAGES,
    "max_model_len": 96,
    "speculative_config": {"method": "draft_model", "model": "of the test", "num_speculative_tokens": K, "adaptive": False},
}
IN_SHORT = ("llama3", "mistral")  # one key/value head; a window in each layer, so that pages behind it are given back
FAMILIES = [
    pytest.param(family, id=family.name, marks=[] if family.name in IN_SHORT else pytest.mark.slow)
    for family in families.FAMILIES
]
LLAMA3 = next(family for family in families.FAMILIES if family.name == "llama3")


class PoisonedRunner(JaxRunner):
    """Before each step, NaN in all that neither a running sequence nor the prefix cache has, in the target's pages and in the
    draft's, which go on for as many tokens as are proposed.
    """

    scheduler: Scheduler | None = None
    drafter: drafter.Drafter  # type: ignore[assignment]

    def submit(self, plan):
        """See JaxRunner.submit."""
        if self.scheduler is not None:
            self.cache = bits.plant_nan(self.cache, self, self.scheduler)
            self.drafter.cache = _plant_nan(self.drafter, self.num_pages, self.scheduler)
        return super().submit(plan)

    def check_null_page(self) -> None:
        """Raise unless the null page of every layer of the draft's is finite."""
        pages, null = self.drafter.cache, np.arange(self.drafter.model.num_layers) * self.num_pages
        assert np.isfinite(np.asarray(pages.k_pages)[null]).all() and np.isfinite(np.asarray(pages.v_pages)[null]).all()


def _plant_nan(draft: drafter.Drafter, num_pages: int, scheduler: Scheduler) -> KVCache:
    unused = np.ones((draft.model.num_layers, num_pages, PAGE), bool)
    unused[:, 0] = False  # rows of padding write there, and it is checked at the end
    for sequence in scheduler.running:
        places = np.arange(min(sequence.num_computed + 1 + K, len(sequence.pages) * PAGE))
        unused[:, np.array(sequence.pages, int)[places // PAGE], places % PAGE] = False
    unused[:, [page for page in range(num_pages) if page in scheduler.pool.cache]] = False  # type: ignore[operator]
    return bits._plant(draft.cache, unused.reshape(-1, PAGE))


def new_runner(family: families.Family, **options) -> PoisonedRunner:
    """A runner whose draft model has the shape of its target, in one program."""
    config = EngineConfig(**{**OPTIONS, "decode_row_buckets": (4 * (1 + K),), **options}).resolved(family.config, "cpu")
    runner = PoisonedRunner(
        config, family.config, family.weights(), num_pages=PAGES, draft=Draft(family.config, family.weights())
    )
    runner.buckets = runner.buckets[-1:]
    return runner


@functools.cache
def runner_of(family: families.Family) -> PoisonedRunner:
    return new_runner(family)


@functools.cache
def weights_of_another(family: families.Family):
    """Weights of the same shapes that say something else."""
    return dataclasses.replace(family, seed=family.seed + 1000).weights()


def engine_of(
    runner: PoisonedRunner,
    *,
    is_same: bool = True,
    num_pages: int = PAGES,
    is_plain: bool = False,
    proposers: Seq = (),
    **options,
) -> Engine:
    """An engine around a runner; the draft model is the target itself or another one."""
    family = next(one for one in families.FAMILIES if one.config == runner.model)
    runner.drafter.weights = runner.weights if is_same else weights_of_another(family)
    config = dataclasses.replace(runner.config, **options)
    draft = runner.drafter
    if is_plain:
        runner.drafter = None  # type: ignore[assignment]
    engine = Engine(config, runner.model, runner, pool=ShuffledPool(num_pages), proposers=proposers)  # type: ignore[arg-type]
    runner.drafter, runner.scheduler = draft, engine.scheduler
    return engine


def asks_of(family: families.Family, temperature: float, count: int = 12) -> list[Ask]:
    """Prompts of all lengths, some of which begin alike; some with several outputs."""
    prompts = family.prompts(count)
    prompts[5:7] = [[*prompts[4][:33], 1, 2], [*prompts[4][:24], 3]]
    return [
        Ask(
            prompt[:70],
            SamplingParams(temperature=temperature, max_tokens=5 + 2 * index, ignore_eos=True, seed=index, n=1 + index % 3 // 2),
        )
        for index, prompt in enumerate(prompts)
    ]


def accepted(engine: Engine) -> tuple[int, int]:
    """Drafts that held, and all."""
    stats = engine.stats()
    return stats["spec_decode_num_accepted_tokens"], stats["spec_decode_num_draft_tokens"]  # type: ignore[return-value]


@functools.cache
def expected(family: families.Family, temperature: float) -> dict:
    """The outputs of `asks_of` without speculation."""
    return outputs_of(engine_of(runner_of(family), is_plain=True), asks_of(family, temperature))


@pytest.mark.parametrize("num_pages", [PAGES, FEW_PAGES])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_without_and_the_target_is_always_right(
    family: families.Family, temperature: float, num_pages: int
) -> None:
    runner = runner_of(family)
    for is_same in (True, False):
        engine = engine_of(runner, is_same=is_same, num_pages=num_pages)
        assert outputs_of(engine, asks_of(family, temperature)) == expected(family, temperature)
        num_right, num_proposed = accepted(engine)
        assert num_proposed > 50 and engine.pool.num_used == 0
        assert (num_right == num_proposed) == is_same
        if not family.config.windows or not all(family.config.windows):
            assert (engine.scheduler.num_preemptions > 0) == (num_pages == FEW_PAGES)
        runner.check_null_page()


OPTIONS_OF_REQUESTS = [
    {"repetition_penalty": 1.3, "frequency_penalty": 0.4},
    {"allowed_token_ids": list(range(3, 60)), "logprobs": 3},
    {"top_k": 5, "min_tokens": 4, "stop_token_ids": [7, 8, 9], "ignore_eos": False},
    {"top_p": 0.8, "prompt_logprobs": 1},
    {"logit_bias": {5: 4.0}, "bad_words_token_ids": [[5, 5]], "best_of": 3},
    {"use_beam_search": True, "temperature": 0.0, "n": 2, "seed": None},
]


def test_options_of_requests_change_as_much_as_without() -> None:
    asks = []
    for index, prompt in enumerate(LLAMA3.prompts(12)):
        options = {"temperature": 0.9, "max_tokens": 12, "ignore_eos": True, "seed": index, **OPTIONS_OF_REQUESTS[index % 6]}
        asks.append(Ask(prompt[:60], SamplingParams(**options)))
    found = []
    for is_plain in (True, False):
        engine = engine_of(runner_of(LLAMA3), is_plain=is_plain)
        for number, ask in enumerate(asks):
            engine.add_request(ask.prompt, ask.params, request_id=str(number))
        events = []
        while engine.has_unfinished:
            events += engine.step()
            engine.scheduler.check()
        found.append([(one.request_id, one.index, one.token_id, one.token_ids, one.finish_reason) for one in events])
    assert sorted(found[0], key=lambda one: one[:2]) == sorted(found[1], key=lambda one: one[:2])


class Knowing:
    """Proposes what it was told will come, now and then, and now and then something else."""

    is_sure, is_free = False, True

    def __init__(self, outputs: Mapping[tuple[str, int], list]):
        self.outputs, self.rng = outputs, random.Random(5)

    def may_propose(self, sequence: Sequence) -> bool:
        return True

    def propose(self, asked: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        found = {}
        for one, most in asked.items():
            coming = [token for token, _ in self.outputs[one.request.request_id, one.index]][one.num_tokens - one.num_prompt :]
            drafts = coming[: self.rng.randrange(most + 1)] + [1] * self.rng.randrange(2)
            if drafts[:most] and self.rng.random() < 0.6:
                found[one] = drafts[:most]
        return found

    def close(self) -> None:
        pass


def test_drafts_of_somebody_else_are_read_too() -> None:
    counts = []
    for proposers in ((), (Knowing(expected(LLAMA3, 1.0)),)):
        engine = engine_of(runner_of(LLAMA3), proposers=proposers)
        assert outputs_of(engine, asks_of(LLAMA3, 1.0)) == expected(LLAMA3, 1.0)
        counts.append(accepted(engine))
    assert counts[0][0] == counts[0][1] and counts[1][0] < counts[1][1]
    # What the other got wrong is all that was: what the draft model said after it was right.
    others = engine._drafting.proposers[0]  # type: ignore[union-attr]
    assert isinstance(others, Knowing)


def test_what_steps_without_the_draft_have_computed_it_makes_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind by a few tokens, by one step's backlog, and by several: steps of the program that the draft model is not in."""
    asks = [Ask(LLAMA3.prompts(5)[index], greedy(70)) for index in (1, 2)]
    plain = outputs_of(engine_of(runner_of(LLAMA3), is_plain=True), asks)
    for num_missed in (3, BACKLOG, 2 * BACKLOG + 3):
        engine, found, step = engine_of(runner_of(LLAMA3)), {}, 0
        drafting = [0, 0]  # steps without the draft model and with it
        run = functools.partial(PoisonedRunner._run, engine.runner)  # type: ignore[arg-type]

        def counted(bucket: Bucket, inputs: Any, drafts: Any) -> Any:
            drafting[drafts is not None] += 1  # noqa: B023
            return run(bucket, inputs, drafts)  # noqa: B023

        monkeypatch.setattr(engine.runner, "_run", counted)
        is_off = range(4, 4 + num_missed)
        monkeypatch.setattr(engine.runner.drafter, "may_propose", lambda _: step not in is_off)  # noqa: B023
        for number, ask in enumerate(asks):
            engine.add_request(ask.prompt, ask.params, request_id=str(number))
        while engine.has_unfinished:
            for event in engine.step():
                found.setdefault((event.request_id, event.index), []).append((event.token_id, event.finish_reason))
            step += 1
            if step == is_off.stop:
                before = accepted(engine)
                assert engine.runner.drafter._stale  # type: ignore[union-attr]
        after = accepted(engine)
        assert found == plain and after[0] == after[1] > before[1] + 10
        assert num_missed - 2 <= drafting[0] <= num_missed and drafting[1] > 10  # the first of them proposes for nobody
        assert not engine.runner.drafter._stale  # type: ignore[union-attr]


def test_an_engine_that_chooses_how_many_has_the_same_tokens() -> None:
    """It tries steps without drafts now and then, so that the draft has something to make up for."""
    wanted = {"method": "draft_model", "model": "of the test", "num_speculative_tokens": K}
    asks = [dataclasses.replace(ask, params=dataclasses.replace(ask.params, max_tokens=24)) for ask in asks_of(LLAMA3, 1.0)]
    plain = outputs_of(engine_of(runner_of(LLAMA3), is_plain=True), asks)
    for is_same in (True, False):
        engine = engine_of(runner_of(LLAMA3), is_same=is_same, speculative_config=wanted)
        assert outputs_of(engine, asks) == plain
        assert not is_same or accepted(engine)[0] == accepted(engine)[1] > 0


def test_a_sequence_that_the_draft_is_far_behind_with_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafter, "MAX_BACKLOG", 5)
    ask = Ask(LLAMA3.prompts(5)[1], greedy(40))
    plain = outputs_of(engine_of(runner_of(LLAMA3), is_plain=True), [ask])["0", 0]
    engine, step = engine_of(runner_of(LLAMA3)), 0
    may_propose = engine.runner.drafter.may_propose  # type: ignore[union-attr]
    monkeypatch.setattr(engine.runner.drafter, "may_propose", lambda one: step not in range(4, 20) and may_propose(one))
    engine.add_request(ask.prompt, ask.params, request_id="0")
    found = []
    while engine.has_unfinished:
        found += [event.token_id for event in engine.step()]
        step += 1
        if step == 18:
            before = accepted(engine)
    assert found == [token for token, _ in plain]
    assert accepted(engine) == before and engine.num_steps > 25
    # What begins after that is followed again, on the very same pages.
    assert outputs_of(engine, [dataclasses.replace(ask, params=greedy(20))])["0", 0][0][0] == found[0]
    assert accepted(engine)[0] == accepted(engine)[1] > before[1]


def test_pages_from_host_memory_are_made_up_for() -> None:
    """What comes from another tier has the target's keys and values alone."""
    runner = new_runner(LLAMA3, decode_row_buckets=(16,), swap_space=0.001, preemption_mode="swap")
    for temperature in (0.0, 1.0):
        known = expected(LLAMA3, temperature)
        engine = engine_of(runner, num_pages=FEW_PAGES)
        runner.scheduler = None  # what is being saved belongs to nobody: it must not be NaN yet
        assert outputs_of(engine, asks_of(LLAMA3, temperature)) == known
        num_right, num_proposed = accepted(engine)
        assert engine.scheduler.num_swaps > 0 and num_right == num_proposed > 50
    runner.close()


@pytest.fixture(scope="module")
def small() -> Iterable[Engine]:
    """A draft model of another shape than its target, and a program with tiles and one without."""
    family = dataclasses.replace(LLAMA3, fields={**LLAMA3.fields, "num_hidden_layers": 1, "num_key_value_heads": 2})
    options = {"decode_row_buckets": (16,), "num_gpu_blocks_override": 6000}
    draft = Draft(family.config, family.weights())
    with Engine.from_weights(EngineConfig(**{**OPTIONS, **options}), LLAMA3.config, LLAMA3.weights(), draft=draft) as engine:
        yield engine


def test_no_step_copies_the_pages_of_either_model(small: Engine) -> None:
    runner: JaxRunner = small.runner  # type: ignore[assignment]
    sizes = [sum(array.nbytes for array in jax.tree.leaves(cache)) for cache in runner._caches()]
    assert min(sizes) > 6 * 2**20 and len(runner.compiled) == 2
    assert [bucket.prefill_tiles for bucket in runner.compiled_alone] == [0]
    of_both = [*runner.compiled.values(), *runner._copiers.values()]
    for program in (*of_both, *runner.compiled_alone.values()):
        analysis, num_bytes = program.memory_analysis(), sum(sizes) if program in of_both else sizes[0]
        assert analysis is not None
        assert analysis.alias_size_in_bytes >= num_bytes and analysis.temp_size_in_bytes < min(sizes) / 4


def test_a_draft_model_of_another_shape_changes_no_token(small: Engine) -> None:
    for temperature in (0.0, 1.0):
        assert outputs_of(small, asks_of(LLAMA3, temperature)) == expected(LLAMA3, temperature)
    assert 0 < accepted(small)[0] < accepted(small)[1]


def test_memory_of_the_draft_model_is_told_and_counted(small: Engine, caplog: pytest.LogCaptureFixture) -> None:
    runner: JaxRunner = small.runner  # type: ignore[assignment]
    draft = runner.drafter.model  # type: ignore[union-attr]
    with caplog.at_level(logging.INFO, "jaxpaged"):
        runner.log_memory()
    assert "weights of the draft model (float32)" in caplog.text
    assert f"its KV pages (6,000 x {draft.page_bytes(PAGE, 'float32'):,} bytes)" in caplog.text
    both = sum(model.page_bytes(PAGE, "float32") for model in (runner.model, draft))
    config = dataclasses.replace(small.config, num_gpu_blocks_override=None, kv_cache_memory_bytes=100 * both)
    assert plan_memory(config, runner.model, draft) == 100 < plan_memory(config, runner.model)


def test_a_closed_engine_holds_nothing_of_the_draft_model(small: Engine) -> None:
    small.close()
    draft: drafter.Drafter = small.runner.drafter  # type: ignore[assignment]
    assert all(array.is_deleted() for array in jax.tree.leaves((draft.cache, draft.weights)))


def test_a_draft_model_that_cannot_propose_is_refused(tmp_path) -> None:
    draft = dataclasses.replace(LLAMA3, fields={**LLAMA3.fields, "vocab_size": 64})
    with pytest.raises(ConfigError, match=r"^speculative_config: model: its vocabulary has 64 tokens, the target's has 96$"):
        Engine.from_weights(EngineConfig(**OPTIONS), LLAMA3.config, None, draft=Draft(draft.config, None))  # type: ignore[arg-type]
    options = {"model": str(draft.save(tmp_path)), "num_speculative_tokens": 2}
    with pytest.raises(ConfigError, match=r"^speculative_config: model: its vocabulary has 64 tokens, the target's has 1,536$"):
        LLM(speculative_config=options)


@pytest.mark.slow
def test_the_distribution_is_the_target_s_whatever_the_draft_says() -> None:
    assert speculation.chi_square(200_000, has_draft_model=True) == 200_000


@pytest.mark.slow
def test_the_bundled_models_agree_often() -> None:
    options = {"max_num_seqs": 4, "enforce_eager": True, "use_tqdm_on_load": False, "max_model_len": 256, "dtype": "float32"}
    wanted = {"method": "draft_model", "num_speculative_tokens": 2, "adaptive": False}
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature, max_tokens=60, seed=3)
        texts = []
        for given in (None, wanted):
            with LLM(speculative_config=given, **options) as llm:
                outputs = llm.generate(["Once upon a time there was a", "One day a little girl"], params, use_tqdm=False)
                texts.append([output.outputs[0].text for output in outputs])
                found = accepted(llm.engine) if given else None
        assert texts[0] == texts[1] and found is not None and found[0] > 0.5 * found[1]
