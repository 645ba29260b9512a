"""Where the pages of a waiting sequence are, on all tiers, and how they come back to the device.

Knows sequences and the keys of their pages. Refuses to know who is admitted, and bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxpaged.host.pages import NULL_PAGE, PagePool
from jaxpaged.host.prefix_cache import Held
from jaxpaged.host.request import Sequence

MAX_HELD_BACK = 32  # sequences that a plan looks past: each look costs a digest of a prompt when it is the first


class Found(NamedTuple):
    """The first pages of a sequence that need not be computed: a page each, NULL_PAGE where it has to be loaded from a slot."""

    pages: list[int]
    slots: list[int]  # of those that are loaded, in order


@dataclass
class _Hold:
    """What a waiting sequence has asked for."""

    coming: set[bytes] = field(default_factory=set)  # fetches that it waited for when it was last looked at
    asked: set[bytes] = field(default_factory=set)  # all that it has waited for: none is asked for twice
    slots: list[int] = field(default_factory=list)  # pinned for it


class Recall:
    """Finds and takes back pages of one pool and of the tiers below it.

    A sequence with pages on disk is held back while they are fetched into slots, which stay pinned until it is admitted or over.
    It asks for each page once, so it is never held back for longer than it has pages; and it asks for nothing when every slot is
    pinned, so that nobody waits for another who waits.
    """

    def __init__(self, pool: PagePool):
        self.pool = pool
        self._holds: dict[Sequence, _Hold] = {}
        self.num_host_hit_tokens = self.num_disk_hit_tokens = 0  # of sequences that were admitted for the first time

    @property
    def has_disk(self) -> bool:
        """Whether a sequence can be held back."""
        return self.pool.tier is not None and self.pool.tier.has_disk

    def look(self, sequence: Sequence) -> Found | None:
        """What can be taken of a waiting sequence's pages; None while some are on their way, for which this may be the moment."""
        pool = self.pool
        if pool.cache is None:
            return Found([], [])
        if pool.tier is None:
            return Found(pool.cache.match(sequence), [])
        hold = self._holds.get(sequence)
        if hold is not None and any(map(pool.tier.is_fetching, hold.coming)):
            return None
        found, wanted = self._find(sequence, hold.asked if hold is not None else set())
        return None if wanted and self._ask(sequence, found, wanted) else found

    def _find(self, sequence: Sequence, asked: set[bytes]) -> tuple[Found, list[Held]]:
        """What is on the device or in host memory, up to the first page that is not, and what from there on is on disk."""
        cache, tier = self.pool.cache, self.pool.tier
        found, wanted = Found([], []), []
        for index in range(cache.num_shareable(sequence)):  # type: ignore[union-attr]
            held = cache.wanted(sequence, index)  # type: ignore[union-attr]
            page = cache.find(held)  # type: ignore[union-attr]
            slot = tier.find(held) if page is None else None  # type: ignore[union-attr]
            is_here = page is not None or (slot is not None and not tier.is_fetching(held.key))  # type: ignore[union-attr]
            if is_here and not wanted:
                found.pages.append(page or NULL_PAGE)
                if slot is not None:
                    found.slots.append(slot)
            elif not is_here:
                # Asked for once and not here: it came to nothing, or has gone again. The rest is computed.
                if held.key in asked or (slot is None and not tier.is_on_disk(held)):  # type: ignore[union-attr]
                    break
                wanted.append(held)
        return found, wanted

    def _ask(self, sequence: Sequence, found: Found, wanted: list[Held]) -> bool:
        """Begin what fetches may begin; whether there is something to wait for."""
        tier = self.pool.tier
        if not tier.may_fetch and not tier.is_fetching(wanted[0].key):  # type: ignore[union-attr]
            return True  # others' fetches end, and then it is the turn of the first in the line
        hold = self._holds.setdefault(sequence, _Hold())
        hold.coming = set()
        self._pin(hold, found.slots)
        for held in wanted:
            slot = tier.find(held)  # type: ignore[union-attr]
            if slot is None and tier.may_fetch:  # type: ignore[union-attr]
                slot = tier.fetch(held)  # type: ignore[union-attr]
            if slot is None:
                break
            self._pin(hold, [slot])
            hold.coming.add(held.key)
        hold.asked |= hold.coming
        return bool(hold.coming)

    def _pin(self, hold: _Hold, slots: list[int]) -> None:
        for slot in slots:
            if slot not in hold.slots:
                self.pool.tier.pin(slot)  # type: ignore[union-attr]
                hold.slots.append(slot)

    def take(self, sequence: Sequence, found: Found) -> list[int] | None:
        """The pages that were found, with one more owner, what was not on the device loaded. None when too few are free."""
        pool, tier, cache = self.pool, self.pool.tier, self.pool.cache
        pool.share(page for page in found.pages if page != NULL_PAGE)
        if not found.slots:
            self.leave(sequence)
            return found.pages
        for slot in found.slots:  # before pages are evicted to make room, which takes slots
            tier.pin(slot)  # type: ignore[union-attr]
        fresh = pool.allocate(len(found.slots))
        if fresh is None:
            pool.free(page for page in found.pages if page != NULL_PAGE)
            for slot in found.slots:
                tier.unpin(slot)  # type: ignore[union-attr]
            return None
        asked = self._holds[sequence].asked if sequence in self._holds else set()
        loads, pages = iter(zip(found.slots, fresh, strict=True)), []
        for index, page in enumerate(found.pages):
            if page == NULL_PAGE:
                slot, page = next(loads)
                held = cache.wanted(sequence, index)  # type: ignore[union-attr]
                cache.register(page, held)  # type: ignore[union-attr]  # at once: the device does things in order
                tier.load(slot, page)  # type: ignore[union-attr]
                self._count(sequence, held.key in asked)
            pages.append(page)
        self.leave(sequence)
        return pages

    def _count(self, sequence: Sequence, was_on_disk: bool) -> None:
        if sequence.num_preemptions:
            return
        if was_on_disk:
            self.num_disk_hit_tokens += self.pool.cache.page_size  # type: ignore[union-attr]
        else:
            self.num_host_hit_tokens += self.pool.cache.page_size  # type: ignore[union-attr]

    def leave(self, sequence: Sequence) -> None:
        """The sequence waits no more: what it has asked for is kept no longer than anything else."""
        hold = self._holds.pop(sequence, None)
        for slot in hold.slots if hold is not None else ():
            self.pool.tier.unpin(slot)  # type: ignore[union-attr]

    def pinned(self) -> Iterator[int]:
        """The slots that are pinned for those who wait."""
        for hold in self._holds.values():
            yield from hold.slots

    def check(self, waiting: set[Sequence]) -> None:
        """Raise unless pins are counted right and only those who wait have some."""
        if self._holds.keys() - waiting:
            raise RuntimeError("slots are pinned for a sequence that does not wait")
        if self.pool.tier is not None:
            self.pool.tier.check(self.pinned())
