"""How many proposed tokens are worth it: from what has been accepted, and from what steps of each size have taken.

Knows rates and seconds, all of which it is told. Refuses to know tokens, models and clocks: equal reports, equal choices.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections import Counter, deque
from collections.abc import Hashable, Iterable, Mapping
from collections.abc import Sequence as Seq
from typing import NamedTuple
from weakref import WeakKeyDictionary

SAMPLES = 9  # of which the median is taken: a step that the machine has interrupted counts for little
ENOUGH = 3  # of them, to say what a step takes
STALE = 256  # times of other sizes after which what a step of a size took says nothing any more
SETTLING = 3  # steps without proposals, of those after each other, that are not timed: the first still waits for one with
PLAIN_STEPS = 8 + SETTLING  # at a time, to see what they take
PLAIN_EVERY = (32, 256)  # steps with proposals before that, twice as many each time, later ones from TRIAL on
COLD = 2  # steps of a size, the first of all, that are not timed
TRIAL = 12  # steps before it is judged whether speculation pays
MEMORY = 1 / 64  # share of the judgement that the last step has
DOUBT = (0.5, 0.02)  # what it may seem to lose: over the root of the number of steps and sequences, and at least
PAUSES = (128, 2048)  # steps without proposals after a trial that was lost, twice as many each time
HOPE = (3.5, 5.0)  # accepted and tried, of everybody, before anything is known
OVERALL, EACH = 0.98, 0.9  # what of the counts stays after a proposal, and after one that was not worth it
_NUM_SHARED = 3.0  # tries of everybody that count for each sequence


class _Counts(NamedTuple):
    """Proposed tokens that were accepted, and those that were tried: the first refused one ends the trying."""

    accepted: float = 0.0
    tried: float = 0.0

    def plus(self, num_accepted: int, num_proposed: int, kept: float) -> _Counts:
        """With one more proposal."""
        num_tried = min(num_accepted + 1, num_proposed)
        return _Counts(kept * self.accepted + num_accepted, kept * self.tried + num_tried)


class _Seconds:
    """What something takes, by its size: the median of the last times. A size that is not timed for long is forgotten: the first
    times of all are those of a cold machine, and one that was slow then would never be tried again.
    """

    def __init__(self) -> None:
        self._found: dict[int, deque[float]] = {}
        self._last: dict[int, int] = {}  # which of all times was the last of a size
        self._num_times = 0
        self.known: dict[int, float] = {}  # of each size that has been timed often enough

    def add(self, size: int, seconds: float) -> None:
        times = self._found.setdefault(size, deque(maxlen=SAMPLES))
        times.append(seconds)
        self._num_times += 1
        self._last[size] = self._num_times
        if len(times) >= ENOUGH:
            self.known[size] = statistics.median(times)
        for old in [other for other, last in self._last.items() if last <= self._num_times - STALE]:
            del self._found[old], self._last[old]
            self.known.pop(old, None)


class Adaptive:
    """Chooses how many tokens are proposed for whom, so that the most tokens per second are to be expected.

    A token is taken to be accepted with its sequence's rate, if all before it are, and a step to take what steps in its bucket
    have taken; what it takes in a bucket that has not been tried is guessed from others, and with nothing to go by it is hoped to
    take no longer than a plain one. Whether to speculate at all is
    judged by what came of it: the tokens of the last steps beside what steps without proposals would have needed for them. After
    a trial that is lost there is a pause, longer each time, and then another trial with new hope.

    Args:
      row_sizes: decode rows of the compiled steps, smallest first.
      is_free: tokens cost the proposer nothing; else its time counts, by the longest proposal.
    """

    def __init__(self, row_sizes: Seq[int], *, is_free: bool):
        self.row_sizes, self.is_free = tuple(row_sizes), is_free
        self._plain, self._verified, self._proposed = _Seconds(), _Seconds(), _Seconds()
        self._num_runs: Counter[int] = Counter()  # with proposals, by size
        self._overall = _Counts(*HOPE)
        self._each: WeakKeyDictionary[Hashable, _Counts] = WeakKeyDictionary()
        self._num_plain = PLAIN_STEPS  # steps without proposals that are still to come
        self._num_settled = 0  # steps without proposals after each other
        self._num_steps = 0  # with proposals, since the last without
        self._every = PLAIN_EVERY[0]
        self._pause = PAUSES[0]
        self._spent = self._needed = 0.0  # seconds of the last steps, and what their tokens would have taken without proposals

    @property
    def is_paused(self) -> bool:
        """Whether the next step is one without proposals."""
        return self._num_plain > 0

    def is_wanted(self, num_sequences: int) -> bool:
        """Whether so many sequences that decode are worth proposals in the next step."""
        return not self.is_paused and self._size(num_sequences) in self._plain.known

    def _size(self, num_rows: int) -> int:
        return next((size for size in self.row_sizes if size >= num_rows), self.row_sizes[-1])

    # --- how many ---

    def rate(self, sequence: Hashable) -> float:
        """The share of the proposed tokens of a sequence that is expected to be accepted, of those that are tried."""
        shared = self._overall.accepted / self._overall.tried
        own = self._each.get(sequence, _Counts())
        return (own.accepted + _NUM_SHARED * shared) / (own.tried + _NUM_SHARED)

    def choose(self, available: Mapping[Hashable, int], num_sequences: int) -> dict[Hashable, int]:
        """How many tokens of those that can be proposed for each sequence are worth it; sequences that get none are not named.

        Args:
          num_sequences: that decode, those without proposals counted.
        """
        gains = []  # of each token: how likely it and all before it are accepted
        for index, (sequence, count) in enumerate(available.items()):
            rate, likely = self.rate(sequence), 1.0
            for depth in range(1, count + 1):
                likely *= rate
                gains.append((-likely, depth, index))
        gains.sort()
        best, chosen = num_sequences / self._step_s(self._size(num_sequences)), []
        longest = max(available.values(), default=0)
        for most in [longest] if self.is_free else range(1, longest + 1):
            few = [one for one in gains if one[1] <= most]
            proposing_s = 0.0 if self.is_free else self._proposing_s(most)
            expected, taken = float(num_sequences), 0
            for size in self.row_sizes:
                while taken < len(few) and num_sequences + taken < size:
                    expected -= few[taken][0]
                    taken += 1
                if taken and expected / (self._step_s(size) + proposing_s) > best:
                    best, chosen = expected / (self._step_s(size) + proposing_s), few[:taken]
                if taken == len(few):
                    break
        lengths = [0] * len(available)
        for _, depth, index in chosen:
            lengths[index] = max(lengths[index], depth)
        self._forget(sequence for sequence, length in zip(available, lengths, strict=True) if not length)
        if available and not chosen:
            hopeful = zip(self._overall, HOPE, strict=True)
            self._overall = _Counts(*(OVERALL * one + (1 - OVERALL) * hope for one, hope in hopeful))
        return {sequence: length for sequence, length in zip(available, lengths, strict=True) if length}

    def _forget(self, sequences: Iterable[Hashable]) -> None:
        """Nobody will see whether these have changed, so what is known of them counts less and less."""
        for sequence in sequences:
            if sequence in self._each:
                self._each[sequence] = _Counts(*(EACH * one for one in self._each[sequence]))

    def _step_s(self, size: int) -> float:
        """Seconds that a step of so many rows is expected to take: where none is known, what lies on a line between two that are,
        or behind two with proposals, and where there is only one the same. A plain step waits for nobody: a line from it to one
        with proposals says little of what lies behind that.
        """
        known = self._verified.known
        if size in known:
            return known[size]
        points = sorted((self._plain.known | known).items())
        place = bisect.bisect(points, (size, math.inf))
        if place == len(points):
            points = sorted(known.items())[-2:] or points[-1:]
        elif place:
            points = points[place - 1 : place + 1]
        if len(points) < 2 or place == 0:
            return points[0][1] if points else 1.0
        (first, first_s), (second, second_s) = points
        return max(first_s, first_s + (second_s - first_s) * (size - first) / (second - first))

    def _proposing_s(self, longest: int) -> float:
        """Likewise for proposing so many tokens."""
        known = self._proposed.known
        if not known or longest in known:
            return known.get(longest, 0.0)
        nearest = min(known, key=lambda other: abs(other - longest))
        return known[nearest] * longest / nearest

    # --- what came of it ---

    def judged(self, sequence: Hashable, num_proposed: int, num_accepted: int) -> None:
        """So many of the tokens that were proposed for a sequence were accepted."""
        self._overall = self._overall.plus(num_accepted, num_proposed, OVERALL)
        self._each[sequence] = self._each.get(sequence, _Counts()).plus(num_accepted, num_proposed, EACH)

    def ran_plainly(self, num_sequences: int, seconds: float) -> None:
        """A step without proposals has given each of so many sequences a token, and nothing else."""
        self._num_settled += 1
        if self._num_settled > (SETTLING if self._size(num_sequences) in self._plain.known else 1):
            self._plain.add(self._size(num_sequences), seconds)
        if self._num_plain:
            self._num_plain -= 1

    def ran(self, num_sequences: int, num_rows: int, num_tokens: int, seconds: float, proposing_s: float, longest: int) -> None:
        """A step that was to have proposals has decoded, and done nothing else.

        Args:
          num_tokens: that came of it.
          seconds: from the end of the step before to its end, proposing counted.
          proposing_s: what that took.
          longest: proposal.
        """
        self._num_settled, size = 0, self._size(num_rows)
        self._num_runs[size] += 1
        if self._num_runs[size] > COLD:
            self._verified.add(size, seconds - (0.0 if self.is_free else proposing_s))
        if longest and not self.is_free:
            self._proposed.add(longest, proposing_s)
        if self._num_plain:  # only what is sure was proposed
            self._num_plain -= 1
            return
        plain = self._plain.known.get(self._size(num_sequences))
        if plain is None:
            return
        took = self._step_s(size) + (self._proposing_s(longest) if longest and not self.is_free else 0.0)
        self._spent = (1 - MEMORY) * self._spent + took
        self._needed = (1 - MEMORY) * self._needed + num_tokens / num_sequences * plain
        self._num_steps += 1
        few, least = DOUBT
        doubt = max(least, few / (min(self._num_steps, 1 / MEMORY) * num_sequences) ** 0.5)
        if self._num_steps >= TRIAL and self._needed < (1 - doubt) * self._spent:
            self._give_up()
        elif self._num_steps >= self._every:
            self._num_steps, self._num_plain, self._pause = TRIAL, PLAIN_STEPS, PAUSES[0]
            self._every = min(2 * self._every, PLAIN_EVERY[1])

    def _give_up(self) -> None:
        self._num_plain, self._num_steps = self._pause, 0
        self._pause = min(2 * self._pause, PAUSES[1])
        self._spent = self._needed = 0.0
        self._overall = _Counts(*HOPE)
        self._verified = _Seconds()
        self._each.clear()
