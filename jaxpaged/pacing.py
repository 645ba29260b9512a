"""How often those who iterate are told: where they are many, not each time that there is something, so that telling costs little.

Knows whom to wake, and when. Refuses to know what there is to tell.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Protocol

MAX_PAUSE_S = 0.05
_CLOCK_S = 0.001


class Sleeper(Protocol):
    """Someone who waits for news. `due_s` is the pacer's own; 0 at first."""

    due_s: float

    @property
    def is_over(self) -> bool:
        """Whether no more will come."""
        ...

    def wake(self) -> None:
        """Tell that there is something."""
        ...


class Pacer:
    """Wakes the sleepers of one loop, on its thread.

    Invariant: whoever there is something for has been woken since, or will be within MAX_PAUSE_S. Each is woken at once the first
    time and the last; all of them together are woken about `max_per_s` times a second, or as often as MAX_PAUSE_S asks.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, max_per_s: int):
        """`max_per_s` 0 wakes at once."""
        self.loop, self._max_per_s = loop, max_per_s
        self._pause_s = 0.0
        self._late: dict[Sleeper, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def take(self, sleepers: Collection[Sleeper]) -> None:
        """There is something for these."""
        self._pause_s = min(MAX_PAUSE_S, len(sleepers) / self._max_per_s) if self._max_per_s else 0.0
        now = self.loop.time()
        for one in sleepers:
            if one.due_s <= now or one.is_over:
                self._wake(one, now)
            else:
                self._late[one] = None
        self._look_again()

    def _wake(self, one: Sleeper, now: float) -> None:
        self._late.pop(one, None)
        one.due_s = now + self._pause_s
        one.wake()

    def _look_again(self) -> None:
        # Those that began together are due together: one timer does for most.
        if self._late and self._timer is None:
            self._timer = self.loop.call_at(min(one.due_s for one in self._late), self._wake_late)

    def _wake_late(self) -> None:
        self._timer = None
        now = self.loop.time()
        # A loop whose clock has whole milliseconds calls up to one too early, and would again at once.
        for one in [one for one in self._late if one.due_s <= now + _CLOCK_S]:
            self._wake(one, now)
        self._look_again()
