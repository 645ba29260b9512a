"""Answers that take a while: several streams as one, events on a connection, and an end when the client has left.

Knows connections. Refuses to know what the events say.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response

from jaxpaged.outputs import RequestOutput
from jaxpaged.server.bodies import dump_json
from jaxpaged.server.errors import ApiError
from jaxpaged.streams import Stream

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"
_GAP = uuid.uuid4().hex  # where a text is to stand; no client can know it


def event(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + dump_json(value) + b"\n\n"


class Events:
    """Server-sent events that differ in one text alone: all else is made once."""

    def __init__(self, value_of: Callable[[str], dict[str, Any]]):
        self._before, self._after = event(value_of(_GAP)).split(dump_json(_GAP))

    def __call__(self, text: str) -> bytes:
        return b"%b%b%b" % (self._before, dump_json(text), self._after)


async def merged(streams: list[Stream]) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """The outputs of all, each with its stream's place, as they come. However it is left, all of them are over then."""
    waiting: dict[asyncio.Future[RequestOutput], int] = {}
    try:
        if len(streams) == 1:
            async for output in streams[0]:
                yield 0, output
            return
        waiting = {asyncio.ensure_future(stream.__anext__()): place for place, stream in enumerate(streams)}
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for future in sorted(done, key=waiting.__getitem__):
                place = waiting.pop(future)
                output = future.result()
                if not output.finished:
                    waiting[asyncio.ensure_future(streams[place].__anext__())] = place
                yield place, output
    finally:
        for future in waiting:
            if not future.cancel():
                future.exception()  # looked at, so that nobody is told of it who does not wait any more
        close_all(streams)


def close_all(streams: list[Stream]) -> None:
    """End what has not ended."""
    for stream in streams:
        stream.close()


async def whole(receive: Any, streams: list[Stream], work: Coroutine[Any, Any, T]) -> T:
    """What the work makes of the streams, which are over then. Raises ConnectionResetError when the client leaves."""
    try:
        return await unless_left(receive, work)
    finally:
        close_all(streams)


async def unless_left(receive: Any, work: Coroutine[Any, Any, T]) -> T:
    """What the work gives; it is cancelled when the client leaves. Raises ConnectionResetError then."""
    # As asyncio's own timeouts do it: who works is this task, which is cancelled while it waits.
    working, is_left = asyncio.current_task(), False

    async def watch() -> None:
        nonlocal is_left
        with contextlib.suppress(Exception):  # of a connection that can say nothing any more
            while (await receive())["type"] != "http.disconnect":
                pass
        is_left = True
        working.cancel()  # type: ignore[union-attr]

    watching = asyncio.ensure_future(watch())
    try:
        return await work
    except asyncio.CancelledError:
        if is_left and not working.uncancel():  # type: ignore[union-attr]
            raise ConnectionResetError from None
        raise
    finally:
        watching.cancel()


class EventStream(Response):
    """An answer of events, as an ASGI application. An error that comes in the middle is an event too, and [DONE] is the last.

    However it ends, the streams that the events are made of are over then.
    """

    def __init__(
        self,
        events: AsyncIterator[bytes],
        streams: list[Stream],
        as_error: Callable[[BaseException], ApiError],
        *,
        last: bytes = DONE,
        told: Callable[[ApiError], bytes] = lambda error: event(error.body),
    ):
        """`last` comes after all events, `told` is the event that an error is."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}, media_type="text/event-stream")
        del self.headers["content-length"]
        self._events, self._streams, self._as_error = events, streams, as_error
        self._last, self._told = last, told

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await unless_left(receive, self._send_all(send))
        finally:
            # Here, not in the work: where the client has left already, that does not even begin.
            close_all(self._streams)
            await self._events.aclose()  # type: ignore[attr-defined]

    async def _send_all(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for piece in self._events:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            last = self._last
        except ConnectionError:
            raise
        except Exception as error:
            last = self._told(self._as_error(error)) + self._last
        await send({"type": "http.response.body", "body": last, "more_body": False})
