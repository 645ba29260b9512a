"""Each formula of a layer against the same formula in float64, at float32 and at half precision."""

from __future__ import annotations

import types

import families
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest

from jaxpaged.config import RopeConfig
from jaxpaged.model import layers
from pallas_kernels import rotate_heads

HALF = {"bfloat16": (ml_dtypes.bfloat16, 2**-8), "float16": (np.float16, 2**-11), "float32": (np.float32, 2**-22)}
each_dtype = pytest.mark.parametrize(("dtype", "epsilon"), HALF.values(), ids=HALF)
RNG = np.random.default_rng(0)


@each_dtype
def test_rms_norm(dtype, epsilon: float) -> None:
    x, scale = (RNG.normal(0, 3, (5, 96))).astype(dtype), RNG.uniform(0.5, 1.5, 96).astype(dtype)
    got = layers.rms_norm(jnp.asarray(x), jnp.asarray(scale), 1e-5)
    assert got.dtype == dtype
    x64 = x.astype(np.float64)
    want = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-5) * scale.astype(np.float64)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=3 * epsilon, atol=1e-6)


def test_rms_norm_of_zeros_and_of_huge_values_is_finite() -> None:
    for value in (0.0, 1e-30, 1e4):
        x = jnp.full((1, 64), value, jnp.bfloat16)
        assert np.isfinite(np.asarray(layers.rms_norm(x, jnp.ones(64, jnp.bfloat16), 1e-6), np.float32)).all()


@each_dtype
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear(dtype, epsilon: float, has_bias: bool) -> None:
    """Weights may have several axes of outputs; sums are float32."""
    x, weight = RNG.normal(size=(7, 48)).astype(dtype), RNG.normal(0, 0.2, (3, 4, 48)).astype(dtype)
    bias = RNG.normal(size=(3, 4)).astype(dtype) if has_bias else None
    got = layers.linear(jnp.asarray(x), jnp.asarray(weight), None if bias is None else jnp.asarray(bias))
    assert got.shape == (7, 3, 4)
    assert got.dtype == dtype
    want = np.einsum("xi,abi->xab", x.astype(np.float64), weight.astype(np.float64))
    want += bias.astype(np.float64) if bias is not None else 0.0
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2 * epsilon, atol=4e-6)


def test_sums_of_half_precision_are_float32() -> None:
    """bfloat16 alone would stop counting at 256."""
    ones = jnp.ones((1, 4096), jnp.bfloat16)
    assert float(layers.linear(ones, ones)[0, 0]) == 4096.0


ROPES = [
    RopeConfig(),
    RopeConfig(theta=1e6),
    RopeConfig(1e4, "linear", 4.0),
    RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 8192),
    RopeConfig(500000.0, "llama3", 32.0, 1.0, 4.0, 8192),
    RopeConfig(500.0, "llama3", 8.0, 1.0, 4.0, 64),
]


@pytest.mark.parametrize("rope", ROPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_rope_frequencies(rope: RopeConfig, head_dim: int) -> None:
    want = [oracle._frequency(rope, i, head_dim) for i in range(head_dim // 2)]
    np.testing.assert_allclose(np.asarray(layers.rope_frequencies(rope, head_dim)), want, rtol=2e-6)


def test_the_llama3_cases_meet_every_branch() -> None:
    """Some frequencies are kept, some divided, some in between: else the test above would show little."""
    for rope in ROPES[3:]:
        ratios = np.array([rope.theta ** (-2 * i / 64) / oracle._frequency(rope, i, 64) for i in range(32)])
        assert (ratios == 1).any()
        assert np.isclose(ratios, rope.factor).any()
        assert ((ratios > 1.001) & (ratios < rope.factor - 0.001)).any()


def rotated(x: np.ndarray, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Heads [X, N, H], turned as queries, a group each."""
    return rotate_heads(jnp.stack([jnp.asarray(x)] * 3, axis=2), cos, sin).q


def test_rope_turns_pairs_and_scores_depend_on_distance_alone() -> None:
    config = families.FAMILIES[0].config
    H = config.head_dim
    q, k = RNG.normal(size=(2, 1, 1, H)).astype(np.float32)

    def turned(x: np.ndarray, position: int) -> np.ndarray:
        cos, sin = layers.rope_tables(config, jnp.array([position]))
        return np.asarray(rotated(x, cos, sin))[0, 0].astype(np.float64)

    np.testing.assert_array_equal(turned(q, 0), q[0, 0])
    for first, second in ((5, 3), (105, 103), (2, 0)):
        assert turned(q, first) @ turned(k, second) == pytest.approx(turned(q, 2) @ turned(k, 0), abs=1e-4)
    assert np.linalg.norm(turned(q, 77)) == pytest.approx(np.linalg.norm(q), rel=1e-6)
    x = np.tile(q[:, 0], (2001, 1))[:, None]
    want = oracle._rotate(x.astype(np.float64), config.rope)
    cos, sin = layers.rope_tables(config, jnp.arange(2001))
    # The angle itself is a float32: at position 2,000 it is right to 2,000 * 2 ** -24.
    np.testing.assert_allclose(np.asarray(rotated(x, cos, sin)), want, atol=1e-3)


def test_rope_keeps_the_dtype_and_computes_in_float32() -> None:
    config = families.FAMILIES[0].config
    x = RNG.normal(size=(3, 2, config.head_dim)).astype(ml_dtypes.bfloat16)
    cos, sin = layers.rope_tables(config, jnp.array([1, 50, 100]))
    got = rotated(x, cos, sin)
    assert got.dtype == jnp.bfloat16
    wide = np.asarray(rotated(x.astype(np.float32), cos, sin))
    np.testing.assert_array_equal(np.asarray(got), wide.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("has_bias", [False, True])
def test_gated_mlp(has_bias: bool) -> None:
    D, F = 24, 40
    x, gate_up, down = (RNG.normal(0, 0.3, shape).astype(np.float32) for shape in ((6, D), (2, F, D), (D, F)))
    gate_up_bias, down_bias = (RNG.normal(size=shape).astype(np.float32) if has_bias else None for shape in ((2, F), (D,)))
    layer = types.SimpleNamespace(gate_up=gate_up, gate_up_bias=gate_up_bias, down=down, down_bias=down_bias)
    got = layers.gated_mlp(jnp.asarray(x), layer)
    x, gate_up, down = (array.astype(np.float64) for array in (x, gate_up, down))
    gate, up = (x @ gate_up[i].T + (gate_up_bias[i] if has_bias else 0) for i in range(2))
    want = (gate / (1 + np.exp(-gate)) * up) @ down.T + (down_bias if has_bias else 0)
    np.testing.assert_allclose(np.asarray(got), want, atol=1e-5)
