"""A server on a socket, until it is told to end: it drains first.

Knows uvicorn and signals. Refuses to know requests.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from jaxpaged.async_llm import AsyncLLM
from jaxpaged.config import ConfigError
from jaxpaged.server.app import build_app
from jaxpaged.server.connection import Connection
from jaxpaged.server.options import ServerOptions

logger = logging.getLogger("jaxpaged")

_LAST_WORDS_S = 2.0  # for errors and [DONE] to reach those whose requests were ended


class Server(uvicorn.Server):
    """Invariant: after the first signal nothing new is taken, and what runs has drain_s to end; a second one ends it at once.

    While it drains it still answers: /ready says no, requests get 503.
    """

    def __init__(self, llm: AsyncLLM, options: ServerOptions):
        http: Any = functools.partial(Connection, request_s=options.body_timeout_s)
        config = uvicorn.Config(
            build_app(llm, options),
            **{"host": options.host, "port": options.port, "http": http, "ws": "none", "lifespan": "off"},
            **{"log_config": None, "access_log": False, "server_header": False, "proxy_headers": False, "timeout_keep_alive": 30},
            timeout_graceful_shutdown=int(_LAST_WORDS_S),
        )
        super().__init__(config)
        self._llm, self._options, self._tracer = llm, options, config.app.state.tracer  # type: ignore[union-attr]
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Until it is told to end."""
        self._loop = asyncio.get_running_loop()
        try:
            await super().serve(sockets)
        finally:
            if self._tracer is not None:
                await asyncio.to_thread(self._tracer.close)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain, then end; called by the signal, between two instructions of whatever runs."""
        if self._loop is None or not self._llm.is_ready:
            self.should_exit = self.force_exit = True
            return
        self._llm.stop_taking()
        self._loop.call_soon_threadsafe(self.start_draining)

    def start_draining(self) -> None:
        """As at SIGTERM; on the loop."""
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        logger.warning("Draining: %d requests have %g s to end.", self._llm.num_unfinished, self._options.drain_s)
        if not await self._llm.drain(self._options.drain_s):
            logger.warning("Ending %d requests that have not ended.", self._llm.num_unfinished)
            await asyncio.to_thread(self._llm.shutdown)
        self.should_exit = True


def serve(
    llm: AsyncLLM,
    options: ServerOptions,
    bound: socket.socket | None = None,
    *,
    when_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then end the model too, and the socket.

    Args:
      bound: from `bind`; None binds what the options say.
      when_ready: told the address before the first connection.
    """
    with bound if bound is not None else bind(options.host, options.port) as bound:
        try:
            server = Server(llm, options)
            bound.listen(server.config.backlog)  # who connects as soon as the address is told has to wait, not to come again
            # What was loaded stays: a collection that looks at all of it holds everybody up for half a second.
            gc.collect()
            gc.freeze()
            if when_ready is not None:
                when_ready(address_of(bound))
            server.run([bound])
        finally:
            llm.shutdown()


def bind(host: str, port: int) -> socket.socket:
    """A socket of an address, on which nothing is heard yet: one in use is told before a model is loaded.

    Raises:
      ConfigError: it cannot be had.
    """
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # With the protocol named: asyncio sets TCP_NODELAY on what it knows to be TCP, and 40 ms a request hang on that.
        bound = socket.socket(found[0], found[1], socket.IPPROTO_TCP)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(found[4])
        except OSError:
            bound.close()
            raise
    except OSError as error:
        raise ConfigError(f"port: {host}:{port}: {error.strerror or error}") from None
    return bound


def address_of(bound: socket.socket) -> str:
    """Its URL."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
