"""The same calls found slowly: by recursion, on the whole text at once, with everything known that comes later."""

from __future__ import annotations

import json

SPACE = " \t\r\n"


class Wrong(Exception):
    """No JSON from here on: `place` is the first character that cannot be there."""

    def __init__(self, place: int):
        self.place = place


class Unfinished(Exception):
    """The text ends inside."""


def char(text: str, place: int) -> str:
    if place >= len(text):
        raise Unfinished
    return text[place]


def space(text: str, place: int) -> int:
    while place < len(text) and text[place] in SPACE:
        place += 1
    return place


def literal(text: str, place: int, wanted: str) -> int:
    for one in wanted:
        if char(text, place) != one:
            raise Wrong(place)
        place += 1
    return place


def json_string(text: str, place: int) -> int:
    place = literal(text, place, '"')
    while (one := char(text, place)) != '"':
        if one < " ":
            raise Wrong(place)
        place += 1
        if one != "\\":
            continue
        if char(text, place) not in '"\\/bfnrtu':
            raise Wrong(place)
        place += 1
        for _ in range(4 if text[place - 1] == "u" else 0):
            if char(text, place) not in "0123456789abcdefABCDEF":
                raise Wrong(place)
            place += 1
    return place + 1


def digits(text: str, place: int) -> int:
    if not "0" <= char(text, place) <= "9":
        raise Wrong(place)
    while place < len(text) and "0" <= text[place] <= "9":
        place += 1
    return place


def json_number(text: str, place: int) -> int:
    place += text[place] == "-"
    place = place + 1 if char(text, place) == "0" else digits(text, place)
    if place < len(text) and text[place] == ".":
        place = digits(text, place + 1)
    if place < len(text) and text[place] in "eE":
        place += 1
        place = digits(text, place + (char(text, place) in "+-"))
    char(text, place)  # at the end of the text a number may go on
    return place


def value(text: str, place: int, depth: int, max_depth: int) -> int:
    """One past the value that begins at `place`, after white space."""
    place = space(text, place)
    first = char(text, place)
    if first in "{[":
        if depth == max_depth:
            raise Wrong(place)
        return container(text, place, depth + 1, max_depth, "}" if first == "{" else "]")
    if first == '"':
        return json_string(text, place)
    if first in "tfn":
        return literal(text, place, {"t": "true", "f": "false", "n": "null"}[first])
    if first in "-0123456789":
        return json_number(text, place)
    raise Wrong(place)


def container(text: str, place: int, depth: int, max_depth: int, closing: str) -> int:
    place = space(text, place + 1)
    if char(text, place) == closing:
        return place + 1
    while True:
        if closing == "}":
            place = space(text, json_string(text, place))
            place = literal(text, place, ":")
        place = space(text, value(text, place, depth, max_depth))
        if char(text, place) == closing:
            return place + 1
        place = space(text, literal(text, place, ","))


def call(text: str, place: int, keys: set[str], extra: set[str] | None, max_depth: int) -> tuple[int, str, str]:
    """(one past it, name, arguments) of the object after white space at `place`."""
    place = space(text, literal(text, space(text, place), "{"))
    name = arguments = None
    while True:
        end = json_string(text, place)
        key = json.loads(text[place:end])
        place = space(text, literal(text, space(text, end), ":"))
        first = char(text, place)
        is_arguments = key in keys
        if key == "name" and (first != '"' or name is not None):
            raise Wrong(place)
        if is_arguments and (first != "{" or arguments is not None):
            raise Wrong(place)
        if key != "name" and not is_arguments and extra is not None and key not in extra:
            raise Wrong(place)
        end = value(text, place, 0, max_depth)
        if key == "name":
            name = json.loads(text[place:end])
            if not 0 < len(name) <= 256 or any(0xD800 <= ord(one) < 0xE000 for one in name):
                raise Wrong(end)
        elif is_arguments:
            arguments = text[place:end]
        place = space(text, end)
        if char(text, place) == "}":
            if name is None or arguments is None:
                raise Wrong(place)
            return place + 1, name, arguments
        place = space(text, literal(text, place, ","))


Found = tuple[str, list[tuple[str, str]]]
"""The content, and name and arguments of each call."""


MARKER = {"hermes": "<tool_call>", "llama3_json": "<|python_tag|>", "mistral": "[TOOL_CALLS]"}


class Slow:
    """Goes over a whole text: `settled` characters of it are content, calls or dropped."""

    def __init__(self, text: str, name: str, max_depth: int = 64):
        self.text, self.name, self.max_depth = text, name, max_depth
        self.content, self.calls = "", []
        self.settled = 0
        self.marker = MARKER[name]

    def run(self) -> Found:
        is_beside = True  # only white space since the beginning or a call
        try:
            while self.settled < len(self.text):
                start = self.call_here() if is_beside else None
                if start is None:
                    start = self.text.find(self.marker, self.settled)
                    if start < 0:
                        break
                    self.keep(start)
                    start += len(self.marker)
                try:
                    self.take_calls(start)
                    is_beside = True
                except Wrong as wrong:
                    self.keep(wrong.place)
                    is_beside = False
        except Unfinished:
            pass
        rest = self.text[self.settled :]
        is_dropped = is_beside and self.calls and not rest.strip(SPACE)
        return self.content + ("" if is_dropped else rest), self.calls

    def keep(self, end: int) -> None:
        self.content += self.text[self.settled : end]
        self.settled = end

    def call_here(self) -> int | None:
        """Where a call goes on that begins here, after white space."""
        start = space(self.text, self.settled)
        if self.name == "llama3_json":
            if self.calls and self.text[start : start + 1] == ";":
                start = space(self.text, start + 1)
            if self.text[start : start + 1] == "{":
                return start
        return start + len(self.marker) if self.text.startswith(self.marker, start) else None

    def take_calls(self, start: int) -> None:
        """What stands behind a marker."""
        if self.name == "mistral":
            start = space(self.text, start)
            if char(self.text, start) != "[":
                return self.take_named(start)
        if self.name != "mistral":
            self.take_call(start)
            end = space(self.text, self.settled)
            if self.name == "hermes" and self.text.startswith("</tool_call>", end):
                self.settled = end + len("</tool_call>")
            return None
        while True:
            self.take_call(start + 1)
            start = space(self.text, self.settled)
            if start == len(self.text):
                return None
            if self.text[start] == "]":
                self.settled = start + 1
                return None
            if self.text[start] != ",":
                raise Wrong(start)

    def take_call(self, start: int) -> None:
        keys = {"parameters", "arguments"} if self.name == "llama3_json" else {"arguments"}
        extra = {"type", "id"} if self.name == "llama3_json" else None
        self.settled, name, arguments = call(self.text, start, keys, extra, self.max_depth)
        self.calls.append((name, arguments))

    def take_named(self, start: int) -> None:
        end = self.word(start, "_-.")
        name = self.text[start:end]
        if not name:
            raise Wrong(end)
        if char(self.text, end) != "{":
            is_args = self.text.startswith("[A", end)
            end = literal(self.text, end, "[ARGS]" if is_args else "[CALL_ID]")
            if not is_args:
                start, end = end, self.word(end, "")
                if start == end:
                    raise Wrong(end)
                end = literal(self.text, end, "[ARGS]")
        begin = space(self.text, end)
        if char(self.text, begin) != "{":
            raise Wrong(begin)
        self.settled = value(self.text, begin, 0, self.max_depth)
        self.calls.append((name, self.text[begin : self.settled]))

    def word(self, start: int, more: str) -> int:
        end = start
        while char(self.text, end).isascii() and (self.text[end].isalnum() or self.text[end] in more) and end < start + 256:
            end += 1
        return end


def slow_parse(text: str, name: str, max_depth: int = 64) -> Found:
    """Content and calls of a whole text."""
    return Slow(text, name, max_depth).run()
