"""One request on its way from the engine's thread to a task that waits for it; and how a request may end that it should not.

Knows two threads and nothing else of either.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from jaxpaged.admission import Ticket
from jaxpaged.growing import GrowingRequest
from jaxpaged.host.request import RequestOutputKind, TokenEvent
from jaxpaged.outputs import RequestOutput
from jaxpaged.pacing import Pacer

logger = logging.getLogger("jaxpaged")


class EngineError(Exception):
    """The engine has not ended a request as it should. `code` is for programs to read."""

    code = "engine_error"


class RequestFaultError(EngineError):
    """Something went wrong with this request alone: its text, its log-probabilities."""

    code = "internal_error"

    @classmethod
    def of(cls, request_id: str, error: Exception) -> RequestFaultError:
        """What is told of an error of ours, which is for the log alone."""
        logger.error("Request %s has failed: %s", request_id, error, exc_info=error)
        return cls("this request could not be completed")


class StepFailedError(EngineError):
    """A step that this request was in has failed, and again when it was computed anew."""

    code = "engine_step_failed"


class ClosedError(EngineError):
    """It takes no requests any more, or was closed before this one had ended."""

    code = "shutting_down"


class StalledError(EngineError):
    """The engine has not been heard of for too long, or its steps fail."""

    code = "engine_stalled"


class DeadlineError(EngineError):
    """The request took longer than it may, waiting included."""

    code = "deadline_exceeded"

    def __init__(self) -> None:
        super().__init__("timeout: the request has taken longer than it may")


@dataclass(slots=True)
class Times:
    """When things happened to one request, in seconds of the engine's clock, 0 for what has not; an `Observer` writes it."""

    scheduled_s: float = 0.0  # the step began that was the first to compute it
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    last_step_s: float = 0.0  # what a step brought was told, the last token among it
    ended_s: float = 0.0
    num_preemptions: int = 0


class Stream:
    """The outputs of one request, as its output_kind has them. One task may iterate; `close` ends it early.

    It holds what has come, not messages: a consumer that is slow gets more at once, and never makes a queue.
    """

    def __init__(
        self,
        live: GrowingRequest,
        *,
        ticket: Ticket,
        pacer: Pacer,
        end: Callable[[Stream], None],
        interval: int = 1,
    ):
        """`end` takes a request out of its engine; `pacer` has the loop on which there is someone to wake; `interval`: see
        `stream_interval` of QueueOptions.
        """
        self.request, self.pacer = live.request, pacer
        self.due_s = 0.0  # the pacer's
        self.live, self.times = live, Times()  # what has come of it, and when: both the engine's thread writes
        self._ticket, self._end = ticket, end
        self._lock = threading.Lock()  # the engine's thread writes what the loop's thread reads
        self._has_news = asyncio.Event()
        self._error: Exception | None = None
        params = self.request.params
        self._is_told_at_end = params.is_ranked or params.output_kind is RequestOutputKind.FINAL_ONLY
        self._is_told_news = params.output_kind is RequestOutputKind.DELTA
        self._interval = interval
        self._num_seen = self._num_tokens_seen = 0
        self._is_told = False
        self._deadline: asyncio.TimerHandle | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self._error is not None or self.live.is_finished

    @property
    def error(self) -> Exception | None:
        """What ended it that should not have."""
        return self._error

    @property
    def is_to_wake(self) -> bool:
        """Whether an event is something to tell: of an answer that is told as a whole only the last is."""
        return self.is_over or (not self._is_told_at_end and self._is_due)

    @property
    def _is_due(self) -> bool:
        """Whether there are so many tokens that they are told before the end."""
        if self._interval == 1 or not self._num_seen or self.live.has_untold_end:
            return True
        return self.num_generated - self._num_tokens_seen >= self._interval

    @property
    def num_generated(self) -> int:
        """Tokens of all outputs so far."""
        return self.live.num_generated

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> RequestOutput:
        while not self._is_told:
            self._has_news.clear()
            try:
                output = self._take()
            except Exception as error:
                if error is self._error:
                    raise
                told = RequestFaultError.of(self.request.request_id, error)  # in its text, which is made now
                self.fail(told)
                self.close()
                raise told from error
            if output is not None:
                return output
            await self._has_news.wait()
        raise StopAsyncIteration

    def close(self) -> None:
        """End the request if it has not ended: its pages are free before the step after next."""
        self._forget_deadline()
        self._end(self)

    def expire_after(self, seconds: float, expire: Callable[[Stream], None]) -> None:
        """Have this called then, on the loop's thread, if nobody has been told the end before."""
        self._deadline = self.pacer.loop.call_later(seconds, expire, self)

    def _forget_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()

    # --- for whoever has the engine ---

    def record(self, event: TokenEvent, now: float) -> bool:
        """See `GrowingRequest.record`; on the engine's thread."""
        with self._lock:
            is_ended = self.live.record(event, now)
            if self._ticket.is_held:
                self._ticket.release(is_served=event.token_id is not None or bool(event.token_ids))
        return is_ended

    def fail(self, error: Exception) -> None:
        """End it with an error, if it has not ended."""
        with self._lock:
            if not self.is_over:
                self._error = error
        self._ticket.release()

    def wake(self) -> None:
        """Tell who iterates that there may be something; on the loop's thread."""
        self._has_news.set()

    def _take(self) -> RequestOutput | None:
        """What is to be told now."""
        with self._lock:
            if self._error is not None:
                self._is_told = True
                self._forget_deadline()
                raise self._error
            live = self.live
            if live.num_events == self._num_seen or not self.is_to_wake:
                return None
            self._num_seen, self._num_tokens_seen = live.num_events, self.num_generated
            self._is_told = live.is_finished
            if self._is_told:
                self._forget_deadline()
            return live.news() if self._is_told_news else live.output()
