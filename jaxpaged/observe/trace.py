"""A recording as a Chrome trace, for https://ui.perfetto.dev: a track per request, a track of steps, counters of the pool.

Knows the trace format. Reads the record alone and replays nothing, so that every recording can be looked at.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxpaged.observe.recording import Recording, Segment
from jaxpaged.observe.records import Admission, Decision, Kind, RecordingError, Work, readable, sets_back, unpack_request, unwords

_ENGINE, _REQUESTS = 1, 2  # the trace's two processes


def save_trace(recording: Recording, path: str | os.PathLike[str]) -> Path:
    """Write `trace_events` as a file that Perfetto and chrome://tracing open. Raises RecordingError when it cannot be written."""
    path = Path(path)
    try:
        with path.open("w") as file, readable(recording.path):
            file.write('{"displayTimeUnit": "ms", "traceEvents": [')
            for number, event in enumerate(trace_events(recording)):
                file.write((",\n" if number else "\n") + json.dumps(event))
            file.write("\n]}\n")
    except OSError as error:
        raise RecordingError(f"{path}: {error.strerror}") from None
    return path


def trace_events(recording: Recording) -> Iterator[dict[str, Any]]:
    """The events of a trace, times in microseconds since the first record.

    A step lasts from its plan to its commit, so what lies between two steps is the host. A request waits from its arrival, or
    from its preemption, to its next admission.
    """
    return _Tracer(recording).events()


class _Tracer:
    def __init__(self, recording: Recording):
        self.recording = recording
        self.start_s = recording.frames[0].time_s if recording.frames else 0.0
        self.tracks: dict[str, int] = {}
        self.rows: dict[int, str] = {}  # all there have been: a step may end after they have left
        self.staying: set[int] = set()  # those of them that have not left
        self.waits: dict[str, float] = {}  # request -> since when
        self.in_flight: list[tuple[int, float, Decision]] = []
        self.num_planned = 0
        self.last_commit = 0.0

    def events(self) -> Iterator[dict[str, Any]]:
        for process, name in ((_ENGINE, "engine"), (_REQUESTS, "requests")):
            yield {"ph": "M", "name": "process_name", "pid": process, "tid": 0, "args": {"name": name}}
        for frame in self.recording.frames:
            now = self._at(frame.time_s)
            match frame.kind:
                case Kind.SEGMENT:
                    self._begin(Segment.unpack(frame.payload))
                case Kind.ADD:
                    self.waits[unpack_request(frame.payload).request_id] = now
                case Kind.ADMIT:
                    yield from self._admit(Admission.unpack(frame.payload), now)
                case Kind.PLAN:
                    yield from self._plan(Decision.unpack(frame.payload), now)
                case Kind.COMMIT:
                    yield from self._commit(now)
                case Kind.PREEMPT:
                    yield from self._leave(unwords(frame.payload[:4])[0], "preempted", now)
                case Kind.FINISH:
                    yield from self._leave(unwords(frame.payload[:4])[0], frame.payload[4:].decode(), now)
                case Kind.ABORT:
                    yield from self._give_up(frame.payload.decode(), now)
                case Kind.RESET:
                    yield self._instant("prefix cache reset", now)
                case Kind.FAIL:
                    yield self._instant(f"failed: {json.loads(frame.payload)['error']}", now)
            if sets_back(frame):
                self.in_flight = []
                for row in sorted(self.staying):
                    yield from self._leave(row, "set back", now)

    def _at(self, time_s: float) -> float:
        return (time_s - self.start_s) * 1e6

    def _instant(self, name: str, now: float) -> dict[str, Any]:
        return {"ph": "i", "s": "p", "name": name, "pid": _ENGINE, "tid": 0, "ts": now}

    def _slice(self, name: str, track: str, start: float, end: float, **args: Any) -> Iterator[dict[str, Any]]:
        if track not in self.tracks:
            thread = self.tracks[track] = len(self.tracks) + 1
            yield {"ph": "M", "name": "thread_name", "pid": _REQUESTS, "tid": thread, "args": {"name": track}}
        place = {"pid": _REQUESTS, "tid": self.tracks[track], "ts": start, "dur": end - start}
        yield {"ph": "X", "name": name, **place, "args": args}

    def _begin(self, segment: Segment) -> None:
        self.num_planned = segment.num_steps
        for row in segment.rows:
            self.rows[row["row"]] = Admission(**row).name
            self.staying.add(row["row"])

    def _admit(self, admitted: Admission, now: float) -> Iterator[dict[str, Any]]:
        self.rows[admitted.row] = admitted.name
        self.staying.add(admitted.row)
        since = self.waits.pop(admitted.name, None)
        if since is not None:
            yield from self._slice("waiting", admitted.name, since, now)

    def _give_up(self, request_id: str, now: float) -> Iterator[dict[str, Any]]:
        since = self.waits.pop(request_id, None)
        if since is not None:
            yield from self._slice("waiting", request_id, since, now, ended="aborted")

    def _plan(self, plan: Decision, now: float) -> Iterator[dict[str, Any]]:
        self.num_planned += 1
        self.in_flight.append((self.num_planned, now, plan))
        used = {"free": plan.num_free - plan.num_cached, "cached": plan.num_cached}
        for name, values in (("pages", used), ("requests", {"running": plan.num_running, "waiting": plan.num_waiting})):
            yield {"ph": "C", "name": name, "pid": _ENGINE, "tid": 0, "ts": now, "args": values}

    def _commit(self, now: float) -> Iterator[dict[str, Any]]:
        if not self.in_flight:  # planned in a part of the ring that was dropped
            return
        number, planned, plan = self.in_flight.pop(0)
        start = max(planned, self.last_commit)  # a step that is planned while another runs begins when that one ends
        self.last_commit = now
        works = (*plan.decodes, *plan.prefills)
        args = {"tokens": sum(work.num_tokens for work in works), "decodes": len(plan.decodes), "prefills": len(plan.prefills)}
        args |= {"copies": len(plan.copies), "drafts": sum(work.num_drafts for work in works)}
        place = {"pid": _ENGINE, "tid": 1, "ts": start, "dur": now - start}
        yield {"ph": "X", "name": f"step {number}", **place, "args": args}
        for name, works in (("decode", plan.decodes), ("prefill", plan.prefills)):
            for work in works:
                yield from self._work(name, work, start, now)

    def _work(self, name: str, work: Work, start: float, end: float) -> Iterator[dict[str, Any]]:
        track = self.rows.get(work.row, f"row {work.row}")
        span = f"[{work.start}, {work.start + work.num_tokens})"
        drafts = {"drafts": work.num_drafts} if work.num_drafts else {}
        yield from self._slice(name, track, start, end, tokens=span, pages=list(work.pages), **drafts)
        if track in self.waits:  # it gave way while this ran
            self.waits[track] = max(self.waits[track], end)

    def _leave(self, row: int, reason: str, now: float) -> Iterator[dict[str, Any]]:
        self.staying.discard(row)
        name = self.rows.get(row, f"row {row}")
        if reason in ("preempted", "set back"):
            self.waits[name] = now
        if name in self.tracks:
            yield {"ph": "i", "s": "t", "name": reason, "pid": _REQUESTS, "tid": self.tracks[name], "ts": now}
