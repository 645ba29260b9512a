"""Laws of stop strings: found as by looking everywhere, whatever the pieces; nothing is shown that goes away again."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import texts
from driving import another_engine
from text_model import FAST, KINDS, write_text_model, write_tokenizer
from texts import cut

from jaxpaged import LLM, Engine, RequestError, RequestOutputKind, SamplingParams
from jaxpaged.growing import GrowingText
from jaxpaged.host.pages import PagePool
from jaxpaged.observe import Recording, Replay
from jaxpaged.stop_strings import StopFinder
from jaxpaged.tokenizer import Tokenizer


def test_what_is_found_and_held_back_is_what_looking_everywhere_finds() -> None:
    num_found, num_held = texts.found_and_held(20_000)
    assert num_found > 5_000 and num_held > 5_000


def test_sixty_four_long_strings_cost_the_same_for_each_character() -> None:
    """Each is nearly found at every character: what looked back at each would need 256 times as long."""
    finder = StopFinder(["a" * n + "b" for n in range(192, 256)])
    assert finder.add("a" * 1_000) is None and finder.num_open == 255
    started = time.process_time()
    for _ in range(1_000):
        assert finder.add("aaac") is None and finder.add("aaaaa") is None
    assert time.process_time() - started < 10.0
    assert finder.num_open == 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_that_grows_is_the_whole_text_cut_where_it_stops(kind: str) -> None:
    assert texts.stopped(kind, 2_000) > 300


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("many", [0, 16])
def test_a_text_without_stops_is_the_same_whenever_it_is_asked_for(kind: str, many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And wherever it settles behind an open character."""
    monkeypatch.setattr("jaxpaged.tokenizer._MANY_IDS", many)
    assert texts.asked_for(kind, 1_000) > 500
    assert texts.streamed(texts.tokenizer_of(kind), 500, seed=many) == 500


def test_a_text_that_nobody_asks_for_before_its_end_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tokenizer(tmp_path)
    tokenizer, decoded = Tokenizer.load(tmp_path), []
    ids = tokenizer.encode("one day a cat went out")
    text = GrowingText(tokenizer.detokenizer())
    whole, decode = tokenizer.decode(ids), Tokenizer.decode
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids, *rest: decoded.append(ids) or decode(self, ids, *rest))
    for token_id in ids[:-1]:
        text.add([token_id], is_last=False)
    assert not decoded
    text.add(ids[-1:], is_last=True)
    for _ in range(2):
        assert text.text(0, text.shown(is_over=True)) == whole and len(decoded) == 1


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 7])
def test_a_text_that_is_asked_for_inside_characters_is_settled_behind_them(step: int, tmp_path: Path) -> None:
    """Else all of it would be decoded at each ask."""
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.encode("😀" * 100 + "日本" * 100, add_special_tokens=False)
    growing, longest = tokenizer.detokenizer(), 0
    growing.add(ids[0])
    for place in range(1, len(ids), step):
        growing.add(*ids[place : place + step])
        longest = max(longest, len(growing._window))
    assert len(ids) >= 600 and longest < 64
    assert growing.finish() is not None and growing.text == tokenizer.decode(ids)


def test_no_string_ends_the_text_of_the_first_tokens(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    ids = [tokenizer.encode(letter)[0] for letter in "abcabc"]
    for min_tokens, wanted in ((0, "a"), (2, "a"), (3, "abca"), (5, "abca"), (6, "abcabc")):
        text = GrowingText(tokenizer.detokenizer(), ("bc",), min_tokens=min_tokens)
        text.add(ids, is_last=True)
        assert text.text(0, text.shown(is_over=True)) == wanted


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stop": ""}, "stop: got '', expected strings that are not empty"),
        ({"stop": ["a", ""]}, "stop: got '', expected strings that are not empty"),
        ({"stop": [1]}, "stop: got 1, expected strings that are not empty"),
        ({"stop": 5}, "stop: got 5, expected a string or a list of strings"),
        ({"stop": b"a"}, "stop: got b'a', expected a string or a list of strings"),
        ({"stop": ["a"] * 65}, "stop: got 65 strings, the limit is 64"),
        ({"stop": "a" * 257}, "stop: got a string of 257 characters, the limit is 256"),
        ({"stop": "a", "detokenize": False}, "stop: strings are found in the text, and detokenize is False"),
        ({"include_stop_str_in_output": 1}, "include_stop_str_in_output: got 1, expected True or False"),
        ({"stop": "a", "use_beam_search": True, "n": 2, "temperature": 0.0}, "stop: got .*: beam search draws no tokens"),
        ({"output_kind": "DELTA"}, "output_kind: got 'DELTA', expected a RequestOutputKind"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(given: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message) as error:
        SamplingParams(**given)
    assert "\n" not in str(error.value)


# --- in an engine ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with LLM(write_text_model(tmp_path_factory.mktemp("stop")), num_gpu_blocks_override=65, **FAST) as llm:
        yield llm


def another(llm: LLM, **options) -> LLM:
    one = copy.copy(llm)
    one.engine, one._live, one._ids = another_engine(llm.engine, **options), {}, itertools.count()
    return one


def drawn(seed: int, **options) -> SamplingParams:
    return SamplingParams(seed=seed, ignore_eos=True, **{"temperature": 1.0, "max_tokens": 24, **options})


@pytest.mark.parametrize("is_async", [True, False])
def test_outputs_are_those_without_stop_cut_there(llm: LLM, is_async: bool) -> None:
    """Of everything at once: n, special tokens that are shown, too few pages; streamed and not."""
    llm = another(llm, async_scheduling=is_async, num_pages=8)
    rng, num_cases, num_preempted = random.Random(2), 0, 0
    for trial in range(6):
        prompts = ["hello world", "one day", "日本語 😀", "the garden"]
        skip, is_included = bool(trial % 2), trial == 3
        params = [drawn(9 * trial + i, n=1 + i % 3, skip_special_tokens=skip) for i in range(4)]
        whole = llm.generate(prompts, params, use_tqdm=False)
        stops = []
        for output in whole:
            text = rng.choice(output.outputs).text
            stops.append([text[at : at + rng.randint(1, 5)] for at in rng.sample(range(len(text) - 5), 2)] + ["nowhere at all"])
        asked = [
            dataclasses.replace(one, stop=stop, include_stop_str_in_output=is_included)
            for one, stop in zip(params, stops, strict=True)
        ]
        found = llm.generate(prompts, asked, use_tqdm=False)
        llm.engine.scheduler.check()
        assert llm.engine.pool.num_used == 0
        for before, after, stop in zip(whole, found, stops, strict=True):
            for one, other in zip(before.outputs, after.outputs, strict=True):
                text, string = cut(one.text, stop, is_included=is_included)
                assert (other.text, other.stop_reason) == (text, string)
                assert other.finish_reason == ("length" if string is None else "stop")
                assert other.token_ids == one.token_ids[: len(other.token_ids)]
                num_cases += string is not None and len(other.token_ids) < 24

        for kind in RequestOutputKind:
            texts: dict[tuple[str, int], str] = {}
            ids: dict[tuple[str, int], list[int]] = {}
            for output in llm.stream(prompts, [dataclasses.replace(one, output_kind=kind) for one in asked]):
                for one in output.outputs:
                    key = str(int(output.request_id) % 4), one.index
                    text = texts.get(key, "")
                    if kind is RequestOutputKind.DELTA:
                        texts[key] = text + one.text
                        ids[key] = ids.get(key, []) + one.token_ids
                        continue
                    assert one.text.startswith(text), "text went away"
                    assert kind is RequestOutputKind.CUMULATIVE or output.finished
                    texts[key], ids[key] = one.text, one.token_ids
            ended = {(texts[key], tuple(ids[key])) for key in texts}
            assert ended == {(one.text, tuple(one.token_ids)) for after in found for one in after.outputs}
        num_preempted = llm.engine.scheduler.num_preemptions
    assert num_cases > 20 and num_preempted > 0


def test_pages_are_free_when_the_text_has_ended(llm: LLM) -> None:
    """With a step in flight that computes the next token: nobody hears of it."""
    whole = llm.generate("hello world", drawn(3), use_tqdm=False)[0].outputs[0].text
    stream = llm.stream("hello world", drawn(3, stop=whole[8:11]))
    last = next(output for output in stream if output.finished)
    assert last.outputs[0].stop_reason == whole[8:11] and last.outputs[0].text == cut(whole, [whole[8:11]])[0]
    assert llm.engine.pool.num_used == 0 and not llm.engine.has_unfinished
    assert list(stream) == []


def test_a_stop_id_before_it_ends_it_and_its_text_stays_where_it_is_asked_for(llm: LLM) -> None:
    ids = llm.generate("hello", drawn(5), use_tqdm=False)[0].outputs[0].token_ids
    tokenizer = llm.get_tokenizer()
    for is_included in (False, True):
        params = drawn(5, stop_token_ids=[ids[4]], stop="nowhere", include_stop_str_in_output=is_included)
        one = llm.generate("hello", params, use_tqdm=False)[0].outputs[0]
        end = ids.index(ids[4]) + 1
        assert (one.token_ids, one.finish_reason, one.stop_reason) == (ids[:end], "stop", ids[4])
        assert one.text == tokenizer.decode(ids[: end if is_included else end - 1])


def test_a_special_token_is_found_where_it_is_shown(llm: LLM) -> None:
    eos = llm.get_tokenizer().eos_token_id
    for seed in range(200):
        ids = llm.generate("hello", drawn(seed, max_tokens=40), use_tqdm=False)[0].outputs[0].token_ids
        if eos in ids:
            break
    end = ids.index(eos) + 1
    shown = llm.generate("hello", drawn(seed, max_tokens=40, stop="<eos>", skip_special_tokens=False), use_tqdm=False)[0].outputs[
        0
    ]
    assert (shown.token_ids, shown.stop_reason) == (ids[:end], "<eos>")
    hidden = llm.generate("hello", drawn(seed, max_tokens=40, stop="<eos>"), use_tqdm=False)[0].outputs[0]
    assert (hidden.token_ids, hidden.finish_reason) == (ids, "length")


def test_the_best_of_those_that_stopped(llm: LLM) -> None:
    params = drawn(1, n=4, best_of=4)
    whole = {tuple(one.token_ids): one.text for one in llm.generate("one day", params, use_tqdm=False)[0].outputs}
    stops = [text[5:8] for text in whole.values()][:3]
    ranked = llm.generate("one day", dataclasses.replace(params, n=2, stop=stops), use_tqdm=False)[0].outputs
    every = llm.generate("one day", dataclasses.replace(params, stop=stops), use_tqdm=False)[0].outputs
    assert [one.token_ids for one in ranked] == [one.token_ids for one in every[:2]]
    for one in every:
        text = next(text for ids, text in whole.items() if list(ids[: len(one.token_ids)]) == one.token_ids)
        assert one.text == cut(text, stops)[0]
    assert sum(one.finish_reason == "stop" for one in every) >= 3


def test_a_recording_of_stops_replays(llm: LLM, tmp_path: Path) -> None:
    config = dataclasses.replace(llm.engine.config, flight_recorder_bytes=1 << 20)
    # With a pool whose pages a replay can hand out again.
    engine = Engine(config, llm.engine.model, llm.engine.runner, pool=PagePool(llm.engine.runner.num_pages))
    one = copy.copy(llm)
    one.engine, one._live, one._ids = engine, {}, itertools.count()
    whole = one.generate("hello world", drawn(3, n=3), use_tqdm=False)[0].outputs
    found = one.generate("hello world", drawn(3, n=3, stop=[whole[1].text[4:8]]), use_tqdm=False)[0].outputs
    assert found[1].finish_reason == "stop"
    recording = Recording.load(engine.save_recording(tmp_path / "stops.recording"))
    assert Replay(recording).run(check=True) is None


def test_without_a_tokenizer_there_is_no_text_to_stop(llm: LLM) -> None:
    one = copy.copy(llm)
    one.tokenizer = None
    with pytest.raises(RequestError, match="stop: strings need the tokenizer"):
        one.generate([1, 2, 3], SamplingParams(stop="a"))
