"""Random forms of text: JSON schemas and regular expressions whose outputs can be checked by others, and grammars meant to harm.

Every form ends by itself, so that an output is judged for what it is and not for how long it may get.
"""

from __future__ import annotations

import json
import random
import re
import string
from collections.abc import Callable, Iterator
from typing import Any

from jaxpaged.host.structured import StructuredOutputsParams

_HUGE = "x" * 10**7
_WORDS = (
    "name",
    "age",
    "city_of_birth",
    "tags",
    "is_active",
    "price",
    "unit",
    "comment",
    "owner",
    "created_at",
    "größe",
    "items",
)


def schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    """A JSON schema of bounded texts, lists and depth."""
    kinds: list[Callable[[], dict[str, Any]]] = [
        lambda: {"type": "string", "maxLength": rng.randrange(1, 12)},
        lambda: {"type": "string", "pattern": f"^{expression(rng, 1)}$"},
        lambda: {"type": "integer", "minimum": (low := rng.randrange(-50, 50)), "maximum": low + rng.randrange(0, 2000)},
        lambda: {"type": "number", "minimum": 0, "maximum": rng.randrange(1, 9), "multipleOf": 0.25},  # or it may go on for ever
        lambda: {"type": "boolean"},
        lambda: {"type": "null"},
        lambda: {"enum": [rng.choice([word, number, None, True]) for number, word in enumerate(rng.sample(_WORDS, 4))]},
        lambda: {"const": rng.choice([*_WORDS, 7, {"a": [1, 2]}])},
    ]
    if depth:
        kinds += 3 * [lambda: _object(rng, depth), lambda: _list(rng, depth)]
        kinds.append(lambda: {"anyOf": [schema(rng, depth - 1) for _ in range(rng.randrange(2, 4))]})
    return rng.choice(kinds)()


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(_WORDS, rng.randrange(1, 5))
    required = [name for name in names if rng.random() < 0.8]
    properties = {name: schema(rng, depth - 1) for name in names}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _list(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randrange(3)
    return {"type": "array", "items": schema(rng, depth - 1), "minItems": least, "maxItems": least + rng.randrange(3)}


def expression(rng: random.Random, depth: int = 3) -> str:
    """A regular expression that Python and Rust read alike, of a bounded text that is not empty."""
    atoms = ["[a-z]", "[0-9]", "[^a-zA-Z ]", "x", "ab", "\\.", "é", "[A-F0-9_]"]
    parts = []
    for _ in range(rng.randrange(1, 4)):
        atom = rng.choice(atoms)
        if depth and rng.random() < 0.4:
            atom = "(" + "|".join(expression(rng, depth - 1) for _ in range(rng.randrange(1, 4))) + ")"
        least = rng.randrange(1, 3)
        parts.append(atom + rng.choice(["", "", "?", f"{{{least},{least + rng.randrange(4)}}}", f"{{{least}}}"]))
    return rng.choice(atoms) + "".join(parts)


def choices(rng: random.Random) -> tuple[str, ...]:
    """Texts, some of which begin others."""
    letters = string.ascii_letters + string.digits + " \"\\'\n/é日😀{}[]|"
    found = ["".join(rng.choice(letters) for _ in range(rng.randrange(1, 10))) for _ in range(rng.randrange(1, 6))]
    return (*found, found[0] + rng.choice(letters))


def form(rng: random.Random) -> StructuredOutputsParams:
    """Any of these."""
    kind = rng.randrange(3)
    if kind == 0:
        options: dict[str, Any] = rng.choice([{}, {"disable_any_whitespace": True}, {"whitespace_pattern": " ?"}])
        return StructuredOutputsParams(json=schema(rng), **options)
    if kind == 1:
        return StructuredOutputsParams(regex=expression(rng))
    return StructuredOutputsParams(choice=choices(rng))


def problem(form: StructuredOutputsParams, text: str) -> str | None:
    """What is wrong with a text of this form, by Python's `re` or by `jsonschema`, which has to be there; None if nothing is."""
    if form.regex is not None:
        return None if re.fullmatch(form.regex, text) else f"{text!r} does not match {form.regex!r}"
    if form.choice is not None:
        return None if text in form.choice else f"{text!r} is none of {form.choice!r}"
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    try:
        value = json.loads(text)
    except ValueError as error:
        return f"{text!r}: {error}"
    if form.json_object:
        return None if isinstance(value, dict) else f"{text!r} is no object"
    error = best_match(Draft202012Validator(json.loads(str(form.json))).iter_errors(value))
    return None if error is None else f"{text!r}: {error.message}"


def hostile(rng: random.Random) -> Iterator[dict[str, Any]]:
    """Options of StructuredOutputsParams that nobody means well with, without end."""
    while True:
        for make in _HOSTILE:
            yield make(rng)


def _deep(rng: random.Random, inner: Any, wrap: Callable[[Any], Any], most: int) -> Any:
    for _ in range(rng.randrange(2, most)):
        inner = wrap(inner)
    return inner


def _itself(rng: random.Random) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "object"}
    found[rng.choice(["properties", "items", "not"])] = {"a": found}
    return found


def _repeated(rng: random.Random) -> str:
    found = rng.choice(["a", "(a|b)", ".", "\\w", "\\p{L}", "(.*a)"])
    for _ in range(rng.randrange(1, 6)):
        found = f"({found}{{1,{rng.choice([10, 100, 1000, 10**6])}}}{rng.choice(['', 'b?', 'c'])})"
    return found


def _garbage(rng: random.Random, count: int) -> str:
    return "".join(rng.choice("()[]{}|*+?\\^$.-,:\"'#/~%&@ \n\0aA0éÿ\ud800😀") for _ in range(count))


def _rules(rng: random.Random) -> str:
    """Rules that name one another at random, themselves first or not at all."""
    names = [f"r{number}" for number in range(rng.randrange(2, 60))]

    def body() -> str:
        words = rng.choices([*names, '"a"', "/[a-z]*/", '""', "/.*/", "T"], k=rng.randrange(1, 6))
        return " ".join(words) + rng.choice(["", "", "*", "{1,1000}", "?"])

    lines = [f"{name}: {' | '.join(body() for _ in range(rng.randrange(1, 4)))}" for name in ["start", *names]]
    return "\n".join([*lines, f"T: /{_repeated(rng)}/"])


def _union(rng: random.Random) -> dict[str, Any]:
    some = [
        {"properties": {f"k{number}{other}": {"type": "string"} for other in range(4)}} for number in range(rng.randrange(4, 60))
    ]
    return {rng.choice(["anyOf", "allOf", "oneOf"]): some}


def _refs(rng: random.Random) -> dict[str, Any]:
    names = [f"d{number}" for number in range(rng.randrange(1, 12))]

    def body() -> dict[str, Any]:
        one = {"$ref": f"#/$defs/{rng.choice(names)}"}
        return rng.choice(
            [one, {"allOf": [one, one]}, {"anyOf": [one, {"type": "null"}]}, {"items": one}, {"properties": {"a": one}}]
        )

    return {"$defs": {name: body() for name in names}, "$ref": rng.choice(["#", "#/$defs/d0", "#/$defs/none", "http://x/y"])}


_HOSTILE: tuple[Callable[[random.Random], dict[str, Any]], ...] = (
    lambda rng: {"regex": _repeated(rng)},
    lambda rng: {"regex": "(" * rng.randrange(1, 8000) + ")" * 8000},
    lambda rng: {"regex": "(a|b)*a" + "(a|b)" * rng.randrange(1, 3000)},
    lambda rng: {"regex": "|".join(_repeated(rng) for _ in range(rng.randrange(1, 200)))[:16000]},
    lambda rng: {"regex": _garbage(rng, rng.randrange(1, 200))},
    lambda rng: {
        "regex": rng.choice(["(?=a)b", "(a)\\1", "\\bfoo", "(?<!x)y", "a\0b", "\ud800", "[", "*", "a{9999999999}", "(?P<n>"])
    },
    lambda rng: {"regex": _HUGE},
    lambda rng: {"regex": rng.choice([b"a", 7, ["a"], {}, "", object(), 1.5])},
    lambda rng: {"json": _deep(rng, {}, lambda one: {"properties": {"a": one}}, 500)},
    lambda rng: {"json": "[" * rng.randrange(1, 16000)},
    lambda rng: {"json": '{"a":' * rng.randrange(1, 3000)},
    lambda rng: {"json": _itself(rng)},
    lambda rng: {"json": _union(rng)},
    lambda rng: {"json": _refs(rng)},
    lambda rng: {"json": {"type": rng.choice(["foo", 7, [], [7], None, {}, True]), "items": rng.choice([7, "a", [[]]])}},
    lambda rng: {"json": {"type": "string", "pattern": rng.choice([_repeated(rng), _garbage(rng, 50), 7, None])}},
    lambda rng: {"json": {"type": "string", rng.choice(["minLength", "maxLength"]): rng.choice([-1, 10**6, 10**30, 1.5, "7"])}},
    lambda rng: {"json": {"type": "array", rng.choice(["minItems", "maxItems"]): rng.choice([-1, 10**9, 10**400, None])}},
    lambda rng: {"json": {"multipleOf": rng.choice([0, -1, 1e-300, 10**9 + 7]), "type": "integer", "minimum": 10**17}},
    lambda rng: {"json": {"enum": [_garbage(rng, 5) for _ in range(rng.randrange(5000))]}},
    lambda rng: {"json": {"const": rng.choice(["\ud800", float("nan"), float("inf"), 10**5000, b"", object(), _HUGE])}},
    lambda rng: {"json": {rng.choice([7, None, ("a",), "\ud800"]): {}}},
    lambda rng: {
        "json": {"patternProperties": {_repeated(rng): {}, _garbage(rng, 9): {}}, "additionalProperties": {"$ref": "#"}}
    },
    lambda rng: {
        "json": rng.choice([b"{}", 7, [], "nul", "{", "NaN", '{"a": 1e999}', '{"a": ' + "9" * 9000 + "}", "\ud800", ""])
    },
    lambda rng: {"grammar": _rules(rng)},
    lambda rng: {
        "grammar": rng.choice(["start: start", "start: start start | ", "start: a\na: b\nb: a", "start:", "x", "%", "start: @x"])
    },
    lambda rng: {"grammar": "root ::= " + rng.choice(["root", "root root | ", "(" * 60, "[a-", '"a"{1,99999999}', "x" * 9000])},
    lambda rng: {"grammar": 'start: x\nx: "a"' + ' | "a" x x' * rng.randrange(1, 900)},
    lambda rng: {"grammar": _garbage(rng, rng.randrange(1, 500))},
    lambda rng: {"choice": rng.choice([[], [""], "abc", [7], [None], ["\ud800"], ["a"] * 10**5, [_HUGE], {}, 7])},
    lambda rng: {
        "structural_tag": rng.choice(["{}", "[]", '{"structures": [{}], "triggers": []}', _garbage(rng, 20), 7, "{" * 9000])
    },
    lambda rng: {"regex": "a", "json": {}},
    lambda rng: {"json_object": True, "whitespace_pattern": rng.choice([_repeated(rng), "(", 7, "", ".*"])},
    lambda rng: {rng.choice(["jsn", "regexp", "lark", "whitespace", "\ud800"]): "a"},
)
