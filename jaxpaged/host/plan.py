"""One step as the scheduler decides it: Limits, Chunk, Transfers, StepPlan.

Knows which tokens of which sequences. Refuses to know how that is decided, and arrays.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from jaxpaged.host.request import Sequence


@dataclass(frozen=True)
class Limits:
    """What one step can hold.

    Args:
      page_size: tokens per page.
      max_num_seqs: sequences that own pages at a time, and so decode rows of a step.
      max_num_batched_tokens: tokens computed in one step.
      tile: tokens of one prefill tile; a chunk fills whole tiles.
      max_prefill_tiles: tiles of one step.
      long_prefill_token_threshold: longest chunk of one sequence in one step; 0 for no limit of its own.
      max_num_partial_prefills: prompts in the middle of which a step may end; 0 for no limit of its own.
      sliding_window: tokens up to and with itself that a token sees at most, in any layer; 0 when a layer sees all of them.
      eager_copy: a fork that sits a step out gets its copy of the page that it will write all the same.
      batch_merge_window: steps that a sequence may be held back, while others run, for more to be admitted with it.
      max_num_rows: decode rows of a step, those of drafts among them; 0 for as many as sequences.
      lookahead: places after its next token that a sequence gets pages for while nobody else lacks them.
    """

    page_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    tile: int
    max_prefill_tiles: int
    long_prefill_token_threshold: int = 0
    max_num_partial_prefills: int = 0
    batch_merge_window: int = 0
    sliding_window: int = 0
    eager_copy: bool = False
    max_num_rows: int = 0
    lookahead: int = 0


class Chunk(NamedTuple):
    """Tokens [start, start + num_tokens) of one sequence, computed in one step. Its pages already hold room for them.

    `samples`: the chunk ends with the last known token, so the step yields the next one.
    `drafts`: what comes after that token as somebody proposes it, counted in `num_tokens`. The step yields the token after each
    of them too, and those up to the first draft that it would not have drawn count. Only a decode has drafts.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
    drafts: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        """One past the last token: the context length once the chunk is computed."""
        return self.start + self.num_tokens

    @property
    def is_decode(self) -> bool:
        """Whether it is rows of a step and not tiles: the last known token, and drafts."""
        return self.samples and self.num_tokens - len(self.drafts) == 1

    def token(self, position: int) -> int | None:
        """Its token at a position of the sequence; None for the one that only the device knows."""
        tokens = self.sequence.tokens
        if position >= self.end - len(self.drafts):
            return self.drafts[position - self.end]
        return tokens[position] if position < len(tokens) else None

    @classmethod
    def next(cls, sequence: Sequence, num_tokens: int) -> Chunk:
        """The next `num_tokens` uncomputed tokens of a sequence."""
        return cls(sequence, sequence.num_computed, num_tokens, num_tokens == sequence.num_uncomputed)


class Transfers(NamedTuple):
    """Pages that move between the tiers, in the order in which it has to be done: `spills`, `saves`, `loads`, copies, the step.

    Slots are those of host memory, keys those of the prefix cache. Fetches run beside the steps, at any time after the spills.
    A page that is saved may be written by the loads, the copies and the step of the same plan. No slot is written twice by one
    plan; of those that it reads and writes, and of those that are fetched into, none is touched by another before that is done.
    """

    spills: tuple[tuple[int, bytes], ...] = ()  # (slot, key): host memory to disk
    saves: tuple[tuple[int, int], ...] = ()  # (page, slot): device to host memory
    loads: tuple[tuple[int, int], ...] = ()  # (slot, page): host memory to device
    fetches: tuple[tuple[bytes, int], ...] = ()  # (key, slot): disk to host memory; its end is an event of the scheduler


NO_TRANSFERS = Transfers()


@dataclass(frozen=True)
class StepPlan:
    """One step, decided. `decodes` are single tokens that sample, with drafts or without; every other chunk is a prefill. It may
    have transfers alone.

    `copies` are (source, target) pages to copy before anything is computed; no target is a source, and none is twice in it.
    """

    decodes: tuple[Chunk, ...]
    prefills: tuple[Chunk, ...]
    copies: tuple[tuple[int, int], ...] = ()
    transfers: Transfers = NO_TRANSFERS

    @property
    def num_tokens(self) -> int:
        """Tokens computed, padding not counted."""
        return sum(chunk.num_tokens for chunk in self.chunks())

    @cached_property
    def num_rows(self) -> int:  # asked for by everybody who handles a step
        """Decode rows that it fills: one for each token of `decodes`."""
        return sum(chunk.num_tokens for chunk in self.decodes)

    def chunks(self) -> tuple[Chunk, ...]:
        """All of them."""
        return (*self.decodes, *self.prefills)

    def sampling(self) -> list[Chunk]:
        """The chunks that yield a token, in the order of the step's outputs."""
        return [*self.decodes, *(chunk for chunk in self.prefills if chunk.samples)]

    def unsampled(self) -> list[Chunk]:
        """The others, in their order."""
        return [chunk for chunk in self.prefills if not chunk.samples]

    def outputs(self) -> tuple[tuple[Chunk, int], ...]:
        """What the step yields, in order: each chunk of `sampling()`, with how many of its drafts come before the token."""
        return self._outputs

    @cached_property
    def _outputs(self) -> tuple[tuple[Chunk, int], ...]:  # likewise
        if self.num_rows == len(self.decodes):
            return tuple(zip(self.sampling(), itertools.repeat(0)))
        return tuple((chunk, num_drafts) for chunk in self.sampling() for num_drafts in range(len(chunk.drafts) + 1))
