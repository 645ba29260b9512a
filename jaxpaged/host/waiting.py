"""The waiting line: sequences without pages, in the order in which they are to be admitted.

Knows ranks and how long each has waited. Refuses to know pages, and who fits.
"""

from __future__ import annotations

import itertools
import operator
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator
from functools import partial

from jaxpaged.host.policies import STATIC, Candidate, Policy, Situation, TenantCounters, fcfs
from jaxpaged.host.request import Sequence

AGEING_STEPS = 5000
by_rank = operator.attrgetter("rank")


class WaitingLine:
    """Waiting sequences, the next one first.

    A rank is (0, 0, number, index) of a sequence that has aged and (1, key, number, index) of any other, key being its policy's.
    A sequence ages when it waits more than `ageing_steps` steps, and stays aged: a preemption does not start its wait anew.
    Invariants, after `refresh`: sorted by rank, no two alike; an aged sequence is behind nobody who came later.

    Args:
      ageing_steps: how long the policy's order may hold a sequence back.
      cached_len: tokens at a sequence's beginning that the prefix cache has.
    """

    def __init__(self, policy: Policy = fcfs, *, ageing_steps: int = AGEING_STEPS, cached_len=lambda sequence: 0):
        self.policy, self.ageing_steps, self.cached_len = policy, ageing_steps, cached_len
        self.step = 0
        # None where no policy asks: the counters of tenants cost time for every token.
        self.tenants = None if policy in STATIC else TenantCounters()
        self._line: list[Sequence] = []
        self._candidates: dict[Sequence, Candidate] = {}
        self._by_age: deque[tuple[Candidate, Sequence]] = deque()  # all that may age, those that have left among them

    def __len__(self) -> int:
        return len(self._line)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._line)

    def __getitem__(self, index: int) -> Sequence:
        return self._line[index]

    def push(self, sequence: Sequence) -> None:
        """A sequence joins: it is new, or it was preempted. What the policy raises is raised before anything is changed."""
        request = sequence.request
        candidate = Candidate(
            request_id=request.request_id,
            number=sequence.number,
            since_step=self.step,
            num_prompt=sequence.num_prompt,
            num_tokens=len(sequence.tokens),
            max_len=request.max_len,
            priority=request.priority,
            tenant=request.tenant,
            num_preemptions=sequence.num_preemptions,
            cached_len=partial(self.cached_len, sequence),
        )
        if not self._is_aged(sequence):
            sequence.rank = self._rank(candidate, sequence)
        insort(self._line, sequence, key=by_rank)
        self._candidates[sequence] = candidate
        if self.policy is not fcfs and not self._is_aged(sequence):
            self._by_age.append((candidate, sequence))
        if self.tenants is not None:
            self.tenants.join(request.tenant)

    def remove(self, sequence: Sequence) -> None:
        """A sequence leaves: it is admitted or over. ValueError when it is not here."""
        index = bisect_left(self._line, sequence.rank, key=by_rank)
        if index == len(self._line) or self._line[index] is not sequence:
            raise ValueError(f"{sequence.request.request_id} does not wait")
        del self._line[index]
        del self._candidates[sequence]
        if len(self._by_age) > 64 + 2 * len(self._line):  # or what is long over would be kept until it could have aged
            self._by_age = deque(entry for entry in self._by_age if self._candidates.get(entry[1]) is entry[0])
        if self.tenants is not None:
            self.tenants.leave(sequence.request.tenant)

    def refresh(self) -> None:
        """Put the line in the order of this moment. To be called before its first is looked at."""
        while self._by_age and self.step - self._by_age[0][0].since_step > self.ageing_steps:
            candidate, sequence = self._by_age.popleft()
            if self._candidates.get(sequence) is candidate:
                self._line.remove(sequence)
                sequence.rank = (0, 0, sequence.number, sequence.index)
                insort(self._line, sequence, key=by_rank)
        if self.policy not in STATIC:
            for sequence in self._line:
                if not self._is_aged(sequence):
                    sequence.rank = self._rank(self._candidates[sequence], sequence)
            self._line.sort(key=by_rank)

    def longest_wait(self) -> int:
        """Steps that the first of those who wait has waited; 0 when nobody does."""
        return self.step - min((candidate.since_step for candidate in self._candidates.values()), default=self.step)

    @staticmethod
    def _is_aged(sequence: Sequence) -> bool:
        return bool(sequence.rank) and sequence.rank[0] == 0

    def _rank(self, candidate: Candidate, sequence: Sequence) -> tuple:
        situation = Situation(self.step, self.tenants.served if self.tenants is not None else {})
        return (1, self.policy(candidate, situation), sequence.number, sequence.index)

    def check(self) -> None:
        """Raise RuntimeError unless the line is in order."""
        if any(before.rank >= after.rank for before, after in itertools.pairwise(self._line)):
            raise RuntimeError("the waiting line is not in the order of its ranks")
        if self._candidates.keys() != set(self._line):
            raise RuntimeError("the waiting line and its candidates disagree")
