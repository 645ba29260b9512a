"""A text taken apart into content and tool calls while it grows.

Knows how to hold back, to let go and to count calls. Refuses to know formats: each is a subclass in `formats`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from jaxpaged.tools.events import ArgumentsDelta, CallDropped, CallFinished, CallStarted, Content, Event
from jaxpaged.tools.scanner import WHITESPACE, ArgumentsScanner, CallScanner, Status

MAX_CALL_LEN = 2**20  # characters of one call: as much is kept until it is finished

State = Callable[[str, int], int]
"""Takes a text from a place on, and gives one past what it took: nothing only when another state goes on."""


class ToolParser(ABC):
    """A text that comes in deltas, and the events that it gives.

    Laws: what `add` and `finish` gave is together the same Reply however the text was cut into deltas. All of the text is
    content, or a finished call with its markers and separators, or white space that touches nothing but calls and the ends.
    What is held back may still be the beginning of a call. Each character is looked at a bounded number of times: what was
    taken for a call and is none is content as a whole, and is not searched for other calls.
    """

    def __init__(self, make_id: Callable[[], str], *, is_eager: bool = True):
        """Without `is_eager` a call is given when it is finished, all at once, and none is ever dropped."""
        self._make_id, self._is_eager = make_id, is_eager
        self._events: list[Event] = []
        self._state: State = self._blank
        self._held: list[str] = []  # text of which it is open what it is
        self._is_space = True  # whether that is white space alone
        self._options: dict[str, State] = {}  # markers that may stand here, and who goes on after them
        self._num_matched = 0  # characters of them that have been found
        self._scanner: CallScanner | ArgumentsScanner = self._call_scanner()
        self._num_scanned = 0
        self._id: str | None = None  # of the call that has started
        self._pending: list[Event] = []  # of a call that waits for its end
        self._num_calls = 0

    def add(self, delta: str) -> list[Event]:
        """What this much more of the text settles."""
        place = 0
        while place < len(delta):
            place = self._state(delta, place)
        return self._take_events()

    def finish(self) -> list[Event]:
        """What the end of the text settles. Nothing may be added after it."""
        if self._id is not None:
            self._drop_call()
        if self._held and not (self._is_space and self._num_calls):
            self._release()
        return self._take_events()

    # --- what formats differ in ---

    @abstractmethod
    def _begin(self, text: str, start: int) -> int:
        """The state at the first character after white space at the beginning of the text, or after a call."""

    @abstractmethod
    def _call_scanner(self) -> CallScanner:
        """Of one object that says a call."""

    @abstractmethod
    def _after_call(self) -> State:
        """The state at the end of a call."""

    # --- text ---

    def _blank(self, text: str, start: int) -> int:
        """White space that touches no content yet."""
        end = self._hold_space(text, start)
        if end < len(text):
            self._state = self._begin
        return end

    def _content(self, text: str, start: int, options: dict[str, State]) -> int:
        """Content as far as none of the markers may begin, all of which begin with one character."""
        self._state = self._text
        first = next(iter(options))[0]
        found = text.find(first, start)
        end = len(text) if found < 0 else found
        if end > start:
            self._release()
            self._events.append(Content(text[start:end]))
        if found >= 0:
            self._expect(options)
        return end

    def _expect(self, options: dict[str, State]) -> None:
        self._options, self._num_matched = options, 0
        self._state = self._marker

    def _marker(self, text: str, start: int) -> int:
        """The beginning of some markers, none of which has its first character a second time or is the beginning of another."""
        place = start
        while place < len(text):
            live = {marker: state for marker, state in self._options.items() if marker[self._num_matched] == text[place]}
            if not live:
                self._hold(text[start:place])
                self._give_up()
                return place
            place, self._num_matched, self._options = place + 1, self._num_matched + 1, live
            whole = next((marker for marker in live if len(marker) == self._num_matched), None)
            if whole is not None:
                self._hold(text[start:place])
                self._state = live[whole]
                return self._state(text, place)  # also at the end of the text
        self._hold(text[start:place])
        return place

    def _hold(self, piece: str) -> None:
        if piece:
            self._held.append(piece)
            self._is_space = False

    def _hold_space(self, text: str, start: int) -> int:
        end = start
        while end < len(text) and text[end] in WHITESPACE:
            end += 1
        if end > start:
            self._held.append(text[start:end])
        return end

    def _release(self) -> None:
        """What is held is content."""
        if self._held:
            self._events.append(Content("".join(self._held)))
        self._forget()

    def _forget(self) -> None:
        """What is held belongs to calls."""
        self._held, self._is_space = [], True

    def _give_up(self) -> None:
        """What is held is no call: the text goes on as if it had been content."""
        self._release()
        self._state = self._text

    @abstractmethod
    def _text(self, text: str, start: int) -> int:
        """The state inside content."""

    # --- calls ---

    def _scan(self, scanner: CallScanner | ArgumentsScanner) -> None:
        self._scanner, self._num_scanned = scanner, 0
        self._state = self._call

    def _call(self, text: str, start: int) -> int:
        """Inside the object that says a call."""
        place = self._scanner.feed(text, start, min(len(text), start + MAX_CALL_LEN - self._num_scanned))
        self._hold(text[start:place])
        self._num_scanned += place - start
        self._tell_call()
        if self._scanner.status is Status.DONE:
            self._finish_call()
        elif self._scanner.status is Status.FAILED or self._num_scanned == MAX_CALL_LEN:
            self._drop_call()
            self._give_up()
        return place

    def _tell_call(self) -> None:
        name, arguments = self._scanner.name, self._scanner.arguments
        if name is None or arguments is None:
            return
        told = self._events if self._is_eager else self._pending
        if self._id is None:
            self._id = self._make_id()
            told.append(CallStarted(self._num_calls, self._id, name))
        if delta := "".join(arguments):
            told.append(ArgumentsDelta(self._num_calls, delta))
        arguments.clear()

    def _finish_call(self) -> None:
        self._events += [*self._pending, CallFinished(self._num_calls)]
        self._num_calls += 1
        self._id, self._pending = None, []
        self._forget()
        self._state = self._after_call()

    def _drop_call(self) -> None:
        if self._id is not None and self._is_eager:
            self._events.append(CallDropped(self._num_calls))
            self._num_calls += 1
        self._id, self._pending = None, []

    def _take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events
