"""The door: who may come in, how much they may bring, and that whatever happens inside, the answer is one of ours.

An ASGI application around another. Knows headers and sizes. Refuses to know routes, but for those that need no key.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import hmac
import re
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import ClientDisconnect

from jaxpaged.server.bodies import dump_json
from jaxpaged.server.errors import ApiError, as_api_error
from jaxpaged.server.ids import new_id
from jaxpaged.server.options import ServerOptions

OPEN_PATHS = ("/live", "/ui")  # the second is a document that says nothing: what it shows needs a key
MAX_HEADER_BYTES = 64 << 10
_DISCARD_S = 1.0
_MAX_BODIES = 16  # of the largest size, at one time: a thousand clients that send one each must not fill the memory
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Guard:
    """Every request passes here.

    Invariant: without one of the keys, where there are any, nothing but OPEN_PATHS is reached, be the route known or not; what is
    inside gets bodies of at most max_body_bytes; an answer has begun once at most, and an exception becomes one.

    What is inside finds in `scope["state"]`: request_id and tenant, the latter the same for one key and empty without.
    """

    def __init__(
        self,
        app: Any,
        options: ServerOptions,
        *,
        check_room: Callable[[str, str], None] = lambda method, path: None,
        make_id: Callable[[], str] = new_id,
    ):
        """`check_room` raises where a request of a method and a path, that of a route, is not to be read."""
        self._app, self._options, self._check_room, self._make_id = app, options, check_room, make_id
        self._digests = [_digest(key.encode()) for key in options.all_keys()]
        self._num_held_bytes = 0  # of all bodies whose requests are not answered

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value for name, value in scope["headers"]}
        given = headers.get("x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else self._make_id()
        has_begun, held = False, [0]
        patient = _Patient(send, self._options.send_timeout_s)

        async def sending(message: dict[str, Any]) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", request_id.encode())]}
            await patient(message)

        try:
            scope.setdefault("state", {}).update(request_id=request_id, tenant=self._tenant(scope, headers))
            self._check_headers(scope, headers)
            self._make_sure_of_room(scope)
            await self._app(scope, self._limited(receive, held), sending)
        except (ConnectionError, ClientDisconnect):
            return  # there is nobody to tell
        except Exception as error:
            told = as_api_error(error)
            if has_begun:
                raise ConnectionAbortedError from error  # an answer cut short must look like one
            await send_error(sending, told, functools.partial(self._discard, receive) if told.status == 413 else None)
        finally:
            patient.close()
            self._num_held_bytes -= held[0]

    def _make_sure_of_room(self, scope: dict[str, Any]) -> None:
        try:
            self._check_room(scope["method"], scope["path"])
        except Exception:
            scope["refused_path"] = scope["path"]  # nobody will look for its route
            raise

    def _tenant(self, scope: dict[str, Any], headers: dict[str, bytes]) -> str:
        """Whose request it is. Raises ApiError when it is nobody's."""
        if not self._digests or scope["path"] in OPEN_PATHS:
            return ""
        scheme, _, key = headers.get("authorization", b"").partition(b" ")
        digest = _digest(key.strip())
        # All are compared, each in constant time: how long it takes says nothing.
        is_known = sum(hmac.compare_digest(digest, one) for one in self._digests) > 0
        if scheme.lower() != b"bearer" or not is_known:
            raise ApiError(
                401, "no key, or one that is not known", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
            )
        return hashlib.sha256(b"jaxpaged tenant " + digest).hexdigest()[:32]

    def _check_headers(self, scope: dict[str, Any], headers: dict[str, bytes]) -> None:
        num_bytes = len(scope["raw_path"] or b"") + len(scope["query_string"])
        if num_bytes + sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            raise ApiError(431, f"more than {MAX_HEADER_BYTES:,} bytes of headers")
        if headers.get("content-encoding", b"identity").lower() != b"identity":
            raise ApiError(415, "Content-Encoding: expected none")
        length = headers.get("content-length", b"0")
        if not length.isdigit() or len(length) > 18:
            raise ApiError(400, "Content-Length: expected a number", code="invalid_header")
        if int(length) > self._options.max_body_bytes:
            raise ApiError(413, f"the body has {int(length):,} bytes, the limit is {self._options.max_body_bytes:,}")

    def _limited(self, receive: Any, held: list[int]) -> Any:
        """`receive`, which refuses what is too large or too slow, or too much beside all others; `held` is how much it gave."""
        num_bytes, is_whole = 0, False
        deadline = asyncio.get_running_loop().time() + self._options.body_timeout_s

        async def receiving() -> dict[str, Any]:
            nonlocal num_bytes, is_whole
            if is_whole:
                return await receive()  # that the client has left
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise ApiError(408, f"no whole request within {self._options.body_timeout_s:g} s") from None
            if message["type"] == "http.request":
                num_bytes += len(message.get("body", b""))
                self._num_held_bytes += num_bytes - held[0]
                held[0] = num_bytes
                is_whole = not message.get("more_body", False)
                if num_bytes > self._options.max_body_bytes:
                    raise ApiError(413, f"the body has more than {self._options.max_body_bytes:,} bytes")
                if self._num_held_bytes > _MAX_BODIES * self._options.max_body_bytes:
                    wait = {"Retry-After": "1", "Connection": "close"}
                    raise ApiError(429, "the bodies of other requests are too large", code="queue_full", headers=wait)
            return message

        return receiving

    async def _discard(self, receive: Any) -> None:
        """Read on for a while: a client that is still sending when the connection is closed does not see the answer."""
        num_bytes = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DISCARD_S):
                while num_bytes <= 2 * self._options.max_body_bytes:
                    message = await receive()
                    num_bytes += len(message.get("body", b""))
                    if not message.get("more_body", False):
                        return


class _Patient:
    """`send` that waits so long for a client to read, with one timer for all that is sent: an answer may have many pieces."""

    def __init__(self, send: Any, timeout_s: float):
        self._send, self._timeout_s = send, timeout_s
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[Any] | None = None  # that sends now
        self._since = 0.0
        self._is_late = False
        self._timer: asyncio.TimerHandle | None = None

    async def __call__(self, message: dict[str, Any]) -> None:
        """Send. Raises ConnectionAbortedError when nobody reads: as if the client had left."""
        self._task, self._since = asyncio.current_task(), self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_at(self._since + self._timeout_s, self._look)
        try:
            await self._send(message)
        except asyncio.CancelledError:
            if self._is_late and self._task is not None and not self._task.uncancel():
                raise ConnectionAbortedError from None
            raise
        finally:
            self._task = None

    def _look(self) -> None:
        """Whether it has sent for too long; look again when it may have."""
        since = self._since if self._task is not None else self._loop.time()
        if self._task is not None and since + self._timeout_s <= self._loop.time():
            self._is_late = True
            self._task.cancel()
        else:
            self._timer = self._loop.call_at(since + self._timeout_s, self._look)

    def close(self) -> None:
        """Nothing is sent any more."""
        if self._timer is not None:
            self._timer.cancel()


async def send_error(send: Any, error: ApiError, before_end: Callable[[], Awaitable[None]] | None = None) -> None:
    """The whole answer that an error is; `before_end` is done when all of it has been said and the connection is still open."""
    content = dump_json(error.body)
    headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), **error.headers}
    if error.status in (408, 413):
        headers["Connection"] = "close"  # what is left of the body is not read
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": content, "more_body": before_end is not None})
    if before_end is not None:
        await before_end()
        await send({"type": "http.response.body", "body": b""})


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
