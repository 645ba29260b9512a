"""How much may wait: requests and prompt tokens that have been taken and have no token of their answer yet.

Knows counts. Refuses to know prompts and engines: a request is refused before anything is made of it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass

from jaxpaged.errors import ConfigError

MAX_RETRY_AFTER_S = 60


@dataclass(frozen=True, kw_only=True)
class QueueOptions:
    """How much may wait for an `AsyncLLM`.

    Args:
      max_queued_requests: requests that have been taken and have no token yet, each counted as its outputs; more are refused.
      max_queued_tokens: likewise tokens of their prompts, guessed until a prompt is tokenised.
      num_text_threads: threads that tokenise and fill in chat templates, and as many that compile grammars.
      max_stream_events_per_s: of all answers that are told while they grow. Where steps would bring more, an answer's tokens come
        several at a time, at most 50 ms apart; its first comes at once. 0 is no limit: each token by itself.
      stream_interval: tokens of a request that are told together while it grows, as vLLM's; its first and its end come at once.
      stall_s: an engine that has begun no step for so long is not healthy. Longer than the longest step, and with enforce_eager
        than the longest compilation.

    Raises:
      ConfigError: a value out of range.
    """

    max_queued_requests: int = 256
    max_queued_tokens: int = 262_144
    num_text_threads: int = 4
    max_stream_events_per_s: int = 1_500
    stream_interval: int = 1
    stall_s: float = 30.0

    def __post_init__(self) -> None:
        limits = {"max_queued_requests": 2**20, "max_queued_tokens": 2**40, "num_text_threads": 64, "stream_interval": 2**20}
        for name, most in limits.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ConfigError(f"{name}: got {value!r}, expected a whole number in [1, {most}]")
        rate = self.max_stream_events_per_s
        if isinstance(rate, bool) or not isinstance(rate, int) or not 0 <= rate <= 2**30:
            raise ConfigError(f"max_stream_events_per_s: got {rate!r}, expected a whole number in [0, {2**30}]")
        if isinstance(self.stall_s, bool) or not isinstance(self.stall_s, (int, float)) or not 0 < self.stall_s <= 86_400:
            raise ConfigError(f"stall_s: got {self.stall_s!r}, expected a number of seconds in (0, 86400]")


class QueueFullError(Exception):
    """As much waits as may. `retry_after_s` is a guess: how long the last request waited for its first token."""

    def __init__(self, message: str, retry_after_s: int):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Ticket:
    """What one request counts for, until it is released. Releasing twice is nothing."""

    def __init__(self, admission: Admission, num_outputs: int, num_tokens: int, at_s: float):
        self.admission, self.num_outputs, self.num_tokens, self.at_s = admission, num_outputs, num_tokens, at_s
        self.is_held = True

    def release(self, *, is_served: bool = False) -> None:
        """It does not wait any more: it has its first token (`is_served`), or has ended."""
        self.admission.release(self, is_served)

    def resize(self, num_tokens: int) -> None:
        """Its prompt is known now."""
        self.admission.resize(self, num_tokens)


class Admission:
    """Two limits on what waits. Threads may share it.

    Invariant: what is counted is what the tickets that are held count for. Where nothing waits, any one request is let in, so
    that a limit refuses no request for ever.
    """

    def __init__(self, max_queued_requests: int, max_queued_tokens: int, clock: Callable[[], float]):
        """A request counts as its outputs: they are what takes room."""
        self.max_queued_requests, self.max_queued_tokens, self._clock = max_queued_requests, max_queued_tokens, clock
        self.num_outputs = self.num_tokens = 0
        self.num_refused = {"max_queued_requests": 0, "max_queued_tokens": 0}  # by the limit
        self._last_wait_s = 0.0
        self._lock = threading.Lock()

    def admit(self, num_outputs: int, num_tokens: int) -> Ticket:
        """Let a request in. `num_tokens` may be a guess; see `Ticket.resize`.

        Raises:
          QueueFullError: it would be too much.
        """
        with self._lock:
            self._check(num_outputs, num_tokens)
            self.num_outputs, self.num_tokens = self.num_outputs + num_outputs, self.num_tokens + num_tokens
        return Ticket(self, num_outputs, num_tokens, self._clock())

    def check(self) -> None:
        """Raises QueueFullError where not even the smallest request would be let in."""
        with self._lock:
            self._check(1, 1)

    def _check(self, num_outputs: int, num_tokens: int) -> None:
        limits = {"max_queued_requests": self.max_queued_requests, "max_queued_tokens": self.max_queued_tokens}
        sums = self.num_outputs + num_outputs, self.num_tokens + num_tokens
        reached = [name for (name, limit), count in zip(limits.items(), sums, strict=True) if count > limit]
        if self.num_outputs and reached:
            self.num_refused[reached[0]] += 1
            queued = f"{self.num_outputs:,} requests with {self.num_tokens:,} tokens wait"
            told = ", ".join(f"{name} {limit:,}" for name, limit in limits.items())
            raise QueueFullError(f"the queue is full: {queued}, the limits are {told}", self.retry_after_s)

    def split(self, ticket: Ticket, num_tokens: list[int]) -> list[Ticket]:
        """One ticket for each of several parts that a request has, of as many outputs each, in place of the whole one."""
        with self._lock:
            ticket.is_held = False
            each = ticket.num_outputs // len(num_tokens)
            return [Ticket(self, each, count, ticket.at_s) for count in num_tokens]

    @property
    def retry_after_s(self) -> int:
        """A whole number of seconds, at least 1."""
        return max(1, min(MAX_RETRY_AFTER_S, math.ceil(self._last_wait_s)))

    def release(self, ticket: Ticket, is_served: bool) -> None:
        """See `Ticket.release`."""
        with self._lock:
            if not ticket.is_held:
                return
            ticket.is_held = False
            self.num_outputs -= ticket.num_outputs
            self.num_tokens -= ticket.num_tokens
            if is_served:
                self._last_wait_s = self._clock() - ticket.at_s

    def resize(self, ticket: Ticket, num_tokens: int) -> None:
        """See `Ticket.resize`."""
        with self._lock:
            if ticket.is_held:
                self.num_tokens += num_tokens - ticket.num_tokens
                ticket.num_tokens = num_tokens
