"""Texts with tool calls, right and nearly right, and ways to cut them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator

from slow_tools import slow_parse

from jaxpaged.tools import Content, Event, Reply, collect, tool_parser

FORMATS = ("hermes", "llama3_json", "mistral")
WORDS = [
    "",
    " ",
    "\n",
    "Sure. ",
    "a < b",
    "[1]",
    "{",
    "}",
    "日本語 😀",
    "\\",
    '"',
    ";",
    ",",
    "x" * 40,
    "\ud7ff",
    "<|",
    "[TOOL",
    "<tool_call",
]
STRINGS = [
    "",
    "a",
    '"',
    "\\",
    "\n",
    "é😀",
    "\u2028",
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "}",
    "]};",
    "<|python_tag|>",
    "\x7f",
]
PIECES = [
    "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "{", "}", "[", "]", ",", ":", ";",
    '"', "\\", " ", "\n", "0", "-", "1.5e+3", "1e", "01", "true", "nul", "null", '"name"', '"arguments"', '"parameters"',
    '"type"', '"f"', '"\\u00e', "\\ud83d", '{"name": "f", "arguments": {', '"arguments": {}', '{"name":"g","parameters":{}}',
    '{"name": "h", "arguments": {"a": [1, {}]}}', "f", "é", "\t",
]  # fmt: skip


def a_value(rng: random.Random, depth: int = 0) -> object:
    """Any JSON value."""
    kind = rng.randrange(8 if depth < 4 else 6)
    if kind < 3:
        return "".join(rng.choices(STRINGS, k=rng.randrange(3)))
    if kind < 6:
        return rng.choice([0, -1, 10**20, 1.5, -2.5e-7, 1e300, True, False, None])
    if kind == 6:
        return [a_value(rng, depth + 1) for _ in range(rng.randrange(3))]
    return {rng.choice(STRINGS): a_value(rng, depth + 1) for _ in range(rng.randrange(3))}


def a_call(rng: random.Random) -> tuple[str, str]:
    """Name and arguments, written in one of many ways."""
    name = rng.choice(["f", "get_weather", "a.b-c", "日本", "name", "x" * 256])
    arguments = {rng.choice(["a", "name", "arguments", "é", ""]): a_value(rng) for _ in range(rng.randrange(3))}
    separators = rng.choice([(", ", ": "), (",", ":"), (" , ", " :\n")])
    options = {"indent": rng.choice([None, None, 1]), "separators": separators, "ensure_ascii": rng.random() < 0.5}
    return name, json.dumps(arguments, **options)


def written(rng: random.Random, name: str, arguments: str, key: str = "arguments", extra: bool = True) -> str:
    """The object that says a call."""
    entries = [f'"name": {json.dumps(name, ensure_ascii=rng.random() < 0.5)}', f'"{key}":{arguments}']
    if extra and rng.random() < 0.3:
        entries.append('"type": "function"')
    rng.shuffle(entries)
    space = rng.choice(["", " ", "\n"])
    return "{" + space + f"{space},{space}".join(entries) + space + "}"


def a_text(rng: random.Random, form: str) -> tuple[str, str, list[tuple[str, str]]]:
    """A text that is right, its content, and its calls."""
    calls = [a_call(rng) for _ in range(rng.randrange(1, 4))]
    space = rng.choice(["", " ", "\n", "\n\n"])
    if form == "hermes":
        words = ["", *("".join(rng.choices(["Sure.", " a < b", "\n日本 [1]"], k=rng.randrange(3))) for _ in calls)]
        text = words[0]
        for word, call in zip(words[1:], calls, strict=True):
            text += f"<tool_call>{space}{written(rng, *call)}{space}</tool_call>{space}{word}"
        # White space that a word ends or begins with is the word's, that around calls alone is nobody's.
        content = "".join(space + word if word else "" for word in words[1:])
        return text, content, calls
    if form == "llama3_json":
        key = rng.choice(["parameters", "arguments"])
        glue = rng.choice([";", "; ", " ;\n", "\n"])
        begin = space + rng.choice(["", "<|python_tag|>"])
        return begin + glue.join(written(rng, *call, key) for call in calls) + space, "", calls
    word = rng.choice(["", "Sure. ", "a [1] b"])
    if rng.random() < 0.5:
        body = f",{space}".join(written(rng, *call) for call in calls)
        return f"{word}[TOOL_CALLS]{space}[{space}{body}{space}]{space}", word, calls
    calls = [("f_1", arguments) for _, arguments in calls]
    glue = rng.choice(["[ARGS]", "", "[CALL_ID]abc123XYZ[ARGS]"])
    return word + space.join(f"[TOOL_CALLS]{name}{glue}{arguments}" for name, arguments in calls), word, calls


def a_mess(rng: random.Random, form: str) -> str:
    """A text that is nearly right, or not at all."""
    kind = rng.randrange(4)
    if kind == 0:
        return "".join(rng.choices(PIECES, k=rng.randrange(20)))
    text = "".join(a_text(rng, form)[0] + rng.choice(WORDS) for _ in range(rng.randrange(1, 3)))
    text = rng.choice(WORDS) + text
    if kind == 1:
        return text[: rng.randrange(len(text) + 1)]
    for _ in range(rng.randrange(1, 4)):
        place = rng.randrange(len(text) + 1)
        text = text[:place] + rng.choice(["", *PIECES]) + text[place + rng.randrange(3) :]
    return text


def cut(rng: random.Random, text: str) -> list[str]:
    """A text in deltas, empty ones among them."""
    longest = rng.choice([1, 2, 5, 30, 400])
    deltas, place = [], 0
    while place < len(text):
        end = place + rng.randrange(0 if rng.random() < 0.1 else 1, longest + 1)
        deltas.append(text[place:end])
        place = end
    return deltas


def counter() -> Callable[[], str]:
    """Ids that count."""
    numbers = iter(range(10**9))
    return lambda: f"call-{next(numbers)}"


def events_of(form: str, deltas: list[str], *, is_eager: bool = True) -> Iterator[Event]:
    """What a parser says of a text in deltas."""
    parser = tool_parser(form, make_id=counter(), is_eager=is_eager)
    for delta in deltas:
        yield from parser.add(delta)
    yield from parser.finish()


def found(reply: Reply) -> tuple[str, list[tuple[str, str]]]:
    """A reply as the oracle gives it."""
    return reply.content or "", [(call.function.name, call.function.arguments) for call in reply.tool_calls]


def check(rng: random.Random, form: str, text: str) -> tuple[str, list[tuple[str, str]]]:
    """All laws of one text; what was found in it."""
    expected = slow_parse(text, form)
    whole = list(events_of(form, [text]))
    told = found(collect(whole))
    if told != expected:
        raise AssertionError(f"{form} {text!r}: {told} and not {expected}")
    for deltas in (list(text), cut(rng, text)):
        for is_eager in (True, False):
            events = list(events_of(form, deltas, is_eager=is_eager))
            check_order(events, is_eager)
            if found(collect(events)) != expected:
                raise AssertionError(f"{form} {deltas!r}, {is_eager=}: {events}")
            if is_eager and collect(events) != collect(whole):
                raise AssertionError(f"{form} {deltas!r}: other ids than in one piece")
    return expected


def check_order(events: list[Event], is_eager: bool) -> None:
    """Calls start in order, one at a time, get arguments and an end, and content never stands inside one."""
    state, index = None, -1
    for event in events:
        kind = type(event).__name__
        if isinstance(event, Content):
            well = state is None and event.text != ""
        elif kind == "CallStarted":
            well, state, index = state is None and event.index == index + 1, "open", event.index
        elif kind == "ArgumentsDelta":
            well = state == "open" and event.index == index and event.text != ""
        else:
            well, state = state == "open" and event.index == index and (is_eager or kind == "CallFinished"), None
        if not well:
            raise AssertionError(f"{event} where it cannot be, in {events}")
    if state is not None:
        raise AssertionError(f"a call without an end: {events}")


def fuzz(seeds: range) -> int:
    """A right text and a mess of every format for each seed; how many texts were checked."""
    for seed in seeds:
        for form in FORMATS:
            rng = random.Random(seed)
            text, *expected = a_text(rng, form)
            if check(rng, form, text) != tuple(expected):
                raise AssertionError(f"{seed=} {form} {text!r}: not {expected}")
            check(rng, form, a_mess(rng, form))
    return 2 * len(FORMATS) * len(seeds)
