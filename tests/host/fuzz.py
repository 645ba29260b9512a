"""Random lives of a page pool and its prefix cache, judged after every operation by a plain model of both (R01).

    python tests/host/fuzz.py --operations 50000000 --seeds 10000

An operation is a method of Machine that asks `choose` for whatever is random in it: here a seeded generator, in test_fuzz.py
Hypothesis, which then shrinks what goes wrong. After each operation all that the pool, the cache and the device hold is compared
with the model, and their own `check` is called.
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

from reference_pool import Owner, Reference

MAX_OWNERS = 10
NUM_TOKEN_IDS = 3  # so few that texts often begin alike by themselves
SALTS = (None, None, None, "a")
POISON = 0  # no text has this number

Choose = Callable[[int], int]  # n -> a whole number in [0, n)


class Machine:
    """A pool and a cache, sequences that use them as the scheduler does, and the model beside them."""

    def __init__(self, num_pages: int, page_size: int, choose: Choose):
        # By name, so that test_fuzz.py can put modules with a bug in their place.
        pages, prefix_cache, request = (
            importlib.import_module(f"jaxpaged.host.{name}") for name in ("pages", "prefix_cache", "request")
        )
        self.choose, self.page_size = choose, page_size
        self.PoolError, self.Sequence = pages.PoolError, request.Sequence
        self.cache = prefix_cache.PrefixCache(page_size, "a model")
        self.pool = pages.PagePool(num_pages, self.cache)
        self.model = Reference(num_pages, page_size)
        self.device = [[POISON] * page_size for _ in range(num_pages)]
        self.sequences: list = []  # beside model.owners, in the same order
        self.numbers: dict[tuple, int] = {}  # (what comes before, token) -> the number of a text
        self.past: list[tuple[list[int], str | None]] = [([], None)]  # texts to go on with
        self.num_operations: Counter[str] = Counter()
        self.num_evictions = self.num_hits = 0  # in pages

    # --- texts ---

    def number(self, before: object, token: object) -> int:
        """The number that stands for a text."""
        return self.numbers.setdefault((before, token), len(self.numbers) + 1)

    def extend(self, sequence, owner: Owner, tokens: list[int]) -> None:
        """More tokens at the end of a text."""
        before = owner.text[-1] if owner.text else self.number("salt", sequence.request.cache_salt)
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
        tokens = tokens[: self.choose(len(tokens) + 1)]
        if not tokens:
            salt = SALTS[self.choose(len(SALTS))]
        room = self.page_size * (self.pool.num_pages - 1) - len(tokens)
        more = 1 + self.choose(max(1, min(room, 3 * self.page_size) // (1 + self.choose(3))))
        sequence, owner = self.Sequence(request=SimpleNamespace(cache_salt=salt, request_id="")), Owner([])
        self.extend(sequence, owner, tokens + self.some_tokens(more))
        self.sequences.append(sequence)
        self.model.owners.append(owner)
        self.hit(sequence, owner)
        if self.choose(8):
            self.reserve(len(self.sequences) - 1)

    def hit(self, sequence, owner: Owner) -> None:
        """Take the pages of a known beginning."""
        known = self.cache.match(sequence)
        assert known == self.model.find(owner.text), "another beginning was found than is known"
        self.pool.share(known)
        self.model.share(owner, known)
        self.num_hits += len(known)
        sequence.pages = known
        sequence.num_recorded = owner.num_told = len(known)
        sequence.num_computed = owner.num_written = len(known) * self.page_size

    def resume(self) -> None:
        """A sequence that was thrown out comes back."""
        for sequence, owner in zip(self.sequences, self.model.owners, strict=True):
            if not owner.pages:
                return self.hit(sequence, owner)

    def reserve(self, at: int | None = None) -> None:
        """Pages for some of a sequence's next tokens, the copy of a shared page among them, as a plan takes them."""
        at = self.pick() if at is None else at
        if at is None:
            return
        sequence, owner = self.sequences[at], self.model.owners[at]
        size, start = self.page_size, sequence.num_computed
        if start == len(sequence.tokens):
            self.extend(sequence, owner, self.some_tokens(1))
        end = start + 1 + self.choose(min(len(sequence.tokens) - start, 2 * size))
        index = start // size
        is_shared = index < len(sequence.pages) and self.pool.num_owners(sequence.pages[index]) > 1
        count = max(0, -(-end // size) - len(sequence.pages)) + is_shared
        pages = self.take(owner, count)
        if pages is None:
            return self.release() if self.choose(2) else None  # somebody has to go
        if is_shared:
            source, target = sequence.pages[index], pages.pop()
            self.device[target] = list(self.device[source])
            self.model.places[target] = list(self.model.places[source])
            sequence.pages[index] = target
            self.pool.free([source])
            self.model.drop(owner, [source])
            owner.pages.remove(target)
            owner.pages.insert(index, target)
            self.num_operations["copy on write"] += 1
        sequence.pages += pages

    def take(self, owner: Owner, count: int) -> list[int] | None:
        """Ask the pool for pages; the device's are poisoned as they change hands."""
        pages = self.pool.allocate(count)
        self.evicted(self.model.take(owner, count, pages))
        for page in pages or ():
            self.device[page] = [POISON] * self.page_size
            self.model.places[page] = [POISON] * self.page_size
        return None if pages is None else list(pages)

    def evicted(self, pages: list[int]) -> None:
        """These pages lost what they held."""
        self.num_evictions += len(pages)

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
        fork = self.Sequence(sequence.request, tokens=list(sequence.tokens), page_keys=list(sequence.page_keys))
        pages = sequence.pages[: -(-sequence.num_computed // self.page_size)]
        self.pool.share(pages)
        twin = Owner(list(owner.text), num_written=owner.num_written, num_told=owner.num_told)
        self.model.owners.append(twin)
        self.model.share(twin, pages)
        fork.pages, fork.num_computed, fork.num_recorded = pages, sequence.num_computed, sequence.num_recorded
        self.sequences.append(fork)

    def release(self) -> None:
        """A sequence ends; others may go on with its text."""
        if (at := self.pick()) is not None:
            self.past = [*self.past[-7:], (self.sequences[at].tokens, self.sequences[at].request.cache_salt)]
            self.give_back(at)
            del self.sequences[at], self.model.owners[at]

    def abort(self) -> None:
        """A sequence ends with pages that were never written, and nobody hears of its text again."""
        if (at := self.pick()) is not None:
            num_free = self.pool.num_free
            counts = self.model.counts()
            num_own = sum(counts[page] == 1 for page in self.sequences[at].pages)
            self.give_back(at)
            assert self.pool.num_free == num_free + num_own, "an aborted sequence keeps pages"
            del self.sequences[at], self.model.owners[at]

    def preempt(self) -> None:
        """A sequence gives everything back and stays."""
        if (at := self.pick()) is not None:
            self.give_back(at)

    def give_back(self, at: int) -> None:
        sequence, owner = self.sequences[at], self.model.owners[at]
        self.pool.free(sequence.pages)
        self.model.drop(owner, sequence.pages)
        sequence.pages, sequence.num_computed, sequence.num_recorded = [], 0, 0
        owner.num_written = owner.num_told = 0

    def evict(self) -> None:
        """All free pages, or some, are taken and given back unwritten."""
        owner = Owner([])
        self.model.owners.append(owner)
        self.take(owner, 1 + self.choose(self.pool.num_free + 1))
        pages = list(owner.pages)
        self.pool.free(pages)
        self.model.drop(owner, pages)
        self.model.owners.pop()

    def reset(self) -> None:
        """Nothing is known any more."""
        self.pool.reset_cache()
        self.model.forget_all()

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
        "release": 4,
        "abort": 3,
        "preempt": 2,
        "resume": 6,
        "evict": 2,
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
            assert sequence.pages == owner.pages
            left, text = owner.num_written, owner.text
            for index, page in enumerate(owner.pages):
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
            assert known == tokens and cache._pages[key] == page and page in cache, "the cache knows a page as another"
            assert self.device[page] == text, "a known page was written"

    def check_with_their_own(self) -> None:
        """What they say themselves."""
        counts = self.model.counts()
        self.pool.check([owner.pages for owner in self.model.owners])
        assert self.pool.refcount_hist() == dict(sorted(Counter(counts[1:]).items()))
        assert [self.pool.num_owners(page) for page in range(self.pool.num_pages)] == counts
        free = [page in self.model.free for page in range(self.pool.num_pages)]
        assert self.pool.num_free_runs() == sum(now and not before for before, now in itertools.pairwise(free))

    def end(self) -> None:
        """All sequences end: not a page is left behind."""
        while self.sequences:
            self.give_back(0)
            del self.sequences[0], self.model.owners[0]
            self.check()
        self.pool.check([])
        assert self.pool.num_used == 0 and self.pool.num_free == self.pool.num_pages - 1, "leaked pages"
        self.reset()
        self.check()
        assert len(self.pool._free) == self.pool.num_pages - 1


def live(seed: int, num_operations: int, *, machine_type: type[Machine] = Machine) -> Machine:
    """One life: pools of 2 to 64 pages of 1, 2 or 16 tokens. Raises when something is wrong."""
    rng = random.Random(f"fuzz {seed}")
    number = rng.random

    def choose(n: int) -> int:
        return int(number() * n)

    num_pages = rng.choice((rng.randint(2, 8), rng.randint(2, 64), rng.randint(2, 64)))
    machine = machine_type(num_pages, (1, 2, 16)[seed % 3], choose)
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
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        try:
            machine = live(seed, each)
        except Exception:
            print(f"seed {seed}: python tests/host/fuzz.py --operations {each} --seeds 1 --first-seed {seed}", file=sys.stderr)
            raise
        done += machine.num_operations
        done += Counter({"evicted pages": machine.num_evictions, "hit pages": machine.num_hits})
    seconds = time.perf_counter() - started
    print("  ".join(f"{name} {count:,}" for name, count in done.items()))
    print(f"R01: {each * arguments.seeds:,} operations, {arguments.seeds} seeds, {seconds:.1f} s, 0 leaked pages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
