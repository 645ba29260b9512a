"""An ASGI application asked without a socket: what no HTTP client would send."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import quote


async def ask(app: Any, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    """The status and the body of an answer."""
    pairs = {"content-type": "application/json", **(headers or {})}
    scope = {
        **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "root_path": ""},
        **{"method": method, "path": path, "raw_path": quote(path).encode(), "query_string": b""},
        "headers": [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in pairs.items()],
        **{"client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2)},
    }
    sent: list[dict[str, Any]] = []
    is_read = False

    async def receive() -> dict[str, Any]:
        nonlocal is_read
        if is_read:
            await asyncio.Event().wait()  # the client stays
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])
