"""Random lives of a page pool, its prefix cache and the tiers below it, judged after every operation by a plain model (R01).

    python tests/host/fuzz.py --operations 50000000 --seeds 10000

An operation is a method of Machine that asks `choose` for whatever is random in it: here a seeded generator, in test_fuzz.py
Hypothesis, which then shrinks what goes wrong. After each operation all that the pool, the cache, the tiers, the device, host
memory and the disk hold is compared with the model, and their own `check` is called.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import ClassVar

from reference_pool import Owner, Reference, TierReference

MAX_OWNERS = 10
NUM_TOKEN_IDS = 3  # so few that texts often begin alike by themselves
SALTS = (None, None, None, "a")
POISON = 0  # no text has this number

Choose = Callable[[int], int]  # n -> a whole number in [0, n)


class Machine:
    """A pool and a cache, sequences that use them as the scheduler does, and the model beside them."""

    def __init__(self, num_pages: int, page_size: int, choose: Choose, *, num_slots: int = 0, has_disk=False, is_private=False):
        """`num_slots` of host memory below the pool; 0 for none."""
        # By name, so that test_fuzz.py can put modules with a bug in their place.
        names = ("pages", "prefix_cache", "request", "recall", "tiers")
        pages, prefix_cache, request, recall, tiers = (importlib.import_module(f"jaxpaged.host.{name}") for name in names)
        self.choose, self.page_size = choose, page_size
        self.PoolError, self.Sequence = pages.PoolError, request.Sequence
        self.cache = prefix_cache.PrefixCache(page_size, "a model", is_private=is_private)
        self.tier = _judged(tiers.HostTier, self)(num_slots, has_disk=has_disk, max_fetches=2) if num_slots else None
        self.tiers_model = TierReference(num_slots, has_disk=has_disk)
        self.pool = pages.PagePool(num_pages, self.cache, self.tier)
        self.recall = recall.Recall(self.pool)
        self.model = Reference(num_pages, page_size)
        self.device = [[POISON] * page_size for _ in range(num_pages)]
        self.host = [[POISON] * page_size for _ in range(num_slots)]
        self.disk: dict[bytes, list[int]] = {}
        self.text_of: dict[bytes, int] = {}  # of a key: the number of its text
        self.places_of: dict[int, list[int]] = {}  # of a text that ends with a page: what has to be in the page
        self.offered: list[int] = []  # pages that the tier was asked to save since somebody looked
        self.in_flight: list = []  # transfers whose plan has not ended
        self.fetches: list[tuple[bytes, int]] = []  # on their way
        self.sequences: list = []  # beside model.owners, in the same order
        self.numbers: dict[tuple, int] = {}  # (what comes before, token) -> the number of a text
        self.past: list[tuple[list[int], str | None]] = [([], None)]  # texts to go on with
        self.num_operations: Counter[str] = Counter()
        self.num_moved: Counter[str] = Counter()  # pages, by what moved them

    # --- texts ---

    def number(self, before: object, token: object) -> int:
        """The number that stands for a text."""
        return self.numbers.setdefault((before, token), len(self.numbers) + 1)

    def extend(self, sequence, owner: Owner, tokens: list[int]) -> None:
        """More tokens at the end of a text."""
        root = ("nobody else's", sequence.number) if self.cache.is_private else ("salt", sequence.request.cache_salt)
        before = owner.text[-1] if owner.text else self.number(*root)
        for token in tokens:
            before = self.number(before, token)
            owner.text.append(before)
        sequence.tokens += tokens

    def some_tokens(self, count: int) -> list[int]:
        return [self.choose(NUM_TOKEN_IDS) for _ in range(count)]

    def pick(self) -> int | None:
        """One of the sequences, mostly one that owns pages."""
        owning = [at for at, sequence in enumerate(self.sequences) if sequence.pages]
        if owning and self.choose(4):
            return owning[self.choose(len(owning))]
        return self.choose(len(self.sequences)) if self.sequences else None

    # --- operations ---

    def arrive(self) -> None:
        """A new sequence, often one that begins as an earlier one did."""
        if len(self.sequences) >= MAX_OWNERS:
            return self.release()
        tokens, salt = self.past[self.choose(len(self.past))]
        tokens = tokens[: self.choose(len(tokens) + 1)] if not self.choose(3) else tokens
        if not tokens:
            salt = SALTS[self.choose(len(SALTS))]
        room = self.page_size * (self.pool.num_pages - 1) - len(tokens)
        more = 1 + self.choose(max(1, min(room, 3 * self.page_size) // (1 + self.choose(3))))
        request = SimpleNamespace(cache_salt=salt, request_id="", params=SimpleNamespace(prompt_logprobs=None))
        sequence, owner = self.Sequence(request, number=self.num_operations.total()), Owner([])
        self.extend(sequence, owner, tokens + self.some_tokens(more))
        self.sequences.append(sequence)
        self.model.owners.append(owner)
        self.hit(sequence, owner)
        if self.choose(8):
            self.reserve(len(self.sequences) - 1)

    def hit(self, sequence, owner: Owner) -> None:
        """Take the pages of a known beginning, those that are loaded among them; none while some are on their way from disk."""
        self.learn(sequence, owner)
        assert self.cache.match(sequence) == self.model.find(owner.text), "another beginning was found than is known"
        found = self.recall.look(sequence)
        if found is None:
            return self.move([])
        pages = self.recall.take(sequence, found)
        here = [page for page in found.pages if page]
        fresh = [page for page, was in zip(pages or (), found.pages, strict=False) if not was]
        self.model.share(owner, here)
        if pages is None:
            assert len(found.slots) > len(self.model.free) + len(self.model.idle), "there was room for what is below"
            self.model.drop(owner, here)
            return self.move([])
        self.taken(owner, fresh, len(found.slots))
        owner.pages, sequence.pages = list(pages), list(pages)
        for index, was in enumerate(found.pages):
            if not was:
                text = owner.text[(index + 1) * self.page_size - 1]
                assert text not in self.model.known
                tokens = sequence.tokens[index * self.page_size : (index + 1) * self.page_size]
                self.model.known[text], self.model.held[pages[index]] = pages[index], (self.places_of[text], tokens)
        self.num_moved["hit"] += len(here)
        sequence.num_recorded = owner.num_told = len(pages)
        sequence.num_computed = owner.num_written = len(pages) * self.page_size

    def learn(self, sequence, owner: Owner) -> None:
        """Note which text each key stands for."""
        size = self.page_size
        for index in range(len(sequence.tokens) // size):
            places = owner.text[index * size : (index + 1) * size]
            self.text_of[self.cache._entry(sequence, index)[0]] = places[-1]
            self.places_of[places[-1]] = places

    def resume(self) -> None:
        """A sequence that was thrown out comes back."""
        for sequence, owner in zip(self.sequences, self.model.owners, strict=True):
            if not sequence.pages:
                return self.hit(sequence, owner)

    def reserve(self, at: int | None = None) -> None:
        """Pages for some of a sequence's next tokens, the copy of a shared page among them, as a plan takes them."""
        at = self.pick() if at is None else at
        if at is None:
            return
        sequence, owner = self.sequences[at], self.model.owners[at]
        if not sequence.pages and self.choose(8):
            self.hit(sequence, owner)
        if sequence in self.recall._holds:
            return None  # it waits for what is on its way
        size, start = self.page_size, sequence.num_computed
        if start == len(sequence.tokens):
            self.extend(sequence, owner, self.some_tokens(1))
        end = start + 1 + self.choose(min(len(sequence.tokens) - start, 2 * size))
        index = start // size
        is_shared = index < len(sequence.pages) and self.pool.num_owners(sequence.pages[index]) > 1
        count = max(0, -(-end // size) - len(sequence.pages)) + is_shared
        pages = self.take(owner, count)
        if pages is None:
            return self.release() if self.choose(2) else self.preempt()  # somebody has to go
        if is_shared:
            source, target = sequence.pages[index], pages.pop()
            self.device[target] = list(self.device[source])
            self.model.places[target] = list(self.model.places[source])
            sequence.pages[index] = target
            self.pool.free([source])
            self.model.drop(owner, [source])
            owner.pages.remove(target)
            owner.pages.insert(index - owner.num_behind, target)
            self.num_moved["copy on write"] += 1
        sequence.pages += pages

    def take(self, owner: Owner, count: int) -> list[int] | None:
        """Ask the pool for pages."""
        pages = self.pool.allocate(count)
        self.taken(owner, pages, count)
        return None if pages is None else list(pages)

    def taken(self, owner: Owner, pages: list[int] | None, count: int) -> None:
        """The pool answered a wish for pages: those that were evicted for it are saved, and what was asked for is loaded."""
        evicted = self.model.take(owner, count, pages)
        self.num_moved["evict"] += len(evicted)
        if self.tier is not None:
            assert self.offered == [page for page in evicted if page not in self.model.let_go], "other pages are saved"
        self.move(pages or [])

    def move(self, fresh: list[int]) -> None:
        """What a plan moves, in its order. Pages that change hands are poisoned as soon as they are saved."""
        transfers = self.tier.take_transfers() if self.tier is not None else ((), (), (), ())
        spills, saves, loads, fetches = transfers
        for slot, key in spills:
            self.disk[key] = list(self.host[slot])
        for page, slot in saves:
            self.host[slot] = list(self.device[page])
        for page in fresh:
            self.device[page] = [POISON] * self.page_size
            self.model.places[page] = [POISON] * self.page_size
        for slot, page in loads:
            self.device[page] = list(self.host[slot])
            self.model.places[page] = self.places_of[self.text_in(slot)]
        self.fetches += fetches
        self.offered.clear()
        if any(transfers):
            self.in_flight.append(transfers)
            for name, moves in zip(("spill", "swap out", "swap in", "fetch"), transfers, strict=True):
                self.num_moved[name] += len(moves)

    def text_in(self, slot: int) -> int:
        return next(text for text, where in self.tiers_model.slots.items() if where == slot)

    def end_plan(self) -> None:
        """The oldest plan that moved something has ended."""
        if self.in_flight:
            self.tier.ended(self.in_flight.pop(0))

    def lose(self) -> None:
        """The plans in flight are lost: what they moved holds nothing, and what was to be written is written anew."""
        nothing = [POISON] * self.page_size
        lost = set()
        for spills, saves, loads, fetches in self.in_flight:
            for _, key in spills:
                self.disk[key] = nothing
                lost.add(self.text_of[key])
            lost |= {
                self.text_in(slot) for slot in [*(slot for _, slot in saves), *(slot for slot, _ in loads)] if self.is_held(slot)
            }
            for _, slot in saves:
                self.host[slot] = list(nothing)
            lost |= {self.text_of[key] for fetch in fetches for key in fetch[:1] if fetch in self.fetches}
            for _, page in loads:
                self.device[page] = list(nothing)
                self.model.places[page] = list(nothing)
        self.pool.rewind()
        self.in_flight.clear()
        for text in lost:
            self.model.forget(text)
            assert text not in self.tiers_model.slots and text not in self.tiers_model.disk, "what is lost is counted on"
        for at in range(len(self.sequences)):
            self.give_back(at)

    def is_held(self, slot: int) -> bool:
        return slot in self.tiers_model.slots.values()

    def fetch_ends(self) -> None:
        """A page comes from disk, or does not."""
        if self.fetches:
            key, slot = self.fetches.pop(self.choose(len(self.fetches)))
            is_there = self.choose(4) > 0
            if is_there:
                self.host[slot] = list(self.disk[key])
            self.tier.fetched(key, is_there)

    def forget(self) -> None:
        """Nobody will ask for a text again."""
        keys = list(self.text_of)
        if keys:
            key = keys[self.choose(len(keys))]
            self.pool.drop(key)
            self.model.forget(self.text_of[key])
            assert self.text_of[key] not in self.tiers_model.slots and self.text_of[key] not in self.tiers_model.disk

    def write(self) -> None:
        """A step ran: tokens are written into the pages that were taken for them; mostly the cache is told at once."""
        if (at := self.pick()) is None:
            return
        sequence, owner = self.sequences[at], self.model.owners[at]
        size = self.page_size
        for position in range(sequence.num_computed, min(len(sequence.tokens), len(sequence.pages) * size)):
            page = sequence.pages[position // size]
            if self.pool.num_owners(page) > 1:
                break  # it was forked after its pages were taken
            self.device[page][position % size] = owner.text[position]
            self.model.places[page][position % size] = owner.text[position]
            sequence.num_computed = owner.num_written = position + 1
        if self.choose(4):
            while self.in_flight:  # the plans before this one ended before it
                self.end_plan()
            self.learn(sequence, owner)
            self.cache.record(sequence)
            self.model.remember(owner, sequence.tokens)

    def append(self) -> None:
        """More tokens than one come at once."""
        if (at := self.pick()) is None:
            return
        sequence = self.sequences[at]
        room = self.page_size * (self.pool.num_pages - 1) - len(sequence.tokens)
        if room > 0:
            count = 1 + self.choose(min(room, 2 * self.page_size))
            self.extend(sequence, self.model.owners[at], self.some_tokens(count))

    def fork(self) -> None:
        """A sibling on the pages of what is computed, the last one not full."""
        if (at := self.pick()) is None or len(self.sequences) >= MAX_OWNERS:
            return
        sequence, owner = self.sequences[at], self.model.owners[at]
        if not sequence.num_computed:
            return self.write()
        fork = self.Sequence(
            sequence.request, number=sequence.number, tokens=list(sequence.tokens), page_keys=list(sequence.page_keys)
        )
        fork.pages = sequence.pages[: -(-sequence.num_computed // self.page_size)]
        fork.num_computed, fork.num_recorded = sequence.num_computed, sequence.num_recorded
        fork.num_behind = sequence.num_behind
        self.pool.share(fork.owned_pages)
        twin = Owner(list(owner.text), [], owner.num_written, owner.num_told, owner.num_behind)
        self.model.owners.append(twin)
        self.model.share(twin, fork.owned_pages)
        self.sequences.append(fork)

    def fall_behind(self) -> None:
        """The first pages of a sequence are behind every layer's window: it gives them back and goes on."""
        if (at := self.pick()) is not None:
            sequence, owner = self.sequences[at], self.model.owners[at]
            num_behind = self.choose(min(sequence.num_recorded, sequence.num_computed // self.page_size) + 1)
            if num_behind > sequence.num_behind:
                pages = sequence.pages[sequence.num_behind : num_behind]
                self.pool.free(pages)
                self.model.drop(owner, pages)
                sequence.pages[:num_behind] = [0] * num_behind
                sequence.num_behind = owner.num_behind = num_behind

    def release(self) -> None:
        """A sequence ends; others may go on with its text."""
        if (at := self.pick()) is not None:
            self.past = [*self.past[-4:], (self.sequences[at].tokens, self.sequences[at].request.cache_salt)]
            self.give_back(at)
            self.leave(at)

    def leave(self, at: int) -> None:
        self.recall.leave(self.sequences[at])
        del self.sequences[at], self.model.owners[at]

    def abort(self) -> None:
        """A sequence ends with pages that were never written, and nobody hears of its text again."""
        if (at := self.pick()) is not None:
            num_free = self.pool.num_free
            counts = self.model.counts()
            num_own = sum(counts[page] == 1 for page in self.sequences[at].owned_pages)
            self.give_back(at)
            assert self.pool.num_free == num_free + num_own, "an aborted sequence keeps pages"
            self.leave(at)

    def preempt(self) -> None:
        """A sequence gives everything back and stays."""
        if (at := self.pick()) is not None:
            self.give_back(at)

    def give_back(self, at: int) -> None:
        sequence, owner = self.sequences[at], self.model.owners[at]
        is_kept = self.choose(4) > 0
        self.pool.free(sequence.owned_pages, is_kept=is_kept)
        self.model.drop(owner, sequence.owned_pages, is_kept=is_kept)
        sequence.pages, sequence.num_computed, sequence.num_recorded, sequence.num_behind = [], 0, 0, 0
        owner.num_written = owner.num_told = owner.num_behind = 0

    def evict(self) -> None:
        """All free pages, or some, are taken and given back unwritten."""
        owner = Owner([])
        self.model.owners.append(owner)
        self.take(owner, self.pool.num_free if self.choose(2) else 1 + self.choose(self.pool.num_free + 1))
        pages = list(owner.pages)
        self.pool.free(pages)
        self.model.drop(owner, pages)
        self.model.owners.pop()

    def reset(self) -> None:
        """Nothing is known any more."""
        self.pool.reset_cache()
        self.model.forget_all()
        assert not self.tiers_model.slots and not self.tiers_model.disk, "something is known below"

    def misuse(self) -> None:
        """A page that nobody owns is freed, or one that holds nothing is shared: refused, with nothing changed."""
        free, idle = sorted(self.model.free), self.model.idle
        held = self.model.owners[self.choose(len(self.model.owners))].pages if self.model.owners else []
        wrongs = [(self.pool.free, [0]), (self.pool.share, [0]), (self.pool.free, [self.pool.num_pages])]
        if free:
            page = free[self.choose(len(free))]
            wrongs += [(self.pool.free, [*held, page]), (self.pool.share, [*held, page])]
        if idle:
            wrongs += [(self.pool.free, [*held, idle[self.choose(len(idle))]])]
        operation, pages = wrongs[self.choose(len(wrongs))]
        try:
            operation(pages)
        except self.PoolError:
            return
        raise AssertionError(f"{operation.__name__}({pages}) was not refused")

    OPERATIONS: ClassVar[dict[str, float]] = {  # by how often
        "arrive": 12,
        "reserve": 26,
        "write": 26,
        "append": 4,
        "fork": 10,
        "fall_behind": 2,
        "release": 4,
        "abort": 3,
        "preempt": 4,
        "resume": 10,
        "evict": 6,
        "end_plan": 14,
        "fetch_ends": 5,
        "forget": 0.5,
        "lose": 0.5,
        "reset": 0.2,
        "misuse": 1,
    }

    # --- judgement ---

    def operate(self, name: str) -> None:
        """One operation, and a look at everything."""
        self.pool.step = self.model.step = self.model.step + self.choose(2)
        getattr(self, name)()
        self.num_operations[name] += 1
        self.check()
        self.check_with_their_own()

    def check(self) -> None:
        """What the pool, the cache and the device hold is what the model says, all of it."""
        pool, cache, model, size = self.pool, self.cache, self.model, self.page_size
        counts = model.counts()
        assert pool._refs == counts, "reference counts are not the owners"
        assert list(pool._cached) == model.idle, "not the pages that are kept, or not in the order of eviction"
        assert len(pool._free) == len(model.free) and model.free.issuperset(pool._free), "not the pages that are free"
        assert len(model.free) + len(model.idle) + sum(map(bool, counts)) == model.num_pages - 1, "a page is lost"
        assert pool.num_free == len(model.free) + len(model.idle) and pool.num_cached == len(model.idle)
        assert pool.num_used == pool.num_usable - pool.num_free == model.num_pages - 1 - pool.num_free
        counters = (pool.num_released, pool.owned_steps, pool.num_reused, pool.idle_steps, cache.num_evictions)
        assert counters == (model.num_released, model.owned_steps, model.num_reused, model.idle_steps, model.num_evicted)

        assert self.device == model.places, "a write went elsewhere"
        for sequence, owner in zip(self.sequences, model.owners, strict=True):
            assert sequence.owned_pages == owner.pages
            left, text = owner.num_written - owner.num_behind * size, owner.text
            for index, page in enumerate(owner.pages, owner.num_behind):
                if left < size:
                    assert self.device[page][: max(0, left)] == text[index * size : index * size + max(0, left)], (
                        "a place is lost"
                    )
                    break
                assert self.device[page] == text[index * size : (index + 1) * size], "a page holds another text"
                left -= size

        held = cache._held
        assert held.keys() == model.held.keys() and len(cache._pages) == len(cache) == len(held), "the cache knows other pages"
        for page, (text, tokens) in model.held.items():
            key, known = held[page][:2]
            assert list(known) == tokens and cache._pages[key] == page and page in cache, "the cache knows a page as another"
            assert self.device[page] == text, "a known page was written"

        if self.tier is not None:
            self.check_tiers(self.tier, self.tiers_model)

    def check_tiers(self, tier, model: TierReference) -> None:
        """Likewise host memory and the disk."""
        text_of, places_of = self.text_of, self.places_of
        assert {text_of[key]: slot for key, (slot, _) in tier._held.items()} == model.slots, "the tier holds other texts"
        assert list(tier._idle) == model.idle and tier._pins == model.pins, "other slots may be given away"
        assert len(tier._free) == len(model.free) and model.free.issuperset(tier._free), "not the slots that are free"
        assert {text_of[key] for key in tier._disk} == model.disk, "the disk holds other texts"
        assert {text_of[key]: slot for key, slot in tier._fetching.items()} == model.fetching
        assert {text_of[key]: slot for key, slot in (*tier._lost.items(), *tier._stray.items())} == model.lost
        for text, slot in model.slots.items():
            assert text in model.fetching or self.host[slot] == places_of[text], "a slot holds another text"
        for key in tier._disk:
            assert self.disk[key] == places_of[text_of[key]], "a file holds another text"

    def check_with_their_own(self) -> None:
        """What they say themselves."""
        counts = self.model.counts()
        self.pool.check([owner.pages for owner in self.model.owners])
        self.recall.check({sequence for sequence in self.sequences if not sequence.pages})
        assert self.pool.refcount_hist() == dict(sorted(Counter(counts[1:]).items()))
        assert [self.pool.num_owners(page) for page in range(self.pool.num_pages)] == counts
        free = [page in self.model.free for page in range(self.pool.num_pages)]
        assert self.pool.num_free_runs() == sum(now and not before for before, now in itertools.pairwise(free))

    def end(self) -> None:
        """All sequences end: not a page is left behind."""
        while self.sequences:
            self.give_back(0)
            self.leave(0)
            self.check()
        while self.fetches or self.in_flight:
            self.fetch_ends()
            self.end_plan()
            self.check()
        self.pool.check([])
        assert self.pool.num_used == 0 and self.pool.num_free == self.pool.num_pages - 1, "leaked pages"
        self.reset()
        self.check()
        assert len(self.pool._free) == self.pool.num_pages - 1
        assert self.tier is None or len(self.tier._free) == self.tier.num_slots, "leaked slots"


def _judged(base: type, machine: Machine) -> type:
    """The tier, each of whose changes is made in the model too."""

    class JudgedTier(base):
        def save(self, page: int, held) -> None:
            text, model = machine.text_of[held.key], machine.tiers_model
            machine.offered.append(page)
            super().save(page, held)
            if text in model.slots:
                model.touch(text)
            else:
                model.take(text, self._held[held.key][0] if held.key in self._held else None)

        def fetch(self, wanted) -> int | None:
            text, model = machine.text_of[wanted.key], machine.tiers_model
            assert text in model.disk and text not in model.slots and text not in model.lost
            slot = super().fetch(wanted)
            model.take(text, slot)
            if slot is not None:
                model.fetching[text] = slot
            return slot

        def pin(self, slot: int) -> None:
            machine.tiers_model.pin(slot)
            super().pin(slot)

        def unpin(self, slot: int) -> None:
            machine.tiers_model.unpin(slot)
            super().unpin(slot)

        def fetched(self, key: bytes, ok: bool) -> None:
            machine.tiers_model.fetched(machine.text_of[key], ok=ok)
            super().fetched(key, ok)

        def forget(self, key: bytes) -> None:
            machine.tiers_model.forget(machine.text_of[key])
            super().forget(key)

    return JudgedTier


def live(seed: int, num_operations: int, *, machine_type: type[Machine] = Machine) -> Machine:
    """One life: pools of 2 to 64 pages of 1, 2 or 16 tokens. Raises when something is wrong."""
    rng = random.Random(f"fuzz {seed}")
    number = rng.random

    def choose(n: int) -> int:
        return int(number() * n)

    num_pages = rng.choice((rng.randint(2, 8), rng.randint(2, 64), rng.randint(2, 64)))
    tiers = {"num_slots": rng.choice((0, 2, rng.randint(2, 5), rng.randint(1, 20))), "has_disk": rng.random() < 0.8}
    tiers["is_private"] = rng.random() < 0.15
    machine = machine_type(num_pages, (1, 2, 16)[seed % 3], choose, **tiers)
    names, weights = zip(*machine_type.OPERATIONS.items(), strict=True)
    for name in rng.choices(names, weights, k=num_operations):
        machine.operate(name)
    machine.end()
    return machine


def main() -> int:
    """Live many lives and say what was done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--seeds", type=int, default=240)
    parser.add_argument("--first-seed", type=int, default=0)
    arguments = parser.parse_args()
    each, started, done = -(-arguments.operations // arguments.seeds), time.perf_counter(), Counter()
    moved: Counter[str] = Counter()
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        try:
            machine = live(seed, each)
        except Exception:
            print(f"seed {seed}: python tests/host/fuzz.py --operations {each} --seeds 1 --first-seed {seed}", file=sys.stderr)
            raise
        done += machine.num_operations
        moved += machine.num_moved
    seconds = time.perf_counter() - started
    for counts, what in ((done, "operations"), (moved, "pages")):
        print(f"{what}: {', '.join(f'{name} {count:,}' for name, count in sorted(counts.items()))}")
    print(f"R01: {each * arguments.seeds:,} operations, {arguments.seeds} seeds, {seconds:.1f} s, 0 leaked pages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
