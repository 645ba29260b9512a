"""The flight recorder: a bounded ring in memory of all that reached the scheduler and all that it decided.

Knows bytes and when to drop the oldest. Refuses to know what the frames mean, and never stops the engine for its own sake.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from jaxpaged.host.beams import Candidates
from jaxpaged.host.plan import StepPlan
from jaxpaged.host.request import Request, Sequence
from jaxpaged.host.scheduler import Scheduler
from jaxpaged.observe import state
from jaxpaged.observe.encoder import Encoder, pack_plan
from jaxpaged.observe.recording import write
from jaxpaged.observe.records import (
    FRAME,
    MAX_ERROR,
    Kind,
    RecordingError,
    pack_commit,
    pack_fetched,
    pack_request,
    pack_stop,
    words,
)

_LATE = 64  # plans and commits that are written down together; one at a time, each would find the processor's caches cold
_SEGMENTS = 8  # of a full ring, were states nothing: what is dropped at a time, and how often the state is written down


class Recorder:
    """Records one scheduler from its birth on.

    The ring is made of segments; the oldest is dropped as a whole. Each begins with the whole state of the scheduler at that
    point, so that a replay can begin there. A state of more than a quarter of the ring is left out: what follows can be looked at
    but not replayed, and the recording says so.

    Steps that only decode, which are most, are kept as they came and written down some dozens at a time.

    Invariant: `num_bytes` <= `max_bytes`.
    """

    def __init__(self, scheduler: Scheduler, *, max_bytes: int, clock: Callable[[], float], header: dict[str, Any]):
        """`header` is what else the file should tell, as JSON; see `Recording.header`."""
        self.max_bytes, self.header = max_bytes, header
        self.num_bytes = 0
        self.num_steps = 0
        self.num_dropped_bytes = 0
        self._clock = clock
        self._encoder = Encoder(scheduler, self._put)
        self._segments: deque[bytearray] = deque()
        # (time, plan, what `Encoder.look` saw), or (time, None, what a step sampled, or the frame of what was proposed)
        self._late: list[tuple] = []
        self._is_full = False
        self._head_bytes = 0  # of the last segment
        self._why_blind = ""
        self._begin_segment()

    # --- what the engine tells ---

    def added(self, request: Request) -> None:
        """The scheduler has queued a request."""
        self._put(Kind.ADD, pack_request(request))
        self._settle()

    def aborted(self, request_id: str) -> None:
        """The scheduler has ended a request that was live."""
        self._put(Kind.ABORT, request_id.encode())
        self._encoder.find_finished()
        self._settle()

    def stopped(self, request_id: str, index: int) -> None:
        """The scheduler has ended an output that was live, for its text."""
        self._put(Kind.STOP, pack_stop(request_id, index))
        self._encoder.find_finished()
        self._settle()

    def fetched(self, key: bytes, ok: bool) -> None:
        """The scheduler was told of a page that has come from disk, or has not."""
        self._put(Kind.FETCHED, pack_fetched(key, ok))
        self._settle()

    def cache_was_reset(self) -> None:
        """The prefix cache has been emptied."""
        self._put(Kind.RESET, b"")
        self._settle()

    def proposed(self, drafts: Mapping[Sequence, Seq[int]]) -> None:
        """The scheduler is about to decide a step with these drafts."""
        self._late.append((self._clock(), None, self._encoder.proposed(drafts)))

    def planned(self, plan: StepPlan | None) -> None:
        """The scheduler has decided a step, or None."""
        self.num_steps += plan is not None
        if plan is None or plan.prefills or self._encoder.has_news or not self._planned_late(plan):
            self._encoder.planned(plan)
            self._settle()

    def _planned_late(self, plan: StepPlan) -> bool:
        """Keep a step that only decodes for later; False when it cannot wait."""
        try:
            seen = self._encoder.look(plan)
        except KeyError:  # of a row that has yet to be admitted
            return False
        self._late.append((self._clock(), plan, seen))
        self._encoder.in_flight.append(plan)
        if len(self._late) >= _LATE:
            self._write_late()
            self._settle()
        return True

    def ran(self, token_ids: Seq[int], is_finite: Seq[bool], candidates: Seq[Candidates] | None = None) -> None:
        """The oldest step in flight has run; it is about to be committed."""
        self._late.append((self._clock(), None, (token_ids, is_finite, candidates)))

    def committed(self) -> None:
        """It has been committed."""
        self._encoder.committed()

    def failed(self, stage: str, error: BaseException) -> None:
        """A step raised: in `plan`, `run` or `commit`."""
        text = f"{type(error).__name__}: {error}"[:MAX_ERROR]
        self._put(Kind.FAIL, json.dumps({"stage": stage, "error": text}).encode())
        self._encoder.failed()

    def singled_out(self, request_ids: Iterable[str] | None) -> None:
        """These alone are to run, and what runs is set back; or all may."""
        self._put(Kind.ONLY, json.dumps(request_ids if request_ids is None else sorted(request_ids)).encode())
        if request_ids is not None:
            self._encoder.failed()
        self._settle()

    # --- the ring ---

    def _put(self, kind: Kind, payload: bytes) -> None:
        if self._late:
            self._write_late()
        self._write(kind, self._clock(), payload)

    def _write_late(self) -> None:
        late, self._late = self._late, []
        encoder = self._encoder
        for time_s, plan, rest in late:
            if plan is not None:
                self._write(Kind.PLAN, time_s, pack_plan(plan, rest, encoder.page_size, {}))
            elif isinstance(rest, bytes):
                self._write(Kind.DRAFTS, time_s, rest)
            else:
                self._write(Kind.COMMIT, time_s, pack_commit(*rest))

    def _write(self, kind: Kind, time_s: float, payload: bytes) -> None:
        if len(payload) > self.max_bytes // 4:  # only a ring of a few kilobytes meets such a frame
            self.num_dropped_bytes += self.num_bytes + len(payload)
            self._segments.clear()
            self._segments.append(bytearray())
            self.num_bytes, self._head_bytes, self._is_full = 0, 0, True
            return
        segment = self._segments[-1]
        segment += FRAME.pack(kind, len(payload), time_s)
        segment += payload
        self.num_bytes += FRAME.size + len(payload)
        self._is_full = self._is_full or len(segment) - self._head_bytes >= self.max_bytes // _SEGMENTS
        if self.num_bytes > self.max_bytes:
            self._drop()

    def _drop(self) -> None:
        while self.num_bytes > self.max_bytes and len(self._segments) > 1:
            num_bytes = len(self._segments.popleft())
            self.num_bytes -= num_bytes
            self.num_dropped_bytes += num_bytes

    def _settle(self) -> None:
        """Begin the next segment when the last is full: only where nothing is late and the state is that of all frames so far."""
        if self._is_full:
            self._begin_segment()

    def _begin_segment(self) -> None:
        encoder = self._encoder
        is_beginning = not self.num_steps and not self._segments
        rows = [encoder.admission(row, sequence) for sequence, row in encoder.rows.items()]
        head = {"is_beginning": is_beginning, "num_steps": self.num_steps, "rows": [vars(row) for row in rows]}
        text = json.dumps(head).encode()
        saved = b"" if is_beginning else self._state(self.max_bytes // 4 - len(text) - 4)
        self._segments.append(bytearray())
        self._head_bytes = FRAME.size + 4 + len(text) + len(saved)
        self._put(Kind.SEGMENT, words(len(text)) + text + saved)
        self._is_full = False

    def _state(self, most_bytes: int) -> bytes:
        """The state of the scheduler and of the encoder; nothing when it cannot be written down."""
        try:
            saved = state.dump(self._encoder.state())
        except Exception as error:  # whatever a pool or a policy of the user's own is made of
            self._why_blind = f"the scheduler's state could not be written down ({type(error).__name__}: {error})"[:300]
            return b""
        if len(saved) > most_bytes:
            self._why_blind = f"the scheduler's state has {len(saved):,} bytes, a quarter of the ring {self.max_bytes // 4:,}"
            return b""
        return saved

    # --- the file ---

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write what the ring holds; the file is whole or not there. It holds the prompts' tokens: mode 0600.

        Raises:
          RecordingError: it could not be written.
        """
        path = Path(path)
        self._write_late()
        header = {**self.header, "num_dropped_bytes": self.num_dropped_bytes, "why_blind": self._why_blind}
        try:
            write(path, header, b"".join(self._segments))
        except OSError as error:
            raise RecordingError(f"{path}: {error.strerror or error}") from None
        return path
