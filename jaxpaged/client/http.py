"""HTTP/1.1 requests to one server over connections that are kept, with the time at which each piece of an answer came.

Knows connections and clocks. Refuses to know what is asked: see `openai.py`. Headers and chunks are httptools' business.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import httptools

from jaxpaged.errors import ConfigError

MAX_ANSWER_BYTES = 1 << 30
MAX_PENDING_BYTES = 1 << 20  # of an answer that is read slower than it comes: then the server has to wait
CONNECT_TIMEOUT_S = 30.0
_PROTECTED = ("host", "content-length", "transfer-encoding", "connection")


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
        self.num_bytes = 0
        self._news = asyncio.Event()
        self._connection: _Connection | None = None

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
            pieces, self.pieces = self.pieces, []
            if self._connection is not None:
                self._connection.resume()
            for _, piece in pieces:
                yield piece
            if not self.pieces:
                self._check()
                if self.is_over:
                    return
                await self._wait()

    @property
    def num_pending_bytes(self) -> int:
        """Bytes that came and have not been taken by `each`."""
        return sum(len(piece) for _, piece in self.pieces)

    def close(self) -> None:
        """Leave it: the server sees the connection close. Nothing where it is over."""
        if self._connection is not None and not self.is_over:
            self._connection.leave()

    # --- for the connection ---

    def opened(self, connection: _Connection, sent_s: float) -> None:
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


class Client:
    """Asks one server. As many connections as there are answers at a time; a free one is used again.

    Belongs to one event loop.
    """

    def __init__(
        self,
        base_url: str,
        *,
        headers: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        bounded: bool = False,
    ):
        """`bounded`: the server waits where an answer is read slower than it comes, so that `each` needs little memory.

        Raises:
          ConfigError: not an address of HTTP, or a header that cannot be sent.
        """
        self.clock, self.is_bounded = clock, bounded
        try:
            parts = urlsplit(base_url if "://" in base_url else f"http://{base_url}")
            self._host, port = parts.hostname or "", parts.port
        except ValueError:
            parts, self._host, port = None, "", None
        if parts is None or parts.scheme not in ("http", "https") or not self._host or parts.query or parts.fragment:
            raise ConfigError(f"base_url: got {base_url!r}, expected an address such as http://127.0.0.1:8000")
        self.is_tls = parts.scheme == "https"
        self._port = port or (443 if self.is_tls else 80)
        self._root = parts.path.rstrip("/")
        lines = [f"host: {parts.netloc.rpartition('@')[2]}", "accept: */*"]
        for name, value in (headers or {}).items():
            if name.lower() in _PROTECTED or not _is_header(name, value):
                raise ConfigError(f"header: got {name!r}, which cannot be set, or has a value that cannot be sent")
            lines.append(f"{name}: {value}")
        self._head = "\r\n".join(lines).encode("latin-1")
        self._free: list[_Connection] = []
        self._all: set[_Connection] = set()

    async def ask(self, method: str, path: str, body: bytes | None = None) -> Answer:
        """Send a request; its answer, of which nothing has come yet. Raises HttpError where there is no connection."""
        request = self._request(method, path, body)
        while self._free:
            connection = self._free.pop()
            if not connection.is_closed:
                return connection.send(request, Answer(), self._retrying(request))
        connection = await self._connect()
        return connection.send(request, Answer(), None)

    async def json(self, method: str, path: str, value: Any = None) -> tuple[int, Any]:
        """Status and JSON of an answer; None where it is none. Raises HttpError."""
        answer = await self.ask(method, path, None if value is None else dump(value))
        content = await answer.whole()
        try:
            return answer.status, json.loads(content)
        except (ValueError, RecursionError):
            return answer.status, None

    def close(self) -> None:
        """End all connections; what has not been answered ends with an error."""
        for connection in tuple(self._all):
            connection.leave()
        self._free.clear()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def _request(self, method: str, path: str, body: bytes | None) -> bytes:
        head = f"{method} {self._root}{path} HTTP/1.1\r\n".encode("latin-1") + self._head
        if body is None:
            return head + b"\r\n\r\n"
        return head + b"\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body

    def _retrying(self, request: bytes) -> Callable[[Answer], None]:
        """A server may close a kept connection just as it is used again: then nothing was begun, and a fresh one is tried."""

        async def again(answer: Answer) -> None:
            try:
                connection = await self._connect()
            except HttpError as error:
                answer.end(error)
                return
            connection.send(request, answer, None)

        return lambda answer: _keep(asyncio.ensure_future(again(answer)))

    async def _connect(self) -> _Connection:
        secure = ssl.create_default_context() if self.is_tls else None
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: _Connection(self), self._host, self._port, ssl=secure
                )
        except TimeoutError:
            raise HttpError("connect timeout", f"{self._host}:{self._port}: no connection in {CONNECT_TIMEOUT_S:g} s") from None
        except ssl.SSLError as error:
            raise HttpError("TLS error", f"{self._host}:{self._port}: {error.reason or 'TLS error'}") from None
        except OSError as error:
            reason = "connection refused" if isinstance(error, ConnectionRefusedError) else "cannot connect"
            raise HttpError(reason, f"{self._host}:{self._port}: {error.strerror or error}") from None
        self._all.add(connection)
        return connection

    def freed(self, connection: _Connection) -> None:
        """A connection may be used again."""
        self._free.append(connection)

    def lost(self, connection: _Connection) -> None:
        """A connection is closed."""
        self._all.discard(connection)


class _Connection(asyncio.Protocol):
    """One request at a time. What comes is noted with its time and nothing else is done with it here."""

    def __init__(self, client: Client):
        self._client, self._clock = client, client.clock
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
        self._client.lost(self)
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
        answer.tell()
        if answer.num_bytes > MAX_ANSWER_BYTES:
            self._fail(HttpError("too large", f"the answer has more than {MAX_ANSWER_BYTES:,} bytes"))
            self._transport.abort()
        elif self._client.is_bounded and answer.num_pending_bytes > MAX_PENDING_BYTES and not self._is_paused:
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
            self._client.freed(self)
        else:
            self._transport.close()


def dump(value: Any) -> bytes:
    """A value as the body of a request."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


_kept: set[asyncio.Future[None]] = set()  # a task that nobody holds may vanish before it has run


def _keep(task: asyncio.Future[None]) -> None:
    _kept.add(task)
    task.add_done_callback(_kept.discard)


def _is_header(name: str, value: str) -> bool:
    is_name = name.replace("-", "").replace("_", "").isalnum() and name.isascii()
    return is_name and all(" " <= one <= "ÿ" and one != "\x7f" for one in value)
