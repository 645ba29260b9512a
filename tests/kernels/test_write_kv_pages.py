"""Writing keys and values: the bits of the new tokens in their slots, and no other bit of any page but the null page's."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from pallas_kernels import write_kv_pages
from pallas_kernels.paged_decode_attention.cases import DTYPES


@functools.cache
def compiled(backend: str):
    return jax.jit(functools.partial(write_kv_pages, backend=backend), donate_argnums=0)


def lowered(backend: str, *arguments):
    try:
        return compiled(backend).lower(*arguments)
    except NotImplementedError as error:
        pytest.skip(str(error))


def write(backend: str, *arguments) -> np.ndarray:
    return lowered(backend, *arguments).compile()(*arguments)


each_backend = pytest.mark.parametrize("backend", ["xla", "native"])


@each_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_tokens", "S", "K", "H"), [(1, 16, 2, 64), (1, 8, 1, 32), (24, 16, 2, 64), (33, 8, 3, 80), (200, 128, 1, 256)]
)
def test_writes_exactly_the_slots(num_tokens: int, S: int, K: int, H: int, dtype: str, backend: str) -> None:
    rng = np.random.default_rng(num_tokens)
    P = 1 + 2 * -(-num_tokens // S) + 3
    pages = rng.normal(size=(P, K, S, H)).astype(DTYPES[dtype])
    new = rng.normal(size=(num_tokens, K, H)).astype(DTYPES[dtype])
    slots = rng.choice(np.arange(S, P * S), num_tokens, replace=False).astype(np.int32)
    padding = rng.random(num_tokens) < 0.25 if num_tokens > 1 else np.zeros(1, bool)
    slots[padding] = 0

    want = pages.copy()
    for x in np.nonzero(~padding)[0]:
        want[slots[x] // S, :, slots[x] % S] = new[x]
    got = np.asarray(write(backend, jax.numpy.asarray(pages), new, slots))
    assert got.dtype == pages.dtype
    assert got[1:].tobytes() == want[1:].tobytes()
    assert got[0, :, 1:].tobytes() == want[0, :, 1:].tobytes()  # padding has one slot of the null page


@each_backend
def test_consecutive_slots_of_one_page_and_the_very_last_slot(backend: str) -> None:
    pages = np.zeros((3, 2, 8, 4), np.float32)
    new = np.arange(9 * 8, dtype=np.float32).reshape(9, 2, 4) + 1
    slots = np.arange(15, 24, dtype=np.int32)
    got = np.asarray(write(backend, jax.numpy.asarray(pages), new, slots))
    np.testing.assert_array_equal(np.moveaxis(got, 1, 2).reshape(24, 2, 4)[15:], new)
    assert not np.moveaxis(got, 1, 2).reshape(24, 2, 4)[:15].any()


@each_backend
def test_new_values_are_cast_to_the_pages_dtype(backend: str) -> None:
    new = np.full((1, 1, 2), 257.0, np.float32)  # bfloat16 rounds 257 to 256
    got = write(backend, jax.numpy.zeros((2, 1, 8, 2), "bfloat16"), new, np.array([9], np.int32))
    assert got.dtype == "bfloat16"
    assert np.asarray(got[1, 0, 1]).tolist() == [256.0, 256.0]


@each_backend
def test_nan_and_negative_zero_keep_their_bits(backend: str) -> None:
    bits = np.array([0x7FC00001, 0x80000000, 0xFF800000, 0x00000001], np.uint32)
    new = bits.view(np.float32).reshape(1, 1, 4)
    got = np.asarray(write(backend, jax.numpy.zeros((2, 1, 8, 4)), new, np.array([8], np.int32)))
    assert got[1, 0, 0].view(np.uint32).tolist() == bits.tolist()


@each_backend
@pytest.mark.parametrize("num_tokens", [1, 8, 24])
def test_donated_pages_are_written_in_place(num_tokens: int, backend: str) -> None:
    pages = jax.ShapeDtypeStruct((4096, 2, 16, 64), "float32")
    new, slots = jax.ShapeDtypeStruct((num_tokens, 2, 64), "float32"), jax.ShapeDtypeStruct((num_tokens,), "int32")
    analysis = lowered(backend, pages, new, slots).compile().memory_analysis()
    assert analysis.alias_size_in_bytes >= 4096 * 2 * 16 * 64 * 4
    assert analysis.temp_size_in_bytes < 1 << 20


@pytest.mark.parametrize("dtype", ["int4", "uint4", "float4_e2m1fn"])
def test_pages_of_half_bytes_are_refused(dtype: str) -> None:
    pages = jax.numpy.zeros((2, 1, 8, 64), dtype)
    with pytest.raises(ValueError, match=f"write_kv_pages: pages of {dtype}, expected numbers of whole bytes"):
        write_kv_pages(pages, jax.numpy.zeros((1, 1, 64), dtype), jax.numpy.zeros(1, int))
