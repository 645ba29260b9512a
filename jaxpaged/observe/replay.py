"""Replay: a recording run again through the real scheduler, with no model, on the clock of the recording.

Knows events and decisions. Refuses to know what the tokens mean: they are fed back as they were sampled.
"""

from __future__ import annotations

import json
import pickle
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jaxpaged.host.pages import PagePool
from jaxpaged.host.plan import Limits
from jaxpaged.host.policies import Policy, find_policy
from jaxpaged.host.preemption import SwapCosts
from jaxpaged.host.prefix_cache import PrefixCache
from jaxpaged.host.request import Request, Sequence
from jaxpaged.host.scheduler import Scheduler
from jaxpaged.host.tiers import HostTier
from jaxpaged.observe import state
from jaxpaged.observe.encoder import Encoder
from jaxpaged.observe.recording import Recording, Segment
from jaxpaged.observe.records import (
    MAX_ERROR,
    Admission,
    Frame,
    Kind,
    RecordingError,
    describe,
    note_names,
    readable,
    unpack_commit,
    unpack_drafts,
    unpack_fetched,
    unpack_request,
    unpack_stop,
)
from jaxpaged.version import __version__

POOL = f"{PagePool.__module__}.{PagePool.__qualname__}"


@dataclass(frozen=True)
class Difference:
    """The first step at which the replay decided otherwise, in words."""

    step: int
    time_s: float
    recorded: list[str]
    replayed: list[str]


class Replay:
    """One recording, lived through again by `run`.

    Invariant: `scheduler` is in the state in which the recorded one was after `num_steps` plans, as long as `difference` is None.
    """

    def __init__(self, recording: Recording, *, policy: Policy | None = None):
        """Begin where the recording begins.

        Args:
          policy: what scheduling_policy was, when it was a function of one's own: a file does not hold code.

        Raises:
          RecordingError: there is nothing to begin with; the message says why.
        """
        self.recording, self._policy = recording, policy
        self.difference: Difference | None = None
        self.failure: str | None = None  # what the recorded scheduler raised, and this one too
        self.now = 0.0  # the virtual clock
        self._decided: deque[Frame] = deque()
        self._drafts: Mapping[Sequence, tuple[int, ...]] = {}  # for the next plan
        self._at, segment = self._beginning()
        self.first_step = self.num_steps = segment.num_steps
        self._encoder = self._restore(segment)
        self.scheduler = self._encoder.scheduler
        with readable(recording.path):
            self._names = {row["row"]: Admission(**row).name for row in segment.rows}

    def run(self, *, until: int | None = None, check: bool = False) -> Difference | None:
        """Replay to the end, or until so many steps are decided; the first difference, or None.

        Args:
          check: also verify every invariant of scheduler and pool after each step; a breach is a difference.
        """
        for _ in self.steps(check=check):
            if self.num_steps == until:
                break
        return self.difference

    def steps(self, *, check: bool = False) -> Iterator[int]:
        """The number of each step once it is decided again and the same; ends at the end or at the first difference."""
        frames = self.recording.frames
        while self._at < len(frames) and self.difference is None and self.failure is None:
            frame = frames[self._at]
            self.now = frame.time_s
            try:
                last = self._decide() if frame.is_decision else self._apply(frame)
                if check and last in (Kind.PLAN, Kind.COMMIT):
                    self.scheduler.check()
            except RecordingError:
                raise
            except Exception as error:  # whatever a broken scheduler raises
                self._fail(f"{type(error).__name__}: {error}")
                return
            if last is Kind.PLAN:
                self.num_steps += 1
                yield self.num_steps

    # --- the beginning ---

    def _beginning(self) -> tuple[int, Segment]:
        header, where = self.recording.header, self.recording.path
        if header.get("pool") != POOL:
            raise RecordingError(f"{where}: cannot be replayed: its pages came from {header.get('pool')}, not from {POOL}")
        if header.get("policy") is None and self._policy is None:
            raise RecordingError(
                f"{where}: cannot be replayed: its scheduling_policy is a function; Replay(recording, policy=...)"
            )
        for at, segment in self.recording.segments():
            if segment.is_beginning or segment.state:
                return at + 1, segment
        why = header.get("why_blind") or "it holds no step"
        raise RecordingError(f"{where}: cannot be replayed: the ring has dropped the beginning, and {why}")

    def _restore(self, segment: Segment) -> Encoder:
        header, where = self.recording.header, self.recording.path
        try:
            if segment.is_beginning:
                return Encoder(self._scheduler(header), self._put)
            return Encoder.restored(state.load(segment.state, self._policy), self._put)
        except (pickle.UnpicklingError, TypeError, ValueError, KeyError, AttributeError, EOFError, IndexError) as error:
            version = header.get("jaxpaged")
            of = f"recorded by jaxpaged {version}, this is {__version__}" if version != __version__ else "damaged"
            raise RecordingError(f"{where}: cannot be replayed: {of} ({error})") from None

    def _scheduler(self, header: dict[str, Any]) -> Scheduler:
        """The recorded one before anything had happened."""
        limits, cache = Limits(**header["limits"]), None
        if header["prefix_cache"]:
            # The context too: keys that moved to a disk were recorded.
            cache = PrefixCache(limits.page_size, header["cache_context"], is_private=header["private_prefixes"])
        tier = HostTier(**header["tier"]) if header["tier"] is not None else None
        pool, policy = PagePool(header["num_pages"], cache, tier), self._policy or find_policy(header["policy"])
        options = {"ageing_steps": header["ageing_steps"], "preemption_mode": header["preemption_mode"]}
        return Scheduler(pool, limits, policy=policy, **options, costs=SwapCosts(**header["costs"]))

    # --- one frame ---

    def _put(self, kind: Kind, payload: bytes) -> None:
        self._decided.append(Frame(kind, self.now, payload))

    def _apply(self, frame: Frame) -> Kind | None:
        """Tell the scheduler what it was told."""
        if self._decided:
            return self._differ([frame] if frame.kind is Kind.FAIL else [], list(self._decided))
        self._at += 1
        scheduler, kind = self.scheduler, frame.kind
        if kind is Kind.ADD:
            scheduler.add(self._request(frame))
        elif kind is Kind.ABORT:
            scheduler.abort(frame.payload.decode())
            self._encoder.find_finished()
        elif kind is Kind.STOP:
            scheduler.stop(*unpack_stop(frame.payload))
            self._encoder.find_finished()
        elif kind is Kind.DRAFTS:
            sequences = {row: sequence for sequence, row in self._encoder.rows.items()}
            self._drafts = {sequences[row]: tokens for row, tokens in unpack_drafts(frame.payload).items()}
        elif kind is Kind.FETCHED:
            scheduler.fetched(*unpack_fetched(frame.payload))
        elif kind is Kind.RESET:
            scheduler.pool.reset_cache()
        elif kind is Kind.COMMIT:
            scheduler.commit(self._encoder.in_flight[0], *unpack_commit(frame.payload))
            self._encoder.committed()
        elif kind is Kind.ONLY:
            only = json.loads(frame.payload)
            scheduler.only = only if only is None else frozenset(only)
            if only is not None:
                self._encoder.failed()
                scheduler.rewind()
        elif kind is Kind.FAIL:
            stage = json.loads(frame.payload)["stage"]
            if stage == "plan":
                self._plan()  # raises again, or differs
            if stage != "run":  # what fails there is the device
                return self._differ([frame], list(self._decided))
            self._encoder.failed()
            scheduler.rewind()
        return kind

    def _request(self, frame: Frame) -> Request:
        try:
            return unpack_request(frame.payload)
        except (TypeError, ValueError, KeyError) as error:
            version = self.recording.header.get("jaxpaged")
            raise RecordingError(
                f"{self.recording.path}: cannot be replayed: a request of jaxpaged {version} is none of {__version__} ({error})"
            ) from None

    def _plan(self) -> None:
        drafts, self._drafts = self._drafts, {}
        self._encoder.planned(self.scheduler.plan(drafts))

    def _decide(self) -> Kind | None:
        """Let the scheduler decide what it decided, and compare frame by frame."""
        recorded = self._group()
        is_ending = recorded[0].kind is Kind.FINISH
        if not is_ending and not self._decided:
            self._plan()
        again = list(self._decided)
        self._decided.clear()
        if [(frame.kind, frame.payload) for frame in again] != [(frame.kind, frame.payload) for frame in recorded]:
            return self._differ(recorded, again)
        for frame in recorded:
            note_names(frame, self._names)
        self._at += len(recorded)
        return recorded[-1].kind

    def _group(self) -> list[Frame]:
        """The decisions from here that belong together: those of one plan, or the endings of one commit or abort."""
        frames, end = self.recording.frames, self._at
        is_ending = frames[end].kind is Kind.FINISH
        while end < len(frames) and frames[end].is_decision and (frames[end].kind is Kind.FINISH) == is_ending:
            end += 1
            if frames[end - 1].kind in (Kind.PLAN, Kind.IDLE):
                break
        return frames[self._at : end]

    # --- the end ---

    def _differ(self, recorded: list[Frame], again: list[Frame]) -> None:
        texts = []
        for found in (recorded, again):
            names = dict(self._names)
            texts.append([line for frame in found for line in describe(frame, names)] or ["no more decisions"])
        self.difference = Difference(self.num_steps + 1, self.now, *texts)

    def _fail(self, error: str) -> None:
        """The scheduler raised. As it did when it was recorded: then the replay has found what it was for."""
        coming = self.recording.frames[self._at - 1 : self._at + 1]
        with readable(self.recording.path):
            recorded_errors = [json.loads(frame.payload)["error"] for frame in coming if frame.kind is Kind.FAIL]
        if error[:MAX_ERROR] in recorded_errors:
            self.failure = error
            return
        group = self._group() if self.recording.frames[min(self._at, len(self.recording.frames) - 1)].is_decision else []
        self._differ(group, [])
        recorded = self.difference.recorded if self.difference else []
        self.difference = Difference(self.num_steps + 1, self.now, recorded, [f"raised   {error}"])
