"""Quantised weights: how much rounding costs, what the formats mean, what does not fit, and no float copy of a weight."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.native.matmul import unavailable as native_unavailable
from pallas_kernels.quantized_matmul import cases, quantize, quantized_matmul

X, D, F = 8, 512, 96


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize(
    ("dtype", "options", "most"),
    [
        ("int8", {}, 1e-2),
        ("int8", {"group_size": 64}, 7e-3),
        ("int4", {"group_size": 32}, 1e-1),
        ("int4", {"group_size": 128}, 1.25e-1),
        ("int4", {"group_size": 32, "has_zeros": True}, 9e-2),
        ("float8_e4m3fn", {}, 3e-2),
        ("float8_e4m3fn", {"group_size": 128}, 3e-2),
    ],
)
def test_rounding_a_weight_costs_at_most(dtype: str, options: dict, most: float) -> None:
    x, weight = normal(0, X, D), normal(1, F, D)
    packed, scales, *zeros = quantize(weight, dtype, **options)
    out = quantized_matmul(x, packed, scales, zeros=zeros[0] if zeros else None, backend="xla")
    exact = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    assert np.linalg.norm(out - exact) / np.linalg.norm(exact) <= most


def test_rounding_rows_to_int8_stays_in_its_bound() -> None:
    x, (weight, scales) = normal(0, X, D), quantize(normal(1, F, D), "int8")
    numbers = np.asarray(weight, np.float64) * np.asarray(scales)[:, None]
    exact = np.asarray(x, np.float64) @ numbers.T
    error = np.abs(quantized_matmul(x, weight, scales, activations="int8", backend="xla") - exact)
    bound = np.abs(np.asarray(x)).max(-1)[:, None] / 254 * np.abs(numbers).sum(-1)
    assert (error <= bound).all()
    assert np.linalg.norm(error) / np.linalg.norm(exact) <= 1.2e-2


@pytest.mark.parametrize("dtype", ["int8", "int4", "float8_e4m3fn"])
@pytest.mark.parametrize("group_size", [0, 32])
def test_numbers_that_the_format_has_are_kept(dtype: str, group_size: int) -> None:
    largest = {"int8": 127, "int4": 7, "float8_e4m3fn": 448}[dtype]
    weight = np.random.default_rng(0).integers(-7, 8, (4, 64)).astype(np.float32)
    weight[:, ::32] = largest
    out = quantized_matmul(jnp.eye(64), *quantize(jnp.asarray(weight), dtype, group_size=group_size), backend="reference")
    np.testing.assert_array_equal(out.T, weight)


def test_a_weight_of_zeros_stays_zero() -> None:
    for dtype, has_zeros in (("int8", False), ("int4", False), ("int4", True), ("float8_e4m3fn", False)):
        packed, scales, *zeros = quantize(jnp.zeros((4, 64)), dtype, group_size=32, has_zeros=has_zeros)
        assert not quantized_matmul(normal(0, 2, 64), packed, scales, zeros=zeros[0] if zeros else None, backend="xla").any()


def test_words_of_gptq_are_taken_after_a_transpose() -> None:
    """qweight int32 [D / 8, F] holds number 8i + k in bits 4k of word i; scales [groups, F]; zeros are stored less one."""
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 16, (64, 32)).astype(np.uint32)  # [D, F]
    words = sum(numbers[k::8] << np.uint32(4 * k) for k in range(8))
    scales, stored = rng.uniform(0.5, 1.5, (2, 32)).astype(np.float32), rng.integers(0, 15, (2, 32))
    packed = np.ascontiguousarray(words.T).view(np.uint8)
    x = rng.standard_normal((3, 64)).astype(np.float32)
    expected = x @ ((numbers - np.repeat(stored + 1.0, 32, 0)) * np.repeat(scales, 32, 0))
    arrays = [jnp.asarray(a) for a in (x, packed, scales)]
    out = quantized_matmul(*arrays, zeros=jnp.asarray(stored + 1, jnp.float32), backend="xla")
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_a_nan_of_one_row_stays_there_and_zero_rows_are_zero() -> None:
    weight, scales = quantize(normal(1, F, D), "int8")
    x = normal(0, 3, D).at[0, 5].set(jnp.nan).at[1].set(0.0)
    for activations in (None, "int8"):
        out = np.asarray(quantized_matmul(x, weight, scales, activations=activations, backend="xla"))
        assert np.isnan(out[0]).all() and not out[1].any() and np.isfinite(out[2]).all()


def test_the_portable_path_makes_no_float_copy_of_a_weight() -> None:
    if jax.default_backend() != "cpu":
        pytest.skip("says what XLA does on a CPU")
    for case in (
        cases.Case(1, 2048, 8192, "int8"),
        cases.Case(8, 2048, 8192, "int8", group=64, dtype="float32"),
        cases.Case(16, 2048, 8192, "int4", group=128),
        cases.Case(1, 2048, 8192, "float8_e4m3fn"),
        cases.Case(64, 2048, 8192, "int8"),
    ):
        call = cases.make(case)
        function = jax.jit(functools.partial(quantized_matmul, backend="xla", **call.options))
        analysis = function.lower(**call.arrays).compile().memory_analysis()
        assert analysis is not None and analysis.temp_size_in_bytes < 4 * 2048 * 8192 / 3, case


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": jnp.zeros((2, 60))}, "expected"),
        ({"x": jnp.zeros(64)}, "axes"),
        ({"x": jnp.zeros((2, 64), jnp.int32)}, "x of int32"),
        ({"weight": jnp.zeros((8, 64), jnp.int16)}, "weights of int16"),
        ({"scales": jnp.ones(7)}, "scales"),
        ({"scales": jnp.ones(8, jnp.bfloat16)}, "scales"),
        ({"scales": jnp.ones((3, 8))}, "groups"),
        ({"zeros": jnp.ones(8)}, "zeros are for 4-bit"),
        ({"x_scales": jnp.ones(2)}, "x_scales"),
        ({"activations": "int4"}, "activations"),
        ({"out_dtype": "int8"}, "out_dtype"),
        ({"x": jnp.zeros((2, 64), jnp.float8_e4m3fn)}, "needs out_dtype"),
        ({"weight": jnp.zeros((8, 64), jnp.float8_e4m3fn), "activations": "int8"}, "int8 activations"),
        ({"weight": jnp.zeros((8, 32), jnp.uint8), "scales": jnp.ones((64, 8))}, "whole bytes"),
        ({"weight": jnp.zeros((1, 17, 16, 4), jnp.int8), "scales": jnp.ones(16)}, "axes"),
        ({"weight": jnp.zeros((1, 16, 16, 4), jnp.int8), "scales": jnp.ones(16), "activations": "int8"}, "panels of the weight"),
        (
            {
                "x": jnp.zeros((2, 66)),
                "weight": jnp.zeros((1, 17, 16, 4), jnp.int8),
                "scales": jnp.ones(16),
                "activations": "int8",
            },
            "panels of the weight",
        ),
        (
            {"x": jnp.zeros((1, 140_000)), "weight": jnp.zeros((8, 140_000), jnp.int8), "activations": "int8"},
            "sums of 140000 products",
        ),
        ({"bias": jnp.zeros(7)}, "bias"),
        ({"is_gated": True, "residual": jnp.zeros((2, 8))}, "residual"),
    ],
)
def test_what_does_not_fit_is_said(change: dict, words: str) -> None:
    arguments: dict[str, Any] = {"x": jnp.zeros((2, 64)), "weight": jnp.zeros((8, 64), jnp.int8), "scales": jnp.ones(8)} | change
    with pytest.raises(ValueError, match=words):
        quantized_matmul(**arguments)


@pytest.mark.parametrize(
    ("weight", "dtype", "options"),
    [
        (normal(0, 4, 4), "int3", {}),
        (normal(0, 4), "int8", {}),
        (normal(0, 4, 30), "int8", {"group_size": 16}),
        (normal(0, 4, 9), "int4", {}),
        (normal(0, 4, 8), "int8", {"has_zeros": True}),
    ],
)
def test_what_cannot_be_quantised_is_said(weight: jax.Array, dtype: str, options: dict) -> None:
    with pytest.raises(ValueError, match="quantize"):
        quantize(weight, dtype, **options)


def integers_differ(X: int, D: int, F: int) -> bool:
    """Whether products of int8 rows in C++ have other bits than exact sums. -128 is in the weight, which no rounding yields."""
    rows = np.random.default_rng(X * D + F).integers(-127, 128, (X, D))
    rows[:, 0], rows[0] = 127, 127  # so that rounding the row again changes nothing; and the largest sums
    weight = np.random.default_rng(F).integers(-128, 128, (F, D)).astype(np.int8)
    weight[0], weight[-1] = 127, -128
    scales = jnp.ones(F, jnp.float32)
    out = quantized_matmul(jnp.asarray(rows, jnp.float32), jnp.asarray(weight), scales, activations="int8", backend="native")
    exact = (rows @ weight.astype(np.int64).T).astype(np.float32)
    row_scale = np.float32(127) * np.float32(1 / 127)
    return not np.array_equal(np.asarray(out), exact * row_scale)


@pytest.mark.parametrize(("X", "D", "F"), [(1, 64, 9), (2, 63, 4), (5, 576, 33), (13, 101, 7), (40, 1536, 130), (1, 4099, 3)])
def test_integers_are_multiplied_exactly(X: int, D: int, F: int) -> None:
    if native_unavailable() is not None:
        pytest.skip(native_unavailable())
    assert not integers_differ(X, D, F)


@pytest.mark.parametrize("backend", ["reference", "xla", "native"])
def test_a_row_that_is_not_finite_stays_so_among_many(backend: str) -> None:
    """XLA's CPU backend may lose a NaN in a maximum, which it does not in few rows."""
    if backend == "native" and native_unavailable() is not None:
        pytest.skip(native_unavailable())
    weight, scales = quantize(normal(0, 64, 64).at[jnp.array([3, 40]), 7].set(jnp.nan), "int8")
    assert np.isnan(np.asarray(scales)).nonzero()[0].tolist() == [3, 40]
    x = normal(1, 97, 64).at[jnp.array([5, 60, 96]), jnp.array([0, 33, 63])].set(jnp.array([jnp.nan, jnp.inf, jnp.nan]))
    out = np.asarray(quantized_matmul(x, weight, jnp.ones(64), activations="int8", backend=backend))
    assert np.isnan(out).all(axis=1).nonzero()[0].tolist() == [5, 60, 96] and np.isnan(out).any(axis=1).sum() == 3
