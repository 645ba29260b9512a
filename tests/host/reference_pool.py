"""What a page pool with a prefix cache has to be, written down with sets and lists, and with what pages hold by token ids.

Knows owners, their texts and every place of every page. Refuses to know reference counts, hashes and how anything is found.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field


@dataclass(eq=False)
class Owner:
    """A text and the pages that hold it. `text` has a number for each token, which stands for all tokens up to it."""

    text: list[int]
    pages: list[int] = field(default_factory=list)
    num_written: int = 0
    num_told: int = 0  # its first pages that `remember` has seen


class Reference:
    """Every page but 0 has owners, or is idle and remembered for what it holds, or is free; `idle` has the longest idle first."""

    def __init__(self, num_pages: int, page_size: int):
        self.num_pages, self.page_size = num_pages, page_size
        self.owners: list[Owner] = []
        self.free = set(range(1, num_pages))
        self.idle: list[int] = []
        self.places = [[0] * page_size for _ in range(num_pages)]  # what was written to the device last, page by page
        self.known: dict[int, int] = {}  # a text that ends with a page -> the page
        self.held: dict[int, tuple[list[int], array]] = {}  # that page -> what has to be in it: its places, its token ids
        self.num_evicted = 0
        self.step = self.num_released = self.owned_steps = self.num_reused = self.idle_steps = 0
        self.since = [-1] * num_pages

    def counts(self) -> list[int]:
        """Owners of each page."""
        counts = [0] * self.num_pages
        for owner in self.owners:
            for page in owner.pages:
                counts[page] += 1
        return counts

    def take(self, owner: Owner, count: int, pages: list[int] | None) -> list[int]:
        """The pool answered `pages` to an owner's wish for `count`. Returns the pages that had to be evicted for it."""
        if count > len(self.free) + len(self.idle):
            assert pages is None, "pages out of nowhere"
            return []
        evicted = self.idle[: max(0, count - len(self.free))]
        del self.idle[: len(evicted)]
        self.free.update(evicted)
        self.num_evicted += len(evicted)
        for page in evicted:
            del self.known[self.held.pop(page)[0][-1]]
        assert pages is not None and len(set(pages)) == len(pages) == count and self.free.issuperset(pages), "not what is free"
        self.free.difference_update(pages)
        self._begin(pages)
        owner.pages += pages
        return evicted

    def share(self, owner: Owner, pages: list[int]) -> None:
        """One more owner for pages that have some, or that are idle."""
        self._begin([page for page in pages if page in self.idle])
        self.idle = [page for page in self.idle if page not in pages]
        owner.pages += pages

    def drop(self, owner: Owner, pages: list[int]) -> None:
        """An owner gives pages back, the last of them first."""
        owner.pages = [page for page in owner.pages if page not in pages]
        counts = self.counts()
        for page in reversed(pages):
            if not counts[page]:
                self.num_released, self.owned_steps = self.num_released + 1, self.owned_steps + self.step - self.since[page]
                self.since[page] = self.step
                if page in self.held:
                    self.idle.append(page)
                else:
                    self.free.add(page)

    def find(self, text: list[int]) -> list[int]:
        """The pages of the longest known beginning of a text, one token left over."""
        pages: list[int] = []
        for end in range(self.page_size, len(text), self.page_size):
            if text[end - 1] not in self.known:
                break
            pages.append(self.known[text[end - 1]])
        return pages

    def remember(self, owner: Owner, tokens: list[int]) -> None:
        """The full pages that an owner has written may be found from here on; of two that hold the same, the first."""
        size = self.page_size
        for index in range(owner.num_told, owner.num_written // size):
            text = owner.text[index * size : (index + 1) * size]
            if text[-1] not in self.known:
                self.known[text[-1]] = owner.pages[index]
                self.held[owner.pages[index]] = text, array("q", tokens[index * size : (index + 1) * size])
        owner.num_told = owner.num_written // size

    def forget_all(self) -> None:
        """Nothing is known any more."""
        self.free.update(self.idle)
        self.idle, self.known, self.held = [], {}, {}

    def _begin(self, pages: list[int]) -> None:
        """Pages get their first owner."""
        for page in pages:
            if self.since[page] >= 0:
                self.num_reused, self.idle_steps = self.num_reused + 1, self.idle_steps + self.step - self.since[page]
            self.since[page] = self.step
