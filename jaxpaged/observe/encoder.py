"""The scheduler's decisions as frames. The recorder and the replay write them with this one class, so that equal is equal.

Knows what a decision is. Refuses to know where frames go.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from typing import Any

from jaxpaged.host.plan import StepPlan, Transfers
from jaxpaged.host.request import Sequence
from jaxpaged.host.scheduler import Scheduler
from jaxpaged.observe.records import Admission, Kind, pack_drafts, packed, unwords, words

Look = tuple[tuple[int, int, int, int], list[int], list[list[int]]]
"""The state of pool and queues, and of each decode its row and the pages it writes to."""


class Encoder:
    """Follows one scheduler. Invariant, after `planned`: `rows` holds the running sequences."""

    def __init__(self, scheduler: Scheduler, put: Callable[[Kind, bytes], None]):
        self.scheduler, self.put = scheduler, put
        self.page_size = scheduler.limits.page_size
        self.rows: dict[Sequence, int] = {}
        self.in_flight: deque[StepPlan] = deque()  # planned and not committed, the oldest first
        self._num_rows = 0
        self._stays: dict[Sequence, int] = {}  # how often each of `rows` had been preempted when it was admitted
        self._num_preemptions = 0

    def state(self) -> tuple[Any, ...]:
        """All of it and of the scheduler, for `restored`."""
        return self.scheduler, self.in_flight, self.rows, self._stays, self._num_rows, self._num_preemptions

    @classmethod
    def restored(cls, state: tuple[Any, ...], put: Callable[[Kind, bytes], None]) -> Encoder:
        """An encoder that goes on where the one that `state` is of was."""
        encoder = cls(state[0], put)
        _, encoder.in_flight, encoder.rows, encoder._stays, encoder._num_rows, encoder._num_preemptions = state
        return encoder

    def planned(self, plan: StepPlan | None) -> None:
        """`plan` is what the scheduler has just returned."""
        if self.scheduler.num_preemptions != self._num_preemptions:
            self._find_preempted()
        if plan is None:
            self.put(Kind.IDLE, b"")
            return
        if self.has_news or any(chunk.sequence not in self.rows for chunk in plan.chunks()):
            self._admit(plan)
        self.put(Kind.PLAN, pack_plan(plan, self.look(plan), self.page_size, self.rows))
        self.in_flight.append(plan)

    def proposed(self, drafts: Mapping[Sequence, Seq[int]]) -> bytes:
        """What the next plan is given; a sequence that has no row gets none of it."""
        return pack_drafts({self.rows[sequence]: tokens for sequence, tokens in drafts.items() if sequence in self.rows})

    def look(self, plan: StepPlan) -> Look:
        """What of a plan and of the pool may be otherwise by the time it is written down. KeyError when a row is new."""
        rows, pool, scheduler, size = self.rows, self.scheduler.pool, self.scheduler, self.page_size
        return (
            (pool.num_free, pool.num_cached, len(scheduler.running), len(scheduler.waiting)),
            [rows[chunk.sequence] for chunk in plan.decodes],
            [chunk.sequence.pages[chunk.start // size : -(-chunk.end // size)] for chunk in plan.decodes],
        )

    @property
    def has_news(self) -> bool:
        """Whether sequences have been admitted, ended or been preempted since this was last told."""
        scheduler = self.scheduler
        return len(scheduler.running) != len(self.rows) or scheduler.num_preemptions != self._num_preemptions

    def committed(self) -> None:
        """The oldest plan in flight has just been committed."""
        self.in_flight.popleft()
        if self.has_news:
            self.find_finished()

    def failed(self) -> None:
        """A step raised: none of those in flight will be committed, and all that runs is set back."""
        self.in_flight.clear()
        self.rows.clear()
        self._stays.clear()

    def find_finished(self) -> None:
        """Take out the rows whose sequences have ended."""
        for sequence in [sequence for sequence in self.rows if sequence.finish_reason is not None]:
            row = self._leave(sequence)
            self.put(Kind.FINISH, words(row) + str(sequence.finish_reason).encode())

    def _find_preempted(self) -> None:
        self._num_preemptions = self.scheduler.num_preemptions
        stays = self._stays
        for sequence in [sequence for sequence in self.rows if sequence.num_preemptions != stays[sequence]]:
            self.put(Kind.PREEMPT, words(self._leave(sequence)))

    def _leave(self, sequence: Sequence) -> int:
        del self._stays[sequence]
        return self.rows.pop(sequence)

    def _admit(self, plan: StepPlan) -> None:
        planned = (chunk.sequence for chunk in plan.chunks())
        for sequence in (*self.scheduler.running, *planned):
            if sequence in self.rows:
                continue
            row = self.rows[sequence] = self._num_rows
            self._num_rows += 1
            self._stays[sequence] = sequence.num_preemptions
            self.put(Kind.ADMIT, self.admission(row, sequence).pack())

    @staticmethod
    def admission(row: int, sequence: Sequence) -> Admission:
        """What the recording says of a row."""
        counts = sequence.index, sequence.num_computed, sequence.num_prompt
        return Admission(row, *counts, tuple(sequence.pages), sequence.request.request_id)


def _pack_transfers(transfers: Transfers) -> list[int]:
    spills, saves, loads, fetches = transfers
    numbers = [*map(len, transfers)]
    for slot, key in spills:
        numbers += (slot, *unwords(key))
    for pairs in (saves, loads):
        numbers += (*[source for source, _ in pairs], *[target for _, target in pairs])
    for key, slot in fetches:
        numbers += (*unwords(key), slot)
    return numbers


def pack_plan(plan: StepPlan, seen: Look, page_size: int, row_of: dict[Sequence, int]) -> bytes:
    """A plan's frame; `records.Decision` reads it."""
    counts, rows, pages = seen
    plain, others = [], []
    for row, written, chunk in zip(rows, pages, plan.decodes, strict=True):
        if chunk.drafts:
            others.append((row, chunk.start, chunk.num_tokens, 1 + len(chunk.drafts), len(written), *written))
        else:
            plain.append((row, chunk.start, *written))
    for chunk in plan.prefills:
        written = chunk.sequence.pages[chunk.start // page_size : -(-chunk.end // page_size)]
        others.append((row_of[chunk.sequence], chunk.start, chunk.num_tokens, chunk.samples, len(written), *written))
    copies = plan.copies
    numbers = [
        *(*counts, len(plain), len(others), len(copies)),
        *itertools.chain.from_iterable(zip(*plain, strict=True)),
        *(*[source for source, _ in copies], *[target for _, target in copies]),
        *itertools.chain.from_iterable(others),
    ]
    if any(plan.transfers):
        numbers += _pack_transfers(plan.transfers)
    return packed(numbers)
