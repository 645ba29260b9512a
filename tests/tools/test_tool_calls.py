"""Laws of tool calls in a text that grows: the same however it comes, nothing lost, and no more work than characters."""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
from slow_tools import Unfinished, Wrong, slow_parse, value
from tool_texts import FORMATS, a_mess, a_text, check, counter, events_of, found

from jaxpaged.tools import (
    ArgumentsDelta,
    CallDropped,
    CallFinished,
    CallStarted,
    Content,
    UnknownParserError,
    collect,
    fitting_parser,
    parse,
    tool_parser,
)
from jaxpaged.tools import parser as parser_file
from jaxpaged.tools.scanner import MAX_DEPTH, Status, ValueScanner

FOLDER = Path(parser_file.__file__).parent
BEGIN = {"hermes": "<tool_call>", "llama3_json": "<|python_tag|>", "mistral": "[TOOL_CALLS]["}
FINISHED = {
    "hermes": '<tool_call>{"name":"f","arguments":{}}</tool_call>',
    "llama3_json": '{"name":"f","parameters":{}};',
    "mistral": "[TOOL_CALLS]f[ARGS]{}",
}
KEY = {"hermes": "arguments", "llama3_json": "parameters", "mistral": "arguments"}


def nested(depth: int) -> str:
    """Arguments with so many brackets open at once."""
    return '{"a":' * (depth - 1) + "{}" + "}" * (depth - 1)


# --- right and nearly right texts ---


@pytest.mark.parametrize("form", FORMATS)
def test_calls_that_were_written_are_found(form: str) -> None:
    for seed in range(250):
        rng = random.Random(seed)
        text, content, calls = a_text(rng, form)
        assert check(rng, form, text) == (content, calls), text
        for _, arguments in calls:
            assert isinstance(json.loads(arguments), dict)


@pytest.mark.parametrize("form", FORMATS)
def test_whatever_a_model_writes(form: str) -> None:
    num_calls = num_contents = 0
    for seed in range(300):
        rng = random.Random(seed)
        content, calls = check(rng, form, a_mess(rng, form))
        num_calls, num_contents = num_calls + len(calls), num_contents + bool(content)
    assert num_calls > 70 and num_contents > 70  # the texts are neither all right nor all wrong


WHOLE = [
    ("hermes", 'a\n<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>', "a\n", [("f", '{"x": 1}')]),
    ("hermes", ' <tool_call>{"arguments": {}, "name": "f"}</tool_call> ', "", [("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {}}', "", [("f", "{}")]),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {}}<tool_call>{"name": "g", "arguments": {}}',
        "",
        [("f", "{}"), ("g", "{}")],
    ),
    ("hermes", '<tool_call>{"name": "f", "thought": [1], "arguments": {}}</tool_call>', "", [("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {}}}</tool_call>', "}</tool_call>", [("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', None, []),
    ("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>', None, []),
    ("hermes", '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>', None, []),
    ("hermes", '<tool_call>{"name": "f", "name": "g", "arguments": {}}</tool_call>', None, []),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>', None, []),
    ("hermes", '<tool_call>{"name": "f", "arguments": {}, "arguments": {}}</tool_call>', None, []),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"x": [1,]}}</tool_call>', None, []),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1,}}</tool_call>', None, []),
    ("hermes", '<tool_call>{"name": "f", "arguments": {},}</tool_call>', None, []),
    ("hermes", '<tool_call>{,"name": "f", "arguments": {}}</tool_call>', None, []),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>', None, []),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"x": "', None, []),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"x": "<tool_call>{}</tool_call>"}}',
        "",
        [("f", '{"x": "<tool_call>{}</tool_call>"}')],
    ),
    ("hermes", "<tool_cal", None, []),
    ("hermes", " \n", None, []),
    ("hermes", '{"name": "f", "arguments": {}}', None, []),
    ("llama3_json", '{"name": "f", "parameters": {}}', "", [("f", "{}")]),
    (
        "llama3_json",
        '{"type": "function", "name": "f", "parameters": {}}; {"name": "g", "arguments": {}}',
        "",
        [("f", "{}"), ("g", "{}")],
    ),
    ("llama3_json", 'Sure. <|python_tag|>{"name": "f", "parameters": {}}', "Sure. ", [("f", "{}")]),
    ("llama3_json", 'Sure. {"name": "f", "parameters": {}}', None, []),
    ("llama3_json", '{"name": "Bob", "age": 3}', None, []),
    ("llama3_json", '<|python_tag|>brave_search.call(query="x")', None, []),
    ("llama3_json", '{"name": "f", "parameters": {}}; and more', "; and more", [("f", "{}")]),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]', "", [("f", "{}"), ("g", "{}")]),
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {}}, {"name": 1}] b', ', {"name": 1}] b', [("f", "{}")]),
    ("mistral", '[TOOL_CALLS]f[ARGS]{"x": 1}[TOOL_CALLS]g[ARGS]{}', "", [("f", '{"x": 1}'), ("g", "{}")]),
    ("mistral", '[TOOL_CALLS]f{"x": 1}', "", [("f", '{"x": 1}')]),
    ("mistral", "[TOOL_CALLS][]", None, []),
    ("mistral", "[TOOL_CALLS]f(x=1)", None, []),
    ("mistral", "[TOOL_CALLS]" + "f" * 257 + "[ARGS]{}", None, []),
]


@pytest.mark.parametrize(("form", "text", "content", "calls"), WHOLE)
def test_known_texts(form: str, text: str, content: str | None, calls: list[tuple[str, str]]) -> None:
    """None: all of it is content."""
    expected = (text if content is None else content, calls)
    assert check(random.Random(0), form, text) == expected


@pytest.mark.parametrize("form", FORMATS)
def test_every_split_of_escapes_and_markers(form: str) -> None:
    arguments = r'{"\u00e9\\\"": "\ud83d\ude00 <tool_call></tool_call>[TOOL_CALLS] }]; \/\b", "n": [-0.5E+10, true, null]}'
    text = f'{BEGIN[form]}{{"n\\u0061me": "\\u0066\\"", "{KEY[form]}": {arguments}}}'
    for place in range(len(text)):
        for deltas in ([text[:place], text[place:]], [text[:place], text[place : place + 1], text[place + 1 :]]):
            assert found(collect(events_of(form, deltas))) == ("", [('f"', arguments)])
        prefix = collect(events_of(form, [text[:place]]))
        assert (prefix.content or "", prefix.tool_calls) == (text[:place], [])


# --- JSON ---


def test_the_scanner_and_json_agree() -> None:
    """Python's json takes NaN, Infinity and -Infinity too, and deeper brackets, which the texts here do not have."""
    rng = random.Random(1)
    pieces = [
        '"',
        "\\",
        "u00e9",
        "{",
        "}",
        "[",
        "]",
        ":",
        ",",
        "1",
        "0",
        "-",
        ".",
        "e",
        "+",
        "true",
        "null",
        " ",
        "a",
        "\x01",
        "é",
        '"a"',
    ]
    num_right = 0
    for _ in range(20_000):
        text = "".join(rng.choices(pieces, k=rng.randrange(1, 9)))
        scanner, place = ValueScanner(), 0
        while place < len(text) and scanner.status is Status.OPEN:
            place = scanner.feed(text, place, place + 1)  # never stands still: one character ends one number at most
            if scanner.status is Status.OPEN and place < len(text):
                assert place > 0
        ended = ValueScanner()
        end = ended.feed(text + " ", 0, len(text) + 1)
        try:
            json.loads(text)
            is_json = True
        except ValueError:
            is_json = False
        assert is_json == (ended.status is Status.DONE and not text[end:].strip(" \t\r\n")), text
        try:
            slow: int | None = value(text + " ", 0, 0, MAX_DEPTH)
        except Wrong as wrong:
            slow = wrong.place
        except Unfinished:
            slow = len(text) + 1
        assert slow == end, text
        num_right += is_json
    assert num_right > 200


# --- what is given when ---


def test_arguments_are_given_as_they_come() -> None:
    text = 'Hi <tool_call>{"name": "f", "arguments": {"x": "ab"}}</tool_call>'
    parser = tool_parser("hermes", make_id=counter())
    given = [(char, event) for char in text for event in parser.add(char)]
    assert given[:3] == [(char, Content(char)) for char in "Hi "]
    assert given[3:5] == [("{", CallStarted(0, "call-0", "f")), ("{", ArgumentsDelta(0, "{"))]
    assert given[5:-1] == [(char, ArgumentsDelta(0, char)) for char in '"x": "ab"}']
    assert given[-1] == ("}", CallFinished(0)) and parser.finish() == []


def test_content_is_held_back_only_while_a_call_is_possible() -> None:
    parser = tool_parser("hermes")
    assert parser.add("a <tool") == [Content("a ")]
    assert parser.add("s") == [Content("<tool"), Content("s")]
    assert parser.add("<tool_call>") == []
    assert parser.add(" {") == []
    assert parser.add("'") == [Content("<tool_call> {"), Content("'")]
    llama = tool_parser("llama3_json")
    assert llama.add('{"answer"') == []
    assert llama.add(":") == []
    assert llama.add(" 4") == [Content('{"answer": '), Content("4")]  # the key that no call has


def test_a_call_that_breaks_off_is_content() -> None:
    parser = tool_parser("hermes", make_id=counter())
    text = '<tool_call>{"name": "f", "arguments": {"x": 1'
    assert parser.add(text) == [CallStarted(0, "call-0", "f"), ArgumentsDelta(0, '{"x": 1')]
    assert parser.finish() == [CallDropped(0), Content(text)]
    patient = tool_parser("hermes", make_id=counter(), is_eager=False)
    assert patient.add(text) == [] and patient.finish() == [Content(text)]


# --- ids ---


def test_ids_are_those_of_vllm() -> None:
    def ids(form: str, seed: int) -> list[str]:
        text = BEGIN[form] + f'{{"name": "f", "{KEY[form]}": {{}}}}'
        rng = random.Random(seed)
        return [parse(text, form, rng=rng).tool_calls[0].id for _ in range(3)]

    for form in FORMATS:
        assert ids(form, 1) == ids(form, 1) != ids(form, 2)
        assert len(set(ids(form, 1))) == 3
    assert all(len(one) == 9 and one.isalnum() and one.isascii() for one in ids("mistral", 0))
    assert all(one.startswith("chatcmpl-tool-") and len(one) == 46 for one in ids("hermes", 0))
    assert (
        parse("[TOOL_CALLS]f[CALL_ID]abc[ARGS]{}[TOOL_CALLS]f[ARGS]{}", "mistral", make_id=lambda: "own").tool_calls[0].id
        == "abc"
    )
    assert (
        parse("[TOOL_CALLS]f[CALL_ID]abc[ARGS]{}[TOOL_CALLS]f[ARGS]{}", "mistral", make_id=lambda: "own").tool_calls[1].id
        == "own"
    )


def test_a_call_as_openai_writes_it() -> None:
    [call] = parse('{"name": "f", "parameters": {"a": 1}}', "llama3_json", make_id=lambda: "i").tool_calls
    assert dataclasses.asdict(call) == {"id": "i", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


# --- hostile texts ---


@pytest.mark.parametrize("form", FORMATS)
def test_depth_and_length_are_limited(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def text(arguments: str) -> str:
        return f'{BEGIN[form]}{{"name": "f", "{KEY[form]}": {arguments}}}'

    for depth, is_call in ((MAX_DEPTH, True), (MAX_DEPTH + 1, False), (20_000, False)):
        assert bool(parse(text(nested(depth)), form).tool_calls) is is_call
    monkeypatch.setattr(parser_file, "MAX_CALL_LEN", 200)
    for length in range(190, 210):
        one = text(json.dumps({"x": "y" * (length - 33 - len(KEY[form]) + 9)}))
        num = len(one) - len(BEGIN[form])
        for deltas in ([one], list(one)):
            reply = collect(events_of(form, deltas))
            assert (len(reply.tool_calls), reply.content) == ((1, None) if num <= 200 else (0, one)), num


HOSTILE = {
    "markers": lambda n, form: BEGIN[form] * (n // len(BEGIN[form])),
    "half markers": lambda n, form: BEGIN[form][:-1] * (n // len(BEGIN[form])),
    "unfinished calls": lambda n, form: (BEGIN[form] + '{"name": "f", "arguments": {"a": "') * (n // 45),
    "a call in a call": lambda n, form: (BEGIN[form] + '{"a": ') * (n // 17),
    "wrong at the end": lambda n, form: (BEGIN[form] + '{"name": "f", "arguments": {"a": [1,2]}, ]') * (n // 53),
    "brackets": lambda n, form: BEGIN[form] + '{"a": ' + "[" * n,
    "white space": lambda n, form: " " * n,
    "white space in a call": lambda n, form: BEGIN[form] + "{" + " " * n + "]",
    "escapes": lambda n, form: BEGIN[form] + '{"a": "' + "\\\\" * (n // 2),
    "unicode escapes": lambda n, form: BEGIN[form] + '{"a": "' + "\\u00e9" * (n // 6) + "\\u00",
    "digits": lambda n, form: BEGIN[form] + '{"a": ' + "1" * n,
    "finished calls": lambda n, form: FINISHED[form] * (n // 40),
    # What made the regular expressions of CVE-2025-48887 backtrack.
    "CVE-2025-48887": lambda n, form: "[A(A=" + "\t)A(A=,\t" * (n // 8),
    "CVE-2025-48887 in JSON": lambda n, form: BEGIN[form] + '{"name": "a", "arguments": {' + '"a": {"a": ' * (n // 11),
}


class CountedText(str):
    """A text that counts the characters that were looked for or copied in it."""

    work = 0

    def find(self, *args: Any) -> int:
        found = super().find(*args)
        CountedText.work += (len(self) if found < 0 else found) - args[1]
        return found

    def __getitem__(self, key: Any) -> str:
        piece = super().__getitem__(key)
        CountedText.work += len(piece)
        return piece


def lines_of(run: Callable[[], object]) -> int:
    """Lines of jaxpaged.tools that run."""
    lines = 0

    def is_ours(code: CodeType) -> bool:
        return Path(code.co_filename).parent == FOLDER

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return trace if is_ours(frame.f_code) else None

    def count(code: CodeType, _: int) -> None:
        nonlocal lines
        lines += is_ours(code)

    if sys.version_info < (3, 12):
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            run()
        finally:
            sys.settrace(before)
        return lines
    monitoring = sys.monitoring  # what settrace is built on there, which takes fifty times as long
    monitoring.use_tool_id(monitoring.PROFILER_ID, "lines")
    monitoring.register_callback(monitoring.PROFILER_ID, monitoring.events.LINE, count)
    monitoring.set_events(monitoring.PROFILER_ID, monitoring.events.LINE)
    try:
        run()
    finally:
        monitoring.set_events(monitoring.PROFILER_ID, 0)
        monitoring.register_callback(monitoring.PROFILER_ID, monitoring.events.LINE, None)
        monitoring.free_tool_id(monitoring.PROFILER_ID)
    return lines


def work_of(form: str, text: str) -> int:
    """Lines that one text in one piece makes run, and the characters touched by what those lines call."""
    CountedText.work, one = 0, tool_parser(form, make_id=lambda: "id")
    return lines_of(lambda: (one.add(CountedText(text)), one.finish())) + CountedText.work


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", HOSTILE)
def test_work_is_linear(form: str, name: str) -> None:
    small, large = HOSTILE[name](500, form), HOSTILE[name](2000, form)
    work = work_of(form, large)
    assert len(large) <= work <= 60 * len(large) + 300
    assert work <= 1.15 * len(large) / len(small) * work_of(form, small) + 500


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_of_a_hostile_text_is_lost(form: str, name: str) -> None:
    text = HOSTILE[name](3000, form)
    assert check(random.Random(0), form, text) == slow_parse(text, form)


def test_a_megabyte() -> None:
    text = "<tool_call" * 100_000
    reply = parse(text, "hermes")
    assert (reply.content, reply.tool_calls) == (text, [])
    text = '<tool_call>{"name": "f", "arguments": {"x": "' + "<tool_call>" * 30_000 + '"}}'
    assert len(parse(text, "hermes").tool_calls[0].function.arguments) == 330_009


# --- which parser ---


def test_parsers_have_names() -> None:
    for name in ("hermis", "", None, 3):
        with pytest.raises(UnknownParserError, match=r"tool_call_parser: got .*, expected one of hermes, ") as error:
            tool_parser(name)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)
    with pytest.raises(UnknownParserError, match="did you mean 'hermes'"):
        parse("", "hermis")


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("... within <tool_call></tool_call> XML tags: ...", "hermes"),
        ("<tool_call>\n<function=name>", None),
        ("{{ '[TOOL_CALLS]' }}", "mistral"),
        ('{{ "<|start_header_id|>" }} {"name": function name, "parameters": dictionary}', "llama3_json"),
        ("{{ '<|start_header_id|>' }}{{ message.content }}", None),
        ("{{ messages }}", None),
        (None, None),
    ],
)
def test_the_parser_that_fits_a_template(template: str | None, name: str | None) -> None:
    assert fitting_parser(template) == name
