"""The page pool: which pages are free, and how many owners each taken page has.

Knows page numbers and counts. Refuses to know what a page holds, who its owners are and why they want it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

NULL_PAGE = 0


class PoolError(RuntimeError):
    """The pool was misused (a double free, a foreign page): a bug of the caller, never of a request."""


class PagePool:
    """Pages 1..num_pages-1, handed out and taken back by number. Page 0 is the null page and is never handed out.

    Invariant (`check`): every page but 0 is free or referenced, exactly one of the two, and reference counts equal the owners.
    Sharing is by `share`; the holder of a page with more than one reference must copy it before it writes.
    """

    def __init__(self, num_pages: int):
        if num_pages < 2:
            raise ValueError(f"num_pages: got {num_pages}, expected at least 2 (page 0 is the null page)")
        self.num_pages = num_pages
        self._free: deque[int] = deque(range(1, num_pages))
        self._refs = [0] * num_pages

    @property
    def num_free(self) -> int:
        """Pages that can be handed out."""
        return len(self._free)

    @property
    def num_usable(self) -> int:
        """All pages but the null page."""
        return self.num_pages - 1

    @property
    def num_used(self) -> int:
        """Pages with at least one owner."""
        return self.num_usable - self.num_free

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages with one reference each, or None, with nothing taken, when fewer are free."""
        if count > len(self._free):
            return None
        pages = [self._free.popleft() for _ in range(count)]
        for page in pages:
            self._refs[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Add one reference to each page: it has one more owner."""
        pages = list(pages)
        for page in pages:
            if not 0 < page < self.num_pages or not self._refs[page]:
                raise PoolError(f"page {page} is shared but has no owner")
        for page in pages:
            self._refs[page] += 1

    def free(self, pages: Iterable[int]) -> None:
        """Take one reference from each page; those without owners become free, the last page first, as a sequence shrinks."""
        pages = list(pages)
        for page, times in Counter(pages).items():
            if not 0 < page < self.num_pages or self._refs[page] < times:
                raise PoolError(
                    f"page {page} is freed {times} times, it has {self._refs[page] if 0 <= page < self.num_pages else 0} owners"
                )
        for page in reversed(pages):
            self._refs[page] -= 1
            if not self._refs[page]:
                self._free.append(page)

    def num_owners(self, page: int) -> int:
        """References to a page."""
        return self._refs[page]

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
            if (page in free) == (self._refs[page] > 0):
                raise PoolError(
                    f"page {page} has {self._refs[page]} owners and is {'' if page in free else 'not '}in the free list"
                )
        if owners is not None:
            held = Counter(page for pages in owners for page in pages)
            for page in range(1, self.num_pages):
                if held[page] != self._refs[page]:
                    raise PoolError(f"page {page} has {held[page]} owners, its count says {self._refs[page]}")
            if held.total() != sum(self._refs):
                raise PoolError(f"an owner holds the null page or one that is not of 1..{self.num_pages - 1}")
