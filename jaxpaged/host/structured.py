"""What an output has to look like: a JSON schema, a regular expression, a choice, a grammar; and how large one may be.

Knows sizes. Refuses to know what they mean and which tokens they allow: that is `jaxpaged.structured`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from jaxpaged.config import nearest
from jaxpaged.host.checks import RequestError, shown

MAX_SOURCE_BYTES = 16 << 10  # of a schema, an expression, a grammar, or all choices together, as UTF-8
MAX_DEPTH = 64  # of objects and arrays in one another in a schema, and of brackets in an expression or a grammar
MAX_NODES = 2048  # values in a schema, and choices
KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
_OF_JSON = ("whitespace_pattern", "disable_any_whitespace", "disable_additional_properties")


class GrammarError(RequestError):
    """A grammar that is no grammar, or one that takes too much to work with. `code` is for programs to read."""

    def __init__(self, message: str, code: str = "invalid_grammar"):
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class StructuredOutputsParams:
    """What the text of an output has to be, whole: exactly one of the first six. Names and meanings are vLLM's.

    Args:
      json: a JSON schema, as a dict or as JSON text.
      regex: a regular expression that the whole text matches, in the syntax of Rust's regex, which has no looking around and no
        references back.
      choice: one of these texts.
      grammar: a context-free grammar with the rule `start` in Lark's syntax, or with `root` and `::=` in that of GBNF.
      json_object: any JSON object.
      structural_tag: as JSON text, {"structures": [{"begin": ..., "schema": ..., "end": ...}], "triggers": [...]}: free text, in
        which whatever begins with a trigger goes on as one of the structures.
      whitespace_pattern: an expression for what may stand between the parts of JSON; None allows any white space, at most 32
        characters at a place.
      disable_any_whitespace: none may.
      disable_additional_properties: an object of the schema has the properties that it names and no others, unless it says
        otherwise itself.

    Raises:
      RequestError: none or several of them, one of the wrong type, or a larger one than the limits of this module.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False

    def __new__(cls, *args: object, **options: object) -> StructuredOutputsParams:
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                raise RequestError(f"structured_outputs: unknown option {shown(name)}{nearest(str(name), known)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name in ("json_object", "disable_any_whitespace", "disable_additional_properties"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (value is None and name == "json_object"):
                raise GrammarError(f"structured_outputs.{name}: got {_named(value)}, expected True or False")
        given = [name for name in KINDS if getattr(self, name) is not None and getattr(self, name) is not False]
        if len(given) != 1:
            got = " and ".join(given) or "none"
            raise GrammarError(f"structured_outputs: got {got}, expected exactly one of {', '.join(KINDS)}")
        kind = given[0]
        if kind == "choice":
            object.__setattr__(self, kind, _checked_choice(self.choice))
        elif kind == "json":
            object.__setattr__(self, kind, _checked_json("json", self.json))
        elif kind != "json_object":
            _check_text(kind, getattr(self, kind))
            if kind == "structural_tag":
                _checked_json(kind, self.structural_tag)
            elif _bracket_depth(getattr(self, kind)) > MAX_DEPTH:
                raise _too_complex(kind, f"brackets more than {MAX_DEPTH} deep")
        if self.whitespace_pattern is not None:
            _check_text("whitespace_pattern", self.whitespace_pattern)
        for name in _OF_JSON:
            if getattr(self, name) and kind not in ("json", "json_object"):
                raise GrammarError(f"structured_outputs.{name}: is for json and json_object, and this is {kind}")
        if self.whitespace_pattern is not None and self.disable_any_whitespace:
            raise GrammarError("structured_outputs.whitespace_pattern: not with disable_any_whitespace")

    @property
    def kind(self) -> str:
        """Which of `KINDS` it is."""
        return next(name for name in KINDS if getattr(self, name) is not None and getattr(self, name) is not False)

    @property
    def given(self) -> dict[str, Any]:
        """The options that say something, as they are kept."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    @cached_property
    def key(self) -> str:
        """The same for parameters that allow the same in the same words."""
        return json.dumps(self.given, sort_keys=True)


def checked_structured_outputs(value: object) -> StructuredOutputsParams | None:
    """The option of `SamplingParams` of this name, which may also be a dict of the fields."""
    if isinstance(value, dict):
        value = StructuredOutputsParams(**{str(name): one for name, one in value.items()})
    if value is not None and not isinstance(value, StructuredOutputsParams):
        raise RequestError(f"structured_outputs: got {_named(value)}, expected StructuredOutputsParams")
    return value


def _too_complex(name: str, what: str) -> GrammarError:
    return GrammarError(f"structured_outputs.{name}: grammar_too_complex: {what}", "grammar_too_complex")


def _named(value: object) -> str:
    """A value for a message; of anything but a number only the type, since it may be endless."""
    is_short = value is None or (isinstance(value, (int, float)) and abs(value) < 1e9)
    return shown(value) if is_short else type(value).__name__


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        got = "an empty text" if value == "" else _named(value)
        raise GrammarError(f"structured_outputs.{name}: got {got}, expected a text")
    _check_size(name, value)


def _check_size(name: str, *texts: str) -> None:
    if sum(map(len, texts)) <= MAX_SOURCE_BYTES:  # before anything is made of it
        try:
            num_bytes = sum(len(text.encode()) for text in texts)
        except UnicodeEncodeError:
            raise GrammarError(f"structured_outputs.{name}: not valid Unicode text (a lone surrogate)") from None
        if num_bytes <= MAX_SOURCE_BYTES:
            return
    raise _too_complex(name, f"{sum(map(len, texts)):,} characters, the limit is {MAX_SOURCE_BYTES:,} bytes")


def _checked_choice(value: object) -> tuple[str, ...]:
    if isinstance(value, (str, bytes, bytearray)) or not isinstance(value, Seq) or not len(value):
        raise GrammarError(f"structured_outputs.choice: got {_named(value)}, expected a list of texts, at least one")
    if len(value) > MAX_NODES:
        raise _too_complex("choice", f"{len(value):,} choices, the limit is {MAX_NODES:,}")
    for one in value:
        if not isinstance(one, str) or not one:
            got = "an empty text" if one == "" else _named(one)
            raise GrammarError(f"structured_outputs.choice: got {got}, expected texts that are not empty")
    _check_size("choice", *value)
    return tuple(value)


def _checked_json(name: str, value: object) -> str:
    """A schema as JSON text, in the order in which it names its properties."""
    if isinstance(value, str):
        _check_text(name, value)
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise GrammarError(f"structured_outputs.{name}: is no JSON: {' '.join(str(error).split())[:80]}") from None
        if not isinstance(value, dict):
            raise GrammarError(f"structured_outputs.{name}: got {_named(value)}, expected an object")
    elif not isinstance(value, dict):
        raise GrammarError(f"structured_outputs.{name}: got {_named(value)}, expected a schema, as a dict or as JSON text")
    _check_values(name, value)
    text = json.dumps(value, ensure_ascii=False)
    _check_size(name, text)
    return text


def _check_values(name: str, schema: object) -> None:
    """Count before anything walks it: it may contain itself."""
    left, num_nodes, num_characters = [(schema, 1)], 0, 0
    while left:
        value, depth = left.pop()
        num_nodes += 1
        num_characters += len(value) if isinstance(value, str) else 0
        if depth > MAX_DEPTH:
            raise _too_complex(name, f"more than {MAX_DEPTH} levels")
        if isinstance(value, (dict, list, tuple)) and num_nodes + len(left) + len(value) > MAX_NODES:
            raise _too_complex(name, f"more than {MAX_NODES:,} values")
        if isinstance(value, dict):
            for key, one in value.items():
                if not isinstance(key, str):
                    raise GrammarError(f"structured_outputs.{name}: got the key {_named(key)}, expected texts as keys")
                num_characters += len(key)
                left.append((one, depth + 1))
        elif isinstance(value, (list, tuple)):
            left += [(one, depth + 1) for one in value]
        elif isinstance(value, float) and not math.isfinite(value):
            raise GrammarError(f"structured_outputs.{name}: got {value!r}, which JSON does not have")
        elif isinstance(value, int) and abs(value) >= 1 << 1024:
            raise GrammarError(f"structured_outputs.{name}: got a whole number that no float64 holds")
        elif value is not None and not isinstance(value, (str, int, float)):
            raise GrammarError(f"structured_outputs.{name}: got {_named(value)}, which JSON does not have")
        if num_characters > MAX_SOURCE_BYTES:
            raise _too_complex(name, f"{num_characters:,} characters and more, the limit is {MAX_SOURCE_BYTES:,} bytes")


def _bracket_depth(text: str) -> int:
    """How deep brackets of any kind are in one another at most, those within quotes and classes counted too."""
    depth = most = 0
    for character in re.sub(r"\\.", "", text, flags=re.DOTALL):
        if character in "([{":
            depth += 1
            most = max(most, depth)
        elif character in ")]}":
            depth = max(0, depth - 1)
    return most
