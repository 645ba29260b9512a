"""The door: who may come in, how much they may bring, and that whatever happens inside, the answer is one of ours.

An ASGI application around another. Knows headers and sizes. Refuses to know routes, but for those that need no key.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import re
import uuid
from collections.abc import Callable
from typing import Any

from jaxpaged.server.bodies import dump_json
from jaxpaged.server.errors import ApiError, as_api_error
from jaxpaged.server.options import ServerOptions

OPEN_PATHS = ("/live", "/ui")  # the second is a document that says nothing: what it shows needs a key
MAX_HEADER_BYTES = 64 << 10
_DISCARD_S = 1.0
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Guard:
    """Every request passes here.

    Invariant: without one of the keys, where there are any, nothing but OPEN_PATHS is reached, be the route known or not; what is
    inside gets bodies of at most max_body_bytes; an answer has begun once at most, and an exception becomes one.

    What is inside finds in `scope["state"]`: request_id and tenant, the latter the same for one key and empty without.
    """

    def __init__(self, app: Any, options: ServerOptions, *, make_id: Callable[[], str] = lambda: uuid.uuid4().hex):
        self._app, self._options, self._make_id = app, options, make_id
        self._digests = [_digest(key.encode()) for key in options.all_keys()]

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
        has_begun = False

        async def sending(message: dict[str, Any]) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", request_id.encode())]}
            try:
                async with asyncio.timeout(self._options.send_timeout_s):
                    await send(message)
            except TimeoutError:
                raise ConnectionAbortedError from None  # nobody reads: as if the client had left

        try:
            scope.setdefault("state", {}).update(request_id=request_id, tenant=self._tenant(scope, headers))
            self._check_headers(scope, headers)
            await self._app(scope, self._limited(receive), sending)
        except ConnectionError:
            return  # there is nobody to tell
        except Exception as error:
            told = as_api_error(error)
            if has_begun:
                raise ConnectionAbortedError from error  # an answer cut short must look like one
            if told.status == 413:
                await self._discard(receive)
            await send_error(sending, told)

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
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            raise ApiError(431, f"more than {MAX_HEADER_BYTES:,} bytes of headers")
        if headers.get("content-encoding", b"identity").lower() != b"identity":
            raise ApiError(415, "Content-Encoding: expected none")
        length = headers.get("content-length", b"0")
        if not length.isdigit() or len(length) > 18:
            raise ApiError(400, "Content-Length: expected a number", code="invalid_header")
        if int(length) > self._options.max_body_bytes:
            raise ApiError(413, f"the body has {int(length):,} bytes, the limit is {self._options.max_body_bytes:,}")

    def _limited(self, receive: Any) -> Any:
        """`receive`, which refuses what is too large or too slow."""
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
                is_whole = not message.get("more_body", False)
                if num_bytes > self._options.max_body_bytes:
                    raise ApiError(413, f"the body has more than {self._options.max_body_bytes:,} bytes")
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


async def send_error(send: Any, error: ApiError) -> None:
    """The whole answer that an error is."""
    content = dump_json(error.body)
    headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), **error.headers}
    if error.status in (408, 413):
        headers["Connection"] = "close"  # what is left of the body is not read
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": content})


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
