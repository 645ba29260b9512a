"""One connection: what does not even become a request is refused in our shape too, within a size and a time.

Knows uvicorn's connection of httptools, which has no limits of its own. Refuses to know routes.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from jaxpaged.server.bodies import dump_json
from jaxpaged.server.errors import ApiError
from jaxpaged.server.guard import MAX_HEADER_BYTES

_MAX_QUEUED = 8  # requests that may wait behind one that is answered and its client is still looked after

# What clients send wrongly is told to them, not to the log, which would be theirs to fill.
_logger = logging.getLogger("jaxpaged.connection")
_logger.setLevel(logging.ERROR)
# Nor are answers that were cut on purpose, or because the server ends.
_cuts = (asyncio.CancelledError, ConnectionError)
_logger.addFilter(lambda record: not (record.exc_info and isinstance(record.exc_info[1], _cuts)))


class Connection(HttpToolsProtocol):
    """Invariant: whoever is connected and has not sent a whole request, nor is being answered, has `request_s` to send one,
    whatever bytes come meanwhile; neither the head of a request nor what stands between and behind the pieces of its body ever
    takes much more room than MAX_HEADER_BYTES. Whoever leaves, every request that has not been answered is told.
    """

    def __init__(self, *arguments: Any, request_s: float, **options: Any):
        super().__init__(*arguments, **options)
        self.logger = _logger
        self._request_s = request_s
        self._deadline: asyncio.TimerHandle | None = None  # held from a request's first byte to its last
        # Bytes since the head began, or since the last piece of a body: sizes and extensions of chunks, and trailers.
        self._is_in_head, self._num_bytes = True, 0
        self._answering: RequestResponseCycle | None = None  # which is not the last that was read where more wait behind it

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._hurry()

    def connection_lost(self, exc: Exception | None) -> None:
        self._relax()
        for cycle in (self._answering, *(queued for queued, _ in self.pipeline)):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._hurry()
        self._num_bytes += len(data)
        super().data_received(data)
        if self._num_bytes > MAX_HEADER_BYTES:
            self._refuse(ApiError(431, f"more than {MAX_HEADER_BYTES:,} bytes of headers"))

    def on_message_begin(self) -> None:
        self._is_in_head, self._num_bytes = True, 0
        self._hurry()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        # What comes behind a body changes nothing of what was decided in front of it: trailers are read by nobody.
        if self._is_in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._is_in_head, self._num_bytes = False, 0
        if self.pipeline and len(self.pipeline) <= _MAX_QUEUED:
            self.flow.resume_reading()  # or nobody would see that the client leaves

    def on_body(self, body: bytes) -> None:
        self._num_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._is_in_head, self._num_bytes = True, 0
        self._relax()

    def send_400_response(self, msg: str) -> None:
        """What the parser refuses."""
        self._refuse(ApiError(400, "this is no HTTP request", code="invalid_http"))

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _hurry(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self._request_s, self._is_late)

    def _relax(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _is_late(self) -> None:
        self._deadline = None
        if self._is_answering:
            # Who waits for a body has a deadline of its own; and bytes after a request are no reason to cut its answer.
            self._hurry()
        elif self._is_in_head and self._num_bytes:
            self._refuse(ApiError(408, f"no whole request within {self._request_s:g} s"))
        else:
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        """The last thing that is said here. In the middle of an answer it cannot be said: that is cut, so that it looks it."""
        is_answered = self.cycle is not None and self.cycle.response_complete and not self._is_in_head
        if is_answered or self.pipeline or (self._is_answering and self.cycle.response_started):
            self.transport.abort()
        elif not self.transport.is_closing():
            content = dump_json(error.body)
            head = f"content-type: application/json\r\ncontent-length: {len(content)}\r\nconnection: close\r\n\r\n"
            self.transport.write(STATUS_LINE[error.status] + head.encode() + content)
            self.transport.close()
