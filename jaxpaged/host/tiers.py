"""The tiers below the page pool: which pages host memory holds and which are on disk, by the keys of the prefix cache.

Knows keys, tokens and numbers of slots. Refuses to know bytes, and who wants a page back.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable

from jaxpaged.host.plan import NO_TRANSFERS, Transfers
from jaxpaged.host.prefix_cache import Held


class TierError(RuntimeError):
    """The tier was misused or has lost count of a slot: a bug of the caller, never of a request or of a disk."""


class HostTier:
    """Slots 0..num_slots-1 of host memory, each for one page, and the keys of the pages that are on disk.

    What a page holds never changes, so a copy stays when the page goes back up: the same page may be on all tiers. The key
    nominates a slot or a file, and its token ids decide.

    Invariant (`check`): a slot is free, or holds one key, or is pinned and has lost its key, exactly one of the three. Pinned are
    the slots that a plan writes or reads until that plan has ended, those that are fetched into, and those that somebody asked
    for. A pinned slot is never given away; of the others the one that was used least recently goes first, to disk where there
    is one.

    Args:
      has_disk: what is evicted is spilled, and can be fetched.
      threshold: a page is kept only when the prefix that it ends has at least so many tokens.
      max_fetches: fetches in flight.
    """

    def __init__(self, num_slots: int, *, has_disk: bool = False, threshold: int = 0, max_fetches: int = 32):
        if num_slots < 1:
            raise ValueError(f"num_slots: got {num_slots}, expected at least 1")
        self.num_slots, self.has_disk, self.threshold, self.max_fetches = num_slots, has_disk, threshold, max_fetches
        self._free: deque[int] = deque(range(num_slots))
        self._held: dict[bytes, tuple[int, array]] = {}  # key -> slot and tokens, those that are fetched into among them
        self._keys: list[bytes | None] = [None] * num_slots
        self._pins = [0] * num_slots
        self._idle: OrderedDict[int, None] = OrderedDict()  # slots with a key and no pin, the least recently used first
        self._disk: dict[bytes, array] = {}
        self._fetching: dict[bytes, int] = {}
        self._lost: dict[bytes, int] = {}  # likewise, of fetches whose key was forgotten before they ended
        self._stray: dict[bytes, int] = {}  # likewise, of those of which nobody knows whether they will end
        self._in_flight: deque[Transfers] = deque()
        self._spills: list[tuple[int, bytes]] = []  # of the plan being made, as are the next three
        self._saves: list[tuple[int, int]] = []
        self._loads: list[tuple[int, int]] = []
        self._fetches: list[tuple[bytes, int]] = []
        self.num_saved = self.num_loaded = self.num_spilled = self.num_fetched = 0  # pages, since the start
        self.num_fetch_misses = 0  # fetches that brought nothing
        self.num_refused = 0  # pages that found every slot pinned

    @property
    def options(self) -> dict[str, int | bool]:
        """What it was made with."""
        names = ("num_slots", "has_disk", "threshold", "max_fetches")
        return {name: getattr(self, name) for name in names}

    @property
    def num_used(self) -> int:
        """Slots that are not free."""
        return self.num_slots - len(self._free)

    @property
    def num_on_disk(self) -> int:
        """Pages that are on disk."""
        return len(self._disk)

    @property
    def num_fetching(self) -> int:
        """Fetches in flight, those that nobody waits for any more among them."""
        return len(self._fetching) + len(self._lost)

    # --- who looks for a page ---

    def find(self, wanted: Held) -> int | None:
        """The slot that holds this page, or will when its fetch has ended: see `is_fetching`."""
        slot, tokens = self._held.get(wanted.key, (None, None))
        return slot if tokens == wanted.tokens else None

    def is_fetching(self, key: bytes) -> bool:
        """Whether this key is on its way from disk."""
        return key in self._fetching

    def is_on_disk(self, wanted: Held) -> bool:
        """Whether a fetch can be begun for this page."""
        is_busy = wanted.key in self._held or wanted.key in self._lost or wanted.key in self._stray
        return not is_busy and self._disk.get(wanted.key) == wanted.tokens

    @property
    def may_fetch(self) -> bool:
        """Whether one more fetch may be in flight."""
        return self.num_fetching < self.max_fetches

    def pin(self, slot: int) -> None:
        """Keep what a slot holds until `unpin`."""
        self._pins[slot] += 1
        self._idle.pop(slot, None)

    def unpin(self, slot: int) -> None:
        """Undo one `pin`; the slot then counts as used just now."""
        if not self._pins[slot]:
            raise TierError(f"slot {slot} is unpinned but has no pin")
        self._pins[slot] -= 1
        if self._pins[slot]:
            return
        if self._keys[slot] is None:
            self._free.append(slot)
        else:
            self._idle[slot] = None

    # --- the plan being made ---

    def save(self, page: int, held: Held) -> None:
        """A page of the device is about to be handed out and written: keep what it holds, if it is wanted and there is room."""
        if held.num_tokens < self.threshold:
            return
        if held.key in self._held:
            slot = self._held[held.key][0]
            if slot in self._idle:
                self._idle.move_to_end(slot)
            return
        slot = self._take_slot(held.key, held.tokens)
        if slot is None:
            self.num_refused += 1
            return
        if self._disk.get(held.key, held.tokens) != held.tokens:
            del self._disk[held.key]
        self._saves.append((page, slot))
        self.num_saved += 1

    def load(self, slot: int, page: int) -> None:
        """Bring what a slot holds to a page. The slot has been pinned for it, by whom is the plan's from here on."""
        self._loads.append((slot, page))
        self.num_loaded += 1

    def fetch(self, wanted: Held) -> int | None:
        """Begin to bring a page from disk: the slot, or None when every slot is pinned."""
        slot = self._take_slot(wanted.key, wanted.tokens)
        if slot is not None:
            self._fetching[wanted.key] = slot
            self._fetches.append((wanted.key, slot))
        return slot

    def take_transfers(self) -> Transfers:
        """What the plan being made moves. Its slots stay pinned until `ended`."""
        if not (self._saves or self._loads or self._fetches):  # a spill only makes room for one of these
            return NO_TRANSFERS
        transfers = Transfers(tuple(self._spills), tuple(self._saves), tuple(self._loads), tuple(self._fetches))
        for done in (self._spills, self._saves, self._loads, self._fetches):
            done.clear()
        self._in_flight.append(transfers)
        return transfers

    def _take_slot(self, key: bytes, tokens: array) -> int | None:
        """A slot for a key, with one pin: a free one, or that of the least recently used page, which goes to disk."""
        if self._free:
            slot = self._free.popleft()
        elif self._idle:
            slot, _ = self._idle.popitem(last=False)
            old: bytes = self._keys[slot]  # type: ignore[assignment]
            _, old_tokens = self._held.pop(old)
            if self.has_disk and old not in self._disk:
                self._disk[old] = old_tokens
                self._spills.append((slot, old))
                self.num_spilled += 1
        else:
            return None
        self._held[key], self._keys[slot], self._pins[slot] = (slot, tokens), key, 1
        return slot

    # --- events ---

    def ended(self, transfers: Transfers) -> None:
        """A plan has ended: what it moved is moved."""
        if not any(transfers):
            return
        self._in_flight.remove(transfers)
        for _, slot in transfers.saves:
            self.unpin(slot)
        for slot, _ in transfers.loads:
            self.unpin(slot)

    def fetched(self, key: bytes, ok: bool) -> None:
        """A fetch has ended. When it brought nothing the page is on disk no more."""
        for ways in (self._lost, self._stray):
            if key in ways:
                return self.unpin(ways.pop(key))
        if key not in self._fetching:
            raise TierError(f"key {key.hex()} has come from disk and nobody fetched it")
        slot = self._fetching.pop(key)
        self.num_fetched += ok
        if not ok:
            self.num_fetch_misses += 1
            del self._disk[key]
            del self._held[key]
            self._keys[slot] = None
        self.unpin(slot)

    def rewind(self) -> list[bytes]:
        """The plans in flight are lost, and nobody knows how much of them was done: the keys of what they moved, to be dropped.

        Who fetches into a slot may do so at any time from now on, or never: such a slot is given away only when its fetch ends.
        """
        self.take_transfers()
        moved: list[bytes | None] = []
        for transfers in list(self._in_flight):
            moved += [key for _, key in transfers.spills]
            moved += [self._keys[slot] for _, slot in transfers.saves]
            moved += [self._keys[slot] for slot, _ in transfers.loads]
            for key, slot in transfers.fetches:
                for ways in (self._fetching, self._lost):
                    if ways.get(key) == slot:
                        self.forget(key)
                        self._stray[key] = self._lost.pop(key)
            self.ended(transfers)
        return [key for key in moved if key is not None]

    def forget(self, key: bytes) -> None:
        """Nobody will ask for this key again, or nobody may."""
        self._disk.pop(key, None)
        slot, _ = self._held.pop(key, (None, None))
        if slot is None:
            return
        self._keys[slot] = None
        if key in self._fetching:
            self._lost[key] = self._fetching.pop(key)
        if slot in self._idle:
            del self._idle[slot]
            self._free.append(slot)

    def clear(self) -> None:
        """Forget everything; what is on its way is dropped when it comes."""
        for key in [*self._held, *self._disk]:
            self.forget(key)

    def check(self, pinned: Iterable[int] | None = None) -> None:
        """Raise TierError unless the invariant holds; with `pinned`, the slots that others have pinned, also that counts do."""
        free = set(self._free)
        if len(free) != len(self._free) or free & self._idle.keys():
            raise TierError("a slot is twice in the free list, or idle and in it")
        slots = {slot: key for key, (slot, _) in self._held.items()}
        if len(slots) != len(self._held) or any(self._keys[slot] != key for slot, key in slots.items()):
            raise TierError("the tier's keys and slots disagree")
        for slot in range(self.num_slots):
            places = (slot in free) + (slot in slots) + (slot not in slots and self._pins[slot] > 0)
            if places != 1 or (slot in free and self._keys[slot] is not None):
                raise TierError(f"slot {slot} is free, holds a key or is pinned without one, but {places} of the three")
            if (slot in self._idle) != (slot in slots and not self._pins[slot]):
                raise TierError(f"slot {slot} has {self._pins[slot]} pins and is {'' if slot in self._idle else 'not '}idle")
        if any(self._held.get(key, (None, None))[0] != slot for key, slot in self._fetching.items()):
            raise TierError("a page is fetched into a slot that holds another key")
        if self.num_fetching > self.max_fetches:
            raise TierError(f"{self.num_fetching} fetches are in flight, {self.max_fetches} may be")
        if pinned is not None:
            wanted = Counter(pinned)
            wanted.update(self._fetching.values())
            wanted.update(self._lost.values())
            wanted.update(self._stray.values())
            for transfers in self._in_flight:
                wanted.update(slot for _, slot in transfers.saves)
                wanted.update(slot for slot, _ in transfers.loads)
            wrong = [slot for slot in range(self.num_slots) if wanted[slot] != self._pins[slot]]
            if wrong:
                raise TierError(f"slot {wrong[0]} has {self._pins[wrong[0]]} pins, {wanted[wrong[0]]} are known of")
