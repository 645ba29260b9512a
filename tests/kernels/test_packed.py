"""Packed panels: every bit of the weight comes back, and products have those of the panels, whatever numbers stand in them."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import matmul
from pallas_kernels.matmul import packed, panels
from pallas_kernels.native import building
from pallas_kernels.native import matmul as native

needs_pairs = pytest.mark.skipif("avx512_bf16" not in building._processor(), reason="this processor has no products of pairs")
STEP = 32  # numbers of a panel's step


def bits(array: jnp.ndarray) -> np.ndarray:
    return np.asarray(array).view(np.uint16)


def weight_of(F: int, D: int, *, stray: float = 3e-4, seed: int = 0) -> np.ndarray:
    """Bits of bfloat16 [F, D]: a normal distribution, and such a share of any bits, but those of what is not finite."""
    rng = np.random.default_rng(seed)
    found = bits(jnp.asarray(rng.standard_normal((F, D)) * 0.02, jnp.bfloat16)).copy()
    any_bits = rng.integers(0, 1 << 16, (F, D)).astype(np.uint16)
    any_bits[(any_bits & 0x7F80) == 0x7F80] = 0x8000  # -0
    return np.where(rng.random((F, D)) < stray, any_bits, found)


def pack(weight: np.ndarray) -> tuple[jnp.ndarray, jnp.ndarray, list[bool]]:
    """Its panels, these packed, and which of them fit."""
    if (reason := native.unavailable()) is not None:
        pytest.skip(reason)
    turned = panels.to_panels(jnp.asarray(weight.view(jnp.bfloat16)))
    smaller, fits = native.pack_panels(turned)
    return turned, smaller, np.asarray(fits).tolist()


def products_differ(D: int, F: int, *, is_gated: bool, stray: float) -> list[int]:
    """Numbers of rows for which packed panels give other bits than panels: around those of a tile, and for several tasks."""
    rng = np.random.default_rng(D)
    turned, smaller, fits = pack(weight_of(F * (1 + is_gated), D, stray=stray))
    assert all(fits)
    bias = jnp.asarray(rng.standard_normal(F * (1 + is_gated)), jnp.bfloat16)
    norm = jnp.asarray(rng.uniform(0.5, 1.5, D), jnp.bfloat16)
    found = []
    for X in (0, 1, 2, 3, 7, 11, 12, 13, 24, 25, 100, 300):
        x, residual = (jnp.asarray(rng.standard_normal((X, n)), jnp.bfloat16) for n in (D, F))
        options = {"norm": norm, "eps": 1e-5, "is_gated": is_gated}
        options |= {"residual": residual, "is_real": jnp.asarray(rng.random(X) < 0.9)} if X > 24 else {"bias": bias}
        options |= {"is_real": jnp.zeros(X, bool)} if X == 11 else {"out_dtype": "float32"} if X == 13 else {}
        wanted, got = (np.asarray(matmul(x, one, backend="native", **options)) for one in (turned, smaller))  # type: ignore[arg-type]
        if wanted.tobytes() != got.tobytes():
            found.append(X)
    return found


SHAPES = ((64, 16, False, 0.0), (64, 48, False, 3e-3), (576, 96, True, 3e-4), (1032, 80, False, 3e-4), (520, 1040, False, 3e-4))


@needs_pairs
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_have_the_bits_of_those_of_panels(shape: tuple[int, int, bool, float]) -> None:
    D, F, is_gated, stray = shape
    assert products_differ(D, F, is_gated=is_gated, stray=stray) == []


@needs_pairs
def test_every_bit_comes_back() -> None:
    """Zeros, subnormal numbers, infinities and NaN too: all bits that there are, each where it was."""
    for F, D in ((16, 64), (48, 512), (80, 1032)):
        weight = weight_of(F, D)
        _, smaller, fits = pack(weight)
        assert all(fits)
        np.testing.assert_array_equal(bits(packed.from_packed(smaller, D)), weight)
        some = np.asarray([[0, F - 1, 15], [3, 3, F // 2]])
        np.testing.assert_array_equal(bits(packed.rows_of(smaller, jnp.asarray(some), D)), weight[some])
    # Sixteen exponents fill a panel's: all bits are sixteen panels.
    all_bits = np.arange(1 << 16, dtype=np.uint16)
    exponents = (all_bits & 0x7F80) >> 7
    weight = np.concatenate([all_bits[exponents // 16 == some].reshape(16, 256) for some in range(16)])
    _, smaller, fits = pack(weight)
    assert fits == [True] * 16
    np.testing.assert_array_equal(bits(packed.from_packed(smaller, 256)), weight)


@needs_pairs
@pytest.mark.parametrize("D", [64, 520])
def test_strays_stand_anywhere_and_one_too_many_is_said(D: int) -> None:
    room = (1 + D // 512) * 8 - 1
    places = [0, 31, STEP, D * 16 - 1, D * 16 - STEP, *range(3 * STEP, 3 * STEP + room - 5)]  # a step of them, two in another
    for count in (1, room, room + 1):
        numbers = np.tile(np.arange(16, dtype=np.uint16) + 112 << 7, D)  # sixteen exponents are there
        strays = np.asarray([*places, 5 * STEP])[:count]
        numbers[strays] = 0x0123 + strays
        steps = numbers.reshape(1, D // 2, 16, 2).transpose(0, 2, 1, 3).reshape(16, D)
        turned, smaller, fits = pack(steps)
        assert fits == [count <= room]
        if all(fits):
            np.testing.assert_array_equal(bits(packed.from_packed(smaller, D)), steps)
            x = jnp.asarray(np.random.default_rng(0).standard_normal((30, D)), jnp.bfloat16)
            np.testing.assert_array_equal(bits(matmul(x, smaller)), bits(matmul(x, turned)))


@needs_pairs
def test_where_products_are_not_in_c_plus_plus_they_are_what_they_were() -> None:
    weight = weight_of(96, 64)
    _, smaller, _ = pack(weight)
    x = jnp.asarray(np.random.default_rng(2).standard_normal((5, 64)), jnp.bfloat16)
    wanted = matmul(x, jnp.asarray(weight.view(jnp.bfloat16)), is_gated=True, backend="xla")
    np.testing.assert_array_equal(bits(matmul(x, smaller, is_gated=True, backend="xla")), bits(wanted))


def test_what_is_not_smaller_stays_what_it_is() -> None:
    for shape, dtype in (((1, 64, 16, 1), "float32"), ((2, 6, 16, 2), "bfloat16"), ((2, 4, 16, 2), "bfloat16")):
        assert not packed.can_pack(jnp.zeros(shape, dtype))
    assert packed.can_pack(jnp.zeros((1, 32, 16, 2), "bfloat16"))


@needs_pairs
def test_a_panel_of_zeros_is_one() -> None:
    """It has no stray: nobody looks for the end of them."""
    pack(weight_of(16, 64))
    zeros = jnp.zeros((2, packed.num_words(64)), jnp.uint16)
    assert not packed.from_packed(zeros, 64).any()
    assert not np.asarray(matmul(jnp.ones((3, 64), jnp.bfloat16), zeros, backend="native")).any()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"panels are bfloat16\[1, 6, 16, 2\], expected what packed.can_pack"):
        native.pack_panels(jnp.zeros((1, 6, 16, 2), "bfloat16"))
    words = packed.num_words(64)
    for x, weight in (
        (jnp.ones((2, 64)), jnp.zeros((1, words), "uint16")),
        (jnp.ones((2, 64), "bfloat16"), jnp.zeros((1, words - 1), "uint16")),
        (jnp.ones((2, 62), "bfloat16"), jnp.zeros((1, words), "uint16")),
    ):
        with pytest.raises(ValueError, match=r"matmul: packed panels of the weight are .*, expected uint16\[P, "):
            matmul(x, weight)
    with pytest.raises(ValueError, match="even number of panels"):
        matmul(jnp.ones((2, 64), "bfloat16"), jnp.zeros((3, words), "uint16"), is_gated=True)
