"""Who proposes tokens for the model to verify, and how many are worth it.

Knows the seam between an engine and a proposer. What a proposer may not do is change a token: one that it gets wrong costs the
rows of a step and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Protocol

from jaxpaged.host.request import Sequence


class Proposer(Protocol):
    """One way to guess what comes next. It is told nothing: it finds out by itself how far a sequence has come and if it is over.

    Attributes:
      is_sure: what it proposes is always accepted, so nobody weighs how much of it is worth it.
      is_free: a token more costs it next to nothing; else it is asked for no more tokens than will be used, of everybody at once.
    """

    is_sure: bool
    is_free: bool

    def may_propose(self, sequence: Sequence) -> bool:
        """Whether it is worth asking in the next steps. While nobody is worth it steps are planned ahead, without proposals."""
        ...

    def propose(self, asked: Mapping[Sequence, int]) -> Mapping[Sequence, Seq[int]]:
        """What may follow each sequence's tokens: at most so many tokens, at least one of each that is named.

        Args:
          asked: sequences that decode, none with a pending token: all that is known of them is in their `tokens`.
        """
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...
