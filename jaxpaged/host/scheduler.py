"""The scheduler: which sequences run in the next step, which of their tokens, on which pages.

A state machine: `add` and `abort` are its events, `plan` decides one step, `commit` records what came of it. Knows tokens, pages
and limits. Refuses to know arrays, text, time and the device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from jaxpaged.host.pages import PagePool
from jaxpaged.host.request import FinishReason, Request, RequestError, Sequence, TokenEvent


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
    """

    page_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    tile: int
    max_prefill_tiles: int
    long_prefill_token_threshold: int = 0


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, start + num_tokens) of one sequence, computed in one step. Its pages already hold room for them.

    `samples`: the chunk ends with the last known token, so the step yields the next one.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool

    @property
    def end(self) -> int:
        """One past the last token: the context length once the chunk is computed."""
        return self.start + self.num_tokens

    @classmethod
    def next(cls, sequence: Sequence, num_tokens: int) -> Chunk:
        """The next `num_tokens` uncomputed tokens of a sequence."""
        return cls(sequence, sequence.num_computed, num_tokens, num_tokens == sequence.num_uncomputed)


@dataclass(frozen=True)
class StepPlan:
    """One step, decided. `decodes` are single tokens that sample; every other chunk is a prefill.

    `copies` are (source, target) pages to copy before anything else happens; no target is a source, and none is twice in it.
    """

    decodes: tuple[Chunk, ...]
    prefills: tuple[Chunk, ...]
    copies: tuple[tuple[int, int], ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens computed, padding not counted."""
        return len(self.decodes) + sum(chunk.num_tokens for chunk in self.prefills)

    def sampling(self) -> list[Chunk]:
        """The chunks that yield a token, in the order of the step's outputs."""
        return [*self.decodes, *(chunk for chunk in self.prefills if chunk.samples)]


class Scheduler:
    """First come, first served, with chunked prefill, shared prefixes, forks and preemption by recompute.

    Invariants: `running` and `waiting` are each in order of arrival and everything running arrived before everything waiting, so
    the oldest sequence can always take pages from a younger one and finishes; only running sequences own pages; a page with
    several owners is copied before one of them writes it.
    """

    def __init__(self, pool: PagePool, limits: Limits):
        self.pool = pool
        self.limits = limits
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_copies = 0
        self._by_id: dict[str, list[Sequence]] = {}  # what has not ended yet of each request
        self._copies: list[tuple[int, int]] = []  # of the plan being made

    # --- events ---

    def add(self, request: Request) -> None:
        """Queue a request behind all others."""
        if request.request_id in self._by_id:
            raise RequestError(f"request_id: {request.request_id!r} is already in use by an unfinished request")
        sequence = Sequence.first(request)
        self._by_id[request.request_id] = [sequence]
        self.waiting.append(sequence)

    def abort(self, request_id: str) -> list[TokenEvent]:
        """End a request now and free its pages: an event for each output that had not ended, none when it is unknown or over."""
        events = []
        for sequence in list(self._by_id.get(request_id, ())):
            for index in range(sequence.index, sequence.index + 1 + sequence.num_forks):
                events.append(TokenEvent(request_id, None, FinishReason.ABORT, index=index))
            self._finish(sequence, FinishReason.ABORT)
        return events

    def __contains__(self, request_id: str) -> bool:
        """Whether an unfinished request has this id."""
        return request_id in self._by_id

    @property
    def has_unfinished(self) -> bool:
        """Whether a call of `plan` would find something to do."""
        return bool(self._by_id)

    # --- plan ---

    def plan(self) -> StepPlan | None:
        """Decide the next step and take the pages it writes to; None when nothing is waiting or running."""
        tokens_left, tiles_left = self.limits.max_num_batched_tokens, self.limits.max_prefill_tiles
        chunks: list[Chunk] = []
        has_preempted = False

        index = 0
        while index < len(self.running):
            sequence = self.running[index]
            self._fork(sequence)
            num_tokens = self._chunk_len(sequence, sequence.num_computed, tokens_left, tiles_left)
            if num_tokens and not self._reserve(sequence, sequence.num_computed + num_tokens):
                # Out of pages: the youngest gives way. It has not been planned yet, because planning goes from old to young.
                self._preempt(self.running[-1])
                has_preempted = True
                continue
            if num_tokens:
                chunks.append(Chunk.next(sequence, num_tokens))
                tokens_left, tiles_left = tokens_left - num_tokens, tiles_left - self._num_tiles(chunks[-1])
            index += 1

        # Free pages that running sequences will take for tokens they already have.
        num_lacking = sum(map(self._num_pages_lacking, self.running)) if self.waiting else 0
        # A step that preempted admits nobody: the pages it freed belong to the older sequences' next tokens.
        while self.waiting and not has_preempted and self._has_room(self.waiting[0]):
            sequence = self.waiting[0]
            known = self.pool.cache.match(sequence) if self.pool.cache is not None else []
            num_known = len(known) * self.limits.page_size
            num_tokens = self._chunk_len(sequence, num_known, tokens_left, tiles_left)
            # Enough for all of its tokens, not only its first chunk: else prompts half done would preempt each other.
            num_needed = self._num_pages_lacking(sequence) - sum(self.pool.num_owners(page) > 0 for page in known)
            if not self.running:
                num_needed -= sequence.num_forks  # which may be more than the whole pool holds: they take turns
            if not num_tokens or num_lacking + num_needed > self.pool.num_free:
                break
            self._begin(sequence, known)
            self._reserve(sequence, num_known + num_tokens)
            num_lacking += self._num_pages_lacking(sequence)
            self.running.append(self.waiting.popleft())
            self._fork(sequence)
            chunks.append(Chunk.next(sequence, num_tokens))
            tokens_left, tiles_left = tokens_left - num_tokens, tiles_left - self._num_tiles(chunks[-1])

        copies, self._copies = tuple(self._copies), []
        self.pool.free(source for source, _ in copies)
        self.num_copies += len(copies)
        if not chunks:
            return None
        return StepPlan(
            decodes=tuple(chunk for chunk in chunks if _is_decode(chunk)),
            prefills=tuple(chunk for chunk in chunks if not _is_decode(chunk)),
            copies=copies,
        )

    def _chunk_len(self, sequence: Sequence, num_computed: int, tokens_left: int, tiles_left: int) -> int:
        """How many of a sequence's next tokens the rest of the step can hold; 0 when it has to sit the step out."""
        num_tokens = len(sequence.tokens) - num_computed
        if num_tokens == 1:
            return min(1, tokens_left)  # a row, no tile; if it has forks, they are there before it is computed
        wanted = min(num_tokens - (sequence.num_forks > 0), tokens_left)
        if self.limits.long_prefill_token_threshold:
            wanted = min(wanted, self.limits.long_prefill_token_threshold)
        return min(wanted, tiles_left * self.limits.tile)

    def _num_tiles(self, chunk: Chunk) -> int:
        return 0 if _is_decode(chunk) else -(-chunk.num_tokens // self.limits.tile)

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.limits.page_size)

    def _num_pages_lacking(self, sequence: Sequence) -> int:
        """Pages that the sequence has yet to take for the tokens it has now, and those that its forks will need at once."""
        lacking = self._num_pages(len(sequence.tokens)) - len(sequence.pages)
        return lacking + self._writes_shared_page(sequence) + sequence.num_forks

    def _has_room(self, sequence: Sequence) -> bool:
        """Whether a waiting sequence and its forks can run beside what runs; one with more forks than fit runs beside nothing."""
        num_slots = sum(1 + other.num_forks for other in self.running)
        return not self.running or num_slots + 1 + sequence.num_forks <= self.limits.max_num_seqs

    def _fork(self, sequence: Sequence) -> None:
        """Fork a sequence's siblings from it once all of the prompt is computed but its last token, which is each one's own."""
        if not sequence.num_forks or sequence.num_to_compute:
            return
        siblings = [sequence.fork(sequence.index + 1 + i) for i in range(sequence.num_forks)]
        sequence.num_forks = 0
        self._by_id[sequence.request.request_id] += siblings
        shared = sequence.pages[: self._num_pages(sequence.num_computed)]
        room = self.limits.max_num_seqs - len(self.running)
        for sibling in siblings[:room]:
            self.pool.share(shared)
            sibling.pages = list(shared)
            sibling.num_computed, sibling.num_recorded = sequence.num_computed, sequence.num_recorded
        at = self.running.index(sequence) + 1
        self.running[at:at] = siblings[:room]
        self.waiting.extendleft(reversed(siblings[room:]))  # on the pages that the prefix cache has then

    def _writes_shared_page(self, sequence: Sequence) -> bool:
        """Whether the place of the sequence's next token is in a page that others own too."""
        index = sequence.num_computed // self.limits.page_size
        return index < len(sequence.pages) and self.pool.num_owners(sequence.pages[index]) > 1

    def _begin(self, sequence: Sequence, known: list[int]) -> None:
        """Give a waiting sequence the pages of the prefix that is already computed."""
        self.pool.share(known)
        sequence.pages = known
        sequence.num_recorded = len(known)
        sequence.num_computed = len(known) * self.limits.page_size
        if self.pool.cache is not None and not sequence.num_preemptions:
            sequence.num_cached_tokens = sequence.num_computed
            self.pool.cache.num_queried_tokens += len(sequence.tokens)
            self.pool.cache.num_hit_tokens += sequence.num_computed

    def _reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Give the sequence pages of its own for its first `num_tokens` tokens; False, nothing taken, when too few are free."""
        is_copied = self._writes_shared_page(sequence)
        pages = self.pool.allocate(self._num_pages(num_tokens) - len(sequence.pages) + is_copied)
        if pages is None:
            return False
        if is_copied:
            index = sequence.num_computed // self.limits.page_size
            # The reference to the source becomes the plan's until it is made, so that nobody gets the page before it is copied.
            self._copies.append((sequence.pages[index], pages[0]))
            sequence.pages[index] = pages.pop(0)
        sequence.pages += pages
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Take all pages back; the sequence recomputes them, its output included, when it is admitted again."""
        self.running.remove(sequence)
        self._release(sequence)
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(sequence)

    # --- commit ---

    def commit(self, plan: StepPlan, token_ids: Seq[int], is_finite: Seq[bool]) -> list[TokenEvent]:
        """Record a step that ran. `token_ids` and `is_finite` are those of `plan.sampling()`, in its order.

        A row whose logits were not finite ends its own request with FinishReason.ERROR and no other.
        """
        for chunk in (*plan.decodes, *plan.prefills):
            if chunk.sequence.finish_reason is None:
                chunk.sequence.num_computed = chunk.end
        events = []
        for chunk, token_id, finite in zip(plan.sampling(), token_ids, is_finite, strict=True):
            sequence = chunk.sequence
            if sequence.finish_reason is not None:  # aborted while the step ran
                continue
            if finite:
                # Only here is it known that everything up to this token is sound, so that others may share it.
                if self.pool.cache is not None:
                    self.pool.cache.record(sequence)
                sequence.tokens.append(token_id)
            reason = self._finish_reason(sequence) if finite else FinishReason.ERROR
            if reason is not None:
                self._finish(sequence, reason)
            params = sequence.request.params
            stop_reason = token_id if reason is FinishReason.STOP and token_id in params.stop_token_ids else None
            new_id, num_cached = token_id if finite else None, sequence.num_cached_tokens
            events.append(TokenEvent(sequence.request.request_id, new_id, reason, stop_reason, num_cached, sequence.index))
        return events

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        if sequence.tokens[-1] in sequence.request.stop_ids:
            return FinishReason.STOP
        if len(sequence.tokens) >= sequence.request.max_len:
            return FinishReason.LENGTH
        return None

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.finish_reason = reason
        self._release(sequence)
        siblings = self._by_id[sequence.request.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._by_id[sequence.request.request_id]
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.free(sequence.pages)
        sequence.pages = []
        sequence.num_recorded = 0

    # --- for people who look ---

    def check(self) -> None:
        """Raise unless every invariant of the scheduler and its pool holds."""
        self.pool.check(sequence.pages for sequence in self.running)
        for sequence in (*self.running, *self.waiting):
            if not 0 <= sequence.num_computed <= len(sequence.tokens):
                raise RuntimeError(
                    f"{sequence.request.request_id}: num_computed {sequence.num_computed} of {len(sequence.tokens)} tokens"
                )
            if self._num_pages(sequence.num_computed) > len(sequence.pages):
                raise RuntimeError(
                    f"{sequence.request.request_id}: {len(sequence.pages)} pages for {sequence.num_computed} tokens"
                )
        if len(self.running) > self.limits.max_num_seqs:
            raise RuntimeError(f"{len(self.running)} sequences run, max_num_seqs is {self.limits.max_num_seqs}")
        if len(self.running) + len(self.waiting) != sum(map(len, self._by_id.values())):
            raise RuntimeError("a sequence is neither running nor waiting")


def _is_decode(chunk: Chunk) -> bool:
    return chunk.num_tokens == 1 and chunk.samples
