"""What a server of OpenAI's API is asked, and what its answers say, whole or in events.

Knows bodies, events and errors. Refuses to know connections: see `http.py`.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from jaxpaged.client.connection import Answer, HttpError
from jaxpaged.client.http import Client, dump

CHAT_PATH, COMPLETION_PATH, MODELS_PATH = "/v1/chat/completions", "/v1/completions", "/v1/models"
DONE = b"[DONE]"
MAX_EVENT_BYTES = 16 << 20


class ServerError(HttpError):
    """The server answered with an error. `status` is 0 for one in the middle of an answer."""

    def __init__(self, status: int, value: Any):
        told = value.get("error") if isinstance(value, dict) else None
        told = told if isinstance(told, dict) else {}
        code = told.get("code") or told.get("type")
        words = f"HTTP {status}" if status else "error event"
        message = "".join(one if one.isprintable() else " " for one in str(told.get("message") or "")[:500])
        super().__init__(f"{words} {code}" if code and str(code) != str(status) else words, f"{words}: {message}".rstrip(": "))
        self.status, self.code = status, code


@dataclass(frozen=True)
class Delta:
    """A piece of an answer. `usage` is the server's count, where it comes."""

    text: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None


class EventReader:
    """The data of server-sent events, out of bytes that are cut anywhere."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._lines: list[bytes] = []

    def add(self, piece: bytes) -> list[bytes]:
        """What is whole now. Raises HttpError where an event has no end."""
        self._rest += piece
        *lines, rest = self._rest.split(b"\n")
        self._rest = bytearray(rest)
        if len(rest) > MAX_EVENT_BYTES:
            raise HttpError("not events", f"an event of more than {MAX_EVENT_BYTES:,} bytes")
        found = []
        for line in lines:
            line = bytes(line).removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._lines.append(line[5:].removeprefix(b" "))
            elif not line and self._lines:
                found.append(b"\n".join(self._lines))
                self._lines = []
        return found


def event_value(data: bytes) -> dict[str, Any]:
    """The object that an event holds. Raises ServerError for an error, HttpError for what is no object."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise HttpError("not events", "an event that is no JSON object")
    if value.get("error"):
        raise ServerError(0, value)
    return value


def text_of(choice: dict[str, Any]) -> str:
    """The new text of a choice, of a chat or a completion."""
    delta = choice.get("delta")
    found = delta.get("content") if isinstance(delta, dict) else choice.get("text")
    return found if isinstance(found, str) else ""


def of_first(event: dict[str, Any]) -> dict[str, Any]:
    """What an event of a stream has of the first output; nothing where it is of others."""
    choices = event.get("choices")
    several = choices if isinstance(choices, list) else []
    return next((one for one in several if isinstance(one, dict) and not one.get("index")), {})


async def check_status(answer: Answer) -> None:
    """Raise ServerError unless the answer is a good one, HttpError where there is none."""
    await answer.head()
    if answer.status != 200:
        content = await answer.whole()
        try:
            value = json.loads(content)
        except (ValueError, RecursionError):
            value = None
        raise ServerError(answer.status, value)


async def deltas(client: Client, path: str, body: dict[str, Any]) -> AsyncGenerator[Delta, None]:
    """The first output of a streamed request, piece by piece. Leaving it early ends the request. Raises HttpError."""
    answer = await client.ask("POST", path, dump({**body, "stream": True, "stream_options": {"include_usage": True}}))
    try:
        await check_status(answer)
        reader = EventReader()
        async for piece in answer.each():
            for data in reader.add(piece):
                if data == DONE:
                    return
                value = event_value(data)
                choice = of_first(value)
                yield Delta(text_of(choice), choice.get("finish_reason"), value.get("usage"))
        raise HttpError("cut short", "the answer ended before its end")
    finally:
        answer.close()


async def models(client: Client) -> list[dict[str, Any]]:
    """The models that the server has. Raises HttpError."""
    status, value = await client.json("GET", MODELS_PATH)
    if status != 200:
        raise ServerError(status, value)
    found = value.get("data") if isinstance(value, dict) else None
    found = [one for one in found if isinstance(one, dict) and isinstance(one.get("id"), str)] if isinstance(found, list) else []
    if not found:
        raise HttpError("no models", "the server names no model: give its name")
    return found
