"""A device without a model: pages that hold token ids, and a next token that is a hash of what is read back through the pages.

Knows where a plan, or the padded arrays made of it, say that tokens lie. Refuses to know requests: a wrong page, a stale page, a
chunk that starts one token late or a length that is off by one all change the output.
"""

from __future__ import annotations

import math
import random
import struct
import zlib
from array import array
from collections.abc import Callable, Sequence

import numpy as np

VOCAB_SIZE = 50_021
BEAM_VOCAB_SIZE = 16
POISON = 2**32 - 1  # what a page holds that nobody owns; not a token id

Fails = Callable[[str, int], bool]  # request id, output tokens so far, below 0 in a prompt -> what is computed is not finite


def next_token(context: bytes, index: int = 0) -> int:
    """The fake model: any change of the context changes the token, but for one in VOCAB_SIZE; `index` stands for the seed."""
    return (zlib.crc32(context) + index) % VOCAB_SIZE


def isolated(
    prompt: Sequence[int], max_len: int, stop_ids: frozenset[int] = frozenset(), index: int = 0, window: int = 0
) -> list[int]:
    """One output of FakeRunner for one prompt, written down without scheduler, pages or steps."""
    tokens = list(prompt)
    crc = zlib.crc32(array("I", tokens[-window:]))
    while True:
        tokens.append((crc + index) % VOCAB_SIZE)
        if tokens[-1] in stop_ids or len(tokens) >= max_len:
            return tokens[len(prompt) :]
        crc = zlib.crc32(array("I", tokens[-window:])) if window else zlib.crc32(array("I", tokens[-1:]), crc)


def next_logprobs(context: bytes) -> list[tuple[int, float]]:
    """The fake model for beams: a few tokens and their log-probabilities, which any change of the context changes."""
    rng = random.Random(zlib.crc32(context))
    logits = [3 * rng.random() for _ in range(BEAM_VOCAB_SIZE)]
    total = math.log(sum(map(math.exp, logits)))
    return [(token_id, logit - total) for token_id, logit in enumerate(logits)]


def isolated_beams(
    prompt: Sequence[int], max_len: int, width: int, stop_ids: frozenset[int], penalty: float, stopping: bool | str
) -> list[tuple[list[int], float]]:
    """What a beam search on FakeRunner finds, written down over whole vocabularies without scheduler, pages or steps."""
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    ended: list[tuple[float, float, list[int]]] = []  # score, sum, tokens
    most = max_len - len(prompt)
    for length in range(1, most + 1):
        continued = [
            (total + logprob, [*tokens, token_id])
            for total, tokens in beams
            for token_id, logprob in next_logprobs(array("I", [*prompt, *tokens]))  # type: ignore[arg-type]
        ]
        continued.sort(key=lambda one: -one[0])
        continued = continued[: max(2, 1 + len(stop_ids)) * width]
        ends = [length == most or tokens[-1] in stop_ids for _, tokens in continued]
        for (total, tokens), has_ended in list(zip(continued, ends, strict=True))[:width]:
            if has_ended:
                ended.append((total / length**penalty, total, tokens))
        ended = sorted(ended, key=lambda one: -one[0])[:width]
        beams = [one for one, has_ended in zip(continued, ends, strict=True) if not has_ended][:width]
        if len(ended) == width and beams:
            hopeful = most if stopping == "never" and penalty > 0 else length
            if stopping is True or not beams[0][0] / hopeful**penalty > ended[-1][0]:
                break
        if not beams:
            break
    return [(tokens, total) for _, total, tokens in ended]


class FakeTiers:
    """What a fake runner has below its pages: slots and a disk as dictionaries, fetches that end whenever they like, or fail.

    A slot holds nothing before it is saved or fetched into, nor after it was spilled; reading nothing is an error. The page and
    the slot of a move are read and written as late, and poisoned as early, as the contract of `Transfers` allows.
    """

    def __init__(self, *, seed: int = 0, fetch_fails: float = 0.0, is_slow: bool = True):
        self.rng, self.fetch_fails, self.is_slow = random.Random(f"tiers {seed}"), fetch_fails, is_slow
        self.host: dict[int, object] = {}
        self.disk: dict[bytes, object] = {}
        self.coming: list[tuple[bytes, int]] = []
        self.unowned: set[int] = set()  # pages that will be poison once the plan being made has saved what it saves

    def read(self, page: int):
        """What a page holds."""
        raise NotImplementedError

    def write(self, page: int, content) -> None:
        """Let a page hold this; None is poison."""
        raise NotImplementedError

    def poison(self, page: int) -> None:
        """Nobody may use what the page holds but the saves of the plan being made."""
        self.unowned.add(page)

    def move(self, plan) -> None:
        """All that comes before the step."""
        spills, saves, loads, fetches = plan.transfers
        for slot, key in spills:
            self.disk[key] = self.host.pop(slot)
        busy = {slot for _, slot in self.coming}
        assert not busy & {slot for slot, _ in (*spills, *loads)} | busy & {slot for _, slot in saves}, (
            "a slot is being fetched into"
        )
        written = [slot for _, slot in (*saves, *fetches)]
        assert len(set(written)) == len(written), "a slot is written twice by one plan"
        for page, slot in saves:
            self.host[slot] = self.read(page)
        sources = [self.read(source) for source, _ in plan.copies]
        for page in self.unowned:
            self.write(page, None)
        self.unowned.clear()
        for slot, page in loads:
            self.write(page, self.host[slot])
        for content, (_, target) in zip(sources, plan.copies, strict=True):
            self.write(target, content)
        for key, slot in fetches:
            self.host.pop(slot, None)
            self.coming.append((key, slot))

    def clean(self, pages: Sequence[int]) -> None:
        """See `jaxpaged.runner.Runner.clean`."""
        for page in pages:
            self.poison(page)

    def recover(self) -> bool:
        """See `jaxpaged.runner.Runner.recover`: what a page holds here is never lost."""
        return True

    def lose(self, plan) -> None:
        """Nobody knows what of this plan was done, so nobody may count on any of it."""
        for _, key in plan.transfers.spills:
            self.disk.pop(key, None)
        for _, slot in plan.transfers.saves:
            self.host.pop(slot, None)
        for _, page in plan.transfers.loads:
            self.poison(page)
        for fetch in plan.transfers.fetches:
            if fetch in self.coming and self.rng.random() < 0.5:
                self.coming.remove(fetch)

    def fetched(self, *, wait: bool = False) -> list[tuple[bytes, bool]]:
        """See `jaxpaged.runner.Runner.fetched`."""
        ended = []
        for key, slot in list(self.coming):
            if self.is_slow and not (wait and not ended) and self.rng.random() < 0.6:
                continue
            self.coming.remove((key, slot))
            if self.rng.random() < self.fetch_fails:
                del self.disk[key]
            elif key in self.disk:
                self.host[slot] = self.disk[key]
            ended.append((key, key in self.disk))
        return ended


class FakeRunner(FakeTiers):
    """The Runner protocol over pages of token ids, written and read through the page list of each chunk's sequence."""

    duel = drafter = matchers = None

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        fails: Fails = lambda request_id, num_output: False,
        sliding_window: int = 0,
        **tiers,
    ):
        super().__init__(**tiers)
        self.num_pages, self.page_size, self.fails, self.sliding_window = num_pages, page_size, fails, sliding_window
        self.places = array("I", [POISON] * (num_pages * page_size))
        self.sampled: dict = {}  # sequence -> the token that the step before sampled

    def read(self, page: int) -> array:
        """See `FakeTiers.read`."""
        return self.places[page * self.page_size : (page + 1) * self.page_size]

    def write(self, page: int, content: array | None) -> None:
        """See `FakeTiers.write`."""
        poison = array("I", [POISON] * self.page_size)
        self.places[page * self.page_size : (page + 1) * self.page_size] = poison if content is None else content

    def submit(self, plan):
        """See `jaxpaged.runner.Runner.submit`: it runs at once, and tells later."""
        result = self.run(plan)
        self.sampled = dict(zip((chunk.sequence for chunk, _ in plan.outputs()), result[0], strict=False))
        return lambda: result

    def run(self, plan) -> tuple:
        """One step: all writes come before its reads."""
        size, places = self.page_size, self.places
        self.move(plan)
        for chunk in plan.chunks():
            pages = chunk.sequence.pages
            for position in range(chunk.start, chunk.end):
                token_id = chunk.token(position)
                token_id = self.sampled[chunk.sequence] if token_id is None else token_id
                places[pages[position // size] * size + position % size] = token_id
        token_ids, is_finite, candidates = [], [], []
        for chunk, num_drafts in plan.outputs():
            context, group, end = array("I"), chunk.sequence.group, chunk.end - len(chunk.drafts) + num_drafts
            for page in chunk.sequence.pages:
                context += places[page * size : (page + 1) * size]
            ranked = sorted(next_logprobs(context[:end]), key=lambda one: -one[1]) if group else []  # type: ignore[arg-type]
            candidates.append(ranked[: group.num_candidates] if group else ())
            token_ids.append(next_token(context[:end][-self.sliding_window :], chunk.sequence.index))  # type: ignore[arg-type]
            is_finite.append(self._is_sound(chunk, end))
        others = [self._is_sound(chunk, chunk.end) for chunk in plan.unsampled()]
        if not all(others):
            token_ids, is_finite = [*token_ids, *[0] * len(others)], is_finite + others
            candidates += [()] * len(others)
        return (token_ids, is_finite, candidates) if any(candidates) else (token_ids, is_finite)

    def _is_sound(self, chunk, end: int) -> bool:
        """Up to a draft, or of the whole chunk."""
        request_id, num_prompt = chunk.sequence.request.request_id, chunk.sequence.num_prompt
        first = end if chunk.is_decode else chunk.start + 1
        return not any(self.fails(request_id, place - num_prompt) for place in range(first, end + 1))

    def close(self) -> None:
        """See `jaxpaged.runner.Runner.close`."""


def salt(temperature: float, top_k: int, top_p: float, min_p: float, seed_high: int, seed_low: int, position: int) -> bytes:
    """What the sampler of a row depends on, besides the logits."""
    return struct.pack("<fiffIIi", temperature, top_k, top_p, min_p, seed_high, seed_low, position)


def isolated_padded(prompt: Sequence[int], max_len: int, stop_ids: frozenset[int], params, seed: int) -> list[int]:
    """The output of PaddedFakeRunner for one prompt, likewise."""
    tokens, first, second = list(prompt), b"", b""
    while True:
        for position in range(len(first) // 8, len(tokens)):
            first += struct.pack("<II", tokens[position], position)
            second += struct.pack("<I", zlib.crc32(first))
        ending = salt(params.temperature, params.top_k, params.top_p, params.min_p, seed >> 32, seed % 2**32, len(tokens))
        tokens.append(next_token(second + ending))
        if tokens[-1] in stop_ids or len(tokens) >= max_len:
            return tokens[len(prompt) :]


class PaddedFakeRunner(FakeTiers):
    """The same behind the bridge: it sees the padded arrays alone, as the compiled step does.

    Two layers, so that a token in the middle of a prompt matters too. The first layer's pages hold each token with its position,
    the second layer's a hash of what that token sees of the first; the next token hashes what the last one sees of the second.
    """

    def __init__(self, num_pages: int, page_size: int, *, buckets, tile: int, max_blocks_per_seq: int, batch, **tiers):
        """`batch` is the module jaxpaged.batch, or one with a bug planted in it."""
        super().__init__(**tiers)
        self.num_pages, self.page_size, self.batch, self.buckets, self.tile = num_pages, page_size, batch, buckets, tile
        self.max_blocks_per_seq = max_blocks_per_seq
        self.first = np.full((num_pages * page_size, 2), POISON, np.uint32)
        self.second = np.full(num_pages * page_size, POISON, np.uint32)
        self.known = batch.DecodeRows(max_blocks_per_seq)
        self.feed = batch.Feed(np.zeros(buckets[-1].decode_rows + buckets[-1].prefill_tiles, np.int32), {})

    def read(self, page: int) -> list[np.ndarray]:
        """See `FakeTiers.read`: both layers of a page."""
        places = slice(page * self.page_size, (page + 1) * self.page_size)
        return [self.first[places].copy(), self.second[places].copy()]

    def write(self, page: int, content: list[np.ndarray] | None) -> None:
        """See `FakeTiers.write`."""
        places = slice(page * self.page_size, (page + 1) * self.page_size)
        self.first[places], self.second[places] = (POISON, POISON) if content is None else content

    def submit(self, plan):
        """See `jaxpaged.runner.Runner.submit`."""
        self.move(plan)
        if not plan.chunks():
            return lambda: ([], [])
        bucket = self.batch.fit(plan, self.buckets, self.tile)
        options = {"tile": self.tile, "page_size": self.page_size, "max_blocks_per_seq": self.max_blocks_per_seq}
        options["known"] = self.known
        padded = self.batch.pad(plan, bucket, self.feed, **options)
        rows, token_ids = padded.rows, self._step(padded.inputs, bucket)
        result = [token_ids[row] for row in rows], [True] * len(rows)
        self.feed.token_ids[:] = np.resize(token_ids, len(self.feed.token_ids))
        self.feed = self.feed._replace(rows=dict(zip((chunk.sequence for chunk, _ in plan.outputs()), rows, strict=True)))
        return lambda: result

    def _step(self, inputs, bucket) -> list[int]:
        """The compiled step's part: a token for each row of the bucket, sampled or not."""
        tokens, D, C, tile, size = inputs.tokens, bucket.decode_rows, bucket.prefill_tiles, self.tile, self.page_size
        M = self.max_blocks_per_seq
        assert tokens.token_ids.shape == tokens.positions.shape == tokens.slots.shape == (D + C * tile,)
        assert tokens.row_tables.shape == (D, M) and tokens.tile_tables.shape == (C, M) and inputs.sample_at.shape == (D + C,)
        assert inputs.fed.shape == (D,) and inputs.previous.shape == self.feed.token_ids.shape
        for row in np.flatnonzero(inputs.fed):
            tokens.token_ids[row] = inputs.previous[inputs.fed[row] - 1]
        written = tokens.slots[tokens.slots >= size]
        assert len(set(written.tolist())) == len(written), "two rows write one slot"

        self.first[tokens.slots] = np.stack([tokens.token_ids, tokens.positions], axis=-1)
        views = []  # of each row: the slots of its context in order, and the place of its first token in the step
        for row in range(D + C):
            table, length = (
                (tokens.row_tables[row], tokens.row_lens[row])
                if row < D
                else (tokens.tile_tables[row - D], tokens.tile_lens[row - D])
            )
            places = np.arange(length)
            slots = table[places // size] * size + places % size
            views.append((slots, row if row < D else D + (row - D) * tile))
        for row, (slots, at) in enumerate(views):
            context = self.first[slots].tobytes()
            for index in range(at, at + (1 if row < D else tile)):
                seen = self._seen(row, index, at, len(slots), D, tokens.positions)
                self.second[tokens.slots[index]] = zlib.crc32(context[: 8 * seen])
        sampled = []
        for row, (slots, at) in enumerate(views):
            index = int(inputs.sample_at[row])
            if not len(slots) or not at <= index < at + (1 if row < D else tile):  # a row that does not sample
                sampled.append(-1)
                continue
            seen = self._seen(row, index, at, len(slots), D, tokens.positions)
            options = inputs.sampling
            knobs = options.temperature[row], options.top_k[row], options.top_p[row], options.min_p[row]
            ending = salt(*knobs, *options.seeds[row], tokens.positions[index] + 1)
            sampled.append(next_token(self.second[slots[:seen]].tobytes() + ending))
        return sampled

    @staticmethod
    def _seen(row: int, index: int, at: int, length: int, num_decodes: int, positions: np.ndarray) -> int:
        """Tokens of its context that the token at `index` attends to; in a tile, only the first position is read."""
        return length if row < num_decodes else min(length, int(positions[at]) + index - at + 1)

    def close(self) -> None:
        """See `jaxpaged.runner.Runner.close`."""


def watched(
    pool_type: type,
    num_pages: int,
    *,
    order: str = "oldest",
    seed: int = 0,
    on_free: Callable[[int], None] | None = None,
    cache=None,
    tier=None,
):
    """A pool of that type that hands out its oldest, newest or a random free page first.

    `on_free` is told of every page whose content nobody may use any more: freed and not cached, or evicted to be handed out.
    """
    rng = random.Random(seed)

    class WatchedPool(pool_type):
        def allocate(self, count: int) -> list[int] | None:
            if order == "random":
                rng.shuffle(self._free)
            if order == "newest":
                self._free.reverse()
            pages = super().allocate(count)
            if order == "newest":
                self._free.reverse()
            for page in pages or ():
                if on_free is not None:
                    on_free(page)
            return pages

        def free(self, pages, **options) -> None:
            super().free(pages, **options)
            for page in set(pages):
                if on_free is not None and not self.num_owners(page) and (cache is None or page not in cache):
                    on_free(page)

    return WatchedPool(num_pages, cache, tier)
