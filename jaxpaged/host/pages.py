"""The page pool: which pages are free, how many owners each taken page has, and which pages are kept for what they hold.

Knows page numbers and counts. Refuses to know what a page holds, who its owners are and why they want it.
"""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable

from jaxpaged.host.prefix_cache import PrefixCache
from jaxpaged.host.tiers import HostTier

NULL_PAGE = 0


class PoolError(RuntimeError):
    """The pool was misused (a double free, a foreign page): a bug of the caller, never of a request."""


class PagePool:
    """Pages 1..num_pages-1, handed out and taken back by number. Page 0 is the null page and is never handed out.

    Invariant (`check`): every page but 0 is free, cached or referenced, exactly one of the three, and reference counts equal the
    owners. A cached page has no owner and holds something that the prefix cache knows; the one that was given back first is
    evicted first, and offered to the host tier. Sharing is by `share`; the holder of a page with more than one reference must
    copy it before it writes.
    """

    def __init__(self, num_pages: int, cache: PrefixCache | None = None, tier: HostTier | None = None):
        if num_pages < 2:
            raise ValueError(f"num_pages: got {num_pages}, expected at least 2 (page 0 is the null page)")
        self.num_pages = num_pages
        self._free: deque[int] = deque(range(1, num_pages))
        self._refs = [0] * num_pages
        # As they lost their last owner, each with whether the tier is to be offered it; a dict scans for its first.
        self._cached: OrderedDict[int, bool] = OrderedDict()
        self.cache, self.tier = cache, tier
        self.step = 0  # of whoever plans; only the counters below read it
        self.num_released = self.owned_steps = 0  # pages that lost their last owner, and the steps for which they had one
        self.num_reused = self.idle_steps = 0  # pages that got an owner again, and the steps for which they had none
        self._since = [-1] * num_pages  # the step at which a page got its first owner or lost its last; -1 before both

    @property
    def num_free(self) -> int:
        """Pages that can be handed out, the cached ones among them."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Pages without an owner that are kept for what they hold."""
        return len(self._cached)

    @property
    def num_usable(self) -> int:
        """All pages but the null page."""
        return self.num_pages - 1

    @property
    def num_used(self) -> int:
        """Pages with at least one owner."""
        return self.num_usable - self.num_free

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages with one reference each, or None, with nothing taken, when fewer are free. Evicts when it must."""
        if count > self.num_free:
            return None
        while len(self._free) < count:
            self._evict(next(iter(self._cached)))
        pages = [self._free.popleft() for _ in range(count)]
        for page in pages:
            self._refs[page] = 1
            self._taken(page)
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Add one reference to each page: it has one more owner. A cached page gets its first."""
        pages = list(pages)
        for page in pages:
            if not 0 < page < self.num_pages or not (self._refs[page] or page in self._cached):
                raise PoolError(f"page {page} is shared but has no owner")
        for page in pages:
            self._cached.pop(page, None)
            if not self._refs[page]:
                self._taken(page)
            self._refs[page] += 1

    def free(self, pages: Iterable[int], *, is_kept: bool = True) -> None:
        """Take one reference from each page; those without owners become free, or cached when the prefix cache knows them.

        The last page goes first, as a sequence shrinks, so that a prefix outlives what hangs on it.

        Args:
          is_kept: those that become cached are offered to the host tier when they are evicted.
        """
        pages = list(pages)
        for page, times in Counter(pages).items():
            if not 0 < page < self.num_pages or self._refs[page] < times:
                raise PoolError(
                    f"page {page} is freed {times} times, it has {self._refs[page] if 0 <= page < self.num_pages else 0} owners"
                )
        for page in reversed(pages):
            self._refs[page] -= 1
            if not self._refs[page]:
                self.num_released += 1
                self.owned_steps += self.step - self._since[page]
                self._since[page] = self.step
                if self.cache is not None and page in self.cache:
                    self._cached[page] = is_kept
                else:
                    self._free.append(page)

    def reset_cache(self) -> None:
        """Forget what pages hold. Those without an owner become free; those with one stay with it."""
        if self.cache is not None:
            self.cache.clear()
        if self.tier is not None:
            self.tier.clear()
        self._free.extend(self._cached)
        self._cached.clear()

    def drop(self, key: bytes) -> None:
        """Forget what nobody will ask for again, on every tier; a page that has an owner stays with it and is known no more."""
        page = self.cache.page_of(key) if self.cache is not None else None
        if page is not None:
            self.cache.forget(page)  # type: ignore[union-attr]
            if self._cached.pop(page, None) is not None:
                self._free.append(page)
        if self.tier is not None:
            self.tier.forget(key)

    def rewind(self) -> None:
        """The plans in flight are lost: forget what was to come with them."""
        for key in self.tier.rewind() if self.tier is not None else ():
            self.drop(key)

    def _evict(self, page: int) -> None:
        is_kept = self._cached.pop(page)
        held = self.cache.forget(page)  # type: ignore[union-attr]
        self.cache.num_evictions += 1  # type: ignore[union-attr]
        if is_kept and self.tier is not None:
            self.tier.save(page, held)
        self._free.append(page)

    def _taken(self, page: int) -> None:
        """A page has its first owner."""
        if self._since[page] >= 0:
            self.num_reused += 1
            self.idle_steps += self.step - self._since[page]
        self._since[page] = self.step

    def num_free_runs(self) -> int:
        """Runs of consecutive numbers among the free pages that hold nothing: 1 when they lie together, 0 when there are none."""
        free = sorted(self._free)
        return bool(free) + sum(after - before > 1 for before, after in itertools.pairwise(free))

    def num_owners(self, page: int) -> int:
        """References to a page."""
        return self._refs[page]

    def refcounts(self) -> list[int]:
        """References to every page, the null page first."""
        return self._refs.copy()

    def refcount_hist(self) -> dict[int, int]:
        """Number of pages by reference count, the null page left out."""
        return dict(sorted(Counter(self._refs[1:]).items()))

    def check(self, owners: Iterable[Iterable[int]] | None = None) -> None:
        """Raise PoolError unless the invariant holds; with `owners`, each one's pages, also that counts equal them."""
        free = set(self._free)
        if len(free) != len(self._free):
            raise PoolError("a page is twice in the free list")
        if NULL_PAGE in free or self._refs[NULL_PAGE]:
            raise PoolError("the null page was handed out or freed")
        if free and not 0 < min(free) <= max(free) < self.num_pages:
            raise PoolError(f"the free list holds a page that is not one of 1..{self.num_pages - 1}")
        for page in range(1, self.num_pages):
            places = (page in free) + (page in self._cached) + (self._refs[page] > 0)
            if places != 1:
                raise PoolError(
                    f"page {page} has {self._refs[page]} owners and is {'' if page in free else 'not '}in the free list "
                    f"and {'' if page in self._cached else 'not '}cached"
                )
        unknown = [page for page in self._cached if self.cache is None or page not in self.cache]
        if unknown:
            raise PoolError(f"page {unknown[0]} is cached but the prefix cache does not know it")
        if self.cache is not None:
            self.cache.check()
            lost = [page for page in free if page in self.cache]
            if lost:
                raise PoolError(f"page {lost[0]} is free but the prefix cache knows it")
        if owners is not None:
            held = Counter(page for pages in owners for page in pages)
            for page in range(1, self.num_pages):
                if held[page] != self._refs[page]:
                    raise PoolError(f"page {page} has {held[page]} owners, its count says {self._refs[page]}")
            if held.total() != sum(self._refs):
                raise PoolError(f"an owner holds the null page or one that is not of 1..{self.num_pages - 1}")
