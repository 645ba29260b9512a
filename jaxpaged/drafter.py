"""The draft model beside the target: its weights, its pages, and which sequences it has kept up with.

Knows both plans and arrays, as `batch` does. Refuses to know how many tokens are worth proposing, and what is accepted: that is
found in the step, see `jaxpaged.model.draft`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple
from weakref import WeakSet

import jax
import numpy as np

from jaxpaged.batch import bring
from jaxpaged.config import Bucket, ConfigError, EngineConfig, ModelConfig
from jaxpaged.host.plan import Chunk, StepPlan
from jaxpaged.host.request import Sequence
from jaxpaged.model import cache as kv_cache
from jaxpaged.model.draft import BACKLOG, DraftInputs
from jaxpaged.model.weights import Weights

_ALL = 2**30  # tokens to propose: as many as there may be
MAX_BACKLOG = 16 * BACKLOG  # a sequence that the draft is further behind with is left alone


class _Proposed(NamedTuple):
    """What the last step proposed for a sequence."""

    position: int  # of the sequence's last token then
    token_ids: tuple[int, ...]
    pages: list[int]  # the sequence's own list, which is another one after it gave way

    def num_wanted(self, chunk: Chunk) -> int:
        """How many tokens are to be proposed next: one more than were thought worth it, so that more can be found to be."""
        num_used = len(chunk.drafts)
        num_usable = min(len(self.token_ids), chunk.sequence.request.max_len - chunk.start - 2)
        return num_used + 1 if num_used < num_usable else _ALL

    def num_known(self, chunk: Chunk) -> int:
        """Tokens of the chunk's sequence whose keys and values the draft has, when it has those before the chunk.

        It went through the last token and all that it proposed but the last, as far as the pages went.
        """
        if self.position != chunk.start or self.pages is not chunk.sequence.pages or not self.token_ids:
            return chunk.start
        pairs = zip(self.token_ids, chunk.drafts, strict=False)
        num_same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        return chunk.start + 1 + min(num_same, len(self.token_ids) - 1)


class Draft(NamedTuple):
    """A draft model: what it is, and its weights, which the engine owns from here."""

    model: ModelConfig
    weights: Weights


class _Asked(NamedTuple):
    """A sequence that a step proposes tokens for."""

    sequence: Sequence
    pages: list[int]  # its list
    num_places: int  # tokens that its pages have room for in that step


class Drafter:
    """Owns the draft model's weights and pages: page p holds the same tokens as the target's page p.

    What is done to the pool's pages is done to both, so prefixes, forks and copies hold here too. A page is stale when the draft
    has not computed all of its tokens: a step ran without the draft, or the page came from another tier, which keeps those of the
    target alone. A sequence on a stale page is one that the draft has to catch up with, BACKLOG tokens in a step and none of it
    when it is more than MAX_BACKLOG behind; until then nothing is proposed for it, and its tokens are the same, only one at a
    time.

    Invariant: a page that is not in `_stale` has the draft's keys and values of all tokens that the target's page has.
    """

    def __init__(self, model: ModelConfig, weights: Weights, config: EngineConfig, *, num_pages: int):
        """`config` is resolved, and has a `speculation`."""
        self.model, self.weights = model, weights
        self.max_drafts = config.speculation.num_speculative_tokens  # type: ignore[union-attr]
        self.page_size: int = config.block_size  # type: ignore[assignment]
        self.max_num_seqs: int = config.max_num_seqs  # type: ignore[assignment]
        self.cache = kv_cache.init_cache(model, num_pages, self.page_size, config.kv_cache_dtype)
        self.num_drafts = self._most = self.max_drafts  # to propose in a step, and at most
        self._is_asked = True  # whether drafts are wanted of the next step
        self._num_unasked = 0  # steps that decoded and of which none were, since one of which some were
        self._proposed: dict[Sequence, _Proposed] = {}  # by the last step that has been waited for
        self._asked: list[_Asked] = []  # of the last step, with the number of tokens that were to be proposed
        self._num_asked = 0
        self._left: WeakSet[Sequence] = WeakSet()  # those that the draft is too far behind with
        self._stale: dict[int, int] = {}  # page -> its first tokens that the draft has

    def num_sequences(self, bucket: Bucket) -> int:
        """Q: sequences that a step of this shape can propose for."""
        return min(bucket.decode_rows + bucket.prefill_tiles, self.max_num_seqs)

    def padding(self, bucket: Bucket) -> DraftInputs:
        """A step that proposes nothing for nobody."""
        return DraftInputs.new(self.num_sequences(bucket), 0)

    def moved(self, plan: StepPlan) -> None:
        """Know what comes of a plan's transfers and copies, before its step."""
        for _, page in plan.transfers.loads:
            self._stale[page] = 0
        for source, target in plan.copies:
            self._stale.pop(target, None)
            if source in self._stale:
                self._stale[target] = self._stale[source]

    def inputs(self, plan: StepPlan, bucket: Bucket, rows: Seq[int]) -> DraftInputs | None:
        """What the step is to propose, and for whom; None for a step that the draft takes no part in, which reads no prompt.

        Args:
          rows: of `plan.outputs()`.
        """
        proposed, self._proposed = self._proposed, {}
        num_drafts = self._num_wanted(plan, proposed)
        self._asked, self._num_asked = [], num_drafts or 0
        if num_drafts is None:
            for chunk in plan.chunks():
                self._miss(chunk)
            return None
        inputs, asked = DraftInputs.new(self.num_sequences(bucket), num_drafts), []
        table: np.ndarray = inputs.table  # type: ignore[assignment]
        at = 0
        for chunk in plan.chunks():
            sequence, num_drafted = chunk.sequence, len(chunk.drafts)
            known, after = self._advance(chunk)
            if chunk.samples and _is_drawn(sequence) and (after > known or known == chunk.end):
                if known == chunk.start and sequence in proposed:
                    known = proposed[sequence].num_known(chunk)
                missed = sequence.tokens[known : min(known + BACKLOG, chunk.end - num_drafted - 1)]
                place = len(asked)
                table[place, :3] = rows[at], 1 + num_drafted, known
                table[place, 4 : 4 + len(missed)] = missed
                num_places = len(sequence.pages) * self.page_size if after == chunk.end else 0
                asked.append(_Asked(sequence, sequence.pages, num_places))
            at += 1 + num_drafted if chunk.samples else 0
        self._asked = asked
        return inputs

    def _num_wanted(self, plan: StepPlan, proposed: Mapping[Sequence, _Proposed]) -> int | None:
        """How many tokens a step is to propose; None when it runs without the draft model."""
        if plan.decodes:  # else nobody can have asked
            self._num_unasked = 0 if self._is_asked else self._num_unasked + 1
        self._is_asked = False
        found = ((chunk, proposed[chunk.sequence]) for chunk in plan.decodes if chunk.sequence in proposed)
        wanted = [one.num_wanted(chunk) for chunk, one in found if one.position == chunk.start]
        self.num_drafts = min(max(wanted, default=self.num_drafts), self._most)
        if self._num_unasked < 2:  # the first may be one that was planned ahead, before it was known what to ask for
            return self.num_drafts
        return 0 if plan.prefills else None  # a prompt that the draft has not read would be too long to make up for

    def with_proposals(self, result: Callable[[], Any], found: jax.Array) -> Callable[[], Any]:
        """What waits for the result of the step that `inputs` was for last, and for what it proposed, `found`, too."""
        if self._asked:
            bring(found)
        take = functools.partial(self._take, found, self._asked, self._num_asked)

        def wait() -> Any:
            take()
            return result()

        return wait

    # --- for jaxpaged.speculative.draft_model ---

    def may_propose(self, sequence: Sequence) -> bool:
        """Whether a sequence is one that anything will be proposed for in the next steps."""
        return sequence not in self._left and _is_drawn(sequence)

    def ask(self, most: int) -> None:
        """Let the next step propose so many tokens or fewer. Without this it may be one that the draft takes no part in."""
        self._is_asked, self._most = True, min(most, self.max_drafts)

    def proposed(self, sequence: Sequence) -> tuple[int, ...]:
        """What follows the tokens that are known of a sequence, as the last step says; nothing when it was planned ahead."""
        found = self._proposed.get(sequence)
        return found.token_ids if found is not None and found.position == sequence.num_tokens - 1 else ()

    # --- inside ---

    def _miss(self, chunk: Chunk) -> tuple[int, int]:
        """Note a chunk that is computed without the draft. Returns as `_advance`."""
        known = self._num_known(chunk.sequence.pages, chunk.start)
        self._note(chunk, chunk.start, known)
        return known, known

    def _advance(self, chunk: Chunk) -> tuple[int, int]:
        """Note a chunk that the draft computes too: how many tokens of its sequence the draft has without the step's rows, and
        how many when the step has run, which is all of them unless it is behind.
        """
        sequence, start, end = chunk.sequence, chunk.start, chunk.end
        known = self._num_known(sequence.pages, start)
        if not chunk.is_decode and known == start:
            self._note(chunk, start, end)
            self._left.discard(sequence)
            return end, end
        # Of more drafts than that the step does not know which holds.
        is_able = chunk.samples and _is_drawn(sequence) and len(chunk.drafts) <= self.max_drafts
        last = end - len(chunk.drafts) - 1
        if not is_able or last - known > MAX_BACKLOG:
            self._left.update([sequence] if last - known > MAX_BACKLOG else [])
            return self._miss(chunk)
        after = known + BACKLOG if known + BACKLOG < last else end
        self._note(chunk, known, after)
        return known, after

    def _num_known(self, pages: Seq[int], num_tokens: int) -> int:
        """How many of a sequence's first tokens, at most so many, the draft has."""
        if self._stale:
            for index, page in enumerate(pages[: -(-num_tokens // self.page_size)]):
                if page in self._stale:
                    return min(index * self.page_size + self._stale[page], num_tokens)
        return num_tokens

    def _note(self, chunk: Chunk, first: int, known: int) -> None:
        """Keep of the pages from the place `first` to the chunk's end that the draft has the sequence's first `known` tokens."""
        size, end = self.page_size, chunk.end
        for index in range(first // size, -(-end // size)):
            page, num_here = chunk.sequence.pages[index], known - index * size
            if num_here >= min(size, end - index * size):
                self._stale.pop(page, None)
            elif page:  # not the null page, which takes the place of those behind a window
                self._stale[page] = max(num_here, 0)

    def _take(self, found: jax.Array, asked: Seq[_Asked], num_drafts: int) -> None:
        if not asked:
            return
        for one, (position, *token_ids) in zip(asked, np.asarray(found)[: len(asked)].tolist(), strict=True):
            # Past its pages there was nowhere to keep what a token is made of: what comes after that one is worth nothing.
            count = max(0, min(num_drafts, one.num_places - position))
            self._proposed[one.sequence] = _Proposed(position, tuple(token_ids[:count]), one.pages)

    def recover(self, num_pages: int, dtype: str) -> None:
        """The pages are lost: those that come hold nothing."""
        self.cache = kv_cache.init_cache(self.model, num_pages, self.page_size, dtype)
        self._stale.clear()
        self._proposed, self._asked = {}, []

    def close(self) -> None:
        """Give the memory back."""
        self._proposed = {}
        for array in jax.tree.leaves((self.weights, self.cache)):
            if not array.is_deleted():
                array.delete()


def _is_drawn(sequence: Sequence) -> bool:
    """Whether a step knows its token: those of beams are found by the host, those with a grammar when the step has ended."""
    return sequence.group is None and sequence.request.params.structured_outputs is None


def check_draft(draft: ModelConfig, target: ModelConfig) -> None:
    """Raise unless what one proposes the other can verify.

    Raises:
      ConfigError: their vocabularies differ.
    """
    if draft.vocab_size != target.vocab_size:
        raise ConfigError(
            f"speculative_config: model: its vocabulary has {draft.vocab_size:,} tokens, the target's has {target.vocab_size:,}"
        )
