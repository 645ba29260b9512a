"""The functional layer: arrays in, arrays out. However a sequence is cut into calls, its logits are the same."""

from __future__ import annotations

import functools

import families
import jax
import numpy as np
import pytest
from families import Family

from jaxpaged.model import cache as kv_cache
from jaxpaged.model import step as model_step
from jaxpaged.model.weights import Weights

PAGE, LEN, M = 8, 40, 6
SOME = [family for family in families.FAMILIES if family.name in ("llama-biases", "qwen2-window", "qwen3")]
each_family = pytest.mark.parametrize("family", SOME, ids=lambda family: family.name)


@functools.cache
def weights_of(family: Family) -> Weights:
    return family.weights()


@functools.cache
def functions(family: Family):
    """prefill and decode, compiled, with the cache donated."""
    prefill = functools.partial(model_step.prefill, config=family.config)
    decode = functools.partial(model_step.decode, config=family.config)
    return jax.jit(prefill, donate_argnums=1), jax.jit(decode, donate_argnums=1)


def two_sequences(family: Family) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [2, LEN] and block tables [2, M] with pages in random order."""
    rng = np.random.default_rng(0)
    tables = rng.permutation(np.arange(1, 2 * M + 1, dtype=np.int32)).reshape(2, M)
    return rng.integers(0, family.config.vocab_size, (2, LEN)).astype(np.int32), tables


def in_chunks(family: Family, size: int) -> np.ndarray:
    prefill, _ = functions(family)
    tokens, tables = two_sequences(family)
    cache, parts = kv_cache.init_cache(family.config, 2 * M + 1, PAGE), []
    for start in range(0, LEN, size):
        count = min(size, LEN - start)
        chunk = np.zeros((2, size), np.int32)
        chunk[:, :count] = tokens[:, start : start + count]
        starts, lens = np.full(2, start, np.int32), np.full(2, count, np.int32)
        logits, cache = prefill(weights_of(family), cache, chunk, tables, lens, start=starts)
        parts.append(np.asarray(logits)[:, :count])
    return np.concatenate(parts, axis=1)


def one_by_one(family: Family) -> np.ndarray:
    _, decode = functions(family)
    tokens, tables = two_sequences(family)
    cache, parts = kv_cache.init_cache(family.config, 2 * M + 1, PAGE), []
    for position in range(LEN):
        logits, cache = decode(weights_of(family), cache, tokens[:, position], tables, np.full(2, position + 1, np.int32))
        parts.append(np.asarray(logits))
    return np.stack(parts, axis=1)


@each_family
def test_prefill_in_one_in_chunks_and_by_decoding_are_the_same(family: Family) -> None:
    whole = in_chunks(family, LEN)
    assert whole.shape == (2, LEN, family.config.vocab_size)
    assert whole.dtype == np.float32
    for other in (in_chunks(family, 7), in_chunks(family, PAGE), one_by_one(family)):
        np.testing.assert_allclose(other, whole, rtol=0, atol=1e-5 * np.abs(whole).max())


def test_start_defaults_to_nothing_in_the_pages_and_padding_rows_touch_no_page() -> None:
    family = SOME[0]
    prefill, decode = functions(family)
    tokens, tables = two_sequences(family)
    whole = in_chunks(family, LEN)
    cache = kv_cache.init_cache(family.config, 2 * M + 1, PAGE)
    logits, cache = prefill(weights_of(family), cache, tokens, tables, np.array([LEN, 0], np.int32))
    np.testing.assert_allclose(np.asarray(logits)[0], whole[0], rtol=0, atol=1e-5 * np.abs(whole).max())
    pages = np.asarray(cache.k).reshape(family.config.num_layers, -1, *cache.k.shape[1:])
    assert not pages[:, tables[1]].any()
    before = pages[:, 1:].tobytes()
    _, cache = decode(weights_of(family), cache, tokens[:, 0], tables, np.zeros(2, np.int32))
    pages = np.asarray(cache.k).reshape(family.config.num_layers, -1, *cache.k.shape[1:])
    assert pages[:, 1:].tobytes() == before
    assert np.isfinite(pages).all()


@pytest.mark.parametrize(
    ("D", "lens", "sample_at", "wanted"),
    [
        (
            4,
            [5, 9, 0, 0, 16, 20],
            [0, 1, 0, 0, 0, 23],
            [0, 1, 5],
        ),  # two rows, the middle of a prompt and its end
        (4, [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 4, 0], [4]),  # no row decodes
        (0, [1, 0], [0, 0], [0]),
        (1, [0, 0], [0, 0], []),
    ],
)
def test_rows_that_are_sampled_are_told_apart(D: int, lens: list[int], sample_at: list[int], wanted: list[int]) -> None:
    T = 16
    _, arrays = model_step.StepInputs.layout(D, len(lens) - D, T, M).new()
    arrays["lens"][:], arrays["sample_at"][:] = lens, sample_at
    inputs = model_step.StepInputs.of({name: jax.numpy.asarray(array) for name, array in arrays.items()}, np.zeros(8, np.int32))
    assert np.flatnonzero(inputs.is_sampled).tolist() == wanted


def test_a_donated_cache_is_gone_and_its_memory_used_again() -> None:
    family = SOME[0]
    _, decode = functions(family)
    tokens, tables = two_sequences(family)
    cache = kv_cache.init_cache(family.config, 2 * M + 1, PAGE)
    address = cache.k.unsafe_buffer_pointer()
    _, new = decode(weights_of(family), cache, tokens[:, 0], tables, np.ones(2, np.int32))
    assert cache.k.is_deleted()
    assert cache.v.is_deleted()
    assert new.k.unsafe_buffer_pointer() == address


def test_the_reference_backend_gives_the_same_logits() -> None:
    family = SOME[1]
    tokens, tables = two_sequences(family)
    lens, cache = np.full(2, LEN, np.int32), kv_cache.init_cache(family.config, 2 * M + 1, PAGE)
    prefill = jax.jit(functools.partial(model_step.prefill, config=family.config, backend="reference"))
    logits, _ = prefill(weights_of(family), cache, tokens, tables, lens)
    whole = in_chunks(family, LEN)
    np.testing.assert_allclose(np.asarray(logits), whole, rtol=0, atol=1e-5 * np.abs(whole).max())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_close_to_float32(dtype: str) -> None:
    """Weights, activations and cache of 16 bits: logits are float32 and off by roundings alone."""
    family = SOME[2]
    tokens, tables = two_sequences(family)
    weights = jax.tree.map(lambda x: x.astype(dtype), weights_of(family))
    cache = kv_cache.init_cache(family.config, 2 * M + 1, PAGE, dtype)
    prefill = jax.jit(functools.partial(model_step.prefill, config=family.config))
    logits, _ = prefill(weights, cache, tokens, tables, np.full(2, LEN, np.int32))
    assert logits.dtype == np.float32
    whole = in_chunks(family, LEN)
    error = np.abs(np.asarray(logits) - whole).mean() / np.abs(whole).mean()
    assert error < {"bfloat16": 0.05, "float16": 0.01}[dtype]


def test_cache_geometry() -> None:
    config = SOME[0].config
    cache = kv_cache.init_cache(config, 13, PAGE, "bfloat16")
    assert cache.k.shape == cache.v.shape == (2 * 13, config.num_kv_heads, PAGE, config.head_dim)
    assert cache.page_size == PAGE
    assert cache.pages_per_layer(config) == 13
    assert kv_cache.page_bytes(config, PAGE, "bfloat16") * 13 == cache.k.nbytes + cache.v.nbytes


def test_dtypes_are_never_promoted_by_accident() -> None:
    """Strict promotion: an int32 that becomes a float, or a bfloat16 that becomes a float32, must say so."""
    family = SOME[2]
    tokens, tables = two_sequences(family)
    weights = jax.eval_shape(lambda: jax.tree.map(lambda x: x.astype("bfloat16"), weights_of(family)))
    cache = jax.eval_shape(lambda: kv_cache.init_cache(family.config, 13, PAGE, "bfloat16"))
    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(
            functools.partial(model_step.prefill, config=family.config), weights, cache, tokens, tables, np.full(2, LEN, np.int32)
        )
        jax.eval_shape(
            functools.partial(model_step.decode, config=family.config), weights, cache, tokens[:, 0], tables, np.ones(2, np.int32)
        )
