"""Products: a row's bits are its own, what does not fit is said, and who takes which shapes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import backends, matmul
from pallas_kernels.matmul import native as module

RNG = np.random.default_rng(0)
INVARIANT = (  # rows, D, outputs, dtype, weight's dtype
    (100, 200, 70, "float32", "float32"),
    (70, 100, 33, "bfloat16", "bfloat16"),
    (40, 64, 30, "float32", "bfloat16"),
)


def needs_native() -> None:
    if (reason := module.unavailable()) is not None:
        pytest.skip(reason)


def rows_differ(num_rows: int, D: int, F: int, dtype: str, weight_dtype: str) -> list[int]:
    """Counts of rows in which a row has other bits than among all; everything that may come with a product is there."""
    rng = np.random.default_rng(D)
    x, residual = (jnp.asarray(rng.standard_normal((num_rows, n)), dtype) for n in (D, F))
    weight, bias = jnp.asarray(rng.standard_normal((2 * F, D)), weight_dtype), jnp.asarray(rng.standard_normal(2 * F), dtype)
    norm = jnp.asarray(rng.uniform(0.5, 1.5, D), dtype)

    @jax.jit
    def compute(x: jax.Array, residual: jax.Array) -> jax.Array:
        options = {"norm": norm, "eps": 1e-5, "is_gated": True, "residual": residual, "backend": "native"}
        return matmul(x, weight, bias, **options)  # type: ignore[arg-type]

    wanted = np.asarray(compute(x, residual))
    found = {}
    for count in (1, 2, 3, 4, 5, 7, 12, 13, 33, num_rows):
        order = rng.permutation(num_rows)[:count]
        found[count] = np.asarray(compute(x[order], residual[order])).tobytes() == wanted[order].tobytes()
    return [count for count, same in found.items() if not same]


@pytest.mark.parametrize("shape", INVARIANT, ids=str)
def test_a_row_has_its_bits_in_any_number_of_rows(shape: tuple[int, int, int, str, str]) -> None:
    needs_native()
    assert rows_differ(*shape) == []


@pytest.mark.parametrize("backend", ["xla", "native"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("D", [40, 41])  # numbers of 16 bits are multiplied in pairs
def test_what_is_not_finite_stays_in_its_row_and_shows(D: int, dtype: str, backend: str) -> None:
    if backend == "native":
        needs_native()
    x = RNG.standard_normal((9, D)).astype(np.float32)
    x[2, D - 1], x[5, 0], x[7, 3] = np.nan, np.inf, -np.inf
    weight = jnp.asarray(RNG.standard_normal((10, D)), dtype)
    for options in ({}, {"is_gated": True}, {"norm": jnp.ones(D, dtype)}):
        out = np.asarray(matmul(jnp.asarray(x, dtype), weight, **options, backend=backend), np.float32)  # type: ignore[arg-type]
        bad = ~np.isfinite(out)
        assert bad[[2, 5, 7]].any(axis=1).all() and not np.delete(bad, [2, 5, 7], axis=0).any()
        assert np.isnan(out[2]).all()


def test_a_sum_too_large_for_the_result_is_infinite_and_ties_are_rounded_to_even() -> None:
    needs_native()
    weight = jnp.asarray([[1.0, 1.0]], "bfloat16")
    for backend in ("xla", "native"):
        run = functools.partial(matmul, weight=weight, backend=backend)
        sums = [run(jnp.asarray([[a, b]], "bfloat16")).item() for a, b in ((256.0, 1.0), (258.0, 1.0), (3e38, 3e38))]
        assert sums == [256.0, 260.0, np.inf]


def test_the_portable_path_has_a_gradient_and_the_native_one_says_that_it_has_none() -> None:
    needs_native()
    x, weight = jnp.ones((3, 8)), jnp.ones((4, 8))

    def loss(weight: jax.Array, backend: backends.Backend) -> jax.Array:
        return matmul(x, weight, norm=jnp.ones(8), is_gated=True, backend=backend).sum()

    assert np.isfinite(jax.grad(loss)(weight, "xla")).all()
    with pytest.raises(ValueError, match="cannot be differentiated"):
        jax.grad(loss)(weight, "native")


def test_one_row_of_16_bits_makes_no_float_copy_of_a_weight() -> None:
    if jax.default_backend() != "cpu":
        pytest.skip("says what XLA does on a CPU")
    shapes = jax.ShapeDtypeStruct((1, 512), "bfloat16"), jax.ShapeDtypeStruct((4096, 512), "bfloat16")
    analysis = jax.jit(functools.partial(matmul, backend="xla")).lower(*shapes).compile().memory_analysis()
    assert analysis is not None and analysis.temp_size_in_bytes < 512 * 4096 * 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_with_auto_a_row_has_its_bits_among_any_number_of_rows(dtype: str) -> None:
    """Decode steps and chunks of prompts have very different numbers of them."""
    needs_native()
    x, weight = (
        jax.random.normal(jax.random.key(seed), shape).astype(dtype) for seed, shape in ((0, (600, 200)), (1, (72, 200)))
    )
    whole = matmul(x, weight)
    for count in (1, 7, 33, 129):
        np.testing.assert_array_equal(matmul(x[5 : 5 + count], weight), whole[5 : 5 + count])
