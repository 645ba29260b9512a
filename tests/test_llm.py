"""Laws of LLM: order, crowd = alone, stream = generate, nothing half done, and memory that comes back."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from text_model import CONFIG, FAST, write_text_model
from tokenizers.processors import TemplateProcessing

import jaxpaged
from jaxpaged import LLM, RequestError, SamplingParams
from jaxpaged.checkpoint import CheckpointError
from jaxpaged.config import ConfigError

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
PROMPTS = ["hello world", "one day a small dog", "日本語 😀", "the garden", "hello", "Grüße!", "a dog went to the", "x"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_model(tmp_path_factory.mktemp("text-model"), temperature=0.7, top_k=5, max_new_tokens=9, do_sample=True)


@pytest.fixture(scope="module")
def shared(model: Path) -> Iterator[LLM]:
    with LLM(model, **FAST) as llm:
        yield llm


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    """The one LLM of this file; every test must leave it empty."""
    yield shared
    stats = shared.stats()
    assert (stats["num_requests_running"], stats["num_requests_waiting"], stats["kv_blocks_active"]) == (0, 0, 0)
    shared.engine.scheduler.check()


def texts(outputs: list[Any]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def token_ids(outputs: list[Any]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


# --- generate ----------------------------------------------------------------------------------------------------


def test_results_come_in_the_order_of_the_prompts(llm: LLM):
    lengths = [9, 1, 5, 12, 3, 7, 2, 12]
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in lengths]
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert [output.prompt for output in outputs] == PROMPTS
    assert [len(output.outputs[0].token_ids) for output in outputs] == lengths
    assert all(output.finished and output.outputs[0].finish_reason == "length" for output in outputs)
    assert [output.prompt_token_ids for output in outputs] == [llm.get_tokenizer().encode(prompt) for prompt in PROMPTS]


def test_a_prompt_alone_and_in_the_crowd_gives_the_same(llm: LLM):
    crowd = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    alone = [llm.generate(prompt, GREEDY, use_tqdm=False)[0] for prompt in PROMPTS]
    assert token_ids(crowd) == token_ids(alone)
    assert texts(crowd) == texts(alone)
    seeded = SamplingParams(temperature=1.0, seed=7, max_tokens=10)
    crowd = llm.generate(PROMPTS, seeded, use_tqdm=False)
    assert token_ids(crowd) == [token_ids(llm.generate(prompt, seeded, use_tqdm=False))[0] for prompt in PROMPTS]


def test_every_form_of_a_prompt_means_the_same(llm: LLM):
    text = "one day"
    ids = llm.get_tokenizer().encode(text)
    forms = [
        text,
        {"prompt": text},
        {"prompt_token_ids": ids},
        ids,
        tuple(ids),
        np.array(ids),
        {"prompt": "x", "prompt_token_ids": ids},
    ]
    together = llm.generate(forms, GREEDY, use_tqdm=False)
    assert len(set(texts(together))) == 1
    assert [output.prompt for output in together] == [text, text, None, None, None, None, "x"]
    for form in forms:
        assert texts(llm.generate(form, GREEDY, use_tqdm=False)) == texts(together)[:1]
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_the_text_is_the_decoded_ids_without_the_token_that_stopped_it(llm: LLM):
    ids = token_ids(llm.generate(PROMPTS[0], SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True), use_tqdm=False))[0]
    stop = next(i for i in ids[1:] if i != ids[0])
    params = SamplingParams(temperature=0.0, max_tokens=12, stop_token_ids=(stop,), ignore_eos=True)
    completion = llm.generate(PROMPTS[0], params, use_tqdm=False)[0].outputs[0]
    assert completion.token_ids == ids[: ids.index(stop) + 1]
    assert (completion.finish_reason, completion.stop_reason, completion.finished()) == ("stop", stop, True)
    assert completion.text == llm.get_tokenizer().decode(ids[: ids.index(stop)])
    for length in range(1, 9):  # most of these end in the middle of a character
        params = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
        for completion in (output.outputs[0] for output in llm.generate(PROMPTS, params, use_tqdm=False)):
            assert completion.text == llm.get_tokenizer().decode(completion.token_ids)
    no_text = SamplingParams(temperature=0.0, max_tokens=12, detokenize=False, ignore_eos=True)
    assert texts(llm.generate(PROMPTS[0], no_text, use_tqdm=False)) == [""]


def test_defaults_are_those_of_the_checkpoint(llm: LLM):
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.7, top_k=5, max_tokens=9)
    assert len(token_ids(llm.generate({"prompt_token_ids": [5]}, use_tqdm=False))[0]) <= 9


def test_a_progress_bar_counts_the_requests(llm: LLM, capsys: pytest.CaptureFixture[str]):
    llm.generate(PROMPTS[:3], GREEDY)
    captured = capsys.readouterr()
    assert "Processed prompts: 100%" in captured.err and "3/3" in captured.err and "output:" in captured.err
    assert captured.out == ""


# --- chat and stream ---------------------------------------------------------------------------------------------


def test_chat_is_generate_on_the_rendered_conversation(llm: LLM):
    one = [{"role": "user", "content": " hello "}]
    two = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one day"}]
    outputs = llm.chat([one, two], GREEDY, use_tqdm=False)
    assert outputs[0].prompt == "<turn>user: hello<eos>\n<turn>assistant: "
    assert outputs[1].prompt == "<turn>system: Be brief.<eos>\n<turn>user: one day<eos>\n<turn>assistant: "
    ids = [llm.get_tokenizer().encode(output.prompt, add_special_tokens=False) for output in outputs]  # type: ignore[arg-type]
    assert [output.prompt_token_ids for output in outputs] == ids
    assert token_ids(outputs) == token_ids(llm.generate(ids, GREEDY, use_tqdm=False))
    assert token_ids(llm.chat(one, GREEDY, use_tqdm=False)) == token_ids(outputs)[:1]
    template = "{{ extra }}{{ messages[0].content }}"
    own = llm.chat(one, GREEDY, use_tqdm=False, chat_template=template, chat_template_kwargs={"extra": "!"})
    assert own[0].prompt == "! hello "


def test_a_chat_with_a_tool_call_parser_is_that_chat(llm: LLM):
    messages = [{"role": "user", "content": "hello"}]
    parsed = llm.chat(messages, GREEDY, use_tqdm=False, tool_call_parser="hermes")
    assert token_ids(parsed) == token_ids(llm.chat(messages, GREEDY, use_tqdm=False))
    assert (parsed[0].outputs[0].content, parsed[0].outputs[0].tool_calls) == (parsed[0].outputs[0].text, [])
    messages.append({"role": "assistant", "content": "a dog"})
    goes_on = llm.chat(messages, GREEDY, use_tqdm=False, add_generation_prompt=False, continue_final_message=True)
    assert goes_on[0].prompt is not None and goes_on[0].prompt.endswith("assistant: a dog")


def test_a_chat_gets_no_second_beginning_of_sequence(llm: LLM):
    backend = llm.get_tokenizer().backend
    backend.post_processor = TemplateProcessing(single="<turn> $A", special_tokens=[("<turn>", 1)])  # type: ignore[assignment]
    try:
        assert llm.generate("hello", GREEDY, use_tqdm=False)[0].prompt_token_ids[0] == 1
        assert llm.chat([{"role": "user", "content": "hello"}], GREEDY, use_tqdm=False)[0].prompt_token_ids.count(1) == 2
    finally:
        backend.post_processor = None  # type: ignore[assignment]


def test_stream_ends_with_what_generate_gives_and_only_grows(llm: LLM):
    expected = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    seen: dict[str, Any] = {}
    for output in llm.stream(PROMPTS, GREEDY):
        before = seen.get(output.request_id)
        if before is not None:
            assert not before.finished
            assert len(output.outputs[0].token_ids) == len(before.outputs[0].token_ids) + 1
            assert output.outputs[0].text.startswith(before.outputs[0].text)
        seen[output.request_id] = output
    final = [seen[request_id] for request_id in sorted(seen, key=int)]
    assert [(o.prompt, o.outputs, o.finished) for o in final] == [(o.prompt, o.outputs, True) for o in expected]


def test_other_calls_may_run_while_a_stream_is_open(llm: LLM):
    expected = texts(llm.generate(PROMPTS[:2], GREEDY, use_tqdm=False))
    stream = llm.stream(PROMPTS[0], GREEDY)
    next(stream)
    assert texts(llm.generate(PROMPTS[:2], GREEDY, use_tqdm=False)) == expected
    assert texts(list(stream)[-1:]) == expected[:1]


def test_leaving_a_stream_aborts_its_requests(llm: LLM):
    llm.stream(PROMPTS, GREEDY)  # never started: nothing is queued
    assert llm.stats()["num_requests_waiting"] == 0
    for output in llm.stream(PROMPTS, GREEDY):
        assert not output.finished
        break
    gc.collect()  # pypy and tracebacks may hold the iterator; CPython closes it at once
    assert llm.stats()["num_requests_running"] == 0


# --- errors ------------------------------------------------------------------------------------------------------

BAD_PROMPTS = [
    ("", "prompt is empty"),
    ([], "prompt is empty"),
    ([1, 320], "expected token ids in"),
    ([1, -1], "expected token ids in"),
    ([1.5], "expected token ids in"),
    ("x" * 4000, r"prompt has [\d,]+ tokens, the limit is 255"),
    (b"bytes", "expected a list of token ids"),
    ({"prompts": "x"}, "prompts"),
    ({}, "expected 'prompt'"),
    ({"prompt": 3}, "got int"),
    (None, "got None, expected a text"),
    ("\ud800", "Unicode"),
]


@pytest.mark.parametrize("bad, problem", BAD_PROMPTS, ids=range(len(BAD_PROMPTS)))
def test_a_bad_prompt_is_named_and_nothing_is_queued(llm: LLM, bad: Any, problem: str):
    before = llm.engine.counts()
    for call in (llm.generate, llm.stream):
        with pytest.raises(RequestError, match=problem) as error:
            call(["hello", bad, "world"], GREEDY)
        assert str(error.value).startswith("prompts[1]: ") and "\n" not in str(error.value)
    assert llm.engine.counts() == before


def test_bad_parameters_are_named(llm: LLM):
    before = llm.engine.counts()
    with pytest.raises(RequestError, match="got 2 for 3 prompts"):
        llm.generate(["a", "b", "c"], [GREEDY, GREEDY])
    with pytest.raises(RequestError, match="expected SamplingParams"):
        llm.generate(["a"], [{"temperature": 0}])  # type: ignore[list-item]
    with pytest.raises(RequestError, match="stop_token_ids"):
        llm.generate("a", SamplingParams(stop_token_ids=(320,)))
    for bad in ([], "hello", [{"content": "x"}], [["x"]]):
        with pytest.raises(RequestError, match="messages"):
            llm.chat(bad)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="got int"):
        llm.generate(3)  # type: ignore[arg-type]
    assert llm.engine.counts() == before


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_call_leaves_the_llm_usable(llm: LLM, monkeypatch: pytest.MonkeyPatch, interruption: type[BaseException]):
    expected = texts(llm.generate(PROMPTS, GREEDY, use_tqdm=False))
    step, count = llm.engine.step, 0

    def interrupted() -> Any:
        nonlocal count
        count += 1
        if count == 3:
            raise interruption
        return step()

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "step", interrupted)
        with pytest.raises(interruption):
            llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert llm.stats()["kv_blocks_active"] == 0 and not llm.engine.has_unfinished
    assert texts(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected


def test_a_request_that_someone_else_aborts_ends(llm: LLM):
    stream = llm.stream("hello", GREEDY)
    request_id = next(stream).request_id
    assert llm.engine.abort(request_id)
    last = list(stream)[-1]
    assert last.finished and last.outputs[0].finish_reason == "abort"


# --- the whole life ----------------------------------------------------------------------------------------------


def test_closing_gives_the_memory_back(model: Path):
    before = sum(array.nbytes for array in jax.live_arrays())
    with LLM(model, **FAST) as llm:
        runner: Any = llm.engine.runner
        arrays = jax.tree.leaves((runner.weights, runner.cache))
        assert sum(array.nbytes for array in jax.live_arrays()) > before
        open_stream = llm.stream("hello", GREEDY)
        next(open_stream)
        del runner
    assert all(array.is_deleted() for array in arrays)
    del arrays
    llm.close()
    for call in (lambda: llm.generate("x"), lambda: llm.stats(), lambda: next(open_stream)):
        with pytest.raises((RequestError, StopIteration)):
            call()
    assert sum(array.nbytes for array in jax.live_arrays()) <= before


def test_without_a_tokenizer_ids_go_in_and_out(model: Path, shared: LLM):
    expected = token_ids(shared.generate([[5, 6, 7]], GREEDY, use_tqdm=False))
    with LLM(model, skip_tokenizer_init=True, **FAST) as llm:
        outputs = llm.generate([[5, 6, 7]], GREEDY, use_tqdm=False)
        assert token_ids(outputs) == expected and texts(outputs) == [""]
        with pytest.raises(RequestError, match="skip_tokenizer_init"):
            llm.generate("text")
        with pytest.raises(RequestError, match="skip_tokenizer_init"):
            llm.get_tokenizer()


def test_bad_options_are_refused_before_the_weights_are_read(model: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="'max_num_seq', did you mean 'max_num_seqs'"):
        LLM(model, max_num_seq=4)
    broken = tmp_path / "broken"
    write_text_model(broken)
    (broken / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ConfigError, match="max_model_len"):
        LLM(broken, max_model_len=4096)
    with pytest.raises(CheckpointError, match="safetensors"):
        LLM(broken, **FAST)
    (broken / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: missing"):
        LLM(broken, **FAST)
    (model / "unused").mkdir(exist_ok=True)
    (broken / "generation_config.json").write_text(json.dumps({"temperature": -1}))
    with pytest.raises(CheckpointError, match="temperature"):
        LLM(broken, skip_tokenizer_init=True, **FAST)


def test_results_and_metrics_show_themselves(llm: LLM):
    output = llm.generate({"prompt": "<b>", "prompt_token_ids": [5]}, GREEDY, use_tqdm=False)[0]
    shown = output._repr_html_()
    assert "&lt;b&gt;" in shown and "<b>" not in shown and output.outputs[0].finish_reason in shown  # type: ignore[operator]
    times = output.metrics
    assert times is not None and times.arrival_time <= times.first_token_ts <= times.last_token_ts
    assert times.num_generation_tokens == len(output.outputs[0].token_ids) and times.first_token_latency >= 0
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    assert metrics["jaxpaged:generation_tokens"].kind == "counter"
    assert metrics["jaxpaged:kv_cache_usage_perc"].kind == "gauge" and metrics["jaxpaged:kv_cache_usage_perc"].value == 0


# --- the package -------------------------------------------------------------------------------------------------


def test_load_weights_feeds_the_functional_layer(model: Path, llm: LLM):
    weights, config = jaxpaged.load_weights(model)
    ids = llm.get_tokenizer().encode("one day")
    expected = token_ids(llm.generate({"prompt_token_ids": ids}, SamplingParams(temperature=0.0, max_tokens=1), use_tqdm=False))
    cache = jaxpaged.init_cache(config, num_pages=4, page_size=16)
    tables, tokens = np.array([[1, 2]], np.int32), np.array([ids], np.int32)
    logits, cache = jaxpaged.prefill(weights, cache, tokens, tables, np.array([len(ids)], np.int32), config=config)  # type: ignore[arg-type]
    assert int(logits[0, -1].argmax()) == expected[0][0]
    assert config.vocab_size == CONFIG["vocab_size"]


def test_public_names_exist_and_import_is_light():
    for name in jaxpaged.__all__:
        assert getattr(jaxpaged, name) is not None and name in dir(jaxpaged)
    assert jaxpaged.EngineArgs is jaxpaged.EngineConfig
    with pytest.raises(AttributeError, match="NoSuch"):
        _ = jaxpaged.NoSuch
    code = "import sys, jaxpaged; jaxpaged.SamplingParams, jaxpaged.EngineConfig; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not {"jax", "transformers", "numpy"} & set(done.stdout.split())


# --- whose turn it is ---


def test_priority_decides_who_is_first_and_changes_no_answer(model: Path) -> None:
    with LLM(model, **{**FAST, "max_num_seqs": 1}, scheduling_policy="priority") as llm:
        alone = [llm.generate(prompt, GREEDY, use_tqdm=False)[0].outputs[0].token_ids for prompt in PROMPTS]
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False, priority=list(range(len(PROMPTS), 0, -1)), tenant="me")
        assert [output.outputs[0].token_ids for output in outputs] == alone
        firsts = [output.metrics.first_token_ts for output in outputs]
        assert firsts == sorted(firsts, reverse=True)
        assert [output.finished for output in llm.stream("hello", GREEDY, priority=3)][-1]


def test_a_function_of_ones_own_is_a_policy(model: Path) -> None:
    asked = []

    def longest_prompt(candidate, situation) -> int:
        asked.append(candidate.tenant)
        return -candidate.num_prompt

    with LLM(model, **{**FAST, "max_num_seqs": 1}, scheduling_policy=longest_prompt) as llm:
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False, tenant=[str(index % 3) for index in range(len(PROMPTS))])
    order = sorted(outputs, key=lambda output: output.metrics.first_token_ts)
    lengths = [len(output.prompt_token_ids) for output in order]
    assert lengths == sorted(lengths, reverse=True) and set(asked) == {"0", "1", "2"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"priority": [1, 2, 3]}, "priority: got 3 for 2 prompts, expected one, or one for each"),
        ({"priority": [1, "high"]}, r"prompts\[1\]: priority: got 'high', expected a whole number"),
        ({"tenant": ["a"]}, "tenant: got 1 for 2 prompts"),
        ({"tenant": 7}, r"prompts\[0\]: tenant: got 7, expected a string"),
    ],
)
def test_priorities_and_tenants_that_cannot_be_are_refused(llm: LLM, options: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        llm.generate(["a", "b"], GREEDY, use_tqdm=False, **options)


def test_an_unknown_policy_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match=r"scheduling_policy: got 'prioritty', expected .* did you mean 'priority'"):
        LLM("nowhere", scheduling_policy="prioritty")
