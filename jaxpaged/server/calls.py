"""Tool calls of a chat: what `tool_choice` makes of the sampling, and the message that comes of the text.

Knows OpenAI's messages and deltas. How models write calls is the business of `jaxpaged.tools`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from jaxpaged.host.checks import shown
from jaxpaged.host.request import RequestError, SamplingParams
from jaxpaged.prompts import parser_meant, with_special_tokens
from jaxpaged.server.ids import new_id
from jaxpaged.tokenizer import Tokenizer
from jaxpaged.tools import Content, collect, tool_parser

_ANY_ARGUMENTS = {"type": "object"}


class Reader(Protocol):
    """Takes the text of one output piece by piece, and gives deltas of an assistant's message."""

    @property
    def has_calls(self) -> bool:
        """Whether it has given a call that finish_reason is to tell of."""
        ...

    def take(self, text: str, *, is_last: bool) -> dict[str, Any]:
        """What this much more text says: {} for nothing yet."""
        ...


@dataclass(frozen=True)
class Choice:
    """How a chat's answers may use tools: `kind` is none, auto, required or named."""

    kind: str
    params: SamplingParams
    parser: str | None = None
    name: str | None = None
    is_parallel: bool = True

    def reader(self, make_id: Callable[[], str] | None = None) -> Reader:
        """A fresh one for one output."""
        make_id = make_id or _new_id
        if self.kind == "named":
            return _NamedCall(self.name or "", make_id)
        if self.kind == "required":
            return _ListedCalls(make_id)
        return _Parsed(self.parser, self.is_parallel) if self.parser is not None else _Text()


def choose(body: Mapping[str, Any], params: SamplingParams, tokenizer: Tokenizer, parser: str) -> Choice:
    """What `tools`, `tool_choice` and `parallel_tool_calls` ask for. Raises RequestError."""
    tools, wish = body.get("tools"), body.get("tool_choice")
    is_parallel = body.get("parallel_tool_calls", True)
    if not tools:
        if wish not in (None, "none", "auto"):
            raise RequestError("tool_choice: only with tools")
        return Choice("none", params)
    functions = [_function(tool, place) for place, tool in enumerate(tools)]
    if wish in (None, "auto"):
        found = parser_meant(parser, tokenizer.chat_template(has_tools=True))
        return Choice("auto", with_special_tokens(params), parser=found, is_parallel=is_parallel)
    if wish == "none":
        return Choice("none", params)
    if params.structured_outputs is not None:
        raise RequestError("tool_choice: not with response_format or structured_outputs, which say what comes")
    if wish == "required":
        calls = [_call_schema(function) for function in functions]
        form: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
        form |= {} if is_parallel else {"maxItems": 1}
        return Choice("required", _constrained(params, form))
    name = wish.get("function", {}).get("name") if isinstance(wish, dict) and isinstance(wish.get("function"), dict) else None
    chosen = next((function for function in functions if function["name"] == name), None)
    if chosen is None:
        names = ", ".join(function["name"] for function in functions)[:200]
        raise RequestError(f"tool_choice: got {shown(wish)}, expected none, auto, required or a function of tools: {names}")
    return Choice("named", _constrained(params, chosen.get("parameters") or _ANY_ARGUMENTS), name=name)


def message_of(reader: Reader, text: str) -> dict[str, Any]:
    """The whole message that a whole text is."""
    delta = reader.take(text, is_last=True)
    message = {"role": "assistant", "content": delta.get("content"), "refusal": None}
    if calls := delta.get("tool_calls"):
        message["tool_calls"] = [{name: call[name] for name in ("id", "type", "function")} for call in calls]
    elif message["content"] is None:
        message["content"] = ""
    return message


def _function(tool: Any, place: int) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type", "function") == "function" else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RequestError(f"tools[{place}]: expected {{'type': 'function', 'function': {{'name': ..., 'parameters': ...}}}}")
    if not isinstance(function.get("parameters") or {}, dict):
        raise RequestError(f"tools[{place}].function.parameters: expected a JSON schema")
    return function


def _call_schema(function: Mapping[str, Any]) -> dict[str, Any]:
    properties = {"name": {"const": function["name"]}, "parameters": function.get("parameters") or _ANY_ARGUMENTS}
    return {"type": "object", "properties": properties, "required": ["name", "parameters"], "additionalProperties": False}


def _constrained(params: SamplingParams, schema: dict[str, Any]) -> SamplingParams:
    return dataclasses.replace(params, structured_outputs={"json": schema})  # type: ignore[arg-type]


def _new_id() -> str:
    return f"chatcmpl-tool-{new_id()}"


def _call(index: int, id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"index": index, "id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


class _Text:
    """Text is content."""

    has_calls = False

    def take(self, text: str, *, is_last: bool) -> dict[str, Any]:
        return {"content": text} if text else {}


class _Parsed:
    """Content and calls, as the model writes them. A call is given when it is whole: a delta cannot be taken back."""

    def __init__(self, parser: str, is_parallel: bool):
        self._parser, self._is_parallel = tool_parser(parser, is_eager=False), is_parallel
        self._num_calls = 0

    @property
    def has_calls(self) -> bool:
        return self._num_calls > 0

    def take(self, text: str, *, is_last: bool) -> dict[str, Any]:
        events = self._parser.add(text)
        if is_last:
            events += self._parser.finish()
        content = "".join(event.text for event in events if isinstance(event, Content))
        delta: dict[str, Any] = {"content": content} if content else {}
        calls = []
        for call in collect(events).tool_calls:
            if self._is_parallel or not self._num_calls:
                calls.append(_call(self._num_calls, call.id, call.function.name, call.function.arguments))
                self._num_calls += 1
        return delta | ({"tool_calls": calls} if calls else {})


class _NamedCall:
    """All text is the arguments of one call. OpenAI's finish_reason stays what it was."""

    has_calls = False

    def __init__(self, name: str, make_id: Callable[[], str]):
        self._name, self._make_id, self._has_begun = name, make_id, False

    def take(self, text: str, *, is_last: bool) -> dict[str, Any]:
        if not self._has_begun and (text or is_last):
            self._has_begun = True
            return {"tool_calls": [_call(0, self._make_id(), self._name, text)]}
        return {"tool_calls": [{"index": 0, "function": {"arguments": text}}]} if text else {}


class _ListedCalls:
    """All text is a JSON list of calls, given at its end; of one that was cut short, those that are whole."""

    def __init__(self, make_id: Callable[[], str]):
        self._make_id, self._text, self.has_calls = make_id, [], False

    def take(self, text: str, *, is_last: bool) -> dict[str, Any]:
        self._text.append(text)
        if not is_last:
            return {}
        whole = "".join(self._text)
        pairs = [(call["name"], json.dumps(call["parameters"], ensure_ascii=False)) for call in _listed(whole)]
        self.has_calls = bool(pairs)
        if not pairs:
            return {"content": whole} if whole else {}
        return {"tool_calls": [_call(index, self._make_id(), *pair) for index, pair in enumerate(pairs)]}


def _finite(text: str) -> float:
    if not math.isfinite(found := float(text)):
        raise ValueError(f"{text[:64]} is no finite number")
    return found


def _listed(text: str) -> list[dict[str, Any]]:
    """The calls of a JSON list that are whole; the list may be cut short."""
    # A number that no float holds would be written as one that JSON does not have.
    found, place, decoder = [], text.find("[") + 1, json.JSONDecoder(parse_float=_finite, parse_constant=_finite)
    while True:
        place += len(text[place:]) - len(text[place:].lstrip(" \t\r\n,"))
        try:
            one, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            return found
        if not isinstance(one, dict) or not isinstance(one.get("name"), str) or "parameters" not in one:
            return found
        found.append(one)
