"""The scheduler: which sequences run in the next step, which of their tokens, on which pages.

A state machine: `add`, `abort` and `stop` are its events, `plan` decides one step, `commit` records what came of it. The next
step may be planned before the last one is committed. Knows tokens, pages and limits. Refuses to know arrays, text, time and the
device.
"""

from __future__ import annotations

import itertools
from bisect import insort
from collections import deque
from collections.abc import Collection, Mapping
from collections.abc import Sequence as Seq

from jaxpaged.config import EngineConfig, ModelConfig
from jaxpaged.host.beams import BeamGroup, Candidates
from jaxpaged.host.pages import NULL_PAGE, PagePool
from jaxpaged.host.plan import NO_TRANSFERS, Chunk, Limits, StepPlan
from jaxpaged.host.policies import OUTPUT_COST, PROMPT_COST, Policy, fcfs, find_policy
from jaxpaged.host.preemption import SwapCosts, is_worth_keeping
from jaxpaged.host.prefix_cache import PrefixCache
from jaxpaged.host.recall import MAX_HELD_BACK, Found, Recall
from jaxpaged.host.request import FinishReason, Request, RequestError, Sequence, TokenEvent
from jaxpaged.host.searches import Searches
from jaxpaged.host.tiers import HostTier
from jaxpaged.host.waiting import AGEING_STEPS, WaitingLine, by_rank

# A sequence that has given way this often is admitted with all the pages that it can ever need, and gives way no more.
MAX_PREEMPTIONS = 8
PREFETCH_AHEAD = 4  # sequences that wait whose pages are fetched before there is room for them
PREFETCH_EVERY = 8  # steps between two looks at them, which cost microseconds for every page
DEFAULT_COSTS = SwapCosts()
NO_DRAFTS: Mapping[Sequence, Seq[int]] = {}


def build(config: EngineConfig, model: ModelConfig, pool: PagePool, *, costs: SwapCosts | None = None) -> Scheduler:
    """The scheduler of an engine with these resolved options; the pool gets its prefix cache and host tier when it has none.

    Args:
      costs: what preemption_mode auto compares; None is a guess.
    """
    limits = Limits(
        page_size=config.block_size,  # type: ignore[arg-type]
        max_num_seqs=config.max_num_seqs,  # type: ignore[arg-type]
        max_num_batched_tokens=config.max_num_batched_tokens,  # type: ignore[arg-type]
        tile=config.prefill_tile,  # type: ignore[arg-type]
        max_prefill_tiles=config.max_prefill_tiles,
        long_prefill_token_threshold=config.long_prefill_token_threshold,
        max_num_partial_prefills=config.max_num_partial_prefills,
        batch_merge_window=config.batch_merge_window,
        sliding_window=max(model.windows) if model.windows and all(model.windows) else 0,
        eager_copy=config.eager_copy,
        max_num_rows=config.buckets()[-1].decode_rows,
        lookahead=config.num_places_ahead,
    )
    num_slots = config.num_host_pages(model)
    if (config.enable_prefix_caching or num_slots) and pool.cache is None:
        context = f"{model!r} {config.dtype} {config.quantization} {config.kv_cache_dtype}"
        pool.cache = PrefixCache(limits.page_size, context, is_private=not config.enable_prefix_caching)
    if num_slots and pool.tier is None:
        has_disk = config.offload_dir is not None
        pool.tier = HostTier(num_slots, has_disk=has_disk, threshold=config.offload_threshold, max_fetches=config.prefetch_blocks)
    options = {"ageing_steps": config.ageing_steps, "preemption_mode": config.preemption_mode}
    options["costs"] = costs or SwapCosts.guess(model.page_bytes(limits.page_size, config.kv_cache_dtype))
    return Scheduler(pool, limits, policy=find_policy(config.scheduling_policy), **options)


class Scheduler(Searches):
    """Chunked prefill, shared prefixes, forks, beams and preemption, by recompute or by swap, in the order of a policy.

    Invariants: `running` and `waiting` are each in order of rank, and a rank changes only while its sequence waits; only running
    sequences own pages; a page with several owners is copied before one of them writes it; a sequence that was preempted
    MAX_PREEMPTIONS times owns, as soon as it runs, all pages that it can ever need.

    Every step computes a token, whatever the policy: the first that runs takes pages from those behind it, and has to give way
    itself only to one behind it that lacks none. So everything ends, because a sequence is set back at most MAX_PREEMPTIONS
    times: steps <= (MAX_PREEMPTIONS + 1) * tokens. With `fcfs` ranks are the order of arrival, all that runs arrived before all
    that waits, the oldest is never set back, and steps <= tokens.

    A sequence whose pages are on disk is held back until they are in host memory, and others are admitted past it; so with a
    disk the oldest may be behind, for as many fetches as it has pages, and a step may have transfers alone.

    The beams of a search run together or not at all; see `Searches`.

    One step may be in flight while the next is planned. What it computes then counts as computed, since the device runs steps in
    order, and a sequence that it samples has a pending token: the next step may compute that one without anybody here knowing
    which it is. When it ends the sequence, what the next step made of it is thrown away; when the sequence has to give way
    meanwhile, its token still counts. A beam waits for its candidates, and a sequence with drafts for what came of them.

    Args:
      ageing_steps: how long a policy may hold a sequence back; see `WaitingLine`.
      preemption_mode, costs: see `is_worth_keeping`; they matter to a pool with a host tier.
    """

    def __init__(
        self,
        pool: PagePool,
        limits: Limits,
        *,
        policy: Policy = fcfs,
        ageing_steps: int = AGEING_STEPS,
        preemption_mode: str = "auto",
        costs: SwapCosts = DEFAULT_COSTS,
    ):
        self.pool = pool
        self.limits = limits
        self.recall = Recall(pool)
        self.preemption_mode, self.costs = preemption_mode, costs
        self.waiting = WaitingLine(policy, ageing_steps=ageing_steps, cached_len=self._cached_len)
        self.running: list[Sequence] = []
        self._num_added = 0
        self.num_preemptions = 0
        self._num_looks = 0
        self.num_swaps = 0  # preemptions whose pages were to be kept
        self.num_copies = 0
        self._by_id: dict[str, list[Sequence]] = {}  # what has not ended yet of each request; beams as in their group's `running`
        self._copies: list[tuple[int, int]] = []  # of the plan being made
        self._in_flight: deque[StepPlan] = deque()  # planned and not committed, the oldest first
        self._is_advanced = False  # whether the sequences of the last of them are where it leaves them
        self.only: Collection[str] | None = None  # requests that alone are admitted; None is all
        self.spoiled: list[int] = []  # pages that the last commit took from rows that were not finite; nobody owns them

    # --- events ---

    def add(self, request: Request) -> None:
        """Queue a request where its policy puts it."""
        if request.request_id in self._by_id:
            raise RequestError(f"request_id: {request.request_id!r} is already in use by an unfinished request")
        sequence = Sequence.first(request, self._num_added)
        self.waiting.push(sequence)
        self._num_added += 1
        self._by_id[request.request_id] = [sequence]

    def abort(self, request_id: str) -> list[TokenEvent]:
        """End a request now and free its pages: an event for each output that had not ended, none when it is unknown or over."""
        return self._end_all(request_id, FinishReason.ABORT)

    def stop(self, request_id: str, index: int) -> bool:
        """End one output that has tokens now, because of what its text says, and free its pages; False when it has ended.

        No event tells of it. What a step in flight samples for it is thrown away.
        """
        for sequence in self._by_id.get(request_id, ()):
            if sequence.index == index and sequence.group is None and len(sequence.tokens) > sequence.num_prompt:
                self._finish(sequence, FinishReason.STOP)
                return True
        return False

    def fetched(self, key: bytes, ok: bool) -> None:
        """A page has come from disk into its slot of host memory, or has not: then it is computed."""
        self.pool.tier.fetched(key, ok)  # type: ignore[union-attr]

    @property
    def is_fetching(self) -> bool:
        """Whether pages are on their way from disk: when `plan` finds nothing to do, it is these that it waits for."""
        return self.pool.tier is not None and self.pool.tier.num_fetching > 0

    def __contains__(self, request_id: str) -> bool:
        """Whether an unfinished request has this id."""
        return request_id in self._by_id

    @property
    def has_unfinished(self) -> bool:
        """Whether a call of `plan` would find something to do."""
        return bool(self._by_id)

    # --- plan ---

    def plan(self, drafts: Mapping[Sequence, Seq[int]] = NO_DRAFTS) -> StepPlan | None:
        """Decide the next step and take the pages it writes to; None when there is nothing to do.

        At most one step may be in flight. None, too, when all depends on what it yields, or on pages that are being fetched.

        Args:
          drafts: proposed tokens to come, after those known or pending, of sequences that decode. As many of them are computed
            as there is room for; nobody gives way to them.
        """
        if len(self._in_flight) > 1:
            raise RuntimeError(f"{len(self._in_flight)} steps are in flight: commit the oldest before the next is planned")
        self._advance_in_flight(is_pending=True)
        tokens_left, tiles_left = self.limits.max_num_batched_tokens, self.limits.max_prefill_tiles
        decodes: list[Chunk] = []
        prefills: list[Chunk] = []
        has_preempted, is_by_arrival = False, self.waiting.policy is fcfs and not self.recall.has_disk
        rows_left = self.num_draft_rows() if drafts else 0
        self.waiting.step += 1
        # Nothing is to be done for a sequence but its next token.
        is_plain = not (drafts or self.limits.sliding_window or self.limits.lookahead)

        index = 0
        while index < len(self.running):
            sequence = self.running[index]
            if is_plain and tokens_left and self._has_its_page(sequence):
                decodes.append(Chunk(sequence, sequence.num_computed, 1, True))
                tokens_left, index = tokens_left - 1, index + 1
                continue
            if self.limits.sliding_window:
                self._free_behind_window(sequence)
            self._fork(sequence)
            num_kept = 0 if is_by_arrival else self._num_kept(index, tokens_left)
            num_tokens = self._chunk_len(sequence, sequence.num_computed, tokens_left - num_kept, tiles_left)
            if num_tokens and not self._reserve(sequence, sequence.num_computed + num_tokens):
                # Out of pages: the last in rank gives way. It has not been planned yet, because planning goes by rank.
                last = next(other for other in reversed(self.running[index:]) if not _is_protected(other))
                has_preempted = True
                if last.group is None or last.group is not sequence.group:
                    self._preempt(last)
                    continue
                # A search gives way as a whole or not at all, and some of its beams may be planned: this one sits the step out.
                num_tokens = 0
            if num_tokens:
                chunk = Chunk.next(sequence, num_tokens)
                if sequence in drafts and chunk.is_decode:
                    most = min(rows_left, tokens_left - (len(self.running) - index))
                    chunk = self._with_drafts(chunk, drafts[sequence], most)
                    rows_left -= len(chunk.drafts)
                (decodes if chunk.is_decode else prefills).append(chunk)
                tokens_left, tiles_left = tokens_left - chunk.num_tokens, tiles_left - self._num_tiles(chunk)
                if self.limits.lookahead and chunk.samples:
                    self._reserve_ahead(sequence, chunk.end + self.limits.lookahead)
            elif self.limits.eager_copy and self._writes_shared_page(sequence):
                self._reserve(sequence, sequence.num_computed + 1)
            index += 1

        # A step that preempted admits nobody: the pages it freed belong to the older sequences' next tokens.
        is_open = self.waiting and not has_preempted and not self._is_held(tokens_left) and self._has_room(1)
        # Free pages that running sequences will take for tokens they already have.
        num_lacking = sum(map(self._num_pages_lacking, self.running)) if is_open else 0
        held_back: set[Sequence] = set()
        while len(self.waiting) > len(held_back) and is_open and self._has_room(1) and len(held_back) < MAX_HELD_BACK:
            self.waiting.refresh()
            sequence = next((one for one in self.waiting if one not in held_back and self._may_run(one)), None)
            if sequence is None or sequence.num_pending:
                break  # a token that only the device knows can be a decode's, not the end of a chunk
            known = self.recall.look(sequence)
            if known is None:
                held_back.add(sequence)
                continue
            num_known = len(known.pages) * self.limits.page_size
            num_tokens = self._chunk_len(sequence, num_known, tokens_left, tiles_left)
            # Enough for all of its tokens, not only its first chunk: else prompts half done would preempt each other.
            num_needed = self._num_pages_lacking(sequence)
            if _is_protected(sequence):
                # All that it can ever need, and likewise for all that runs: nobody will lack what it holds.
                num_needed, num_lacking = self._num_pages_to_end(sequence), sum(map(self._num_pages_to_end, self.running))
            num_needed -= sum(self.pool.num_owners(page) > 0 for page in known.pages)
            if not self.running and sequence.group is None:
                num_needed -= sequence.num_forks  # which may be more than the whole pool holds: they take turns
            if not num_tokens or num_lacking + num_needed > self.pool.num_free:
                break
            if not self._has_room(1 + sequence.num_to_come) or self._is_one_too_many(
                prefills, num_known + num_tokens < sequence.num_tokens
            ):
                break
            self._begin(sequence, known)
            self._reserve(sequence, _num_places(sequence) if _is_protected(sequence) else num_known + num_tokens)
            num_lacking += self._num_pages_lacking(sequence)
            self.waiting.remove(sequence)
            insort(self.running, sequence, key=by_rank)
            self._fork(sequence)
            chunk = Chunk.next(sequence, num_tokens)
            (decodes if chunk.is_decode else prefills).append(chunk)
            tokens_left, tiles_left = tokens_left - num_tokens, tiles_left - self._num_tiles(chunk)
            if self.limits.lookahead and chunk.samples:
                self._reserve_ahead(sequence, chunk.end + self.limits.lookahead)

        self._prefetch()

        copies, self._copies = tuple(self._copies), []
        self.pool.free(source for source, _ in copies)
        self.num_copies += len(copies)
        transfers = self.pool.tier.take_transfers() if self.pool.tier is not None else NO_TRANSFERS
        if not decodes and not prefills and not any(transfers):
            return None
        plan = StepPlan(tuple(decodes), tuple(prefills), copies, transfers)
        self._in_flight.append(plan)
        self._is_advanced = False
        return plan

    def _advance_in_flight(self, *, is_pending: bool) -> None:
        """Count what the last step in flight computes as computed; `is_pending` when nobody knows yet what it samples."""
        if self._is_advanced or not self._in_flight:
            return
        self._is_advanced = True
        for sequence, start, num_tokens, samples, drafts in self._in_flight[-1].chunks():
            if sequence.finish_reason is None:
                sequence.num_computed = start + num_tokens - len(drafts)
                sequence.num_pending = int(is_pending and samples and sequence.group is None)
                sequence.is_drafted = is_pending and bool(drafts)

    def _prefetch(self) -> None:
        """Begin the fetches of those who are next, though there is no room for them yet."""
        tier = self.pool.tier
        if tier is None or not tier.num_on_disk or not self.waiting:
            return
        self._num_looks += 1  # not the line's steps: a replay knows nothing of those for which nobody was there
        if self._num_looks % PREFETCH_EVERY:
            return
        for sequence in itertools.islice(self.waiting, PREFETCH_AHEAD):
            if not tier.may_fetch:
                break
            self.recall.look(sequence)

    def _has_its_page(self, sequence: Sequence) -> bool:
        """Whether all that a sequence wants is to compute its last token, in a page that it has for itself.

        Nearly all sequences of nearly all steps; what `plan` does for the others comes to the same for these, only slower.
        """
        num_computed, num_pending = sequence.num_computed, sequence.num_pending
        if num_computed + 1 != len(sequence.tokens) + num_pending or sequence.num_forks:
            return False
        if num_pending and (sequence.is_drafted or num_computed + 1 >= sequence.request.max_len):
            return False
        pages, index = sequence.pages, num_computed // self.limits.page_size
        return index < len(pages) and self.pool.num_owners(pages[index]) == 1

    def _chunk_len(self, sequence: Sequence, num_computed: int, tokens_left: int, tiles_left: int) -> int:
        """How many of a sequence's next tokens the rest of the step can hold; 0 when it has to sit the step out."""
        num_tokens = sequence.num_tokens - num_computed
        if sequence.num_pending and (sequence.is_drafted or sequence.num_tokens >= sequence.request.max_len):
            return 0  # nobody knows how many tokens are pending, or the one that is comes last
        if num_tokens == 1:
            return min(1, tokens_left)  # a row, no tile; if it has forks, they are there before it is computed
        num_own = sequence.num_own
        wanted = min(num_tokens - num_own if num_tokens > num_own else num_tokens, tokens_left)
        if self.limits.long_prefill_token_threshold:
            wanted = min(wanted, self.limits.long_prefill_token_threshold)
        return min(wanted, tiles_left * self.limits.tile)

    def _num_tiles(self, chunk: Chunk) -> int:
        return 0 if chunk.is_decode else -(-chunk.num_tokens // self.limits.tile)

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.limits.page_size)

    def _num_pages_lacking(self, sequence: Sequence) -> int:
        """Pages that the sequence has yet to take for the tokens it has now, and those that its forks will need at once."""
        lacking = self._num_pages(sequence.num_tokens) - len(sequence.pages)
        # Below 0 for one that was given all its pages beforehand: what it has to spare is nobody's.
        lacking = (lacking if lacking > 0 else 0) + self._writes_shared_page(sequence)
        return lacking + self._num_pages_to_come(sequence) if sequence.num_forks or sequence.group is not None else lacking

    def _num_pages_to_come(self, sequence: Sequence) -> int:
        num_tokens = sequence.num_tokens
        num_each = self._num_pages(num_tokens) - (num_tokens - sequence.num_own) // self.limits.page_size
        return sequence.num_forks * num_each if sequence.num_forks else sequence.num_to_come  # a page for the first token

    def _num_pages_to_end(self, sequence: Sequence) -> int:
        """Pages that the sequence and its forks have yet to take if they become as long as they can."""
        num_pages = self._num_pages(_num_places(sequence))
        lacking = max(0, num_pages - len(sequence.pages))
        return lacking + self._writes_shared_page(sequence) + sequence.num_to_come * num_pages

    def _num_kept(self, index: int, tokens_left: int) -> int:
        """Tokens of the step that the chunk of running[index] leaves to sequences behind it that decode.

        By order of arrival none are kept. By another order a long prompt may come before what decodes already, and must not
        stop it.
        """
        if self.running[index].num_uncomputed == 1 or not tokens_left:
            return 0
        return min(tokens_left - 1, sum(other.num_uncomputed == 1 for other in self.running[index + 1 :]))

    def _may_run(self, sequence: Sequence) -> bool:
        return self.only is None or sequence.request.request_id in self.only

    def _is_held(self, tokens_left: int) -> bool:
        """Whether admission waits for more sequences to come, so that their prompts share a step."""
        if not self.limits.batch_merge_window or not self.running:
            return False
        if self.waiting.longest_wait() > self.limits.batch_merge_window:
            return False
        return sum(sequence.num_tokens for sequence in self.waiting) < tokens_left

    def _is_one_too_many(self, prefills: list[Chunk], is_partial: bool) -> bool:
        """Whether the step would end in the middle of more prompts than it may."""
        most = self.limits.max_num_partial_prefills
        if not most or not is_partial:
            return False
        num_ended = sum(chunk.samples for chunk in prefills)
        return sum(sequence.num_uncomputed > 1 for sequence in self.running) - num_ended >= most

    def _cached_len(self, sequence: Sequence) -> int:
        return len(self.pool.cache.match(sequence)) * self.limits.page_size if self.pool.cache is not None else 0

    def _has_room(self, num_more: int) -> bool:
        """Whether so many can run, forks included, beside what runs; more of them than fit run beside nothing."""
        forking = (sequence for sequence in self.running if sequence.num_forks or sequence.group is not None)
        num_slots = len(self.running) + sum(sequence.num_to_come for sequence in forking)
        return not self.running or num_slots + num_more <= self.limits.max_num_seqs

    def _fork(self, sequence: Sequence) -> None:
        """Fork a sequence's siblings from it once all that they share is computed: of a prompt all but its last token."""
        if not sequence.num_forks or sequence.num_to_compute > 0:
            return
        if sequence.group is not None:
            return self._unfold(sequence)
        siblings = self._siblings(sequence)
        room = self.limits.max_num_seqs - len(self.running)
        for sibling in siblings[:room]:
            self._run_beside(sequence, sibling)
        for sibling in siblings[room:]:
            self.waiting.push(sibling)  # on the pages that the prefix cache has then

    def _run_beside(self, sequence: Sequence, fork: Sequence) -> None:
        """Let a fork of a sequence run, on the pages of what it has computed."""
        fork.pages = sequence.pages[: self._num_pages(sequence.num_computed)]
        fork.num_computed, fork.num_recorded = sequence.num_computed, sequence.num_recorded
        fork.num_behind = sequence.num_behind
        self.pool.share(fork.owned_pages)
        insort(self.running, fork, key=by_rank)

    def _writes_shared_page(self, sequence: Sequence) -> bool:
        """Whether the place of the sequence's next token is in a page that others own too.

        Those that have copied it in the plan being made do not count: copies come before writes, so the last owner needs none.
        """
        index = sequence.num_computed // self.limits.page_size
        if index >= len(sequence.pages):
            return False
        page = sequence.pages[index]
        num_owners = self.pool.num_owners(page)
        return num_owners > 1 and num_owners - sum(source == page for source, _ in self._copies) > 1

    def _begin(self, sequence: Sequence, known: Found) -> None:
        """Give a waiting sequence the pages of the prefix that is already computed."""
        sequence.pages = self.recall.take(sequence, known)  # type: ignore[assignment]  # there is room for all of it
        sequence.num_recorded = len(sequence.pages)
        sequence.num_computed = sequence.num_recorded * self.limits.page_size
        if self.pool.cache is not None and not self.pool.cache.is_private and not sequence.num_preemptions:
            sequence.num_cached_tokens = sequence.num_computed
            self.pool.cache.num_queried_tokens += len(sequence.tokens)
            self.pool.cache.num_hit_tokens += (len(known.pages) - len(known.slots)) * self.limits.page_size
        if self.waiting.tenants is not None and not sequence.num_preemptions and not sequence.index:
            self.waiting.tenants.charge(sequence.request.tenant, PROMPT_COST * sequence.num_uncomputed)

    def _free_behind_window(self, sequence: Sequence) -> None:
        """Give back the pages that no token to come sees. What the prefix cache is to know of them it has to know first."""
        num_unseen = sequence.num_computed + 1 - self.limits.sliding_window  # the next token sees itself
        num_behind = num_unseen // self.limits.page_size
        if self.pool.cache is not None:
            num_behind = min(num_behind, sequence.num_recorded)
        if num_behind > sequence.num_behind:
            self.pool.free(sequence.pages[sequence.num_behind : num_behind])
            sequence.pages[:num_behind] = [NULL_PAGE] * num_behind
            sequence.num_behind = num_behind

    def _reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give the sequence pages of its own for its first `num_tokens` tokens; False, nothing taken, when too few are free."""
        is_copied = self._writes_shared_page(sequence)
        num_lacking = self._num_pages(num_tokens) - len(sequence.pages) + is_copied
        if num_lacking <= 0:
            return True
        pages = self.pool.allocate(num_lacking)
        if pages is None:
            return False
        if is_copied:
            index = sequence.num_computed // self.limits.page_size
            # The reference to the source becomes the plan's until it is made, so that nobody gets the page before it is copied.
            self._copies.append((sequence.pages[index], pages[0]))
            sequence.pages[index] = pages.pop(0)
        sequence.pages += pages
        return True

    def num_draft_rows(self) -> int:
        """Rows of a step that whoever runs, is forked or may yet be admitted has no use for."""
        num_seqs = len(self.running) + sum(sequence.num_to_come for sequence in self.running) + len(self.waiting)
        return max(self.limits.max_num_rows, self.limits.max_num_seqs) - min(num_seqs, self.limits.max_num_seqs)

    def _with_drafts(self, chunk: Chunk, drafts: Seq[int], most: int) -> Chunk:
        """A decode with as many drafts as there are tokens to come, pages to spare and room for: at most `most`."""
        sequence = chunk.sequence
        # The step yields one more token than it has drafts.
        count = min(len(drafts), most, sequence.request.max_len - sequence.num_tokens - 1)
        if count > 0:
            self._reserve_ahead(sequence, chunk.end + count)
            count = min(count, len(sequence.pages) * self.limits.page_size - chunk.end)
        return chunk._replace(num_tokens=1 + count, drafts=tuple(drafts[:count])) if count > 0 else chunk

    def _reserve_ahead(self, sequence: Sequence, num_tokens: int) -> None:
        """Give the sequence pages for so many tokens, or as far as it can come, from those that nobody who runs lacks."""
        wanted = self._num_pages(min(num_tokens, _num_places(sequence))) - len(sequence.pages)
        if wanted > 0 and wanted + sum(max(0, self._num_pages_lacking(other)) for other in self.running) <= self.pool.num_free:
            sequence.pages += self.pool.allocate(wanted) or []

    def _preempt(self, sequence: Sequence, *, is_counted: bool = True) -> None:
        """Take all pages back; when it is admitted again the sequence recomputes what of them is no longer on any tier."""
        is_kept = self._is_worth_keeping(sequence)
        self.num_swaps += is_kept and is_counted
        if sequence.group is not None:
            for beam in self._by_id[sequence.request.request_id]:
                self._release(beam, is_kept=is_kept)
            sequence = self._fold(self._by_id[sequence.request.request_id])
        self.running.remove(sequence)
        self._release(sequence, is_kept=is_kept)
        sequence.num_computed = 0
        sequence.num_preemptions += is_counted
        self.num_preemptions += is_counted
        self.waiting.push(sequence)
        if _is_protected(sequence):
            self._part(sequence)

    def _is_worth_keeping(self, sequence: Sequence) -> bool:
        """Whether what the sequence has computed is to be kept below the device when it is evicted."""
        num_pages = sequence.num_recorded
        if self.pool.tier is None or not num_pages:
            return False
        return is_worth_keeping(self.preemption_mode, num_pages * self.limits.page_size, num_pages, self.costs)

    def _part(self, sequence: Sequence) -> None:
        """Let a waiting sequence's forks wait on their own: what they might write of its pages, nobody can tell beforehand."""
        for sibling in self._siblings(sequence):
            self.waiting.push(sibling)

    def _siblings(self, sequence: Sequence) -> list[Sequence]:
        """The outputs that a sequence stands for, from here on sequences of their own."""
        siblings = [sequence.fork(sequence.index + 1 + i) for i in range(sequence.num_forks)]
        sequence.num_forks = 0
        self._by_id[sequence.request.request_id] += siblings
        return siblings

    # --- commit ---

    def commit(
        self, plan: StepPlan, token_ids: Seq[int], is_finite: Seq[bool], candidates: Seq[Candidates] | None = None
    ) -> list[TokenEvent]:
        """Record the oldest step in flight, which ran. `token_ids` and `is_finite` are those of `plan.outputs()`, in its order,
        and where something was not finite in one of `plan.unsampled()`, those too.

        A row that was not finite ends its own request with FinishReason.ERROR and no other. What it alone had of pages is known
        to no tier any more, and those are `spoiled`: to be zeroed behind the steps in flight and before those to come. Of a chunk
        with drafts, the tokens count up to the first one that is not the draft after it.

        Args:
          candidates: likewise; needed where there is a beam among them, and read of beams alone.
        """
        if not self._in_flight or plan is not self._in_flight[0]:
            raise RuntimeError("a step is committed that is not the oldest in flight")
        if len(self._in_flight) == 1:
            self._advance_in_flight(is_pending=False)
        self._in_flight.popleft()
        if self.pool.tier is not None:
            self.pool.tier.ended(plan.transfers)
        events, tenants, cache, page_size = [], self.waiting.tenants, self.pool.cache, self.limits.page_size
        self.spoiled = []
        grown: dict[str, BeamGroup] = {}
        outputs = plan.outputs()
        num_outputs = len(outputs)
        yielded = zip(outputs, token_ids[:num_outputs], is_finite[:num_outputs], strict=True)
        for row, ((chunk, num_drafts), token_id, finite) in enumerate(yielded):
            sequence = chunk.sequence
            if sequence.finish_reason is not None:  # aborted while the step ran, or ended by the token before
                continue
            if num_drafts:
                if not _is_right(chunk, num_drafts):
                    continue
                # The draft is what was drawn, so its keys and values are the sequence's, unless it gave way while the step ran.
                sequence.num_computed += sequence.num_computed == chunk.start + num_drafts
            sequence.num_pending, sequence.is_drafted = 0, False
            if finite:
                # Only here is it known that everything up to this token is sound, so that others may share it.
                if cache is not None and sequence.num_recorded != sequence.num_computed // page_size:
                    cache.record(sequence)
                if tenants is not None:
                    tenants.charge(sequence.request.tenant, OUTPUT_COST)
            if sequence.group is not None:
                request_id = sequence.request.request_id
                if sequence.num_computed < chunk.end:  # the search gave way while the step ran: it computes this anew
                    continue
                if finite:
                    sequence.candidates = candidates[row]  # type: ignore[index]
                    grown[request_id] = sequence.group
                else:
                    events += self._end_beams(list(self._by_id[request_id]), FinishReason.ERROR)
                continue
            if finite:
                sequence.tokens.append(token_id)
            request, stop_reason = sequence.request, None
            reason = self._finish_reason(sequence) if finite else FinishReason.ERROR
            if reason is not None:
                self._finish(sequence, reason)
                if reason is FinishReason.STOP and token_id in request.params.stop_token_ids:
                    stop_reason = token_id
            new_id, num_cached = token_id if finite else None, sequence.num_cached_tokens
            events.append(TokenEvent(request.request_id, new_id, reason, stop_reason, num_cached, sequence.index))
        others = plan.unsampled() if len(token_ids) > num_outputs else ()
        for chunk, _, finite in zip(others, token_ids[num_outputs:], is_finite[num_outputs:], strict=True):
            if not finite:  # by now siblings may have been forked from it
                events += self._end_all(chunk.sequence.request.request_id, FinishReason.ERROR)
        for request_id, group in grown.items():
            beams = self._by_id.get(request_id, [])
            if beams and all(beam.candidates for beam in beams):
                events += self._advance(group, beams)
        return events

    def rewind(self) -> None:
        """Forget the steps in flight: their results will not come. All that runs begins again with what was committed.

        Not where it was, because nobody can tell which pages were written, and which copied before somebody else wrote them.
        """
        self._in_flight.clear()
        self._copies.clear()
        self.pool.rewind()
        for sequence in (*self.running, *self.waiting):
            sequence.num_pending = 0
        while self.running:
            self._preempt(self.running[-1], is_counted=False)

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        if sequence.tokens[-1] in sequence.request.stop_ids:
            return FinishReason.STOP
        if len(sequence.tokens) >= sequence.request.max_len:
            return FinishReason.LENGTH
        return None

    def _end_all(self, request_id: str, reason: FinishReason) -> list[TokenEvent]:
        """End what has not ended of a request: an event for each output."""
        sequences = list(self._by_id.get(request_id, ()))
        if sequences and sequences[0].group is not None:
            return self._end_beams(sequences, reason)
        events = []
        for sequence in sequences:
            for index in range(sequence.index, sequence.index + 1 + sequence.num_forks):
                events.append(TokenEvent(request_id, None, reason, index=index))
            self._finish(sequence, reason)
        return events

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        siblings = self._by_id[sequence.request.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._by_id[sequence.request.request_id]
        self._leave(sequence, reason)

    def _leave(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.finish_reason = reason
        self.recall.leave(sequence)
        pages = sequence.owned_pages
        self._release(sequence)
        if reason is FinishReason.ERROR:
            self._spoil(sequence, pages)
        if self.pool.cache is not None and self.pool.cache.is_private:
            self._drop(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)

    def _spoil(self, sequence: Sequence, pages: list[int]) -> None:
        """Let nobody find what a sequence has computed and nobody else has, and note its pages. Others' rows speak for theirs."""
        for key in sequence.page_keys if self.pool.cache is not None else ():
            page = self.pool.cache.page_of(key)  # type: ignore[union-attr]
            if page is None or not self.pool.num_owners(page):
                self.pool.drop(key)
        self.spoiled += [page for page in pages if not self.pool.num_owners(page)]

    def _drop(self, sequence: Sequence) -> None:
        """Forget what a sequence has computed: nobody but its siblings may ask for it."""
        siblings = self._by_id.get(sequence.request.request_id, ())
        kept = {key for sibling in siblings if sibling is not sequence for key in sibling.page_keys}
        for key in sequence.page_keys:
            if key not in kept:
                self.pool.drop(key)

    def _release(self, sequence: Sequence, *, is_kept: bool = True) -> None:
        self.pool.free(sequence.owned_pages, is_kept=is_kept)
        sequence.pages = []
        sequence.num_recorded = sequence.num_behind = 0

    # --- for people who look ---

    def check(self) -> None:
        """Raise unless every invariant of the scheduler and its pool holds."""
        self.pool.check(sequence.owned_pages for sequence in self.running)
        for sequence in (*self.running, *self.waiting):
            if not 0 <= sequence.num_computed <= sequence.num_tokens:
                raise RuntimeError(
                    f"{sequence.request.request_id}: num_computed {sequence.num_computed} of {sequence.num_tokens} tokens"
                )
            if sequence.num_pending and not self._in_flight:
                raise RuntimeError(f"{sequence.request.request_id}: a token is pending and no step is in flight")
            if self._num_pages(sequence.num_computed) > len(sequence.pages):
                raise RuntimeError(
                    f"{sequence.request.request_id}: {len(sequence.pages)} pages for {sequence.num_computed} tokens"
                )
            if sequence.pages and _is_protected(sequence) and self._num_pages_to_end(sequence):
                raise RuntimeError(f"{sequence.request.request_id}: preempted {MAX_PREEMPTIONS} times, not given all its pages")
        self.waiting.check()
        self.recall.check(set(self.waiting))
        if any(before.rank >= after.rank for before, after in itertools.pairwise(self.running)):
            raise RuntimeError("what runs is not in the order of its ranks")
        for request_id, beams in self._by_id.items():
            self._check_beams(request_id, beams)
        if len(self.running) > self.limits.max_num_seqs:
            raise RuntimeError(f"{len(self.running)} sequences run, max_num_seqs is {self.limits.max_num_seqs}")
        if len(self.running) + len(self.waiting) != sum(map(len, self._by_id.values())):
            raise RuntimeError("a sequence is neither running nor waiting")


def _is_right(chunk: Chunk, num_drafts: int) -> bool:
    """Whether the first so many drafts of a chunk are what was drawn; of all but the last of them it is known."""
    tokens = chunk.sequence.tokens
    return len(tokens) == chunk.start + 1 + num_drafts and tokens[-1] == chunk.drafts[num_drafts - 1]


def _is_protected(sequence: Sequence) -> bool:
    """Whether it has given way so often that it need not again."""
    return sequence.num_preemptions >= MAX_PREEMPTIONS and sequence.group is None


def _num_places(sequence: Sequence) -> int:
    """Places that the sequence takes if it becomes as long as it can: its last token is sampled and never written."""
    return sequence.request.max_len - 1
