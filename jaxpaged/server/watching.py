"""Around everything that is asked over HTTP: its metrics, its line in the log, its trace. When an answer ends, not before.

An ASGI application around another. Knows what a request came to. Refuses to look into bodies.
"""

from __future__ import annotations

import logging
import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from jaxpaged.server.endings import finish_reasons, spans
from jaxpaged.server.logs import REQUESTS, clean
from jaxpaged.server.metrics import NO_ROUTE, Metrics
from jaxpaged.server.options import ServerOptions
from jaxpaged.server.tracing import Tracer
from jaxpaged.streams import Stream

logger = logging.getLogger(REQUESTS)

# What machines ask all the time: told when it fails.
QUIET = ("/live", "/ready", "/health", "/metrics", "/version", "/state/{view}", "/ui", "/ui/state")  # asked again and again
_TENANT_LEN = 8  # of a digest: enough to tell tenants apart, too little to find a key by
_MAX_PATH_LEN = 200


@dataclass
class Account:
    """One request over HTTP, and what of it has been put into the engine."""

    began_s: float
    began_ns: int
    status: int = 0  # none yet
    request_id: str | None = None
    streams: list[Stream] = field(default_factory=list)


_ACCOUNT: ContextVar[Account | None] = ContextVar("account", default=None)


class Book(Metrics):
    """The metrics, which also write down whose a stream is."""

    def started(self, stream: Stream) -> None:
        """See `Observer.started`."""
        account = _ACCOUNT.get()
        if account is not None:
            account.streams.append(stream)


class Watching:
    """Every request passes here first, what the door refuses too."""

    def __init__(self, app: Any, *, metrics: Metrics, options: ServerOptions, tracer: Tracer | None = None):
        """`tracer` None makes no traces."""
        self._app, self._metrics, self._options, self._tracer = app, metrics, options, tracer

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        account = Account(time.perf_counter(), time.time_ns())
        _ACCOUNT.set(account)

        def sending(message: dict[str, Any]) -> Any:
            if message["type"] == "http.response.start":
                account.status = message["status"]
                ids = [value for name, value in message.get("headers", ()) if name == b"x-request-id"]
                account.request_id = ids[0].decode("latin-1") if ids else None
            return send(message)

        try:
            await self._app(scope, receive, sending)
        finally:
            self._ended(scope, account)

    def _ended(self, scope: dict[str, Any], account: Account) -> None:
        seconds = time.perf_counter() - account.began_s
        route = getattr(scope.get("route"), "path", scope.get("refused_path"))
        self._metrics.http(scope["method"], route, account.status, seconds)
        if route in QUIET and account.status < 400:
            return
        if self._options.access_log:
            self._log(scope, account, route, seconds)
        if self._tracer is not None:
            self._tracer.trace(scope, account, route)

    def _log(self, scope: dict[str, Any], account: Account, route: str | None, seconds: float) -> None:
        tenant = scope.get("state", {}).get("tenant", "")
        fields: dict[str, Any] = {
            "request_id": account.request_id,
            "tenant": tenant[:_TENANT_LEN] or None,
            "method": clean(scope["method"][:16]),
            "route": route or NO_ROUTE,
            "path": None if route is not None else clean(scope["path"][:_MAX_PATH_LEN]),
            "status": account.status,
            "seconds": seconds,
            **self._of_streams(account.streams),
        }
        head = f"{fields['method']} {fields['route']} {account.status or 'left'}"
        logger.info("%s", head, extra={"fields": fields})

    def _of_streams(self, streams: list[Stream]) -> dict[str, Any]:
        """What has been computed, and how long that took; of several prompts, the longest times."""
        if not streams:
            return {}
        found: dict[str, Any] = {
            "num_prompts": len(streams) if len(streams) > 1 else None,
            "prompt_tokens": sum(len(one.request.prompt_token_ids) for one in streams),
            "cached_tokens": sum(one.live.num_cached_tokens for one in streams),
            "generation_tokens": sum(one.num_generated for one in streams),
            "finish_reason": ",".join(sorted({reason for one in streams for reason in finish_reasons(one)})),
        }
        for stream in streams:
            of_one = spans(stream) if stream.times.ended_s else {}
            if stream.times.first_token_s:
                of_one["time_to_first_token"] = stream.times.first_token_s - stream.request.arrival_s
            for name in ("request_queue_time", "time_to_first_token"):
                if name in of_one:
                    short = name.removeprefix("request_") + "_s"
                    found[short] = max(found.get(short, 0.0), of_one[name])
        if self._options.enable_log_requests:
            limit = self._options.max_log_len
            prompts = [one.live.prompt or str(list(one.request.prompt_token_ids)) for one in streams]
            found["prompts"] = [clean(prompt if limit is None else prompt[:limit]) for prompt in prompts]
        return found
