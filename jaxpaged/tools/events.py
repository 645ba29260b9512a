"""What a text with tool calls consists of: events while it grows, and what they add up to.

Knows no format: how models write calls is `parsers`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class FunctionCall:
    """`arguments` is JSON text of one object, as the model wrote it."""

    name: str
    arguments: str


@dataclass(frozen=True)
class ToolCall:
    """One call that a model asks for. `dataclasses.asdict` gives the object of OpenAI's chat completions."""

    id: str
    function: FunctionCall
    type: str = "function"


@dataclass(frozen=True)
class Content:
    """Text that is no call."""

    text: str


@dataclass(frozen=True)
class CallStarted:
    """A call whose name is known and whose arguments begin."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ArgumentsDelta:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


@dataclass(frozen=True)
class CallFinished:
    """All of a call has been said, and it is well-formed."""

    index: int


@dataclass(frozen=True)
class CallDropped:
    """What had started was no call after all, or the text ended in it: all of its text follows as Content.

    Whoever cannot take a started call back asks for `is_eager=False`.
    """

    index: int


Event = Content | CallStarted | ArgumentsDelta | CallFinished | CallDropped


@dataclass(frozen=True)
class Reply:
    """A text taken apart. `content` is None when there is none."""

    content: str | None
    tool_calls: list[ToolCall]


def collect(events: Iterable[Event]) -> Reply:
    """What events add up to: the content in its order, and the calls that were finished."""
    content: list[str] = []
    started: dict[int, CallStarted] = {}
    arguments: dict[int, list[str]] = {}
    finished: list[int] = []
    for event in events:
        if isinstance(event, Content):
            content.append(event.text)
        elif isinstance(event, CallStarted):
            started[event.index], arguments[event.index] = event, []
        elif isinstance(event, ArgumentsDelta):
            arguments[event.index].append(event.text)
        elif isinstance(event, CallFinished):
            finished.append(event.index)
    calls = [ToolCall(started[i].id, FunctionCall(started[i].name, "".join(arguments[i]))) for i in finished]
    return Reply("".join(content) or None, calls)
