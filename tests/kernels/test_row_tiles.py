"""Rows computed in tiles: each result is its own row's, to the last bit, wherever it is and however many there are."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import paged_decode_attention, paged_prefill_attention
from pallas_kernels.row_tiles import RowTiles

RNG = np.random.default_rng(0)
COUNTS = (1, 2, 15, 16, 17, 40, 64)


def norm_and_product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """What differs most on a CPU by the number of rows: the norm's sum, and a product of one row."""
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5)
    return jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())))


@pytest.mark.parametrize("size", [1, 16])
def test_a_row_has_its_bits_in_any_number_of_rows(size: int) -> None:
    x, weight = RNG.normal(size=(64, 64)).astype(np.float32), RNG.normal(size=(96, 64)).astype(np.float32)

    @jax.jit
    def compute(x, weight, is_real):
        return RowTiles.of(is_real, size).map(lambda rows: norm_and_product(rows, weight), x)

    def in_tiles(x, weight):
        return compute(x, weight, np.ones(len(x), bool))  # which are real the compiler is not to know

    wanted = np.asarray(in_tiles(x, weight))
    np.testing.assert_allclose(wanted, norm_and_product(jnp.asarray(x), jnp.asarray(weight)), rtol=1e-4, atol=1e-4)
    plain = [np.asarray(jax.jit(norm_and_product)(x[:count], weight)) for count in COUNTS]
    assert any(found.tobytes() != plain[-1][: len(found)].tobytes() for found in plain), "there is nothing to fix here"
    for count in COUNTS:
        order = RNG.permutation(64)[:count]
        assert np.asarray(in_tiles(x[order], weight)).tobytes() == wanted[order].tobytes()


def test_only_tiles_with_a_real_row_are_computed() -> None:
    x = np.arange(1, 12, dtype=np.float32)[:, None]
    is_real = np.zeros(11, bool)
    is_real[[4, 5, 10]] = True
    doubled, kept = RowTiles.of(jnp.asarray(is_real), 4).map(lambda rows: (2 * rows, rows[:, 0] > 0), jnp.asarray(x))
    wanted = np.where(np.arange(11)[:, None] >= 4, 2 * x, 0)
    np.testing.assert_array_equal(doubled, wanted)
    np.testing.assert_array_equal(kept, wanted[:, 0] > 0)


def attention_call(dtype: str) -> dict[str, jax.Array]:
    pages = [jnp.asarray(RNG.normal(size=(40, 2, 16, 16)), dtype) for _ in range(2)]
    kv_lens = RNG.integers(1, 160, 12)
    tables = np.stack([RNG.permutation(np.arange(1, 40))[:10] for _ in kv_lens])
    return {
        "q": jnp.asarray(RNG.normal(size=(12, 1, 4, 16)), dtype),
        "block_tables": jnp.asarray(tables, jnp.int32),
        "kv_lens": jnp.asarray([*kv_lens[:-1], 0], jnp.int32),
        "k_pages": pages[0],
        "v_pages": pages[1],
    }


@pytest.mark.parametrize("window", [0, 24])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["reference", "xla", "native"])
def test_attention_of_a_tile_is_that_of_the_tile_alone(backend: str, dtype: str, window: int) -> None:
    call, options = attention_call(dtype), {"scale": 0.25, "window": window, "backend": backend, "return_lse": True}
    pages = call["k_pages"], call["v_pages"]

    def run(rows: np.ndarray, **how) -> tuple[np.ndarray, ...]:
        lens = call["kv_lens"][rows]
        found = paged_prefill_attention(
            call["q"][rows], *pages, call["block_tables"][rows], lens, jnp.maximum(lens - 1, 0), **options, **how
        )
        return tuple(np.asarray(one) for one in found)

    try:
        everyone = run(np.arange(12), batch_invariant=True)
    except NotImplementedError as error:
        pytest.skip(str(error))
    out, lse = paged_decode_attention(call["q"], *pages, call["block_tables"], call["kv_lens"], **options)
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(everyone[0].astype(np.float32), np.asarray(out, np.float32), rtol=0, atol=tolerance)
    np.testing.assert_allclose(everyone[1], lse, rtol=0, atol=1e-5)
    for count in (1, 3, 7):
        rows = RNG.permutation(12)[:count]
        for found, wanted in zip(run(rows, batch_invariant=True), everyone, strict=True):
            assert found.tobytes() == wanted[rows].tobytes()
    if backend != "native" and dtype == "float32":
        together = run(np.arange(12))[0]
        assert any(run(np.array([row]))[0].tobytes() != together[[row]].tobytes() for row in range(11))
