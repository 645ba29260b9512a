"""Pages in host memory against arrays of numpy: every bit, whatever the order of saves, loads, steps and other uses of slots."""

from __future__ import annotations

import functools
import random
from typing import Any

import jax
import numpy as np
import pytest
from driving import compilations

from jaxpaged.config import ConfigError, ModelConfig
from jaxpaged.model import cache as kv_cache
from jaxpaged.model.cache import KVCache
from jaxpaged.offload import host_pages
from jaxpaged.offload.host_pages import HostPages, slots_for

MODEL = ModelConfig(
    model_type="llama",
    vocab_size=8,
    hidden_size=16,
    intermediate_size=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_position_embeddings=64,
)
NUM_PAGES, NUM_SLOTS = 12, 6
MOST = 3  # pages of one call in the tests below, so that calls are cut


def random_bits(rng: random.Random, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Any bits at all: NaN with every payload, infinities, subnormal numbers."""
    return np.frombuffer(rng.randbytes(int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype).reshape(shape)


class Model:
    """The pool as numpy arrays [L, P, K, S, H], the slots as bytes, and the cache that must hold the same."""

    def __init__(self, seed: int, page_size: int, dtype: str, memory_kind: str | None = None):
        self.rng = random.Random(seed)
        empty = kv_cache.init_cache(MODEL, NUM_PAGES, page_size, dtype)
        layers = (MODEL.num_layers, NUM_PAGES, *empty.k.shape[1:])
        self.k, self.v = (random_bits(self.rng, layers, empty.k.dtype).copy() for _ in range(2))
        self.k[:, 0] = self.v[:, 0] = 0
        self.cache: KVCache = empty.replace(
            k=jax.numpy.asarray(self.k.reshape(empty.k.shape)), v=jax.numpy.asarray(self.v.reshape(empty.v.shape))
        )
        self.host = HostPages(self.cache, MODEL, num_slots=NUM_SLOTS, memory_kind=memory_kind)
        self.host.warm_up()
        self.slots = [self.rng.randbytes(self.host.page_bytes) for _ in range(NUM_SLOTS)]
        for slot, content in enumerate(self.slots):
            self.host.overwrite(slot)[:] = content
        self._step = jax.jit(step, donate_argnums=0)

    def page(self, page: int) -> bytes:
        """A page as a slot holds it: keys of all layers, then values."""
        return self.k[:, page].tobytes() + self.v[:, page].tobytes()

    def save(self) -> None:
        pairs = list(zip(self.pages(), self.some_slots(), strict=False))
        self.host.save(self.cache, pairs)
        for page, slot in pairs:
            self.slots[slot] = self.page(page)

    def load(self) -> None:
        pairs = list(zip(self.some_slots(), self.pages(), strict=False))
        self.cache = self.host.load(self.cache, pairs)
        for slot, page in pairs:
            both = np.frombuffer(self.slots[slot], self.k.dtype).reshape(2, *self.k[:, page].shape)
            self.k[:, page], self.v[:, page] = both

    def step(self) -> None:
        """What a step does: pages change in place, in a call that is given the cache."""
        page = self.rng.randrange(1, NUM_PAGES)
        k, v = (random_bits(self.rng, self.k[:, page].shape, self.k.dtype) for _ in range(2))
        self.cache = self._step(self.cache, k, v, np.int32(page))
        self.k[:, page], self.v[:, page] = k, v

    def read(self) -> None:
        slot = self.rng.randrange(NUM_SLOTS)
        assert bytes(self.host.read(slot)) == self.slots[slot], "a slot holds other bytes"

    def overwrite(self) -> None:
        slot = self.rng.randrange(NUM_SLOTS)
        self.slots[slot] = self.rng.randbytes(self.host.page_bytes)
        self.host.overwrite(slot)[:] = self.slots[slot]

    def pages(self) -> list[int]:
        return self.rng.sample(range(1, NUM_PAGES), NUM_PAGES - 1)

    def some_slots(self) -> list[int]:
        """Any number of slots, none of them twice."""
        return self.rng.sample(range(NUM_SLOTS), self.rng.randrange(NUM_SLOTS + 1))

    def check(self) -> None:
        shape = self.k.shape
        assert np.asarray(self.cache.k).reshape(shape).tobytes() == self.k.tobytes(), "keys of the pool"
        assert np.asarray(self.cache.v).reshape(shape).tobytes() == self.v.tobytes(), "values of the pool"
        for slot in range(NUM_SLOTS):
            assert bytes(self.host.read(slot)) == self.slots[slot], "a slot holds other bytes"


def step(cache: KVCache, k: jax.Array, v: jax.Array, page: jax.Array) -> KVCache:
    """Page `page` of all layers becomes k, v: [L, K, S, H]."""
    numbers = np.arange(MODEL.num_layers, dtype=np.int32) * NUM_PAGES + page
    return cache.replace(k=cache.k.at[numbers].set(k), v=cache.v.at[numbers].set(v))  # type: ignore[attr-defined]


def run(model: Model, num_operations: int, *, late: float) -> None:
    """Random operations; a save is seen to have arrived with probability 1 - late."""
    operations = (model.save, model.load, model.step, model.step, model.read, model.overwrite, model.host.poll)
    real = host_pages._Saved.is_ready
    host_pages._Saved.is_ready = lambda saved: model.rng.random() >= late and real(saved)  # type: ignore[method-assign]
    try:
        for number in range(num_operations):
            model.rng.choice(operations)()
            if number % 16 == 15:
                model.check()
        model.check()
    finally:
        host_pages._Saved.is_ready = real  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def few_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_pages, "MAX_CALL_PAGES", MOST)


@pytest.mark.parametrize("memory_kind", [None, "pinned_host"])
@pytest.mark.parametrize("page_size", [4, 16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_random_operations_end_as_in_numpy(dtype: str, page_size: int, memory_kind: str | None) -> None:
    for seed, late in enumerate((0.6,) if memory_kind else (0.0, 0.6, 1.0)):
        run(Model(seed, page_size, dtype, memory_kind), 150, late=late)


def test_a_save_has_read_before_the_next_step_writes() -> None:
    """Large pages and no waiting: the gather, and the steps that overwrite what it reads, are queued one behind the other."""
    model = Model(0, 16, "float32")
    for _ in range(100):
        pages = model.pages()[:MOST]
        expected = [model.page(page) for page in pages]
        model.host.save(model.cache, list(zip(pages, range(MOST), strict=True)))
        for page in pages:
            k, v = (random_bits(model.rng, model.k[:, page].shape, model.k.dtype) for _ in range(2))
            model.cache = model._step(model.cache, k, v, np.int32(page))
            model.k[:, page], model.v[:, page] = k, v
        assert [bytes(model.host.read(slot)) for slot in range(MOST)] == expected


def test_of_two_saves_to_one_slot_the_later_stays() -> None:
    model = Model(0, 4, "bfloat16")
    model.host.save(model.cache, [(1, 0), (2, 0)])
    model.host.save(model.cache, [(3, 1)])
    model.host.save(model.cache, [(4, 1)])
    assert bytes(model.host.read(0)) == model.page(2)
    assert bytes(model.host.read(1)) == model.page(4)


def test_saves_on_their_way_are_few_and_nobody_waits_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_pages, "MAX_IN_FLIGHT_BYTES", 1)
    model = Model(0, 4, "float32")
    monkeypatch.setattr(host_pages._Saved, "is_ready", lambda saved: False)
    for number in range(10):
        model.host.save(model.cache, [(1, number % NUM_SLOTS)])
        assert len(model.host._in_flight) == min(number + 1, host_pages.MIN_IN_FLIGHT)
    model.host.read(10 % NUM_SLOTS)  # whose save has arrived long ago
    assert len(model.host._in_flight) == host_pages.MIN_IN_FLIGHT
    model.host.read(9 % NUM_SLOTS)
    assert not model.host._in_flight


def test_waiting_is_counted_only_where_a_save_had_not_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(0, 4, "float32")
    model.host._clock = iter(range(100)).__next__  # type: ignore[assignment]
    model.host.save(model.cache, [(1, 0)])
    jax.block_until_ready(model.host._in_flight[0].k), jax.block_until_ready(model.host._in_flight[0].v)
    model.host.read(0)
    assert model.host.waited_s == 0
    monkeypatch.setattr(host_pages._Saved, "is_ready", lambda saved: False)
    model.host.save(model.cache, [(1, 0)])
    model.host.read(0)
    assert model.host.waited_s == 1


class Failed:
    """An array of a device that has failed."""

    def is_ready(self) -> bool:
        return True

    def __array__(self, *args: object, **options: object) -> np.ndarray:
        raise RuntimeError("the device has failed")


def test_a_save_that_fails_is_an_error_once() -> None:
    model = Model(0, 4, "float32")
    saved = host_pages._Saved(Failed(), Failed(), (0, 1))  # type: ignore[arg-type]
    model.host._in_flight.append(saved)
    model.host._source.update({0: saved, 1: saved})
    with pytest.raises(RuntimeError, match="the device has failed"):
        model.host.read(1)
    model.check()


def test_nothing_compiles_after_warm_up() -> None:
    model = Model(0, 4, "bfloat16")
    with compilations() as seen:
        for count in range(1, NUM_SLOTS + 1):
            model.host.save(model.cache, [(page, page - 1) for page in range(1, count + 1)])
            model.cache = model.host.load(model.cache, [(page - 1, page) for page in range(1, count + 1)])
        jax.block_until_ready(model.cache)
        assert not seen
        jax.jit(lambda x: x + 1)(np.float32(1))
        assert seen, "the listener cannot see a compilation"


def test_without_warm_up_a_size_is_compiled_at_its_first_use() -> None:
    cache = kv_cache.init_cache(MODEL, NUM_PAGES, 4)
    host = HostPages(cache, MODEL, num_slots=NUM_SLOTS)
    assert not host._gatherers
    host.save(cache, [(1, 0)])
    assert set(host._gatherers) == {1}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_load_works_in_place_and_a_save_leaves_the_pool_alone(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_pages, "MAX_CALL_PAGES", 16)
    cache = kv_cache.init_cache(MODEL, 4096, 16, dtype)
    pool_bytes = cache.k.nbytes + cache.v.nbytes
    host = HostPages(cache, MODEL, num_slots=16)
    host.warm_up()
    assert host.sizes == [1, 4, 16]
    for size in host.sizes:
        load: Any = host._scatterers[size].memory_analysis()
        save: Any = host._gatherers[size].memory_analysis()
        assert load.alias_size_in_bytes == pool_bytes
        assert load.temp_size_in_bytes <= 2 * host.page_bytes + 1024
        assert save.alias_size_in_bytes == 0
        assert save.output_size_in_bytes + save.temp_size_in_bytes <= 2 * size * host.page_bytes + 1024
    host.save(cache, [(1, 0)])
    assert not cache.k.is_deleted()
    after = host.load(cache, [(0, 1)])
    assert cache.k.is_deleted() and not after.k.is_deleted()


def test_padding_leaves_the_null_page_finite() -> None:
    model = Model(0, 4, "float16")
    model.host.overwrite(0)[:] = b"\xff" * model.host.page_bytes
    for count in (1, 2, 3, 4, 5):
        pages = model.pages()[:count]
        model.cache = model.host.load(model.cache, [(0, page) for page in pages])
        k, v = (np.asarray(x).reshape(model.k.shape)[:, 0] for x in (model.cache.k, model.cache.v))
        assert np.isfinite(k.view(np.float16)).all() and np.isfinite(v.view(np.float16)).all()


def test_large_pages_make_small_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_pages, "MAX_CALL_PAGES", 64)
    cache = kv_cache.init_cache(MODEL, NUM_PAGES, 4)
    page_bytes = kv_cache.page_bytes(MODEL, 4, "float32")
    monkeypatch.setattr(host_pages, "MAX_CALL_BYTES", 20 * page_bytes)
    host = HostPages(cache, MODEL, num_slots=100)
    assert host.page_bytes == page_bytes
    assert host.sizes == [1, 4, 16, 20]
    monkeypatch.setattr(host_pages, "MAX_IN_FLIGHT_BYTES", 200 * page_bytes + 1)
    assert HostPages(cache, MODEL, num_slots=100).staging_bytes == 11 * 20 * page_bytes
    monkeypatch.setattr(host_pages, "MAX_CALL_BYTES", 1)
    assert HostPages(cache, MODEL, num_slots=100).sizes == [1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_slots_for_some_bytes(dtype: str) -> None:
    cache = kv_cache.init_cache(MODEL, NUM_PAGES, 16, dtype)
    page_bytes = HostPages(cache, MODEL, num_slots=1).page_bytes
    sizes = functools.partial(slots_for, model=MODEL, page_size=16, dtype=dtype)
    assert [sizes(n) for n in (0, page_bytes - 1, page_bytes, 10 * page_bytes + 1)] == [0, 0, 1, 10]


def test_memory_that_cannot_be_had_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^swap_space: .* GiB of host memory cannot be had for .* pages$"):
        HostPages(kv_cache.init_cache(MODEL, NUM_PAGES, 16), MODEL, num_slots=2**50)


def test_after_close_the_memory_is_gone() -> None:
    model = Model(0, 4, "float32")
    model.host.save(model.cache, [(1, 0)])
    model.host.close()
    assert model.host._slots.nbytes == 0 and not model.host._in_flight
