"""Prompt lookup: what followed the last tokens of a text when they came before, in the prompt or in the output.

Knows tokens and where they lie. Refuses to know the model: it costs a few dictionary entries for each token.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from weakref import WeakKeyDictionary

from jaxpaged.host.request import Sequence


class NgramIndex:
    """Where each n-gram of one growing text ended first.

    Invariant: it knows the n-grams that end within the first `num_known` tokens, for n from `least` to `most`.
    """

    def __init__(self, least: int, most: int):
        self.least, self.most = least, most
        self.num_known = 0
        self._ends: list[dict[tuple[int, ...], int]] = [{} for _ in range(least, most + 1)]

    def read(self, tokens: Seq[int]) -> None:
        """Take in what has been added to the text since the last time."""
        for size, ends in enumerate(self._ends, self.least):
            for end in range(max(self.num_known + 1, size), len(tokens) + 1):
                ends.setdefault(tuple(tokens[end - size : end]), end)
        self.num_known = len(tokens)

    def propose(self, tokens: Seq[int], count: int) -> Seq[int]:
        """At most so many tokens that followed, at its first occurrence, the longest n-gram that the text ends with; or none.

        As in vLLM: a longer n-gram goes before a shorter one, of one length the earliest place counts, which may overlap the end,
        and what is proposed ends where the text does.
        """
        self.read(tokens)
        for size in range(min(self.most, len(tokens) - 1), self.least - 1, -1):
            end = self._ends[size - self.least][tuple(tokens[-size:])]
            if end < len(tokens):
                return tokens[end : end + count]
        return ()


class NgramProposer:
    """The `Proposer` of prompt lookup: an index for each sequence, as long as that lives."""

    is_sure = False
    is_free = True

    def __init__(self, *, prompt_lookup_min: int, prompt_lookup_max: int):
        self.sizes = prompt_lookup_min, prompt_lookup_max
        self._indexes: WeakKeyDictionary[Sequence, NgramIndex] = WeakKeyDictionary()

    def may_propose(self, sequence: Sequence) -> bool:
        """See `Proposer.may_propose`."""
        return True

    def propose(self, asked: Mapping[Sequence, int]) -> Mapping[Sequence, Seq[int]]:
        """See `Proposer.propose`."""
        found = {}
        for sequence, count in asked.items():
            index = self._indexes.get(sequence)
            if index is None:
                index = self._indexes[sequence] = NgramIndex(*self.sizes)
            if proposed := index.propose(sequence.tokens, count):
                found[sequence] = proposed
        return found

    def close(self) -> None:
        """See `Proposer.close`."""
        self._indexes.clear()
