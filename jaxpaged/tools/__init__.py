"""Tool calls in the text of a model: found while it grows, without regular expressions.

    reply = parse(output.text, "hermes")                # all at once
    reply.content, reply.tool_calls

    parser = tool_parser("hermes")                      # piece by piece
    for delta in deltas:
        events = parser.add(delta)                      # Content, CallStarted, ArgumentsDelta, CallFinished, CallDropped
    events = parser.finish()

The markers of some formats are special tokens: the text is to be generated with `skip_special_tokens=False`.
Knows formats of text, and nothing of requests and models. The formats' names are vLLM's, values of its `tool_call_parser`.
"""

from __future__ import annotations

import difflib
import random
import string
import uuid
from collections.abc import Callable

from jaxpaged.tools.events import (
    ArgumentsDelta,
    CallDropped,
    CallFinished,
    CallStarted,
    Content,
    Event,
    FunctionCall,
    Reply,
    ToolCall,
    collect,
)
from jaxpaged.tools.formats import HermesParser, Llama3Parser, MistralParser
from jaxpaged.tools.parser import ToolParser

__all__ = [
    "TOOL_CALL_PARSERS",
    "ArgumentsDelta",
    "CallDropped",
    "CallFinished",
    "CallStarted",
    "Content",
    "Event",
    "FunctionCall",
    "Reply",
    "ToolCall",
    "ToolParser",
    "UnknownParserError",
    "check_parser",
    "collect",
    "fitting_parser",
    "parse",
    "tool_parser",
]

_CLASSES = {"hermes": HermesParser, "llama3_json": Llama3Parser, "llama4_json": Llama3Parser, "mistral": MistralParser}
TOOL_CALL_PARSERS = tuple(_CLASSES)

# parser -> what a chat template of its format spells out, and what shows that it is another one's.
_SIGNS = {
    "mistral": (("[TOOL_CALLS]",), ()),
    "hermes": (("<tool_call>",), ("<function=", "<arg_key>", "<tool_sep>")),
    "llama3_json": (('"parameters"', "<|start_header_id|>"), ()),
}


class UnknownParserError(ValueError):
    """There is no parser of that name."""


def tool_parser(
    name: str, *, rng: random.Random | None = None, make_id: Callable[[], str] | None = None, is_eager: bool = True
) -> ToolParser:
    """A fresh parser for one text.

    Args:
      name: one of TOOL_CALL_PARSERS.
      rng: where the ids of calls come from, formed as vLLM's; None is the system's.
      make_id: gives them itself.
      is_eager: give arguments while they come. Else a call comes when it is finished, and none is dropped.

    Raises:
      UnknownParserError: in one line.
    """
    check_parser(name)
    return _CLASSES[name](make_id or _ids(name, rng or random.SystemRandom()), is_eager=is_eager)


def parse(text: str, parser: str, *, rng: random.Random | None = None, make_id: Callable[[], str] | None = None) -> Reply:
    """A whole text taken apart; the arguments are `tool_parser`'s."""
    one = tool_parser(parser, rng=rng, make_id=make_id)
    return collect([*one.add(text), *one.finish()])


def check_parser(name: str) -> None:
    """Raise UnknownParserError unless there is such a parser."""
    if name not in _CLASSES:
        near = difflib.get_close_matches(str(name), TOOL_CALL_PARSERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UnknownParserError(f"tool_call_parser: got {name!r}, expected one of {', '.join(TOOL_CALL_PARSERS)}{hint}")


def fitting_parser(chat_template: str | None) -> str | None:
    """The parser for calls as this chat template teaches them to a model; None when it teaches none that is known here."""
    for name, (signs, others) in _SIGNS.items():
        text = chat_template or ""
        if all(sign in text for sign in signs) and not any(other in text for other in others):
            return name
    return None


def _ids(name: str, rng: random.Random) -> Callable[[], str]:
    """Ids as vLLM forms them: Mistral's templates and tokenizers refuse any but nine letters and digits."""
    if name == "mistral":
        return lambda: "".join(rng.choices(string.ascii_letters + string.digits, k=9))
    return lambda: f"chatcmpl-tool-{uuid.UUID(int=rng.getrandbits(128), version=4).hex}"
