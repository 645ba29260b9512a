"""The drafts of an engine's steps: who is asked for them, in which order, how many are taken, and what became of them.

Knows sequences, plans and results. Refuses to know how tokens are guessed, and what a step makes of them.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import NamedTuple

from jaxpaged.config import MAX_SURE_DRAFTS, EngineConfig
from jaxpaged.host.plan import StepPlan
from jaxpaged.host.request import Sequence
from jaxpaged.speculative import Proposer
from jaxpaged.speculative.adaptive import Adaptive
from jaxpaged.speculative.ngram import NgramProposer


class _Asked(NamedTuple):
    """How a step came to its drafts."""

    is_tried: bool = False  # whether all steps before it were waited for, so that there could be some
    proposing_s: float = 0.0
    longest: int = 0  # of those that are weighed


class Drafting:
    """Asks proposers in their order: of those that have something for a sequence, the first is heard.

    What is sure is taken as it comes. The rest is weighed by `Adaptive`, or taken too where that is None.

    Args:
      most: drafts of one sequence in one step.
      most_sure: likewise of those that are sure.
      row_sizes: decode rows of the compiled steps, smallest first.
    """

    def __init__(
        self,
        proposers: Seq[Proposer],
        *,
        most: int,
        most_sure: int,
        row_sizes: Seq[int],
        is_adaptive: bool,
        clock: Callable[[], float],
    ):
        self.proposers, self.clock = tuple(proposers), clock
        self.most, self.most_sure = most, most_sure
        unsure = [proposer for proposer in proposers if not proposer.is_sure]
        self.adaptive = None
        if is_adaptive and unsure:
            self.adaptive = Adaptive(row_sizes, is_free=all(proposer.is_free for proposer in unsure))
        self.num_drafts = self.num_draft_tokens = self.num_accepted_tokens = 0
        self.num_accepted_at: Counter[int] = Counter()  # by the number of drafts before it
        self._next = _Asked()  # of the step that is about to be planned
        self._asked: deque[_Asked] = deque()  # of the steps in flight, the oldest first
        self._weighed: set[Sequence] = set()  # whose drafts in flight were weighed
        self._ended_s: float | None = None  # when the last step did, if others came right after it

    # --- before a step ---

    def is_wanted(self, running: Seq[Sequence]) -> bool:
        """Whether the next step is to have drafts: then nothing may be in flight when it is planned."""
        return bool(self._heard(running))

    def _heard(self, running: Seq[Sequence]) -> list[Proposer]:
        """The proposers that are worth asking now."""
        decoding = [sequence for sequence in running if _decodes(sequence)]
        is_open = bool(decoding) and (self.adaptive is None or self.adaptive.is_wanted(_num_rows(running)))
        heard = [proposer for proposer in self.proposers if proposer.is_sure or is_open]
        return [proposer for proposer in heard if any(map(proposer.may_propose, decoding))]

    def propose(self, running: Seq[Sequence]) -> dict[Sequence, tuple[int, ...]]:
        """Drafts for the next step; no step is in flight."""
        decoding = [sequence for sequence in running if _decodes(sequence)]
        drafts: dict[Sequence, tuple[int, ...]] = {}
        proposing_s, weighed = 0.0, set()
        num_rows = _num_rows(running)
        for proposer in self._heard(running):
            most = self.most_sure if proposer.is_sure else self.most
            # The step itself yields one token, so drafts for the last one are for nothing.
            asked = {one: min(most, one.request.max_len - one.num_tokens - 1) for one in decoding if one not in drafts}
            mine = {one: count for one, count in asked.items() if count > 0 and proposer.may_propose(one)}
            if self.adaptive is not None and not proposer.is_sure and not proposer.is_free:
                mine = self._chosen(mine, num_rows)
            started = self.clock()
            found = {one: tuple(tokens) for one, tokens in proposer.propose(mine).items() if tokens} if mine else {}
            if not proposer.is_sure:
                proposing_s += self.clock() - started
            if self.adaptive is not None and proposer.is_free and not proposer.is_sure:
                lengths = self._chosen({one: len(tokens) for one, tokens in found.items()}, num_rows)
                found = {one: found[one][:length] for one, length in lengths.items()}
            drafts |= found
            weighed |= set() if proposer.is_sure else found.keys()
        longest = max((len(drafts[sequence]) for sequence in weighed), default=0)
        self._weighed = weighed
        self._next = _Asked(True, proposing_s, longest)
        return drafts

    def _chosen(self, available: dict[Sequence, int], num_decoding: int) -> dict[Sequence, int]:
        return self.adaptive.choose(available, num_decoding)  # type: ignore[union-attr, return-value, arg-type]

    def planned(self, plan: StepPlan | None) -> None:
        """The step that was asked for, if it was, has been planned."""
        asked, self._next = self._next, _Asked()
        if plan is not None:
            self._asked.append(asked)

    # --- after a step ---

    def ran(self, plan: StepPlan, token_ids: Seq[int] | None, num_tokens: int, *, is_last: bool) -> None:
        """The oldest step in flight has been committed.

        Args:
          token_ids: as its result has them; None when nobody was left to wait for it.
          num_tokens: that its sequences have got.
          is_last: whether nothing is left to do, so that what comes next will have waited for somebody.
        """
        asked, now = self._asked.popleft(), self.clock()
        if token_ids is not None:
            self._count(plan, token_ids)
        if (
            self.adaptive is not None
            and token_ids is not None
            and self._ended_s is not None
            and plan.decodes
            and not plan.prefills
        ):
            count, seconds = len(plan.decodes), now - self._ended_s  # type: ignore[operator]
            if asked.is_tried:
                self.adaptive.ran(count, plan.num_rows, num_tokens, seconds, asked.proposing_s, asked.longest)
            else:
                self.adaptive.ran_plainly(count, seconds)
        self._ended_s = None if is_last else now

    def _count(self, plan: StepPlan, token_ids: Seq[int]) -> None:
        row = 0
        for chunk in plan.decodes:
            drafts, drawn = chunk.drafts, token_ids[row : row + chunk.num_tokens]
            row += chunk.num_tokens
            if not drafts:
                continue
            num_accepted = next((at for at, draft in enumerate(drafts) if draft != drawn[at]), len(drafts))
            self.num_drafts += 1
            self.num_draft_tokens += len(drafts)
            self.num_accepted_tokens += num_accepted
            self.num_accepted_at.update(range(num_accepted))
            if self.adaptive is not None and chunk.sequence in self._weighed:
                self.adaptive.judged(chunk.sequence, len(drafts), num_accepted)

    def failed(self) -> None:
        """The steps in flight are lost."""
        self._asked.clear()
        self._next, self._ended_s = _Asked(), None

    def stats(self) -> dict[str, int]:
        """Counters under vLLM's names."""
        num_places = max(self.most, len(self.num_accepted_at))
        found = {
            "num_drafts": self.num_drafts,
            "num_draft_tokens": self.num_draft_tokens,
            "num_accepted_tokens": self.num_accepted_tokens,
            **{f"num_accepted_tokens_per_pos_{at}": self.num_accepted_at[at] for at in range(num_places)},
        }
        return {f"spec_decode_{name}": count for name, count in found.items()}

    def close(self) -> None:
        """Close the proposers."""
        for proposer in self.proposers:
            proposer.close()


def new_drafting(config: EngineConfig, proposers: Seq[Proposer], clock: Callable[[], float]) -> Drafting | None:
    """The drafts of an engine with these resolved options; None when nobody proposes any.

    Args:
      proposers: asked before the one that the options name.
    """
    wanted, asked = config.speculation, list(proposers)
    if wanted is not None and wanted.method == "ngram":
        asked.append(
            NgramProposer(prompt_lookup_min=wanted.prompt_lookup_min, prompt_lookup_max=wanted.prompt_lookup_max)  # type: ignore[arg-type]
        )
    if not asked:
        return None
    row_sizes = sorted({bucket.decode_rows for bucket in config.buckets()})
    is_adaptive = wanted is not None and wanted.adaptive
    limits = {"most": wanted.num_speculative_tokens if wanted is not None else MAX_SURE_DRAFTS, "most_sure": config.max_drafts}
    return Drafting(asked, **limits, row_sizes=row_sizes, is_adaptive=is_adaptive, clock=clock)


def _num_rows(running: Seq[Sequence]) -> int:
    """Rows of a step without drafts, but for what else may be admitted."""
    return sum(sequence.num_uncomputed == 1 for sequence in running)


def _decodes(sequence: Sequence) -> bool:
    """Whether it has one token left to compute and none to share: beams are no guess, and forks are to come first."""
    return sequence.num_uncomputed == 1 and sequence.group is None and not sequence.num_forks
