"""Looks at an engine between two of its steps, for whoever asks, at a rate that the engine does not notice.

Knows how long a look takes and who waits for one. Refuses to know what is looked at.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from jaxpaged.async_llm import AsyncLLM
from jaxpaged.engine import Engine

INTERVAL_S = 0.25  # between two looks, at least
ENGINE_SHARE = 0.005  # of the time of the engine's thread, which no step gets
OTHER_SHARE = 0.02  # of the time of another thread, which takes turns with the engine's
MAX_INTERVAL_S = 5.0  # a rarer look would be called broken

T = TypeVar("T")
V = TypeVar("V")


class SharedLook(Generic[T, V]):
    """One kind of look. All who ask before one begins get that one, so that any number of them costs what one costs.

    Invariants: what is got was looked at after it was asked for; two looks begin at least as far apart as keeps them within the
    shares above, up to MAX_INTERVAL_S; when nobody asks, nobody looks.
    """

    def __init__(
        self,
        llm: AsyncLLM,
        take: Callable[[Engine], T],
        finish: Callable[[T], V],
        *,
        cpu_s: Callable[[], float] = time.thread_time,
    ):
        """`take` looks, on the engine's thread; `finish` makes of it what is wanted, on a thread for texts."""
        self._llm, self._take, self._finish, self._cpu_s = llm, take, finish, cpu_s
        self._next: asyncio.Future[V] | None = None  # a look that has not begun
        self._lock = asyncio.Lock()  # one at a time
        self._due_s = 0.0
        self._begun_s = self._engine_s = self._other_s = 0.0  # of the last one
        self._asked_s: float | None = None  # since when it waits for the engine

    async def get(self) -> V:
        """The next look. Raises ClosedError."""
        if self._next is None:
            self._next = asyncio.ensure_future(self._look())
            self._next.add_done_callback(_seen)
        return await asyncio.shield(self._next)  # others wait for it too

    @property
    def held_up_s(self) -> float:
        """How long a look has waited for a step to end; 0 when none waits."""
        return self._llm.clock() - self._asked_s if self._asked_s is not None else 0.0

    async def _look(self) -> V:
        async with self._lock:
            await asyncio.sleep(max(0.0, self._due_s - self._llm.clock()))
            self._next = None  # who asks from here on wants to see what happens from here on
            self._begun_s = self._asked_s = self._llm.clock()
            self._engine_s = self._other_s = 0.0
            try:
                return await self._llm.in_thread(self._timed_finish, await self._llm.between_steps(self._timed_take))
            finally:
                self._asked_s = None
                apart_s = max(INTERVAL_S, self._engine_s / ENGINE_SHARE, self._other_s / OTHER_SHARE)
                self._due_s = self._begun_s + min(apart_s, MAX_INTERVAL_S)

    def _timed_take(self, engine: Engine) -> T:
        self._begun_s, self._asked_s = self._llm.clock(), None
        try:
            return self._take(engine)
        finally:
            self._engine_s = self._llm.clock() - self._begun_s

    def _timed_finish(self, taken: T) -> V:
        begun_s = self._cpu_s()
        try:
            return self._finish(taken)
        finally:
            self._other_s = self._cpu_s() - begun_s


def _seen(future: asyncio.Future) -> None:
    """Whoever waited may have left: nobody is to be told of an error then."""
    if not future.cancelled():
        future.exception()
