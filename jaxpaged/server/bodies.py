"""The body of a request as plain values: JSON without the freedoms that Python's reader takes, and fields that are known.

Knows JSON and names of fields. Refuses to know what they are for.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from jaxpaged.config import nearest
from jaxpaged.host.checks import shown
from jaxpaged.server.errors import ApiError

MAX_DIGITS = 400  # of a number
MAX_DEPTH = 200  # brackets in one another: whoever reads a value after us may recurse
_PYTHON = {"boolean": bool, "string": str, "array": list, "object": dict}
_EXPECTED = {"boolean": "true or false", "string": "a text", "array": "a list", "object": "an object"}


@dataclass(frozen=True)
class Body:
    """The fields that a kind of request may have, each with its JSON schema.

    Types that the schema leaves open, and all ranges, are left to whoever reads the field.
    """

    fields: Mapping[str, Mapping[str, Any]]
    required: tuple[str, ...] = ()

    def parse(self, raw: bytes) -> dict[str, Any]:
        """The fields that are there and not null.

        Raises:
          ApiError: it is no JSON, no object, or has a field that is unknown or of another type.
        """
        found = parse_json(raw)
        if not isinstance(found, dict):
            raise ApiError(
                400, f"the body: got {_EXPECTED.get(_kind(found) or '', 'a number')}, expected an object", code="invalid_json"
            )
        for name, value in found.items():
            if name not in self.fields:
                hint = nearest(name, list(self.fields)) if len(name) < 64 else ""
                raise ApiError(400, f"unknown field {shown(name)}{hint}", param=name[:64], code="unknown_field")
            kind = self.fields[name].get("type")
            if value is not None and kind in _PYTHON and not isinstance(value, _PYTHON[kind]):
                raise ApiError(400, f"{name}: got {shown(value)}, expected {_EXPECTED[kind]}", param=name)
        for name in self.required:
            if found.get(name) is None:
                raise ApiError(400, f"{name}: missing", param=name, code="missing_field")
        return {name: value for name, value in found.items() if value is not None}

    @property
    def schema(self) -> dict[str, Any]:
        """For the OpenAPI document. A field that is not required may be null: it is as if it were not there."""
        properties = {name: dict(one) if name in self.required else _or_null(one) for name, one in self.fields.items()}
        return {"type": "object", "properties": properties, "required": list(self.required), "additionalProperties": False}


def _or_null(schema: Mapping[str, Any]) -> dict[str, Any]:
    if "type" in schema:
        return {**schema, "type": [schema["type"], "null"]}
    return {**schema, "anyOf": [*schema["anyOf"], {"type": "null"}]}


def parse_json(raw: bytes) -> Any:
    """A JSON document, strictly: UTF-8, no NaN, no name twice in an object, no number that overflows, no more than MAX_DEPTH
    brackets in one another. Raises ApiError.
    """
    try:
        found = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_int=_whole,
            parse_float=_decimal,
        )
        if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH and _is_deeper(found, MAX_DEPTH):
            raise RecursionError
        return found
    except UnicodeDecodeError:
        raise ApiError(400, "the body is not UTF-8", code="invalid_json") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deep", code="invalid_json") from None
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body is no JSON: {error.msg} at character {error.pos}", code="invalid_json") from None


def _is_deeper(value: Any, limit: int) -> bool:
    """Whether more lists and objects than that are in one another."""
    level = [value] if isinstance(value, (list, dict)) else []
    while level and limit:
        limit -= 1
        values = (one.values() if isinstance(one, dict) else one for one in level)
        level = [child for several in values for child in several if isinstance(child, (list, dict))]
    return bool(level)


_dumped = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def dump_json(value: Any) -> bytes:
    """The JSON text of an answer. What is no character, half of a surrogate pair, is written as an escape."""
    return _dumped(value).encode("utf-8", "backslashreplace")


def _kind(value: Any) -> str | None:
    return next((name for name, kind in _PYTHON.items() if isinstance(value, kind)), None)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise ApiError(400, f"{shown(twice)} is in an object twice", param=twice[:64], code="invalid_json")
    return found


def _constant(text: str) -> NoReturn:
    raise ApiError(400, f"the body is no JSON: {text} is no number", code="invalid_json")


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ApiError(400, f"a number of {len(text):,} digits, the limit is {MAX_DIGITS}", code="invalid_json")
    return int(text)


def _decimal(text: str) -> float:
    if len(text) > MAX_DIGITS or not math.isfinite(found := float(text)):
        raise ApiError(400, f"the number {shown(text)} is too large", code="invalid_json")
    return found
