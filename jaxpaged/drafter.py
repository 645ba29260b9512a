"""The draft model beside the target: its weights, its pages, and which sequences it has kept up with.

Knows both plans and arrays, as `batch` does. Refuses to know how many tokens are worth proposing, and what is accepted: that is
found in the step, see `jaxpaged.model.draft`.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import NamedTuple

import jax
import numpy as np

from jaxpaged.config import Bucket, ConfigError, EngineConfig, ModelConfig
from jaxpaged.host.plan import Chunk, StepPlan
from jaxpaged.host.request import Sequence
from jaxpaged.model import cache as kv_cache
from jaxpaged.model.draft import DraftInputs
from jaxpaged.model.weights import Weights


class _Proposed(NamedTuple):
    """What the last step proposed for a sequence."""

    position: int  # of the sequence's last token then
    token_ids: tuple[int, ...]
    pages: list[int]  # the sequence's own list, which is another one after it gave way

    def num_known(self, chunk: Chunk) -> int:
        """Tokens of the chunk's sequence whose keys and values the draft has, when it has those before the chunk.

        It went through the last token and all that it proposed but the last, as far as the pages went.
        """
        if self.position != chunk.start or self.pages is not chunk.sequence.pages or not self.token_ids:
            return chunk.start
        num_same = next((at for at, pair in enumerate(zip(self.token_ids, chunk.drafts)) if pair[0] != pair[1]), None)
        num_same = min(len(self.token_ids), len(chunk.drafts)) if num_same is None else num_same
        return chunk.start + 1 + min(num_same, len(self.token_ids) - 1)


class _Asked(NamedTuple):
    """A sequence that a step proposes tokens for."""

    sequence: Sequence
    pages: list[int]  # its list
    num_places: int  # tokens that its pages have room for in that step


class Drafter:
    """Owns the draft model's weights and pages: page p holds the same tokens as the target's page p.

    What is done to the pool's pages is done to both, so prefixes, forks and copies hold here too. A page is stale when the draft
    has not computed all of its tokens: the step ran without the draft, or the page came from another tier, which keeps those of
    the target alone. For a sequence with a stale page nothing is proposed until it begins again elsewhere; its tokens are the
    same, only one at a time.

    Invariant: no page that holds tokens of a sequence with proposals is stale.
    """

    def __init__(self, model: ModelConfig, weights: Weights, config: EngineConfig, *, num_pages: int, max_drafts: int):
        """`config` is resolved."""
        self.model, self.weights, self.max_drafts = model, weights, max_drafts
        self.page_size: int = config.block_size  # type: ignore[assignment]
        self.max_num_seqs: int = config.max_num_seqs  # type: ignore[assignment]
        self.cache = kv_cache.init_cache(model, num_pages, self.page_size, config.kv_cache_dtype)
        self.num_drafts = max_drafts  # that the next step proposes for each sequence; -1 and the draft does not run at all
        self.proposals: Mapping[Sequence, tuple[int, ...]] = {}  # of the last step that has been waited for
        self._proposed: dict[Sequence, _Proposed] = {}
        self._stale: set[int] = set()

    def num_sequences(self, bucket: Bucket) -> int:
        """Q: sequences that a step of this shape can propose for."""
        return min(bucket.decode_rows + bucket.prefill_tiles, self.max_num_seqs)

    def padding(self, bucket: Bucket) -> DraftInputs:
        """A step that proposes nothing and leaves the draft's pages as they are."""
        first_rows, num_rows, num_known = np.zeros((3, self.num_sequences(bucket)), np.int32)
        return DraftInputs(first_rows, num_rows, num_known, np.int32(-1))  # type: ignore[arg-type]

    def moved(self, plan: StepPlan) -> None:
        """Know what comes of a plan's transfers and copies, before its step."""
        self._stale.update(page for _, page in plan.transfers.loads)
        for source, target in plan.copies:
            (self._stale.add if source in self._stale else self._stale.discard)(target)

    def inputs(self, plan: StepPlan, bucket: Bucket, rows: Seq[int]) -> tuple[DraftInputs, list[_Asked]]:
        """What the step is to propose, and for whom, in the order of its proposals; for `take`.

        Args:
          rows: of `plan.outputs()`.
        """
        inputs, asked = self.padding(bucket), []
        proposed, self._proposed, self.proposals = self._proposed, {}, {}
        is_fresh = {chunk.sequence: self._computes(chunk) for chunk in plan.chunks()}
        if self.num_drafts < 0:
            return inputs, asked
        at = 0
        for chunk in plan.sampling():
            sequence, num_rows = chunk.sequence, 1 + len(chunk.drafts)
            if is_fresh[sequence]:
                before, place = proposed.get(sequence), len(asked)
                num_known = chunk.start if before is None else before.num_known(chunk)
                inputs.first_rows[place], inputs.num_rows[place] = rows[at], num_rows  # type: ignore[index]
                inputs.num_known[place] = num_known if chunk.is_decode else chunk.end  # type: ignore[index]
                asked.append(_Asked(sequence, sequence.pages, len(sequence.pages) * self.page_size))
            at += num_rows
        return inputs.replace(num_drafts=np.int32(self.num_drafts)), asked  # type: ignore[attr-defined]

    def _computes(self, chunk: Chunk) -> bool:
        """Note what a step makes of a chunk's pages; whether the draft then has all of its sequence's tokens."""
        pages, size = chunk.sequence.pages, self.page_size
        first_new, end = -(-chunk.start // size), -(-chunk.end // size)
        is_fresh = self.num_drafts >= 0 and (not self._stale or self._stale.isdisjoint(pages[:first_new]))
        if chunk.is_decode and (chunk.sequence.group is not None or len(chunk.drafts) > self.max_drafts):
            is_fresh = False  # beams are nobody's to propose for, and of more drafts than that the step does not know the last
        if is_fresh:
            self._stale.difference_update(pages[first_new:end])
        else:
            self._stale.update(pages[chunk.start // size : end])
        return is_fresh

    def take(self, found: jax.Array, asked: Seq[_Asked], num_drafts: int) -> None:
        """Take in what a step proposed, as `step_and_propose` returns it. Waits for it.

        Args:
          asked, num_drafts: as they were for that step.
        """
        for one, (position, *token_ids) in zip(asked, np.asarray(found)[: len(asked)].tolist(), strict=True):
            # Past its pages there was nowhere to keep what a token is made of: what comes after that one is worth nothing.
            count = max(0, min(num_drafts, one.num_places - position))
            self._proposed[one.sequence] = _Proposed(position, tuple(token_ids[:count]), one.pages)
        self.proposals = {sequence: one.token_ids for sequence, one in self._proposed.items() if one.token_ids}

    def close(self) -> None:
        """Give the memory back."""
        self.proposals, self._proposed = {}, {}
        for array in jax.tree.leaves((self.weights, self.cache)):
            if not array.is_deleted():
                array.delete()


def check_draft(draft: ModelConfig, target: ModelConfig) -> None:
    """Raise unless what one proposes the other can verify.

    Raises:
      ConfigError: their vocabularies differ.
    """
    if draft.vocab_size != target.vocab_size:
        raise ConfigError(
            f"speculative_config: model: its vocabulary has {draft.vocab_size:,} tokens, the target's has {target.vocab_size:,}"
        )
