"""Both tiers below the device as one: what a plan's transfers do to pages, and what they cost.

Knows the order of transfers. Refuses to know why they are made.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax

from jaxpaged.config import ModelConfig
from jaxpaged.host.plan import Transfers
from jaxpaged.model.cache import KVCache
from jaxpaged.offload.disk_pages import DiskPages
from jaxpaged.offload.files import Files
from jaxpaged.offload.host_pages import HostPages
from jaxpaged.offload.trouble import Trouble

STALL_S = 1e-3  # a shorter wait is no line in the log
MEASURED_TURNS = 5


class Costs(NamedTuple):
    """Seconds that a device and its host take for nothing else; a transfer of X pages takes `fixed + X * page`."""

    save_fixed_s: float
    save_page_s: float
    load_fixed_s: float
    load_page_s: float


class Stats(NamedTuple):
    """Totals since the start; pages and bytes of each way. `stall_s`: seconds in which a step waited for pages."""

    num_saved_pages: int
    num_loaded_pages: int
    num_saved_bytes: int
    num_loaded_bytes: int
    num_spilled_pages: int
    num_fetched_pages: int
    num_spilled_bytes: int
    num_fetched_bytes: int
    num_lost_spills: int
    num_missed_fetches: int
    num_waiting_fetches: int
    fetch_latency_s: float
    stall_s: float


class Offload:
    """Host memory below a pool of pages, and a disk below that where a folder is given."""

    def __init__(
        self,
        cache: KVCache,
        model: ModelConfig,
        *,
        num_slots: int,
        offload_dir: str | None = None,
        num_threads: int = 4,
        files: Files | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """The tiers of one pool, of which only the shape is kept.

        Raises:
          ConfigError: there is not so much memory, or no folder can be made in `offload_dir`.
        """
        self._clock = clock
        self.host = HostPages(cache, model, num_slots=num_slots, memory_kind=staging_kind(cache), clock=clock)
        self.disk = None
        if offload_dir is not None:
            self.disk = DiskPages(offload_dir, num_threads=num_threads, files=files, clock=clock)
        self._stalled_s = 0.0  # for fetches
        self._stall_trouble = Trouble("[Offload] Page-in stall: a step waited %.1f ms for pages")

    def warm_up(self) -> None:
        """Compile everything that transfers run."""
        self.host.warm_up()

    def transfer(self, cache: KVCache, transfers: Transfers) -> KVCache:
        """Do what a plan says, in its order. The cache is donated when there are loads, and only then.

        Nothing is waited for but saves that a spill or load of this plan needs.
        """
        host, waited_s = self.host, self.host.waited_s
        host.poll()
        if self.disk is not None:
            for slot, key in transfers.spills:
                self.disk.spill(key, host.read(slot))
        if transfers.saves:
            host.save(cache, transfers.saves)
        if transfers.loads:
            cache = host.load(cache, transfers.loads)
        if self.disk is not None:
            for key, slot in transfers.fetches:
                self.disk.fetch(key, host.overwrite(slot))
        self._look_at_stall(host.waited_s - waited_s)
        return cache

    def fetched(self, wait: bool = False) -> list[tuple[bytes, bool]]:
        """One answer for each fetch: its key and whether it has arrived. With `wait` at least one, if one is to come."""
        self.host.poll()
        if self.disk is None:
            return []
        started_s = self._clock()
        answers = self.disk.finished(wait)
        if wait:
            waited_s = self._clock() - started_s
            self._stalled_s += waited_s
            self._look_at_stall(waited_s)
        return answers

    def lost(self) -> list[bytes]:
        """Keys that a plan has spilled and that are not on disk; to ask for one is only a miss."""
        return self.disk.lost() if self.disk is not None else []

    def stats(self) -> Stats:
        """See `Stats`."""
        host, disk = self.host, self.disk
        return Stats(
            num_saved_pages=host.num_saved,
            num_loaded_pages=host.num_loaded,
            num_saved_bytes=host.num_saved * host.page_bytes,
            num_loaded_bytes=host.num_loaded * host.page_bytes,
            num_spilled_pages=disk.num_spilled if disk else 0,
            num_fetched_pages=disk.num_fetched if disk else 0,
            num_spilled_bytes=disk.num_spilled_bytes if disk else 0,
            num_fetched_bytes=disk.num_fetched_bytes if disk else 0,
            num_lost_spills=disk.num_lost if disk else 0,
            num_missed_fetches=disk.num_missed if disk else 0,
            num_waiting_fetches=disk.num_waiting if disk else 0,
            fetch_latency_s=disk.latency_s() if disk else 0.0,
            stall_s=self._stalled_s + host.waited_s,
        )

    def measure(self, cache: KVCache) -> tuple[Costs, KVCache]:
        """What transfers cost here, by moving the null page; before any slot is used. The cache is donated."""
        host, turns = self.host, range(MEASURED_TURNS + 1)
        totals = host.num_saved, host.num_loaded, host.waited_s
        counts = sorted({1, min(host.sizes[-1], host.num_slots)})
        save_s: dict[int, list[float]] = {count: [] for count in counts}
        load_s: dict[int, list[float]] = {count: [] for count in counts}
        for turn in turns:
            for count in counts:
                jax.block_until_ready(cache)
                started_s = self._clock()
                host.save(cache, [(0, slot) for slot in range(count)])
                host.settle()
                saved_s = self._clock()
                cache = host.load(cache, [(slot, 0) for slot in range(count)])
                jax.block_until_ready(cache)
                loaded_s = self._clock()
                if turn:  # the first touches memory for the first time
                    save_s[count].append(saved_s - started_s)
                    load_s[count].append(loaded_s - saved_s)
        host.num_saved, host.num_loaded, host.waited_s = totals
        return Costs(*_line(save_s), *_line(load_s)), cache

    def close(self) -> None:
        """Stop the threads, remove the folder, give the memory back."""
        if self.disk is not None:
            self.disk.close()
        self.host.close()

    def _look_at_stall(self, waited_s: float) -> None:
        if waited_s >= STALL_S:
            self._stall_trouble.bad(waited_s * 1e3)
        else:
            self._stall_trouble.good()


def staging_kind(cache: KVCache) -> str | None:
    """Where saves go on their way to a slot: memory that the device writes by itself, but on a CPU, where it is a detour."""
    (device,) = cache.k.devices()
    kinds = {memory.kind for memory in device.addressable_memories()}
    return "pinned_host" if device.platform != "cpu" and "pinned_host" in kinds else None


def _line(seconds: dict[int, list[float]]) -> tuple[float, float]:
    """(fixed, per page) seconds of transfers of one page and of many; all is per page where there is but one size."""
    (few, few_s), (many, many_s) = ((count, statistics.median(seconds[count])) for count in (min(seconds), max(seconds)))
    page_s = (many_s - few_s) / (many - few) if many > few else many_s / many
    page_s = max(0.0, page_s)
    return max(0.0, few_s - few * page_s), page_s
