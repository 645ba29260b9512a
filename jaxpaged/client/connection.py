"""One answer and the connection that it comes over, with the time at which each piece of it came.

Knows bytes and clocks. Refuses to know what is asked, and of whom. Headers and chunks are httptools' business.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Protocol

import httptools

MAX_ANSWER_BYTES = 1 << 30
MAX_PENDING_BYTES = 1 << 20  # of an answer that is read slower than it comes: then the server has to wait


class HttpError(Exception):
    """There is no whole answer. `reason` is a few words, equal for equal causes."""

    def __init__(self, reason: str, message: str | None = None):
        super().__init__(message or reason)
        self.reason = reason


class Answer:
    """One answer, while it comes. `pieces` are its body's, each with the time at which it came."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.pieces: list[tuple[float, bytes]] = []
        self.sent_s = 0.0  # when the request was handed to the connection
        self.is_over = False
        self.error: HttpError | None = None
        self.num_bytes = self.num_pending_bytes = 0  # of all that came, of what has not been taken by `each`
        self._news = asyncio.Event()
        self._connection: Connection | None = None

    async def head(self) -> None:
        """Wait for status and headers. Raises HttpError."""
        while not self.status and not self.is_over:
            await self._wait()
        self._check()

    async def whole(self) -> bytes:
        """Wait for all of it. Raises HttpError."""
        while not self.is_over:
            await self._wait()
        self._check()
        return b"".join(piece for _, piece in self.pieces)

    async def each(self) -> AsyncGenerator[bytes, None]:
        """The pieces as they come; those that were given are forgotten. Raises HttpError."""
        while True:
            pieces, self.pieces, self.num_pending_bytes = self.pieces, [], 0
            if self._connection is not None:
                self._connection.resume()
            for _, piece in pieces:
                yield piece
            if not self.pieces:
                self._check()
                if self.is_over:
                    return
                await self._wait()

    def close(self) -> None:
        """Leave it: the server sees the connection close. Nothing where it is over."""
        if self._connection is not None and not self.is_over:
            self._connection.leave()

    # --- for the connection ---

    def opened(self, connection: Connection, sent_s: float) -> None:
        self._connection, self.sent_s = connection, sent_s

    def tell(self) -> None:
        self._news.set()

    def end(self, error: HttpError | None = None) -> None:
        if not self.is_over:
            self.is_over, self.error, self._connection = True, error, None
            self._news.set()

    def _check(self) -> None:
        if self.error is not None:
            raise self.error

    async def _wait(self) -> None:
        self._news.clear()
        await self._news.wait()


class Owner(Protocol):
    """Who has connections."""

    clock: Callable[[], float]
    is_bounded: bool

    def freed(self, connection: Connection) -> None:
        """A connection may be used again."""
        ...

    def lost(self, connection: Connection) -> None:
        """A connection is closed."""
        ...


class Connection(asyncio.Protocol):
    """One request at a time. What comes is noted with its time and nothing else is done with it here."""

    def __init__(self, owner: Owner):
        self._owner, self._clock = owner, owner.clock
        self._transport: asyncio.Transport = None  # type: ignore[assignment]
        self._answer: Answer | None = None
        self._retry: Callable[[Answer], None] | None = None
        self._at = 0.0
        self._has_length = False
        self._is_paused = False

    @property
    def is_closed(self) -> bool:
        return self._transport.is_closing()

    def send(self, request: bytes, answer: Answer, retry: Callable[[Answer], None] | None) -> Answer:
        self._answer, self._retry, self._has_length = answer, retry, False
        self._parser = httptools.HttpResponseParser(self)
        answer.opened(self, self._clock())
        self._transport.write(request)
        return answer

    def leave(self) -> None:
        answer, self._answer = self._answer, None
        self._transport.abort()
        if answer is not None:
            answer.end(HttpError("left"))

    def resume(self) -> None:
        if self._is_paused and not self._transport.is_closing():
            self._is_paused = False
            self._transport.resume_reading()

    # --- of asyncio ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self._at = self._clock()
        if self._answer is None:  # nobody has asked
            self._transport.abort()
            return
        self._retry = None
        try:
            self._parser.feed_data(data)
        except Exception:
            self._fail(HttpError("not HTTP", "the answer is not HTTP"))
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._owner.lost(self)
        answer = self._answer
        if answer is None:
            return
        if self._retry is not None:
            self._answer, retry, self._retry = None, self._retry, None
            retry(answer)
        elif answer.status and not self._has_length and exc is None:
            self.on_message_complete()  # an answer that ends where the connection does
        else:
            self._fail(HttpError("cut short" if answer.status else "connection closed", "the server closed the connection"))

    def _fail(self, error: HttpError) -> None:
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.end(error)

    # --- of httptools ---

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._answer is not None:
            key = name.decode("latin-1").lower()
            self._has_length = self._has_length or key in ("content-length", "transfer-encoding")
            self._answer.headers[key] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        if self._answer is not None:
            self._answer.status = self._parser.get_status_code()
            self._answer.tell()

    def on_body(self, body: bytes) -> None:
        answer = self._answer
        if answer is None:
            return
        answer.pieces.append((self._at, body))
        answer.num_bytes += len(body)
        answer.num_pending_bytes += len(body)
        answer.tell()
        if answer.num_bytes > MAX_ANSWER_BYTES:
            self._fail(HttpError("too large", f"the answer has more than {MAX_ANSWER_BYTES:,} bytes"))
            self._transport.abort()
        elif self._owner.is_bounded and answer.num_pending_bytes > MAX_PENDING_BYTES and not self._is_paused:
            self._is_paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        answer, self._answer = self._answer, None
        if answer is None:
            return
        if 100 <= answer.status < 200:  # the answer is still to come
            self._answer, answer.status = answer, 0
            return
        answer.end()
        if self._has_length and self._parser.should_keep_alive() and not self._transport.is_closing():
            self._owner.freed(self)
        else:
            self._transport.close()
