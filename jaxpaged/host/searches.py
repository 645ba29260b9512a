"""Beam searches among the sequences of a scheduler: how beams fork, give way together, come back and end.

The part of the scheduler that knows beams. Which of them go on is `host/beams.py`'s to say.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter, deque

from jaxpaged.host.beams import BeamGroup
from jaxpaged.host.pages import PagePool
from jaxpaged.host.plan import Limits, StepPlan
from jaxpaged.host.request import FinishReason, Sequence, TokenEvent
from jaxpaged.host.waiting import by_rank


class Searches:
    """What a scheduler does with the beams of a search.

    They run together or not at all, side by side: when one has to give way all of them do, and wait as one sequence, from which
    the others are forked again where they part. No number of preemptions protects them.
    """

    pool: PagePool
    limits: Limits
    running: list[Sequence]
    _by_id: dict[str, list[Sequence]]
    _in_flight: deque[StepPlan]

    # What the scheduler has for every sequence.

    def _num_pages(self, num_tokens: int) -> int:
        raise NotImplementedError

    def _run_beside(self, sequence: Sequence, fork: Sequence) -> None:
        raise NotImplementedError

    def _leave(self, sequence: Sequence, reason: FinishReason) -> None:
        raise NotImplementedError

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        raise NotImplementedError

    def _fold(self, beams: list[Sequence]) -> Sequence:
        """Leave one sequence of a search, which stands for all beams: their tokens are in the group."""
        first = beams[0]
        for beam in beams[1:]:
            self._leave(beam, FinishReason.PRUNED)
        first.num_forks += len(beams) - 1
        # It is to run before those that will be forked from it.
        first.index, first.rank, first.candidates = 0, (*first.rank[:-1], 0), ()
        del beams[1:]
        return first

    def _unfold(self, sequence: Sequence) -> None:
        """Fork the beams that a sequence stands for from it, where they part."""
        group: BeamGroup = sequence.group  # type: ignore[assignment]
        beams, size = self._by_id[sequence.request.request_id], self.limits.page_size
        sequence.num_forks = 0
        # What the prefix cache knew of it may reach into its own tokens: then whole pages are shared, which nobody writes.
        num_common = sequence.num_prompt + group.num_common
        is_beyond = sequence.num_computed > num_common
        num_shared = num_common // size * size if is_beyond else sequence.num_computed
        for index, beam in enumerate(group.running[1:], 1):
            fork = sequence.fork(index)
            fork.tokens[fork.num_prompt :] = beam.token_ids
            del fork.page_keys[num_common // size :]
            known = self.pool.cache.match(fork) if self.pool.cache is not None else []
            if len(known) * size > num_shared:
                fork.num_computed, fork.pages = len(known) * size, known
            else:
                fork.num_computed, fork.pages = num_shared, sequence.pages[: self._num_pages(num_shared)]
                fork.num_behind = min(sequence.num_behind, len(fork.pages))
            fork.num_recorded = min(fork.num_computed // size, sequence.num_recorded)
            self.pool.share(fork.owned_pages)
            insort(self.running, fork, key=by_rank)
            beams.append(fork)

    def _advance(self, group: BeamGroup, beams: list[Sequence]) -> list[TokenEvent]:
        """Take a group whose beams all have their candidates one token further. Its events when that was the last one.

        The first child of a beam goes on in its place, the others are forks; a beam without children gives its pages back.
        """
        children = group.advance([beam.candidates for beam in beams])
        if group.is_over:
            return self._end_beams(list(beams))
        num_children = Counter(parent for parent, _ in children)
        for parent, beam in enumerate(beams):
            if not num_children[parent]:
                self._leave(beam, FinishReason.PRUNED)
        indices = iter(sorted({*range(group.width)} - {beams[parent].index for parent in num_children}))
        families = {}
        for parent, count in num_children.items():
            forks = [beams[parent].fork(next(indices)) for _ in range(count - 1)]
            for fork in forks:
                self._run_beside(beams[parent], fork)
            families[parent] = iter([beams[parent], *forks])
        beams[:] = [next(families[parent]) for parent, _ in children]
        for beam, (_, token_id) in zip(beams, children, strict=True):
            beam.tokens.append(token_id)
            beam.candidates = ()
        return []

    def _end_beams(self, beams: list[Sequence], reason: FinishReason | None = None) -> list[TokenEvent]:
        """End a whole group: with its results, or for a reason that leaves it none. An event for each output."""
        first = beams[0]
        request, group = first.request, first.group
        for beam in beams:
            self._finish(beam, reason or FinishReason.STOP)
        if reason is not None:
            return [TokenEvent(request.request_id, None, reason, index=index) for index in range(request.params.n)]
        events = []
        for index, found in enumerate(group.finished):  # type: ignore[union-attr]
            last = found.token_ids[-1]
            ending = FinishReason.STOP if last in request.stop_ids else FinishReason.LENGTH
            stop_reason = last if last in request.params.stop_token_ids else None
            place = first.num_cached_tokens, index
            events.append(
                TokenEvent(request.request_id, None, ending, stop_reason, *place, found.token_ids, found.cumulative_logprob)
            )
        return events

    def _check_beams(self, request_id: str, beams: list[Sequence]) -> None:
        group = beams[0].group
        if group is None:
            return
        wanted = [list(one.token_ids) for one in group.running[: len(beams)]]
        if [beam.output_token_ids for beam in beams] != wanted or len(beams) + beams[0].num_forks != len(group.running):
            raise RuntimeError(f"{request_id}: its sequences are not the beams of its group")
        in_flight = {chunk.sequence for plan in self._in_flight for chunk in plan.chunks()}
        if any(bool(beam.candidates) != (not beam.num_uncomputed) for beam in beams if beam not in in_flight):
            raise RuntimeError(f"{request_id}: a beam waits and has no candidates, or has some and does not wait")
        if len(beams) > 1 and not all(beam in self.running for beam in beams):
            raise RuntimeError(f"{request_id}: some of its beams run and some do not")
