"""Messages and tools as templates expect them: plain values, in the shapes that transformers and vLLM hand over.

Knows what a conversation looks like. Refuses to know templates beyond whether they take contents apart themselves.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any

from jaxpaged.host.checks import shown
from jaxpaged.host.request import RequestError

MAX_NESTING = 100  # of lists and objects in messages and tools
# Names that are a call's own or the environment's: a request that could set them would be the operator.
RESERVED = (
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize",
    "return_dict", "raise_exception", "strftime_now", "namespace", "dict", "range", "lipsum", "cycler", "joiner",
)  # fmt: skip
# Names under which a message's reasoning comes; templates read the first, those of gpt-oss the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


def plain(value: Any, name: str, depth: int = 0) -> Any:
    """A copy made of JSON types alone: a template can neither change the caller's objects nor call their methods."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, (Mapping, list, tuple)):
        if depth == MAX_NESTING:
            raise RequestError(f"{name}: nested more than {MAX_NESTING} deep")
        if isinstance(value, Mapping):
            return {plain(key, name, depth + 1): plain(item, name, depth + 1) for key, item in value.items()}
        return [plain(item, name, depth + 1) for item in value]
    for plain_type in (str, int, float):
        if isinstance(value, plain_type):
            return plain_type(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):  # our own ToolCall, given back
        return plain({field.name: getattr(value, field.name) for field in dataclasses.fields(value)}, name, depth)
    return f"<{type(value).__name__}>"


def conversation(messages: Seq[Mapping[str, Any]], *, lists_content: bool) -> list[dict[str, Any]]:
    """Messages as a template takes them.

    Content in parts is text alone; a template that does not go through parts gets them as one text, by lines, as from vLLM.
    Arguments of tool calls are objects there, though they are JSON text in OpenAI's messages.

    Raises:
      RequestError: naming the message and the field.
    """
    found = []
    for index, given in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(given, Mapping):
            raise RequestError(f"{where}: got {shown(given)}, expected {{'role': ..., 'content': ...}}")
        message = plain(given, where)
        if isinstance(message.get("content"), list):
            texts = [_text(part, f"{where}.content[{place}]") for place, part in enumerate(message["content"])]
            parts = [{"type": "text", "text": text} for text in texts]
            message["content"] = parts if lists_content else "\n".join(texts)
        if message.get("tool_calls") is not None:
            message["tool_calls"] = _with_objects(message["tool_calls"], f"{where}.tool_calls")
        found.append(_with_reasoning(message))
    return found


def _text(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or part.get("type", "text") != "text":
        kind = part.get("type") if isinstance(part, dict) else part
        raise RequestError(f"{where}: got {shown(kind)}, expected {{'type': 'text', 'text': ...}}: this model reads text only")
    if not isinstance(part.get("text"), str):
        raise RequestError(f"{where}.text: got {shown(part.get('text'))}, expected a text")
    return part["text"]


def _with_objects(calls: Any, where: str) -> list[Any]:
    if not isinstance(calls, list):
        raise RequestError(f"{where}: got {shown(calls)}, expected a list")
    for place, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if function is None and isinstance(call, dict) and "name" in call:
            function = call  # as transformers' own examples also write it
        if not isinstance(function, dict):
            raise RequestError(f"{where}[{place}].function: expected {{'name': ..., 'arguments': ...}}")
        if isinstance(function.get("arguments"), str):
            function["arguments"] = _object(function["arguments"], f"{where}[{place}].function.arguments")
    return calls


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise RequestError(f"{where}: got {text[:32]!a}, expected the JSON text of an object")
    return plain(found, where)


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def tool_list(tools: Any) -> list[Any] | None:
    """Tools as OpenAI's `tools`: a list of objects, passed on as they are."""
    if tools is None:
        return None
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RequestError("tools: expected a list of objects, {'type': 'function', 'function': {'name': ..., ...}}")
    return plain(tools, "tools")


def allowed(variables: Mapping[str, Any], template_reads: frozenset[str], own: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a request that a template gets: those that it reads. What it does not read is left out, as by vLLM.

    Raises:
      RequestError: one has a name of RESERVED, of `own`, or one that begins with an underscore.
    """
    for name in variables:
        if not isinstance(name, str) or name in RESERVED or name in own or name.startswith("_"):
            raise RequestError(f"chat_template_kwargs: {str(name)[:32]!r} cannot be set")
    return {name: plain(value, "chat_template_kwargs") for name, value in variables.items() if name in template_reads}


def marked(messages: list[dict[str, Any]], field: bool | str) -> tuple[list[dict[str, Any]], str]:
    """Messages whose last one ends in a tag, which `cut` finds again, and that message's text."""
    name = field if isinstance(field, str) else "content"
    last = messages[-1] if messages else {}
    names = [one for one in _REASONING if one in last] if name in _REASONING else [name]
    text = last.get(name)
    if isinstance(text, list) and text:
        return [*messages[:-1], {**last, name: [*text[:-1], {**text[-1], "text": text[-1]["text"] + _CONTINUE_TAG}]}], text[-1][
            "text"
        ]
    if not isinstance(text, str):
        raise RequestError(f"continue_final_message: the last message has no {name} to continue")
    return [*messages[:-1], {**last, **dict.fromkeys(names, text + _CONTINUE_TAG)}], text


def cut(rendered: str, text: str) -> str:
    """A rendered chat up to the end of its last message, whose text this is."""
    place = rendered.rfind(_CONTINUE_TAG.strip())
    if place < 0 or text.strip() not in rendered:
        raise RequestError("continue_final_message: the chat template does not show the last message as it is")
    is_spaced = rendered.startswith(_CONTINUE_TAG, place)
    return rendered[:place] if is_spaced else rendered[:place].rstrip()  # a template that trims its messages trims this one too
