"""Laws of chat templates: what transformers renders, within limits that nothing gets out of, and one line for what is wrong."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from chat_template_texts import (
    CALL,
    CHATML,
    CONVERSATIONS,
    ESCAPES,
    FAMILIES,
    HIDDEN_ESCAPES,
    MISTRAL,
    PARTS,
    QWEN3,
    QWEN25,
    TOOLS,
)
from text_model import write_tokenizer

from jaxpaged import LLM, SamplingParams
from jaxpaged.checkpoint import CheckpointError
from jaxpaged.host.request import RequestError
from jaxpaged.outputs import CompletionOutput, RequestOutput
from jaxpaged.templates.process import MAX_QUESTION_BYTES, MAX_RENDERED, TemplateError, TemplateProcess
from jaxpaged.tokenizer import Tokenizer
from jaxpaged.tools import parse

BEGINS = {"qwen2.5": "<tool_call>", "qwen3": "<tool_call>", "llama3.1": '{"name"', "mistral": "[TOOL_CALLS]"}
NOW = datetime(2026, 3, 4, 5, 6, 7)
USER = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": "<turn>"}))
    return folder


@pytest.fixture(scope="module")
def ours(directory: Path) -> Tokenizer:
    return Tokenizer.load(directory)


@pytest.fixture(scope="module")
def theirs(directory: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(directory)


@pytest.fixture(scope="module")
def process() -> Iterator[TemplateProcess]:
    made = TemplateProcess()
    yield made
    made.close()


# --- what transformers renders ---


def outcome(render: Any, *args: Any, **options: Any) -> str | None:
    """A rendered chat, None when it is refused."""
    try:
        return render(*args, **options)
    except Exception:
        return None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_chats_with_tools_are_those_of_transformers(ours: Tokenizer, theirs: Any, family: str, name: str) -> None:
    messages, source = CONVERSATIONS[name], FAMILIES[family]
    for tools in (None, [], TOOLS[:1], TOOLS):
        for options in ({}, {"add_generation_prompt": True}, {"add_generation_prompt": True, "enable_thinking": False}):
            options = {"add_generation_prompt": False, **options, "tools": tools, "chat_template": source}
            expected = outcome(theirs.apply_chat_template, messages, tokenize=False, **options)
            assert outcome(ours.apply_chat_template, messages, **options) == expected, options
            assert expected is not None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_last_message_that_goes_on_is_that_of_transformers(ours: Tokenizer, theirs: Any, family: str) -> None:
    for last in ("Sure, it", " Sure, it ", "it it", "\n", ""):
        messages = [*CONVERSATIONS["system"], {"role": "assistant", "content": last}]
        options = {"continue_final_message": True, "add_generation_prompt": False, "chat_template": FAMILIES[family]}
        expected = outcome(theirs.apply_chat_template, messages, tokenize=False, **options)
        assert outcome(ours.apply_chat_template, messages, **options) == expected
        if last.strip():
            assert expected is not None and expected.endswith(last.strip() if family in ("mistral", "llama3.1") else last)


def test_thoughts_and_parts_that_go_on(ours: Tokenizer, theirs: Any) -> None:
    options: dict[str, Any] = {
        "add_generation_prompt": False,
        "chat_template": QWEN3,
        "continue_final_message": "reasoning_content",
    }
    for field in ("reasoning", "reasoning_content", "thinking"):
        messages = [*USER, {"role": "assistant", "content": "", field: "I think"}]
        expected = theirs.apply_chat_template(messages, tokenize=False, **options)
        assert ours.apply_chat_template(messages, **options) == expected and expected.endswith("<think>\nI think")
    options |= {"chat_template": PARTS, "continue_final_message": True}
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b c"}]}]
    assert ours.apply_chat_template(messages, **options) == theirs.apply_chat_template(messages, tokenize=False, **options)
    for wrong in ([{"role": "assistant", "content": None}], [{"role": "assistant", "content": []}]):
        with pytest.raises(RequestError, match="continue_final_message: the last message has no content"):
            ours.apply_chat_template(wrong, **options)
    with pytest.raises(RequestError, match="continue_final_message: the chat template does not show"):
        ours.apply_chat_template(USER, continue_final_message=True, add_generation_prompt=False, chat_template="x")
    with pytest.raises(RequestError, match="not with add_generation_prompt"):
        ours.apply_chat_template(USER, continue_final_message=True, chat_template=CHATML)


def test_the_time_is_the_callers(ours: Tokenizer) -> None:
    template = "{{ strftime_now('%d %b %Y %H:%M:%S') }}"
    assert ours.apply_chat_template(USER, chat_template=template, now=NOW) == "04 Mar 2026 05:06:07"
    before = datetime.now().replace(microsecond=0)
    shown = datetime.strptime(ours.apply_chat_template(USER, chat_template=template), "%d %b %Y %H:%M:%S")
    assert before <= shown <= datetime.now()


# --- messages ---


def test_arguments_are_objects_to_a_template_and_texts_in_messages(ours: Tokenizer) -> None:
    as_text = copy.deepcopy(CONVERSATIONS["called"])
    as_text[1]["tool_calls"][0]["function"]["arguments"] = json.dumps(CALL["function"]["arguments"])
    for family in ("qwen2.5", "qwen3", "llama3.1", "mistral"):
        options = {"chat_template": FAMILIES[family], "tools": TOOLS}
        assert ours.apply_chat_template(as_text, **options) == ours.apply_chat_template(CONVERSATIONS["called"], **options)
    assert isinstance(as_text[1]["tool_calls"][0]["function"]["arguments"], str)  # the caller's own stays as it was
    as_text[1]["tool_calls"][0]["function"]["arguments"] = ""
    assert '"arguments": {}' in ours.apply_chat_template(as_text, chat_template=QWEN25)


@pytest.mark.parametrize(
    ("parser", "family"), [("hermes", "qwen2.5"), ("hermes", "qwen3"), ("mistral", "mistral"), ("llama3_json", "llama3.1")]
)
def test_calls_that_were_found_go_back_into_a_chat(ours: Tokenizer, parser: str, family: str) -> None:
    def rendered(messages: list[dict[str, Any]]) -> str:
        return ours.apply_chat_template(messages, chat_template=FAMILIES[family], tools=TOOLS, now=NOW)

    asked = CONVERSATIONS["called"][:1]
    said = rendered(CONVERSATIONS["called"][:2])
    answer = said[said.rindex(BEGINS[family]) :]  # as a model would write it that was trained on this
    reply = parse(answer, parser, make_id=lambda: CALL["id"])
    [call] = reply.tool_calls
    assert json.loads(call.function.arguments) == CALL["function"]["arguments"]
    given_back = [*asked, {"role": "assistant", "content": "", "tool_calls": reply.tool_calls}, CONVERSATIONS["called"][2]]
    assert rendered(given_back) == rendered(CONVERSATIONS["called"])


def test_parts_are_text(ours: Tokenizer) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert "user\na\nb<|im_end|>" in ours.apply_chat_template(messages, chat_template=CHATML)
    assert ours.apply_chat_template(messages, chat_template=PARTS, now=NOW).startswith("[user]a/b/")


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, r"messages\[1\].content\[0\]: got 'image_url'"),
        ({"role": "user", "content": [{"type": "text", "text": 3}]}, r"messages\[1\].content\[0\].text: got 3"),
        ({"role": "user", "content": [3]}, r"messages\[1\].content\[0\]: got 3"),
        ({"role": "assistant", "tool_calls": 3}, r"messages\[1\].tool_calls: got 3"),
        ({"role": "assistant", "tool_calls": [{"id": "x"}]}, r"messages\[1\].tool_calls\[0\].function: expected"),
        ({"role": "assistant", "tool_calls": [{"function": {"arguments": "[1]"}}]}, r"arguments: got '\[1\]', expected"),
        ({"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}, r"arguments: got '{', expected"),
        ({"role": "assistant", "tool_calls": [{"function": {"arguments": "[" * 99_999}}]}, "arguments: got '"),
        ("hello", r"messages\[1\]: got 'hello'"),
    ],
)
def test_a_message_that_cannot_be_read_is_named(ours: Tokenizer, message: Any, problem: str) -> None:
    with pytest.raises(RequestError, match=problem) as error:
        ours.apply_chat_template([*USER, message], chat_template=CHATML)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_deep_and_endless_values_are_refused(ours: Tokenizer) -> None:
    deep: Any = []
    deep.append(deep)
    for options in ({"tools": [{"x": deep}]}, {"x": deep}):
        with pytest.raises(RequestError, match="nested more than 100 deep"):
            ours.apply_chat_template(USER, chat_template="{{ x }}", **options)
    with pytest.raises(RequestError, match=r"messages\[0\]: nested more than 100 deep"):
        ours.apply_chat_template([{"role": "user", "content": "", "x": deep}], chat_template="{{ x }}")
    for tools in ("x", [3], {}):
        with pytest.raises(RequestError, match="tools: expected a list of objects"):
            ours.apply_chat_template(USER, chat_template="x", tools=tools)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="bytes of messages, the limit is"):
        ours.apply_chat_template([{"role": "user", "content": "x" * MAX_QUESTION_BYTES}], chat_template="x")


# --- names that a request may set ---


@pytest.mark.parametrize(
    "name",
    [
        "messages",
        "tools",
        "tokenize",
        "chat_template",
        "documents",
        "raise_exception",
        "strftime_now",
        "range",
        "eos_token",
        "_x",
    ],
)
def test_a_request_cannot_set_what_is_not_its_own(ours: Tokenizer, name: str) -> None:
    with pytest.raises(RequestError, match=f"chat_template_kwargs: '{name}' cannot be set"):
        ours.apply_chat_template(USER, chat_template="{{ x }}", chat_template_kwargs={name: 1})


def test_a_template_gets_the_names_that_it_reads(ours: Tokenizer) -> None:
    kwargs = {"x": [1], "enable_thinking": True}
    assert ours.apply_chat_template(USER, chat_template="{{ x }}{{ y }}", chat_template_kwargs=kwargs) == "[1]"
    # Not handed over when it is not read: it would be too large.
    assert ours.apply_chat_template(USER, chat_template="{{ x }}", chat_template_kwargs={"z": "z" * MAX_QUESTION_BYTES}) == ""


# --- templates that try to get out ---


def test_there_are_enough_of_them() -> None:
    assert len(set(ESCAPES)) >= 50 and len(set(HIDDEN_ESCAPES)) >= 10


@pytest.mark.parametrize("template", ESCAPES)
def test_an_escape_is_refused_when_it_is_loaded(directory: Path, ours: Tokenizer, template: str) -> None:
    with pytest.raises(CheckpointError, match=r"^here: chat template 'default': .*(unsafe|of another template)") as error:
        Tokenizer(ours.backend, chat_templates={"default": template}, where="here")
    assert "\n" not in str(error.value)
    with pytest.raises(RequestError, match=r"^chat template: "):
        ours.apply_chat_template(USER, chat_template=template)


@pytest.mark.parametrize("template", HIDDEN_ESCAPES)
def test_a_hidden_escape_is_refused_when_it_is_reached(ours: Tokenizer, template: str) -> None:
    with pytest.raises(RequestError, match=r"^chat template: .*(unsafe|not safe|cannot hold|undefined|no attribute)") as error:
        ours.apply_chat_template(USER, chat_template=template)
    assert "\n" not in str(error.value)


def test_behind_the_sandbox_there_is_a_second_wall() -> None:
    code = (
        "import os, sys, socket\nfrom jaxpaged.templates import child\nchild.limit_itself()\n"
        "for attempt in (lambda: open('/etc/hostname'), lambda: os.listdir('/'), socket.socket, lambda: bytearray(2**31)):\n"
        "    try:\n        attempt()\n        print('done')\n    except (OSError, MemoryError):\n        print('refused')\n"
        "print(len(os.environ))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.stdout.split() == ["refused"] * 4 + ["0"], ran.stderr


# --- limits ---

ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a filter": "{{ 'x' | center(10 ** 11) }}",
    "a power": "{{ (9 ** 9) ** (9 ** 9) }}",
    "a power when compiled": "{% if messages %}{% else %}{{ 2 ** (2 ** 40) }}{% endif %}",
    "doubling": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a list": "{{ [1] * 10 ** 10 }}",
    "a format": "{{ '%0999999999d' % 1 }}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "brackets": "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "output": "{% for i in range(99999) %}" + "x" * 100 + "{% endfor %}",
    "words": "{{ lipsum(n=99999) }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_has_its_limits(process: TemplateProcess, name: str) -> None:
    wrong = (
        rf"200 ms of processor time|more memory than|recursion|more than {MAX_RENDERED:,} char|its process died|too large|nested"
    )
    started = os.times()
    with pytest.raises(TemplateError, match=wrong) as error:
        process.render(ENDLESS[name], {"messages": []}, NOW)
    spent = os.times()
    assert "\n" not in str(error.value)
    assert spent.user + spent.system - started.user - started.system < 0.5  # ours
    assert process.render("{{ x }}", {"x": "still here"}, NOW) == "still here"


def test_processor_time_is_bounded_and_said() -> None:
    process = TemplateProcess(cpu_s=0.05)
    before = os.times()
    for _ in range(3):
        with pytest.raises(TemplateError, match=r"^more than 50 ms of processor time$"):
            process.render(ENDLESS["loops"], {}, NOW)
    process.close()
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    assert used < 3 * 1.5  # start-ups included; a template without a limit takes minutes


def test_a_process_that_says_nothing_is_ended() -> None:
    process = TemplateProcess()
    assert process.render("a", {}, NOW) == "a"
    process._wall_s = 0.2
    os.kill(process._process.pid, signal.SIGSTOP)  # type: ignore[union-attr]
    started = time.monotonic()
    with pytest.raises(TemplateError, match=r"^no answer within 0.2 s$"):
        process.render("b", {}, NOW)
    with pytest.raises(TemplateError, match="no answer"):
        process.render("b", {}, NOW)
        os.kill(process._process.pid, signal.SIGSTOP)  # type: ignore[union-attr]
        process.render("b", {"x": "x" * 2**20}, NOW)  # more than a pipe holds
    assert time.monotonic() - started < 20
    process.close()


def test_a_process_that_was_killed_is_replaced() -> None:
    process = TemplateProcess()
    for _ in range(2):
        assert process.render("{{ x }}", {"x": 1}, NOW) == "1"
        process._process.kill()  # type: ignore[union-attr]
        process._process.wait()  # type: ignore[union-attr]
    process.close()
    assert process.render("{{ x }}", {"x": 2}, NOW) == "2"
    pid = process._process.pid  # type: ignore[union-attr]
    del process
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_threads_get_their_own_answers(process: TemplateProcess) -> None:
    wrong = []

    def ask(who: int) -> None:
        for i in range(50):
            if process.render("{{ x }}", {"x": [who, i]}, NOW) != f"[{who}, {i}]":
                wrong.append((who, i))

    threads = [threading.Thread(target=ask, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_process_that_cannot_start_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    process = TemplateProcess()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/nonexistent/python")
        with pytest.raises(TemplateError, match=r"^its process did not start \(No such file"):
            process.render("x", {}, NOW)
        patch.setattr(sys, "executable", "/bin/false")
        with pytest.raises(TemplateError, match=r"^its process did not start$"):
            process.render("x", {}, NOW)
    assert process.render("x", {}, NOW) == "x"
    process.close()


def test_a_fork_has_a_process_of_its_own(process: TemplateProcess) -> None:
    assert process.render("{{ x }}", {"x": 1}, NOW) == "1"
    code = (
        "import os, sys\nfrom datetime import datetime\nfrom jaxpaged.templates.process import shared\n"
        "ask = lambda x: shared().render('{{ x }}', {'x': x}, datetime.now())\n"
        "ask(0)\npid = os.fork()\n"
        "found = [ask([bool(pid), i]) for i in range(40)]\n"
        "right = found == [str([bool(pid), i]) for i in range(40)]\n"
        "if not pid:\n    os._exit(right)\n"
        "print(right, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.stdout.split() == ["True", "1"], ran.stderr


def test_a_lone_surrogate_and_every_plain_value_come_through(process: TemplateProcess) -> None:
    value = {"a": ["\ud800", "é😀", 1.5, float("inf"), True, None, 10**30, {1: 2}]}
    assert process.render("{{ x }}", {"x": value}, NOW) == str(value)
    assert process.render("{{ x.a[0] }}", {"x": value}, NOW) == "\ud800"


# --- calls that come out of LLM.chat ---


@pytest.fixture
def llm(ours: Tokenizer) -> LLM:
    """The part of one that is there before there is a model."""
    llm = object.__new__(LLM)
    llm.tokenizer, llm._default_params = ours, SamplingParams()
    return llm


CALLS = {
    "hermes": ('Sure.\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>', "Sure.\n"),
    "mistral": ('[TOOL_CALLS] [{"name": "now", "arguments": {}}]', None),
}


@pytest.mark.parametrize(("parser", "template"), [("hermes", QWEN25), ("mistral", MISTRAL)])
def test_calls_are_found_in_what_a_model_answers(llm: LLM, parser: str, template: str) -> None:
    text, content = CALLS[parser]
    seen: list[SamplingParams] = []

    def generate(prompts: Any, params: Any, **_: Any) -> list[RequestOutput]:
        seen.append(params)
        return [RequestOutput("0", "", [], [CompletionOutput(i, text, []) for i in range(2)], True) for _ in prompts]

    llm.generate = generate  # type: ignore[method-assign]
    params = SamplingParams(n=2, max_tokens=4)
    for name in (parser, "auto"):
        [output] = llm.chat(USER, params, tools=TOOLS, tool_call_parser=name, chat_template=template)
        for completion in output.outputs:
            [call] = completion.tool_calls or []
            assert (completion.text, completion.content) == (text, content)
            assert dataclasses.asdict(call)["function"] == {"name": "now", "arguments": "{}"}
    assert seen == [replace(params, skip_special_tokens=False)] * 2
    [output] = llm.chat(USER, params, tools=TOOLS, chat_template=template)
    assert output.outputs[0].tool_calls is None and seen[-1] == params


def test_what_a_chat_cannot_do_is_one_line(llm: LLM) -> None:
    for options, problem in [
        ({"tool_call_parser": "hermis"}, "tool_call_parser: got 'hermis', expected one of .*did you mean 'hermes'"),
        ({"tool_call_parser": "auto"}, "tool_call_parser: got 'auto', and no parser fits"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs: got list, expected names and values"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs: 'tokenize' cannot be set"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs: 'chat_template' cannot be set"),
        (
            {"tool_call_parser": "hermes", "sampling_params": SamplingParams(detokenize=False)},
            "tool_call_parser: calls are found in",
        ),
    ]:
        with pytest.raises(RequestError, match=problem):
            llm.chat(USER, **{"chat_template": CHATML, **options})  # type: ignore[arg-type]
