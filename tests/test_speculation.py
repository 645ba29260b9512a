"""Speculation on a real tiny model: nobody can tell by the outputs, whatever is proposed and whatever else goes on."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import speculation
from driving import Ask, another_engine, compilations, greedy, run
from speculation import FEW_PAGES, MOST, Scripted, check_same, equal_to_plain, new_engine, random_asks, tokens_of
from text_model import FAST, write_text_model

from jaxpaged import LLM, SamplingParams
from jaxpaged.engine import Engine
from jaxpaged.observe import Recording, Replay

sys.path.insert(0, str(Path(__file__).parent / "host"))


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with new_engine() as engine:
        yield engine


@pytest.mark.parametrize("seed", range(4))
def test_tokens_are_those_without_speculation(engine: Engine, seed: int) -> None:
    seen: Counter[str] = Counter()

    def watch(one: Engine) -> None:
        stats = one.stats()
        for name in ("num_drafts", "num_accepted_tokens"):
            seen[name] += int(stats[f"spec_decode_{name}"])
        seen["preemptions"] += int(stats["num_preemptions"])
        seen["hits"] += int(stats["prefix_cache_hits"])

    assert equal_to_plain(engine, 20, seed, watch=watch) == 80
    assert all(seen[name] > 20 for name in ("num_drafts", "num_accepted_tokens", "hits")) and seen["preemptions"], seen


@pytest.mark.slow
def test_two_thousand_requests() -> None:
    assert speculation.crowds(range(100, 120)) == 2000


def test_nothing_compiles(engine: Engine) -> None:
    with compilations() as compiled:
        equal_to_plain(engine, 10, 5)
    assert not compiled


def test_right_drafts_are_steps_saved_and_counted(engine: Engine) -> None:
    ask = Ask([1, 2, 3], greedy(31))
    plain = another_engine(engine, speculative_config=None)
    (answer,) = run(plain, [ask])
    one = another_engine(engine, async_scheduling=False)
    one._drafting.proposers = (Always({("0", 0): answer.token_ids}, rightness=1.0),)  # type: ignore[union-attr]
    assert run(one, [ask])[0].token_ids == answer.token_ids
    stats = one.stats()
    # The prompt's step yields one token, and each after it five.
    assert plain.num_steps == 31 and one.num_steps == 1 + 30 // (1 + MOST)
    assert stats["spec_decode_num_drafts"] == 6 and stats["spec_decode_num_draft_tokens"] == 24
    assert stats["spec_decode_num_accepted_tokens"] == 24 and stats["generation_tokens"] == 31
    assert [stats[f"spec_decode_num_accepted_tokens_per_pos_{at}"] for at in range(MOST)] == [6] * MOST


class Always(Scripted):
    """As many as are asked for."""

    def propose(self, asked):
        found = {}
        for sequence, most in asked.items():
            known = len(sequence.tokens) - sequence.num_prompt
            found[sequence] = self.coming[sequence.request.request_id, sequence.index][known : known + most]
        return found


def test_without_speculation_there_are_no_counters_and_nobody_is_asked(engine: Engine) -> None:
    plain = another_engine(engine, speculative_config=None)
    assert plain._drafting is None and not any(name.startswith("spec_decode") for name in plain.stats())


def test_a_sure_proposer_goes_first_and_needs_no_speculation(engine: Engine) -> None:
    asks = random_asks(12, 9)
    plain = tokens_of(another_engine(engine, speculative_config=None), asks)
    coming = {key: [token_id for token_id, *_ in found] for key, found in plain[0].items()}
    for config in (None, engine.config.speculation):
        sure = Scripted(coming, rightness=1.0, is_sure=True)
        unheard = Always(coming, rightness=1.0)
        one = Engine(
            another_engine(engine, speculative_config=config).config,
            engine.model,
            engine.runner,
            pool=another_engine(engine).pool,
            proposers=[sure, unheard],
        )
        check_same(tokens_of(one, asks), plain)
        stats = one.stats()
        assert stats["spec_decode_num_accepted_tokens"] > 0
        one._drafting.close()  # type: ignore[union-attr]
        assert sure.is_closed and unheard.is_closed


def test_a_recording_with_drafts_replays(engine: Engine, tmp_path: Path) -> None:
    for is_async in (False, True):
        one = another_engine(engine, num_pages=FEW_PAGES, async_scheduling=is_async)
        one.scheduler.pool.__class__ = one.scheduler.pool.__class__.__mro__[1]  # the engine's own, which replays can build
        one._eyes._recorder.header["pool"] = "jaxpaged.host.pages.PagePool"  # type: ignore[union-attr]
        tokens_of(one, random_asks(20, 3))
        recording = Recording.load(one.save_recording(tmp_path / f"{is_async}.recording"))
        replay = Replay(recording)
        assert replay.run(check=True) is None and replay.num_steps == one.num_steps
        assert one.stats()["spec_decode_num_accepted_tokens"] > 0


def test_text_that_stops_in_the_middle_of_a_step(tmp_path: Path) -> None:
    """Of several outputs too: what the step had beyond the stop string is nobody's."""
    model = write_text_model(tmp_path / "model")
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 2, "adaptive": False}
    prompts = ["hello world, hello world, hello", "one day a small dog one day a small"]
    options = {"max_tokens": 40, "ignore_eos": True, "frequency_penalty": -2.0, "logprobs": 1}
    params = [
        SamplingParams(temperature=temperature, seed=5, n=n, stop=stop, include_stop_str_in_output=n > 1, **options)
        for temperature, n in ((0.0, 1), (1.0, 3))
        for stop in ((), ("o",), ("a", "e "), ("dd", "ll"))
    ]
    found, options = [], {**FAST, "decode_row_buckets": (16,)}
    with LLM(model, speculative_config=ngram, **options) as llm:
        drafting = llm.engine._drafting
        for llm.engine._drafting in (None, drafting):
            outputs = [llm.generate(prompts, one, use_tqdm=False) for one in params]
            found.append([(c.text, c.token_ids, c.finish_reason, c.stop_reason) for o in outputs for p in o for c in p.outputs])
            streamed = [text_of(llm, prompt, params[1]) for prompt in prompts]
            assert streamed == [p.outputs[0].text for p in outputs[1]]
            assert all(len(c.logprobs or ()) == len(c.token_ids) for o in outputs for p in o for c in p.outputs)
        accepted = llm.stats()["spec_decode_num_accepted_tokens"]
    assert found[0] == found[1] and accepted > 100
    assert {reason for *_, reason in found[0]} > {"o", "a"}


def text_of(llm: LLM, prompt: str, params: SamplingParams) -> str:
    *_, last = llm.stream([prompt], params)
    return last.outputs[0].text


@pytest.mark.slow
def test_two_hundred_thousand_draws() -> None:
    assert speculation.chi_square(200_000) == 200_000
