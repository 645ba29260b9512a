"""Heads out of a product: a token's bits are its own, what is not finite is told, and what does not fit is said."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import rotate_heads
from pallas_kernels.native import heads as native
from pallas_kernels.rotate_heads import cases

BACKENDS = ("reference", "xla", "native")


def arrays_of(case: cases.Case) -> dict[str, jax.Array]:
    return {name: jnp.asarray(x) for name, x in cases.make(case).arrays.items()}


def needs(backend: str) -> None:
    if backend == "native" and (reason := native.unavailable()) is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(3, 3, 64), (8, 2, 128), (1, 5, 34)], ids=str)
def test_a_token_has_its_bits_among_any_number_of_tokens(shape: tuple[int, int, int], dtype: str) -> None:
    needs("native")
    arrays = arrays_of(cases.Case(200, *shape, dtype, has_norms=True))
    norms = {name: arrays.pop(name) for name in ("q_norm", "k_norm")}
    whole = rotate_heads(**arrays, **norms, eps=cases.EPS, backend="native")
    for first, count in ((0, 1), (7, 1), (3, 30), (150, 50)):
        part = rotate_heads(**{k: x[first : first + count] for k, x in arrays.items()}, **norms, eps=cases.EPS, backend="native")
        for got, expected in zip(part, whole, strict=True):
            assert np.asarray(got).tobytes() == np.asarray(expected[first : first + count]).tobytes()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_place_that_is_not_finite_is_told_and_becomes_0(dtype: str, backend: str) -> None:
    needs(backend)
    heads = arrays_of(cases.Case(4 * 18, 2, 1, 18, dtype))
    qkv = np.array(heads["qkv"])
    expected = np.ones(len(qkv), bool)
    for token, place in zip(range(0, len(qkv), 2), np.ndindex(2, 1, 18), strict=True):
        head = (token // 2) % 3
        qkv[(token, place[0], head, place[2])] = (np.nan, np.inf, -np.inf)[token // 2 % 7 % 3]
        expected[token] = False
    found = rotate_heads(jnp.asarray(qkv), heads["cos"], heads["sin"], backend=backend)
    np.testing.assert_array_equal(np.asarray(found.is_finite), expected)
    for x in found[:3]:
        assert np.isfinite(np.asarray(x).astype(np.float32)).all()


def test_a_number_too_large_once_it_is_rotated_is_not_finite() -> None:
    for backend in BACKENDS:
        needs(backend)
        qkv, angle = jnp.full((1, 1, 3, 2), 6e4, "float16"), jnp.full((1, 1), 0.5**0.5, "float32")
        found = rotate_heads(qkv, angle, angle, backend=backend)
        assert not found.is_finite[0] and found.q[0, 0, 1] == 0 and (np.asarray(found.v) == 6e4).all()


def test_the_portable_path_has_a_gradient() -> None:
    arrays = arrays_of(cases.Case(3, 2, 2, 16, "float32", has_norms=True))
    qkv = arrays.pop("qkv")

    def loss(qkv: jax.Array) -> jax.Array:
        q, k, v, _ = rotate_heads(qkv, **arrays, eps=cases.EPS, backend="xla")
        return (q.sum() + k.sum() + v.sum()) ** 2

    assert np.isfinite(jax.grad(loss)(qkv)).all() and np.abs(jax.grad(loss)(qkv)).max() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv": jnp.ones((3, 2, 64))}, "qkv has 3 axes, expected 4"),
        ({"qkv": jnp.ones((3, 2, 2, 64))}, "at least one query"),
        ({"qkv": jnp.ones((3, 2, 3, 63))}, "an even H"),
        ({"qkv": jnp.ones((3, 2, 3, 64), jnp.int8)}, "qkv of int8 is not supported"),
        ({"cos": jnp.ones((3, 64))}, r"cos is float32\[3, 64\], expected float32\[3, 32\]"),
        ({"sin": jnp.ones((3, 32), jnp.bfloat16)}, r"sin is bfloat16\[3, 32\]"),
        ({"q_norm": jnp.ones(32)}, r"q_norm is float32\[32\], expected float32\[64\]"),
        ({"k_norm": jnp.ones(64, jnp.bfloat16)}, r"k_norm is bfloat16\[64\]"),
    ],
)
def test_what_does_not_fit_is_said(changes: dict[str, jax.Array], message: str) -> None:
    arrays = {"qkv": jnp.ones((3, 2, 3, 64)), "cos": jnp.ones((3, 32)), "sin": jnp.ones((3, 32))}
    with pytest.raises(ValueError, match=f"rotate_heads: .*{message}"):
        rotate_heads(**(arrays | changes))
