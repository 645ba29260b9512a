"""The draft model as an engine's proposer: what it says was found by the step before, on the device.

Knows when it is asked. Refuses to know pages and arrays: those are `jaxpaged.drafter`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq

from jaxpaged.drafter import Drafter
from jaxpaged.host.request import Sequence


class DraftModelProposer:
    """The `Proposer` of one engine around a runner's draft model; `most` tokens at a time, or fewer where fewer are taken."""

    is_sure = False
    is_free = True  # all that it costs is in the step

    def __init__(self, drafter: Drafter, most: int):
        self.drafter, self.most = drafter, most

    def may_propose(self, sequence: Sequence) -> bool:
        """See `Proposer.may_propose`."""
        return self.drafter.may_propose(sequence)

    def propose(self, asked: Mapping[Sequence, int]) -> Mapping[Sequence, Seq[int]]:
        """See `Proposer.propose`. The next step proposes too."""
        self.drafter.ask(self.most)
        found = {sequence: self.drafter.proposed(sequence)[:most] for sequence, most in asked.items()}
        return {sequence: token_ids for sequence, token_ids in found.items() if token_ids}

    def close(self) -> None:
        """See `Proposer.close`. The draft model is the runner's."""
