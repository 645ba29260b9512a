"""Beam search of one prompt: which continuations are kept, which have ended, and when it is over.

Knows tokens and their log-probabilities. Refuses to know sequences, pages and the device: who computes candidates is not asked.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

Candidates = Seq[tuple[int, float]]
"""(token id, log-probability) of the likeliest next tokens of one beam."""


@dataclass(frozen=True)
class Hypothesis:
    """A continuation of the prompt: its tokens, the one that ended it included, and the sum of their log-probabilities."""

    token_ids: tuple[int, ...] = ()
    cumulative_logprob: float = 0.0


class BeamGroup:
    """The beams of one prompt, as a state machine without time: `advance` takes all of them one token further.

    It decides as `GenerationMixin._beam_search` of transformers 5 does: of all continuations by one token, the best `width` that
    have not ended run on, and of the best `width` those that have ended join the `width` best finished ones, whose order is that
    of `score`. Sums are Python floats, not float32, and of equal sums the earlier beam's and then the lower token comes first.

    Invariant: `running` is best first and has at most `width` entries of one length; it is empty when `is_over`.
    """

    def __init__(
        self,
        width: int,
        max_tokens: int,
        stop_ids: Iterable[int],
        *,
        length_penalty: float = 1.0,
        early_stopping: bool | str = False,
    ):
        """`max_tokens` is the length at which every beam has ended; the other two are those of SamplingParams."""
        self.width, self.max_tokens, self.stop_ids = width, max_tokens, frozenset(stop_ids)
        self.length_penalty, self.early_stopping = length_penalty, early_stopping
        self.running = [Hypothesis()]
        self.finished: list[Hypothesis] = []  # best first, at most `width`

    @property
    def is_over(self) -> bool:
        """Whether `finished` is the result."""
        return not self.running

    @property
    def num_candidates(self) -> int:
        """Likeliest tokens of each beam that `advance` needs: so many are left to run when all stop ids are among them."""
        return self.width + len(self.stop_ids)

    @property
    def num_unborn(self) -> int:
        """Beams that there will be after the first token, less the one that computes the prompt for them."""
        return self.width - 1 if self.running and not self.running[0].token_ids else 0

    @property
    def num_common(self) -> int:
        """Tokens with which all running beams begin."""
        columns = zip(*(beam.token_ids for beam in self.running), strict=True)
        return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))

    def score(self, hypothesis: Hypothesis) -> float:
        """What finished hypotheses compete by: the sum of log-probabilities over length ** length_penalty."""
        return hypothesis.cumulative_logprob / len(hypothesis.token_ids) ** self.length_penalty

    def advance(self, candidates: Seq[Candidates]) -> list[tuple[int, int]]:
        """One token further: (parent, token id) of each entry of the new `running`, a parent being a place in the old one.

        Args:
          candidates: of each running beam, its `num_candidates` likeliest tokens, or all there are.
        """
        ranked = sorted(
            (-(beam.cumulative_logprob + logprob), parent, token_id)
            for parent, (beam, likeliest) in enumerate(zip(self.running, candidates, strict=True))
            for token_id, logprob in likeliest
        )
        is_last = len(self.running[0].token_ids) + 1 >= self.max_tokens
        kept: list[tuple[int, int]] = []
        running: list[Hypothesis] = []
        for rank, (cost, parent, token_id) in enumerate(ranked):
            has_ended = is_last or token_id in self.stop_ids
            if (has_ended and rank >= self.width) or (not has_ended and len(kept) == self.width):
                continue
            hypothesis = Hypothesis((*self.running[parent].token_ids, token_id), -cost)
            if has_ended:
                self.finished.append(hypothesis)
            else:
                kept.append((parent, token_id))
                running.append(hypothesis)

        self.finished.sort(key=self.score, reverse=True)  # stable: of equal scores the one that ended first stays
        del self.finished[self.width :]
        self.running = running
        if self._cannot_improve():
            self.running, kept = [], []
        return kept

    def _cannot_improve(self) -> bool:
        """Whether the best running beam is not expected to displace a finished one: a guess, but with early_stopping "never"."""
        if not self.running or len(self.finished) < self.width:
            return not self.running
        if self.early_stopping is True:
            return True
        best, length = self.running[0], len(self.running[0].token_ids)
        if self.early_stopping == "never" and self.length_penalty > 0:
            length = self.max_tokens  # where a sum that is not going to rise weighs least
        return best.cumulative_logprob / length**self.length_penalty <= self.score(self.finished[-1])
