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


def _next(text: str, marker: str, place: int) -> int:
    found = text.find(marker, place)
    return len(text) if found < 0 else found


def slow_parse(text: str, name: str, max_depth: int = 64) -> Found:
    """Content and calls of a whole text."""
    content, calls = "", []
    marker = {"hermes": "<tool_call>", "llama3_json": "<|python_tag|>", "mistral": "[TOOL_CALLS]"}[name]
    place = 0  # all before it is settled
    is_beside = True  # only white space since a call or the beginning
    while place < len(text):
        start = space(text, place) if is_beside else place
        if is_beside and name == "llama3_json" and calls and text[start : start + 1] == ";":
            start = space(text, start + 1)
        if is_beside and name == "llama3_json" and text[start : start + 1] == "{":
            begin = start
        else:
            start = _next(text, marker, start)
            begin = start + len(marker)
            piece = text[place:start]
            is_separator = is_beside and bool(calls) and name == "llama3_json" and start < len(text) and piece.strip(SPACE) == ";"
            if (piece.strip(SPACE) and not is_separator) or not is_beside:
                content += piece
                place = start
            if start == len(text):
                break
        try:
            place, found = slow_calls(text, begin, name, max_depth)
            calls += found
            is_beside = True
        except Unfinished:
            return content + text[place:], calls
        except Wrong as wrong:
            content, place, is_beside = content + text[place : wrong.place], wrong.place, False
    rest = text[place:]
    return content + (rest if rest.strip(SPACE) or not calls else ""), calls


def slow_calls(text: str, place: int, name: str, max_depth: int) -> tuple[int, list[tuple[str, str]]]:
    """What the marker before `place` says, and one past what belongs to it."""
    if name == "hermes":
        place, *found = call(text, place, {"arguments"}, None, max_depth)
        end = space(text, place)
        return (end + 12 if text.startswith("</tool_call>", end) else place), [tuple(found)]
    if name == "llama3_json":
        place, *found = call(text, place, {"parameters", "arguments"}, {"type", "id"}, max_depth)
        return place, [tuple(found)]
    raise NotImplementedError(name)
