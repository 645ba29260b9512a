"""The page pool against a model of sets and counts: a million random operations, a full check after each."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxpaged.host.pages import NULL_PAGE, PagePool, PoolError

NUM_SEEDS = 240
OPERATIONS_PER_SEED = 4_200  # 240 * 4,200 = 1,008,000
SEEDS_PER_TEST = 20
MAX_OWNERS = 12


class Model:
    """The pool as its docstring defines it: a set of free pages, and for each owner the list of its pages."""

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self.free = set(range(1, num_pages))
        self.owners: list[list[int]] = []

    def counts(self) -> list[int]:
        counts = [0] * self.num_pages
        for pages in self.owners:
            for page in pages:
                counts[page] += 1
        return counts

    def take(self, owner: list[int], count: int, pages: list[int] | None) -> bool:
        """The pool answered `pages` to a wish for `count`."""
        if count > len(self.free):
            assert pages is None
            return False
        assert pages is not None and len(pages) == len(set(pages)) == count and self.free.issuperset(pages)
        self.free.difference_update(pages)
        owner += pages
        return True

    def give_back(self, owner: list[int], count: int) -> list[int]:
        """The last `count` pages of an owner."""
        pages = owner[len(owner) - count :]
        del owner[len(owner) - count :]
        self.free.update(page for page in pages if not any(page in other for other in self.owners))
        return pages


def agree(pool: PagePool, model: Model) -> None:
    """Everything that the pool tells about itself is what the model says."""
    pool.check(model.owners)
    counts = model.counts()
    assert [pool.num_owners(page) for page in range(pool.num_pages)] == counts
    assert model.free == {page for page in range(1, pool.num_pages) if not counts[page]}
    assert pool.num_free == len(model.free)


def operate(rng: random.Random, pool: PagePool, model: Model, page_size: int) -> None:
    """One operation that a scheduler could ask for."""
    owners = model.owners
    choice = rng.random()
    if not owners or (choice < 0.2 and len(owners) < MAX_OWNERS):  # a new sequence; now and then more than the pool holds
        owner: list[int] = []
        count = -(-rng.randint(0, pool.num_pages * page_size) // rng.randint(1, 4) // page_size)
        if model.take(owner, count, pool.allocate(count)):
            owners.append(owner)
        return
    owner = rng.choice(owners)
    if choice < 0.55:  # append tokens, as many as fill a new page or two
        held = len(owner) * page_size
        count = -(-(held + rng.randint(1, 2 * page_size)) // page_size) - len(owner)
        model.take(owner, count, pool.allocate(count))
    elif choice < 0.65 and len(owners) < MAX_OWNERS:  # fork: a prefix gets a second owner
        prefix = owner[: rng.randint(0, len(owner))]
        pool.share(prefix)
        owners.append(prefix)
    elif choice < 0.75 and owner:  # copy on write: swap a shared page for a page of one's own
        index = rng.randrange(len(owner))
        if pool.num_owners(owner[index]) > 1 and (pages := pool.allocate(1)) is not None:
            pool.free([owner[index]])
            model.free.remove(pages[0])
            owner[index] = pages[0]
    elif choice < 0.85:  # shrink
        pool.free(model.give_back(owner, rng.randint(0, len(owner))))
    else:  # release the whole sequence
        pool.free(model.give_back(owner, len(owner)))
        owners[:] = [other for other in owners if other is not owner]


@pytest.mark.parametrize("first_seed", range(0, NUM_SEEDS, SEEDS_PER_TEST))
def test_random_operations_keep_every_invariant(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + SEEDS_PER_TEST):
        rng = random.Random(seed)
        page_size = (1, 2, 16)[seed % 3]
        pool = PagePool(rng.randint(2, 64))
        model = Model(pool.num_pages)
        for _ in range(OPERATIONS_PER_SEED):
            operate(rng, pool, model, page_size)
            agree(pool, model)
        for owner in model.owners:
            pool.free(owner)
        pool.check([])
        assert pool.num_used == 0 and pool.num_free == pool.num_usable == pool.num_pages - 1, "leaked pages"


class PoolMachine(RuleBasedStateMachine):
    """The same laws, with Hypothesis to shrink what breaks them."""

    @initialize(num_pages=st.integers(2, 9))
    def start(self, num_pages: int) -> None:
        self.pool, self.model = PagePool(num_pages), Model(num_pages)

    @rule(count=st.integers(0, 10))
    def allocate(self, count: int) -> None:
        owner: list[int] = []
        if self.model.take(owner, count, self.pool.allocate(count)):
            self.model.owners.append(owner)

    @precondition(lambda self: self.model.owners)
    @rule(data=st.data(), count=st.integers(0, 3))
    def append(self, data: st.DataObject, count: int) -> None:
        self.model.take(data.draw(st.sampled_from(self.model.owners)), count, self.pool.allocate(count))

    @precondition(lambda self: self.model.owners)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(self.model.owners))
        self.pool.share(owner)
        self.model.owners.append(list(owner))

    @precondition(lambda self: self.model.owners)
    @rule(data=st.data())
    def shrink(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(self.model.owners))
        self.pool.free(self.model.give_back(owner, data.draw(st.integers(0, len(owner)))))

    @precondition(lambda self: self.model.free)
    @rule(data=st.data())
    def misuse(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.model.free)))
        for operation in (self.pool.free, self.pool.share):
            with pytest.raises(PoolError):
                operation([page])

    @invariant()
    def agrees(self) -> None:
        agree(self.pool, self.model)

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for owner in self.model.owners:
                self.pool.free(owner)
            self.pool.check([])
            assert self.pool.num_used == 0


TestPoolMachine = PoolMachine.TestCase
# derandomize: a test run says the same twice; the seeds above are for breadth.
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None, derandomize=True, database=None)


# --- misuse ---


def state(pool: PagePool) -> tuple[list[int], int, list[int]]:
    """All that a caller can see: counts, free pages, and the order in which they are handed out."""
    counts = [pool.num_owners(page) for page in range(pool.num_pages)]
    taken = pool.allocate(pool.num_free) or []
    pool._free.extend(taken)
    for page in taken:
        pool._refs[page] = 0
    return counts, pool.num_free, taken


MISUSES = {
    "double free": lambda pool, pages: pool.free([pages[0], pages[0]]),
    "free of a free page": lambda pool, pages: pool.free([5]),
    "free of one good and one free page": lambda pool, pages: pool.free([pages[0], 5]),
    "free of the null page": lambda pool, pages: pool.free([NULL_PAGE]),
    "free of a good and the null page": lambda pool, pages: pool.free([pages[0], NULL_PAGE]),
    "free past the end": lambda pool, pages: pool.free([6]),
    "free of a negative page": lambda pool, pages: pool.free([-3]),
    "more frees than owners": lambda pool, pages: pool.free([pages[1]] * 3),
    "share of a free page": lambda pool, pages: pool.share([5]),
    "share of a good and a free page": lambda pool, pages: pool.share([pages[0], 5]),
    "share of the null page": lambda pool, pages: pool.share([NULL_PAGE]),
    "share past the end": lambda pool, pages: pool.share([6]),
    "share of a negative page": lambda pool, pages: pool.share([-3]),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse_raises_and_changes_nothing(misuse: str) -> None:
    pool = PagePool(6)
    pages = pool.allocate(3)
    assert pages == [1, 2, 3]
    pool.share([pages[1]])
    before = state(pool)
    with pytest.raises(PoolError) as error:
        MISUSES[misuse](pool, pages)
    assert "\n" not in str(error.value) and "page" in str(error.value)
    assert state(pool) == before
    pool.check([pages, [pages[1]]])


@pytest.mark.parametrize("num_pages", [-1, 0, 1])
def test_a_pool_without_a_usable_page_is_refused(num_pages: int) -> None:
    with pytest.raises(ValueError, match=f"num_pages: got {num_pages}, expected at least 2"):
        PagePool(num_pages)


def test_asking_for_too_much_takes_nothing() -> None:
    pool = PagePool(4)
    assert pool.allocate(4) is None
    assert pool.num_free == 3
    assert pool.allocate(0) == []
    assert sorted(pool.allocate(3) or []) == [1, 2, 3]
    assert pool.allocate(1) is None


def test_counts_of_references() -> None:
    pool = PagePool(6)
    pages = pool.allocate(3) or []
    pool.share(pages[:1])
    assert pool.refcount_hist() == {0: 2, 1: 2, 2: 1}
    pool.free([pages[0], pages[0], pages[1]])  # both references of a page in one call
    assert pool.refcount_hist() == {0: 4, 1: 1}
    assert Counter(pool.num_owners(page) for page in range(6)) == {0: 5, 1: 1}


# --- check() itself must be able to fail ---


CORRUPTIONS = {
    "a leaked page": lambda pool: pool._free.pop(),
    "a page twice in the free list": lambda pool: pool._free.append(pool._free[0]),
    "an owned page in the free list": lambda pool: pool._free.append(1),
    "the null page in the free list": lambda pool: pool._free.append(NULL_PAGE),
    "the null page with an owner": lambda pool: pool._refs.__setitem__(NULL_PAGE, 1),
    "a free page with an owner": lambda pool: pool._refs.__setitem__(5, 1),
    "one reference too many": lambda pool: pool._refs.__setitem__(1, 2),
    "one reference too few": lambda pool: pool._refs.__setitem__(2, 1),
    "a page without references that is not free": lambda pool: pool._refs.__setitem__(1, 0),
    "a page beyond the pool in the free list": lambda pool: pool._free.append(pool.num_pages),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_check_sees_a_corruption(corruption: str) -> None:
    pool = PagePool(6)
    pages = pool.allocate(3) or []
    pool.share([2])
    owners = [pages, [2]]
    pool.check(owners)
    CORRUPTIONS[corruption](pool)
    with pytest.raises(PoolError):
        pool.check(owners)


@pytest.mark.parametrize(
    "owners", [[], [[1, 2, 3]], [[1, 2, 3], [2], [2]], [[1, 2, 3], [2, 4]], [[1, 2, 3], [2, 0]], [[1, 2, 3], [2, 6]]]
)
def test_check_sees_owners_that_do_not_match(owners: list[list[int]]) -> None:
    pool = PagePool(6)
    pool.allocate(3)
    pool.share([2])
    with pytest.raises(PoolError):
        pool.check(owners)
