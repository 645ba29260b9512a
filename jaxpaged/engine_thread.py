"""The thread that drives an engine: what callers send, then a step, for as long as there is something to do.

Knows streams by what they take. Refuses to know prompts, texts and who waits: what comes here has been checked.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

from jaxpaged.engine import Engine
from jaxpaged.host.request import RequestError, TokenEvent
from jaxpaged.live import record
from jaxpaged.pacing import Pacer
from jaxpaged.streams import ClosedError, DeadlineError, RequestFaultError, StalledError, StepFailedError, Stream
from jaxpaged.suspects import Suspects

logger = logging.getLogger("jaxpaged")

_IDLE_BEAT_S = 0.5  # how often an engine that has nothing to do says that it lives
_MAX_FAILED_STEPS = 4  # in a row: then it is not one request that is at fault

T = TypeVar("T")


class Observer(Protocol):
    """Told what happens to streams, on the engine's thread but for `started`; in the middle of a step, which waits for it and may
    have two in flight.
    """

    def started(self, stream: Stream) -> None:
        """It has been taken; told on the thread, and in the context, of whoever asked for it."""
        ...

    def queued(self, engine: Engine, stream: Stream) -> None:
        """The engine has it."""
        ...

    def stepped(self, engine: Engine, changed: list[Stream], began_s: float) -> None:
        """A step was made, and changed these: the ones that are over still among them. Another began at `began_s`."""
        ...

    def ended(self, stream: Stream) -> None:
        """It is over."""
        ...


class EngineThread:
    """Owns an engine, which nobody else drives.

    Invariant: a stream that was added and is not over is in the engine, on its way there, or its last event is untold; when the
    thread ends, all are over. What goes wrong in one request ends that one alone.

    What a step brings is told after the next has been begun, so that the device never waits for texts.
    """

    def __init__(self, engine: Engine, *, stall_s: float):
        """`stall_s`: see `QueueOptions`."""
        self.engine, self.clock, self._stall_s = engine, engine.clock, stall_s
        self._streams: dict[str, Stream] = {}  # not over, by request id
        self._suspects = Suspects()
        self._num_failed = 0  # steps, in a row, but those of a trial
        self._untold: list[TokenEvent] | None = None  # what the last step brought
        self.observer: Observer | None = None
        self._lock = threading.Condition()  # of what follows
        self._commands: list[Callable[[], None]] = []
        self._is_closing, self._close_by_s = False, 0.0
        self._beat_s = self.clock()
        self._told_beat_s: float | None = None  # of the hang whose stack is in the log
        self._death: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="jaxpaged-engine", daemon=True)
        self._thread.start()

    # --- for other threads ---

    @property
    def is_closed(self) -> bool:
        """Whether it takes nothing any more."""
        return self._is_closing

    @property
    def num_unfinished(self) -> int:
        """Requests that were added and are not over."""
        return len(self._streams)

    def add(self, stream: Stream) -> None:
        """Queue a request.

        Raises:
          RequestError: an unfinished request has its id.
          ClosedError: nothing is taken any more.
        """
        request_id = stream.request.request_id
        with self._lock:
            if self._is_closing:
                raise ClosedError("no further requests are taken")
            if request_id in self._streams:
                raise RequestError(f"request_id: {request_id!r} is already in use by an unfinished request")
            self._streams[request_id] = stream
            self._commands.append(functools.partial(self._queue, stream))
            self._lock.notify()

    def find(self, request_id: str) -> Stream | None:
        """An unfinished request."""
        return self._streams.get(request_id)

    def end(self, stream: Stream) -> None:
        """Take a request out of the engine before its next step, if it is there; who iterates gets its end, if it had none."""
        if self._has(stream):
            self._send(functools.partial(self._abort, stream))

    def expire(self, stream: Stream) -> None:
        """End a request that takes too long, if it is not over; on its loop's thread.

        Who waits is told now, even where the step that runs never ends; its pages are free before the next.
        """
        if not stream.is_over:
            stream.fail(DeadlineError())
            self.end(stream)
            stream.wake()

    async def call(self, function: Callable[[Engine], T]) -> T:
        """What a function of the engine gives between two steps.

        Raises:
          ClosedError: there is no engine any more.
        """
        loop = asyncio.get_running_loop()
        future = loop.create_future()

        def settle(found: T | None, error: Exception | None) -> None:
            if future.done():  # whoever waited has gone
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(found)

        def run() -> None:
            found = error = None
            try:
                found = function(self.engine)
            except Exception as caught:
                error = caught
            with contextlib.suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(settle, found, error)

        if not self._send(run):
            raise ClosedError("the engine is closed")
        return await future

    def check(self) -> None:
        """Whether the thread begins its steps: it says so itself.

        Raises:
          StalledError, ClosedError: why not.
        """
        if self._death is not None:
            raise StalledError("the engine's thread has ended")
        silent_s = self.clock() - self._beat_s
        if self._is_closing:
            raise ClosedError("the engine is closed")
        if silent_s > self._stall_s:
            self._tell_stack()
            raise StalledError(f"the engine has begun no step for {silent_s:.1f} s, the limit is {self._stall_s:g} s")
        if self._num_failed >= _MAX_FAILED_STEPS:
            raise StalledError(f"the last {self._num_failed} steps have failed")

    def _tell_stack(self) -> None:
        """What the thread is at, once for each time that it hangs."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        if self._told_beat_s != self._beat_s and frame is not None:
            self._told_beat_s = self._beat_s
            logger.error("The engine hangs; its thread's stack:\n%s", "".join(traceback.format_stack(frame)))

    def close(self) -> None:
        """End what runs with a ClosedError to who waits for it, and the engine. Twice is nothing.

        A step that hangs is not waited for longer than `stall_s`: those who wait are told here then, and the engine stays as it
        is.
        """
        with self._lock:
            if not self._is_closing:
                self._close_by_s = time.monotonic() + self._stall_s
            self._is_closing = True
            self._lock.notify()
        if threading.current_thread() is self._thread:
            return
        self._thread.join(max(0.0, self._close_by_s - time.monotonic()))
        if self._thread.is_alive():
            self._tell_stack()
            streams = list(self._streams.values())
            for stream in streams:
                stream.fail(ClosedError("closed while a step hung"))
            self._wake(streams)

    def _send(self, command: Callable[[], None]) -> bool:
        """Have something done before the next step; False when there will be none."""
        with self._lock:
            if not self._is_closing:
                self._commands.append(command)
                self._lock.notify()
            return not self._is_closing

    # --- the thread ---

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:  # nobody else would tell those who wait
            self._death = error
            logger.exception("The engine's thread has ended.")
        with self._lock:
            self._is_closing = True
            commands, self._commands = self._commands, []
        for command in (self._tell_untold, *commands):
            with contextlib.suppress(Exception):
                command()
        for stream in list(self._streams.values()):
            self._fail(stream, ClosedError("closed before the request had ended"))
        with contextlib.suppress(Exception):  # of an engine that is broken itself: that was told above
            self.engine.close()

    def _turn(self) -> bool:
        """What was sent, then a step; False when it is to end."""
        with self._lock:
            while not (self._commands or self._is_closing or self.engine.has_unfinished):
                self._beat_s = self.clock()
                self._lock.wait(_IDLE_BEAT_S)
            if self._is_closing:
                return False
            commands, self._commands = self._commands, []
        self._beat_s = self.clock()
        for command in commands:
            command()
        if self.engine.has_unfinished:
            self._step()
        else:  # whoever looked between two steps may have ended all that ran
            self._tell_untold()
        return True

    def _step(self) -> None:
        self._untold = self._untold or []  # whoever looks is told of each step
        try:
            self.engine.single_out(self._suspects.on_trial)
            events = self.engine.step(self._tell_untold)
        except Exception as error:
            self._tell_untold()
            self._step_failed(error)
            return
        self._num_failed = 0
        self._tell_untold()  # where nothing was waited for
        self._untold = events
        # Who has had a token in a trial is not suspected in the next step.
        if not self.engine.is_ahead or self._suspects.on_trial is not None:
            self._tell_untold()

    def _tell_untold(self) -> None:
        """Tell what the last step brought, if it has not been told: before its requests are taken out, for one."""
        events, self._untold = self._untold, None
        if events is None:
            return
        changed = record(self.engine, events, self._streams, self._fault)
        self._tell(lambda observer: observer.stepped(self.engine, changed, self._beat_s))
        for stream in changed:
            self._suspects.over(stream.request.request_id)
            if stream.live.is_finished:  # one that has expired is in the engine still, and keeps its id
                self._forget_if_over(stream)
        self._wake(stream for stream in changed if stream.is_to_wake)

    def _step_failed(self, error: Exception) -> None:
        """The engine has set back what was in the step: it is computed anew once, then whoever it was is found and given up."""
        self._num_failed += self._suspects.on_trial is None
        ids = [one for one in self.engine.failed_ids if one in self._streams]
        logger.error("A step with %d requests has failed: %s", len(ids), error, exc_info=error)
        given_up = self._suspects.failed(sorted(ids))
        if self._num_failed >= _MAX_FAILED_STEPS and not given_up and self._suspects.on_trial is None:
            given_up = list(self._streams)  # it is none of those that can be named
        for one in given_up:
            self.engine.abort(one)
            self._fail(self._streams[one], StepFailedError("the steps that compute this request fail"))

    def _fault(self, stream: Stream, error: Exception) -> None:
        self._fail(stream, RequestFaultError.of(stream.request.request_id, error))

    def _fail(self, stream: Stream, error: Exception) -> None:
        stream.fail(error)
        self._forget_if_over(stream)
        self._wake([stream])

    def _queue(self, stream: Stream) -> None:
        if stream.is_over:  # given up with all others before it was here
            return
        try:
            self.engine.queue(stream.request)
            self._tell(lambda observer: observer.queued(self.engine, stream))
        except RequestError as error:
            self._fail(stream, error)
        except Exception as error:
            self._fault(stream, error)

    def _abort(self, stream: Stream) -> None:
        self._tell_untold()
        if not self._has(stream):
            return
        events = self.engine.abort(stream.request.request_id)
        try:
            for event in events if not stream.is_over else ():
                stream.record(event, self.clock())
        except Exception as error:
            self._fault(stream, error)
        self._forget_if_over(stream)
        self._wake([stream])

    def _has(self, stream: Stream) -> bool:
        """Whether its id is still its own: another may have come with it since it ended."""
        return self._streams.get(stream.request.request_id) is stream

    def _forget_if_over(self, stream: Stream) -> None:
        if stream.is_over and self._has(stream):
            self._suspects.over(stream.request.request_id)
            del self._streams[stream.request.request_id]
            self._tell(lambda observer: observer.ended(stream))

    def _tell(self, what: Callable[[Observer], None]) -> None:
        """Who only looks ends nobody's request: one that raises is told no more."""
        if self.observer is None:
            return
        try:
            what(self.observer)
        except Exception:
            logger.exception("What observes the engine has failed, and is told no more.")
            self.observer = None

    def _wake(self, streams: Iterable[Stream]) -> None:
        """One message to each loop, whatever number of streams it has."""
        by_pacer: dict[Pacer, list[Stream]] = {}
        for stream in streams:
            by_pacer.setdefault(stream.pacer, []).append(stream)
        for pacer, some in by_pacer.items():
            try:
                pacer.loop.call_soon_threadsafe(pacer.take, some)
            except RuntimeError:  # the loop has been closed: nobody waits for these
                for stream in some:
                    self.end(stream)
