"""Slots of host memory that hold pages, and the way from the device and back.

Knows bytes and slots. Refuses to know what a page holds and who wants it: that is the scheduler's.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import NamedTuple

import jax
import numpy as np

from jaxpaged.config import ConfigError, ModelConfig
from jaxpaged.model import cache as kv_cache
from jaxpaged.model.cache import KVCache

# The largest call. A CPU loads 5 GB/s in calls of 2 MiB and 1 in calls of 32, whose new arrays are paid for page by page and do
# not stay in its cache; saves go at 3 to 4 GB/s in both (2 cores under load, jax 0.10.2, pages of 512 KiB, November 2026).
MAX_CALL_BYTES = 4 << 20
MAX_CALL_PAGES = 64
# Saves that have not been written into their slots: so many bytes, but always a few calls.
MAX_IN_FLIGHT_BYTES = 128 << 20
MIN_IN_FLIGHT = 4


class _Saved(NamedTuple):
    """What one call has gathered, [X, L, K, S, H] each, and the slots that it is for."""

    k: jax.Array
    v: jax.Array
    slots: tuple[int, ...]

    def is_ready(self) -> bool:
        return self.k.is_ready() and self.v.is_ready()  # type: ignore[attr-defined]


class HostPages:
    """`num_slots` slots; one holds a page of all layers, keys and values, in one contiguous piece of bytes.

    A save is started and not waited for: its pages lie gathered on the device, safe from later steps, until they have arrived.
    They are written into their slots when somebody needs one of these, when the next save comes, or when `poll` finds them there.

    Invariants: what `_source` names for a slot is newer than the slot's own bytes; after `warm_up` nothing compiles.
    """

    def __init__(
        self,
        cache: KVCache,
        model: ModelConfig,
        *,
        num_slots: int,
        memory_kind: str | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """A tier for the pages of one pool.

        Args:
          cache: the pool; only its shape is kept.
          memory_kind: where gathered pages go before they are written into their slots: a kind of jax's host memory, or None,
            which lets jax bring them as an array of numpy. None is 1.1 to 5 times faster on a CPU, where pinned_host is one more
            copy (2 cores, jax 0.10.2 and 0.12, pages of 32 and 512 KiB, November 2026).

        Raises:
          ConfigError: there is not so much memory.
        """
        self.num_slots = num_slots
        self._clock = clock
        self._cache = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), cache)
        self._page_shape = (model.num_layers, *cache.k.shape[1:])  # [L, K, S, H]
        shape = (num_slots, 2, *self._page_shape)
        self.page_bytes = int(np.prod(shape[1:])) * cache.k.dtype.itemsize
        try:
            # Not touched before it is used, so a large tier costs nothing until pages are in it.
            self._slots = np.empty(shape, cache.k.dtype)
        except (MemoryError, ValueError):  # numpy says ValueError when the number of bytes has no machine word
            size = num_slots * self.page_bytes / 2**30
            raise ConfigError(f"swap_space: {size:.1f} GiB of host memory cannot be had for {num_slots:,} pages") from None
        self._staging = None if memory_kind is None else cache.k.sharding.with_memory_kind(memory_kind)
        limit = max(1, min(MAX_CALL_PAGES, MAX_CALL_BYTES // self.page_bytes, num_slots))
        self.sizes = [*itertools.takewhile(lambda size: size < limit, (4**i for i in itertools.count())), limit]
        self.max_in_flight = max(MIN_IN_FLIGHT, MAX_IN_FLIGHT_BYTES // (limit * self.page_bytes))
        self._gather = jax.jit(functools.partial(kv_cache.gather_pages, config=model))
        self._scatter = jax.jit(functools.partial(kv_cache.scatter_pages, config=model), donate_argnums=0)
        self._gatherers: dict[int, jax.stages.Compiled] = {}
        self._scatterers: dict[int, jax.stages.Compiled] = {}
        self._in_flight: deque[_Saved] = deque()
        self._source: dict[int, _Saved] = {}  # slot -> the save in flight whose page it will hold
        self.num_saved = self.num_loaded = 0  # pages
        self.waited_s = 0.0  # for saves that had not arrived

    @property
    def staging_bytes(self) -> int:
        """Bytes of the device, beside the pool, that all saves on their way and one call's load take."""
        return (self.max_in_flight + 1) * self.sizes[-1] * self.page_bytes

    def warm_up(self) -> None:
        """Compile every size."""
        for size in self.sizes:
            self._compile(size)

    def save(self, cache: KVCache, pages_and_slots: Seq[tuple[int, int]]) -> None:
        """Start copying pages into slots; steps that are given the cache from now on may overwrite them."""
        self.poll()
        for part in _parts(pages_and_slots, self.sizes[-1]):
            while len(self._in_flight) >= self.max_in_flight:
                self._land()
            size = self._size(len(part))
            numbers = np.zeros(size, np.int32)
            numbers[: len(part)] = [page for page, _ in part]
            k, v = self._gatherers[size](cache, numbers)
            if self._staging is not None:
                k, v = jax.device_put((k, v), self._staging)
            else:
                k.copy_to_host_async()
                v.copy_to_host_async()
            saved = _Saved(k, v, tuple(slot for _, slot in part))
            self._in_flight.append(saved)
            self._source.update(dict.fromkeys(saved.slots, saved))
            self.num_saved += len(part)

    def load(self, cache: KVCache, slots_and_pages: Seq[tuple[int, int]]) -> KVCache:
        """The cache with pages from slots. `cache` is donated; the slots may be written again at once."""
        for part in _parts(slots_and_pages, self.sizes[-1]):
            size = self._size(len(part))
            self._settle([slot for slot, _ in part])
            # New arrays each time: jax may read them after this returns.
            k, v = (np.empty((size, *self._page_shape), self._slots.dtype) for _ in range(2))
            k[len(part) :] = v[len(part) :] = 0  # padding goes to the null page, which is finite
            numbers = np.zeros(size, np.int32)
            for index, (slot, page) in enumerate(part):
                k[index], v[index] = self._slots[slot]
                numbers[index] = page
            cache = self._scatterers[size](cache, k, v, numbers)
            self.num_loaded += len(part)
        return cache

    def read(self, slot: int) -> memoryview:
        """The bytes of a slot, `page_bytes` of them, which change with the slot."""
        self._settle([slot])
        return self._view(slot)

    def overwrite(self, slot: int) -> memoryview:
        """The bytes of a slot for somebody who writes all of them; a save that is on its way there is forgotten."""
        self._source.pop(slot, None)
        return self._view(slot)

    def poll(self) -> None:
        """Write into their slots the saves that have arrived; waits for nothing."""
        while self._in_flight and self._in_flight[0].is_ready():
            self._land()

    def settle(self) -> None:
        """Wait for all saves."""
        while self._in_flight:
            self._land()

    def close(self) -> None:
        """Give the memory back; saves that are on their way are forgotten."""
        self._in_flight.clear()
        self._source.clear()
        self._gatherers.clear()
        self._scatterers.clear()
        self._slots = self._slots[:0].copy()
        self.num_slots = 0

    def _view(self, slot: int) -> memoryview:
        return memoryview(self._slots[slot].reshape(-1).view(np.uint8))

    def _settle(self, slots: Seq[int]) -> None:
        """Wait for the saves that these slots will hold, and so for those before them."""
        while any(slot in self._source for slot in slots):
            self._land()

    def _land(self) -> None:
        """Write the oldest save into those of its slots that nothing newer is for."""
        saved = self._in_flight.popleft()
        newest = {slot: index for index, slot in enumerate(saved.slots) if self._source.get(slot) is saved}
        for slot in newest:  # before anything is waited for: a save whose device has failed must not be waited for again
            del self._source[slot]
        started = None if saved.is_ready() else self._clock()
        k, v = np.asarray(saved.k), np.asarray(saved.v)
        if started is not None:
            self.waited_s += self._clock() - started
        for slot, index in newest.items():
            self._slots[slot, 0], self._slots[slot, 1] = k[index], v[index]

    def _size(self, count: int) -> int:
        """The smallest size that holds so many pages, compiled."""
        size = next(size for size in self.sizes if size >= count)
        if size not in self._scatterers:  # enforce_eager
            self._compile(size)
        return size

    def _compile(self, size: int) -> None:
        numbers = jax.ShapeDtypeStruct((size,), np.int32)
        pages = jax.ShapeDtypeStruct((size, *self._page_shape), self._slots.dtype)
        self._gatherers[size] = self._gather.lower(self._cache, numbers).compile()
        self._scatterers[size] = self._scatter.lower(self._cache, pages, pages, numbers).compile()


def slots_for(num_bytes: int, model: ModelConfig, page_size: int, dtype: str) -> int:
    """Pages that so many bytes of host memory hold."""
    return num_bytes // kv_cache.page_bytes(model, page_size, dtype)


def _parts(pairs: Seq[tuple[int, int]], size: int) -> list[Seq[tuple[int, int]]]:
    """The pairs in their order, at most `size` at a time."""
    return [pairs[start : start + size] for start in range(0, len(pairs), size)]
