"""Both tiers under random plans against a model of bytes, what they count, and what they say."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import jax
import numpy as np
import pytest
from faulty_files import FaultyFiles

from jaxpaged.config import ModelConfig
from jaxpaged.host.plan import Transfers
from jaxpaged.model import cache as kv_cache
from jaxpaged.model.cache import KVCache
from jaxpaged.offload import host_pages, transfer
from jaxpaged.offload.transfer import Offload

MODEL = ModelConfig(
    model_type="llama",
    vocab_size=8,
    hidden_size=16,
    intermediate_size=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)
NUM_PAGES, NUM_SLOTS, PAGE_SIZE = 10, 5, 4


def filled_cache(dtype: str = "bfloat16") -> KVCache:
    """Page p of every layer holds the number p, the null page 0."""
    cache = kv_cache.init_cache(MODEL, NUM_PAGES, PAGE_SIZE, dtype)
    rows = np.arange(MODEL.num_layers * NUM_PAGES) % NUM_PAGES
    numbers = np.broadcast_to(rows[:, None, None, None], cache.k.shape).astype(dtype)
    return KVCache.of(jax.numpy.asarray(numbers), jax.numpy.asarray(-numbers))


def held(cache: KVCache) -> list[float]:
    """What each page holds, the same in all layers and places, or this fails."""
    k, v = (np.asarray(x).view(cache.dtype).astype(float).reshape(MODEL.num_layers, NUM_PAGES, -1) for x in (cache.k, cache.v))
    assert (k == k[:1, :, :1]).all() and (v == -k).all(), "a page is of two"
    return k[0, :, 0].tolist()


class Scheduler:
    """Makes random plans as the scheduler may, and knows what every page and slot must hold after them."""

    def __init__(self, offload: Offload, cache: KVCache, seed: int):
        self.offload, self.cache, self.rng = offload, cache, random.Random(seed)
        self.pages: list[float] = held(cache)
        self.slots: dict[int, float] = {}  # what is in them; a slot that is fetched into is not in here
        self.on_disk: dict[bytes, float] = {}
        self.fetching: dict[bytes, int] = {}
        self.num_fetched = 0
        self._next = 100.0
        self._write = jax.jit(write, donate_argnums=0)

    def plan(self) -> None:
        """One plan, and a step that overwrites some pages, those that have just been saved above all."""
        rng = self.rng
        usable = [slot for slot in range(NUM_SLOTS) if slot not in self.fetching.values()]
        spills, saves, loads, fetches = [], [], [], []
        for slot in rng.sample(usable, rng.randrange(len(usable) + 1)):
            if slot in self.slots and rng.random() < 0.5:
                # The name of a page on the disk is what it holds: contents never change.
                key = int(self.slots[slot]).to_bytes(16, "big")
                spills.append((slot, key))
                self.on_disk[key] = self.slots[slot]
        taken = rng.sample(usable, rng.randrange(len(usable) + 1))
        pages = rng.sample(range(1, NUM_PAGES), len(taken))
        for page, slot in zip(pages, taken, strict=True):
            saves.append((page, slot))
            self.slots[slot] = self.pages[page]
        known = [slot for slot in usable if slot in self.slots]
        for slot, page in zip(rng.sample(known, rng.randrange(len(known) + 1)), rng.sample(range(1, NUM_PAGES), 9), strict=False):
            loads.append((slot, page))
            self.pages[page] = self.slots[slot]
        busy = {slot for slot, _ in loads}
        for slot in usable:
            wanted = [key for key in self.on_disk if key not in self.fetching]
            if wanted and slot not in busy and rng.random() < 0.3:
                key = rng.choice(wanted)
                fetches.append((key, slot))
                self.fetching[key] = slot
                self.slots.pop(slot, None)
        self.cache = self.offload.transfer(self.cache, Transfers(spills=spills, saves=saves, loads=loads, fetches=fetches))
        for page in rng.sample(pages, min(2, len(pages))):
            self._next += 1
            self.cache = self._write(self.cache, np.int32(page), np.float32(self._next % 120 + 8))
            self.pages[page] = self._next % 120 + 8

    def hear(self, *, wait: bool) -> None:
        for key, ok in self.offload.fetched(wait):
            slot = self.fetching.pop(key)
            if ok:
                self.slots[slot] = self.on_disk[key]
                self.num_fetched += 1
            else:
                self.on_disk.pop(key, None)
        for key in self.offload.lost():
            self.on_disk.pop(key, None)

    def check(self) -> None:
        assert held(self.cache) == self.pages


def write(cache: KVCache, page: jax.Array, number: jax.Array) -> KVCache:
    """A step: a page of every layer holds another number."""
    rows = np.arange(MODEL.num_layers) * NUM_PAGES + page
    k, v = (x.at[rows].set(sign * number.astype(x.dtype)) for x, sign in ((cache.k_pages, 1), (cache.v_pages, -1)))
    return KVCache.of(k, v)


@pytest.mark.parametrize("fault", ["", "ENOSPC", "flip", "torn"])
@pytest.mark.parametrize("late", [0.0, 0.8])
def test_random_plans_end_as_in_the_model(late: float, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, rng = host_pages._Saved.is_ready, random.Random(0)
    monkeypatch.setattr(host_pages._Saved, "is_ready", lambda saved: rng.random() >= late and real(saved))
    monkeypatch.setattr(host_pages, "MAX_CALL_PAGES", 3)
    for seed in range(2):
        files = FaultyFiles(fault)
        offload = Offload(filled_cache(), MODEL, num_slots=NUM_SLOTS, offload_dir=str(tmp_path), num_threads=2, files=files)
        offload.warm_up()
        files.fail_at_random = random.Random(seed) if fault else None
        scheduler = Scheduler(offload, filled_cache(), seed)
        for number in range(120):
            scheduler.plan()
            scheduler.hear(wait=number % 5 == 4)
            if number % 8 == 7:
                scheduler.check()
        while scheduler.fetching:
            scheduler.hear(wait=True)
        scheduler.check()
        assert scheduler.num_fetched > 10
        stats = offload.stats()
        assert stats.num_waiting_fetches == 0
        assert bool(fault) or (stats.num_lost_spills, stats.num_missed_fetches) == (0, 0)
        files.fail_at_random = None
        offload.close()
        assert not list(tmp_path.iterdir())


def test_the_order_is_spills_saves_loads_fetches(tmp_path: Path) -> None:
    """One slot takes part in all four: what it held is spilled, a page is saved to it, loaded from it, and another fetched."""
    offload, cache = Offload(filled_cache(), MODEL, num_slots=2, offload_dir=str(tmp_path)), filled_cache()
    cache = offload.transfer(cache, Transfers(saves=[(1, 0), (2, 1)]))
    cache = offload.transfer(cache, Transfers(spills=[(1, b"two")]))
    cache = offload.transfer(
        cache, Transfers(spills=[(0, b"one")], saves=[(3, 0)], loads=[(0, 9)], fetches=[(b"two", 0), (b"one", 1)])
    )
    answers = []
    while len(answers) < 2:
        answers += offload.fetched(wait=True)
    assert sorted(answers) == [(b"one", True), (b"two", True)]
    cache = offload.transfer(cache, Transfers(loads=[(0, 7), (1, 8)]))
    assert held(cache) == [0, 1, 2, 3, 4, 5, 6, 2, 1, 3]
    offload.close()


def test_a_fetch_is_not_overwritten_by_a_save_that_was_on_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offload, cache = Offload(filled_cache(), MODEL, num_slots=2, offload_dir=str(tmp_path)), filled_cache()
    cache = offload.transfer(cache, Transfers(saves=[(1, 0)]))
    cache = offload.transfer(cache, Transfers(spills=[(0, b"one")]))
    monkeypatch.setattr(host_pages._Saved, "is_ready", lambda saved: False)
    cache = offload.transfer(cache, Transfers(saves=[(2, 0), (3, 1)]))
    cache = offload.transfer(cache, Transfers(fetches=[(b"one", 0)]))
    assert offload.fetched(wait=True) == [(b"one", True)]
    cache = offload.transfer(cache, Transfers(loads=[(1, 8), (0, 9)]))
    assert held(cache)[8:] == [3, 1]
    offload.close()


def test_what_is_counted(tmp_path: Path) -> None:
    offload, cache = Offload(filled_cache(), MODEL, num_slots=4, offload_dir=str(tmp_path)), filled_cache()
    offload.warm_up()
    page_bytes = kv_cache.page_bytes(MODEL, PAGE_SIZE, "bfloat16")
    cache = offload.transfer(cache, Transfers(saves=[(1, 0), (2, 1), (3, 2)]))
    cache = offload.transfer(cache, Transfers(spills=[(0, b"a"), (1, b"b")], loads=[(2, 5)], fetches=[(b"a", 3), (b"c", 1)]))
    answers = []
    while len(answers) < 2:
        answers += offload.fetched(wait=True)
    assert sorted(answers) == [(b"a", True), (b"c", False)]
    assert offload.disk is not None
    offload.disk.flush()
    stats = offload.stats()
    assert (stats.num_saved_pages, stats.num_loaded_pages, stats.num_spilled_pages, stats.num_fetched_pages) == (3, 1, 2, 1)
    assert (stats.num_saved_bytes, stats.num_loaded_bytes) == (3 * page_bytes, page_bytes)
    assert (stats.num_spilled_bytes, stats.num_fetched_bytes) == (2 * page_bytes, page_bytes)
    assert (stats.num_lost_spills, stats.num_missed_fetches, stats.num_waiting_fetches) == (0, 1, 0)
    assert stats.fetch_latency_s > 0
    offload.close()


def test_without_a_disk_nothing_is_fetched() -> None:
    offload = Offload(filled_cache(), MODEL, num_slots=4)
    cache = offload.transfer(filled_cache(), Transfers(saves=[(4, 0)]))
    cache = offload.transfer(cache, Transfers(loads=[(0, 9)]))
    assert held(cache)[9] == 4
    assert offload.fetched() == offload.fetched(wait=True) == offload.lost() == []
    assert offload.stats().num_spilled_pages == 0
    offload.close()


class Clock:
    """Moves when it is told to, and a little whenever it is read."""

    def __init__(self, tick_s: float = 0.0):
        self.now_s, self.tick_s = 0.0, tick_s

    def __call__(self) -> float:
        self.now_s += self.tick_s
        return self.now_s


def test_a_stall_is_said_once_when_a_step_has_waited(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING, logger="jaxpaged")
    clock = Clock()
    offload = Offload(filled_cache(), MODEL, num_slots=4, offload_dir=str(tmp_path), clock=clock)
    cache = offload.transfer(filled_cache(), Transfers(saves=[(1, 0)]))
    offload.host.settle()
    cache = offload.transfer(cache, Transfers(spills=[(0, b"a")], loads=[(0, 3)], fetches=[(b"a", 1)]))
    assert offload.fetched(wait=True) == [(b"a", True)]
    assert caplog.messages == [] and offload.stats().stall_s == 0
    monkeypatch.setattr(host_pages._Saved, "is_ready", lambda saved: False)
    clock.tick_s = 2e-3
    cache = offload.transfer(cache, Transfers(saves=[(1, 0)]))
    assert caplog.messages == [], "nobody waits for a save"
    for _ in range(2):
        cache = offload.transfer(cache, Transfers(saves=[(1, 0)], loads=[(0, 4)]))
    assert caplog.messages == ["[Offload] Page-in stall: a step waited 4.0 ms for pages"]
    assert offload.stats().stall_s == pytest.approx(6e-3)
    offload.close()


def test_costs_are_measured_on_the_null_page_and_leave_everything_as_it_was() -> None:
    cache = filled_cache()
    offload = Offload(cache, MODEL, num_slots=6)
    offload.warm_up()
    costs, cache = offload.measure(cache)
    assert (
        all(0 <= cost < 1 for cost in costs)
        and costs.save_fixed_s + costs.save_page_s > 0 < costs.load_fixed_s + costs.load_page_s
    )
    assert held(cache) == list(range(NUM_PAGES))
    assert offload.stats() == Offload(cache, MODEL, num_slots=6).stats()


def test_costs_are_a_line_through_few_pages_and_many() -> None:
    assert transfer._line({1: [3.0], 5: [7.0]}) == (2.0, 1.0)
    assert transfer._line({1: [1.0, 9.0, 3.0], 5: [7.0]}) == (2.0, 1.0), "medians"
    assert transfer._line({1: [3.0]}) == (0.0, 3.0)
    assert transfer._line({1: [3.0], 5: [2.0]}) == (3.0, 0.0), "no cost is below nothing"
    assert transfer._line({1: [1.0], 5: [6.0]}) == (0.0, 1.25)


def test_a_cpu_brings_saves_as_numpy_arrays() -> None:
    assert transfer.staging_kind(filled_cache()) is None
