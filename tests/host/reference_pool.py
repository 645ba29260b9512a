"""What a page pool with a prefix cache has to be, written down with sets and lists, and with what pages hold by token ids.

Knows owners, their texts and every place of every page. Refuses to know reference counts, hashes and how anything is found.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(eq=False)
class Owner:
    """A text and the pages that hold it. `text` has a number for each token, which stands for all tokens up to it."""

    text: list[int]
    pages: list[int] = field(default_factory=list)
    num_written: int = 0
    num_told: int = 0  # its first pages that `remember` has seen
    num_behind: int = 0  # its first pages that it has given back before all others: `pages` are those after them


class Reference:
    """Every page but 0 has owners, or is idle and remembered for what it holds, or is free; `idle` has the longest idle first."""

    def __init__(self, num_pages: int, page_size: int):
        self.num_pages, self.page_size = num_pages, page_size
        self.owners: list[Owner] = []
        self.free = set(range(1, num_pages))
        self.idle: list[int] = []
        self.places = [[0] * page_size for _ in range(num_pages)]  # what was written to the device last, page by page
        self.known: dict[int, int] = {}  # a text that ends with a page -> the page
        self.held: dict[int, tuple[list[int], list[int]]] = {}  # that page -> what has to be in it: its places, its token ids
        self.let_go: set[int] = set()  # idle pages that are not to be kept below when they are evicted
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

    def drop(self, owner: Owner, pages: list[int], *, is_kept: bool = True) -> None:
        """An owner gives pages back, the last of them first."""
        owner.pages = [page for page in owner.pages if page not in pages]
        counts = self.counts()
        for page in reversed(pages):
            if not counts[page]:
                self.num_released, self.owned_steps = self.num_released + 1, self.owned_steps + self.step - self.since[page]
                self.since[page] = self.step
                if page in self.held:
                    self.idle.append(page)
                    (self.let_go.discard if is_kept else self.let_go.add)(page)
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
                page = owner.pages[index - owner.num_behind]
                self.known[text[-1]] = page
                self.held[page] = text, tokens[index * size : (index + 1) * size]
        owner.num_told = owner.num_written // size

    def forget(self, text: int) -> None:
        """A text is known no more; the page that held it is free when nobody owns it."""
        page = self.known.pop(text, None)
        if page is not None:
            del self.held[page]
            if page in self.idle:
                self.idle.remove(page)
                self.free.add(page)

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


class TierReference:
    """Host memory and a disk below the pool, by the numbers of texts: what each call of the tier has to leave behind."""

    def __init__(self, num_slots: int, *, has_disk: bool):
        self.has_disk = has_disk
        self.slots: dict[int, int] = {}  # a text that ends with a page -> where it is, or will be when its fetch has ended
        self.free = set(range(num_slots))
        self.idle: list[int] = []  # slots that nobody has pinned, the least recently used first
        self.pins = [0] * num_slots
        self.disk: set[int] = set()
        self.fetching: dict[int, int] = {}
        self.lost: dict[int, int] = {}

    def take(self, text: int, slot: int | None) -> None:
        """The tier took `slot` for a text, or had none."""
        if not self.free and not self.idle:
            assert slot is None, "a slot out of nowhere"
            return
        if self.free:
            assert slot in self.free, "another slot was free"
            self.free.remove(slot)
        else:
            assert slot == self.idle.pop(0), "another slot has been used longer ago"
            old = next(text for text, where in self.slots.items() if where == slot)
            del self.slots[old]
            if self.has_disk:
                self.disk.add(old)
        self.slots[text] = slot
        self.pins[slot] = 1

    def touch(self, text: int) -> None:
        """A text that is here is wanted again."""
        if self.slots[text] in self.idle:
            self.idle.remove(self.slots[text])
            self.idle.append(self.slots[text])

    def pin(self, slot: int) -> None:
        """One more who needs what a slot holds."""
        self.pins[slot] += 1
        if slot in self.idle:
            self.idle.remove(slot)

    def unpin(self, slot: int) -> None:
        """One less."""
        self.pins[slot] -= 1
        if not self.pins[slot]:
            if slot in self.slots.values():
                self.idle.append(slot)
            else:
                self.free.add(slot)

    def fetched(self, text: int, *, ok: bool) -> None:
        """A fetch ends."""
        if text in self.lost:
            del self.lost[text]
            return
        del self.fetching[text]
        if not ok:
            self.disk.remove(text)
            del self.slots[text]

    def forget(self, text: int) -> None:
        """Nobody asks for a text any more."""
        self.disk.discard(text)
        slot = self.slots.pop(text, None)
        if slot is None:
            return
        if text in self.fetching:
            self.lost[text] = self.fetching.pop(text)
        if slot in self.idle:
            self.idle.remove(slot)
            self.free.add(slot)
