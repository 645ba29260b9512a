"""Products: a row's bits are its own, what does not fit is said, and who takes which shapes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import backends, matmul
from pallas_kernels.matmul import native as module
from pallas_kernels.matmul import panels

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


@pytest.mark.parametrize(
    "dtypes", [("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "float32")]
)
def test_panels_give_the_bits_of_the_weight_that_they_are_of(dtypes: tuple[str, str]) -> None:
    """For numbers of rows around those of a tile, outputs of one panel, an odd and an even number of them, gated or not."""
    needs_native()
    rng = np.random.default_rng(7)
    for D, F, is_gated in ((30, 16, False), (100, 48, False), (34, 48, True)):
        weight = jnp.asarray(rng.standard_normal((F * (1 + is_gated), D)), dtypes[1])
        turned = panels.to_panels(weight)
        assert panels.has_panels((2, F, D) if is_gated else (F, D), dtypes[1])
        np.testing.assert_array_equal(panels.from_panels(turned), weight)
        some = jnp.asarray([[0, F - 1], [15, 3]])
        np.testing.assert_array_equal(panels.rows_of(turned, some), weight[some])
        for X in (0, 1, 4, 5, 12, 13, 100):
            x = jnp.asarray(rng.standard_normal((X, D)), dtypes[0])
            options = {"norm": jnp.asarray(rng.uniform(0.5, 1.5, D), dtypes[0]), "eps": 1e-5, "is_gated": is_gated}
            for backend in ("native", "xla") if X == 5 else ("native",):
                wanted, found = (matmul(x, one, backend=backend, **options) for one in (weight, turned))  # type: ignore[arg-type]
                assert np.asarray(found).tobytes() == np.asarray(wanted).tobytes(), (D, F, is_gated, X, backend)


def test_what_has_no_panels_stays_what_it_is_and_what_is_none_is_refused() -> None:
    for shape, dtype in (
        ((24, 64), "float32"),
        ((16, 63), "bfloat16"),
        ((2, 8, 64), "float32"),
        ((16, 64), "float16"),
        ((64,), "float32"),
    ):
        assert not panels.has_panels(shape, dtype)
    assert panels.has_panels((3, 4, 8, 64), "float32")
    x = jnp.ones((2, 64))
    for weight in (
        jnp.ones((1, 64, 8, 1)),
        jnp.ones((1, 32, 16, 2)),
        jnp.ones((1, 64, 16, 1), "bfloat16"),
        jnp.ones((1, 32, 16, 1)),
    ):
        with pytest.raises(ValueError, match="weight"):
            matmul(x, weight)
    with pytest.raises(ValueError, match="even number of panels"):
        matmul(x, jnp.ones((3, 64, 16, 1)), is_gated=True)


@pytest.mark.parametrize("shape", INVARIANT, ids=str)
def test_a_row_has_its_bits_in_any_number_of_rows(shape: tuple[int, int, int, str, str]) -> None:
    needs_native()
    assert rows_differ(*shape) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_that_do_not_count_are_0_and_change_nothing(dtype: str) -> None:
    """Whatever stands in them, wherever they are, and whether the weight is turned on its way or was before."""
    needs_native()
    rng = np.random.default_rng(1)
    x, residual = (jnp.asarray(rng.standard_normal((90, n)), dtype) for n in (64, 48))
    weight = jnp.asarray(rng.standard_normal((96, 64)), dtype)
    options = {"norm": jnp.ones(64, dtype), "eps": 1e-5, "is_gated": True, "backend": "native"}
    whole = np.asarray(matmul(x, weight, residual=residual, **options))  # type: ignore[arg-type]
    for stretches in ([(0, 90)], [(0, 1)], [(89, 90)], [(3, 16), (17, 29), (30, 31)], [(0, 24), (40, 90)], []):
        is_real = np.zeros(90, bool)
        for first, last in stretches:
            is_real[first:last] = True
        rows = jnp.where(is_real[:, None], x, jnp.nan)
        for one in (weight, panels.to_panels(weight)):
            out = np.asarray(matmul(rows, one, residual=residual, is_real=jnp.asarray(is_real), **options))  # type: ignore[arg-type]
            assert out[is_real].tobytes() == whole[is_real].tobytes() and not out[~is_real].any(), stretches


def test_rows_that_count_are_told_by_one_bool_each() -> None:
    for is_real in (jnp.ones(4, bool), jnp.ones(3, jnp.int32), jnp.ones((3, 1), bool)):
        with pytest.raises(ValueError, match=r"matmul: is_real is .*, expected bool\[3\]"):
            matmul(jnp.ones((3, 8)), jnp.ones((4, 8)), is_real=is_real)


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
