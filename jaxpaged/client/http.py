"""HTTP/1.1 requests to one server over connections that are kept.

Knows addresses, headers and which connection is free. Refuses to know what is asked: see `openai.py`.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from jaxpaged.client.connection import Answer, Connection, HttpError
from jaxpaged.errors import ConfigError

CONNECT_TIMEOUT_S = 30.0
_PROTECTED = ("host", "content-length", "transfer-encoding", "connection")


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
        self._free: list[Connection] = []
        self._all: set[Connection] = set()

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

    async def _connect(self) -> Connection:
        secure = ssl.create_default_context() if self.is_tls else None
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: Connection(self), self._host, self._port, ssl=secure
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

    def freed(self, connection: Connection) -> None:
        """A connection may be used again."""
        self._free.append(connection)

    def lost(self, connection: Connection) -> None:
        """A connection is closed."""
        self._all.discard(connection)


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
