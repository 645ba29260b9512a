"""The formulas of a layer that do not depend on how the cache is kept: norm, linear, rotary embedding, gated MLP.

Each takes arrays and returns arrays; sums and products accumulate in float32 whatever the dtype of the weights.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxpaged.config import ModelConfig, RopeConfig


@jax.named_scope("norm")
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last axis, computed in float32, in x's dtype. Source: arXiv 1910.07467."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    # transformers rounds to x's dtype before the scale; the same order here keeps bfloat16 logits comparable.
    return x32.astype(x.dtype) * scale


@jax.named_scope("matmul")
def linear(x: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """x [..., I] times weight [O..., I] transposed, plus bias: [..., O...], in x's dtype with float32 sums.

    float32 is asked for explicitly: XLA's CPU backend has a fast path for a bfloat16 product only when the result is float32.
    """
    out_shape = weight.shape[:-1]
    flat = weight.reshape(-1, weight.shape[-1])
    y = lax.dot_general(x, flat, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    if bias is not None:
        y = y + bias.reshape(-1).astype(jnp.float32)
    return y.astype(x.dtype).reshape(*x.shape[:-1], *out_shape)


def rope_frequencies(rope: RopeConfig, head_dim: int) -> jax.Array:
    """Angle per position of each of the H/2 pairs: float32 [H/2].

    Source: RoFormer (arXiv 2104.09864); "linear" divides by factor; "llama3" divides the low frequencies and leaves the
    high ones, as in Llama 3.1's reference code.
    """
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequencies = 1.0 / (rope.theta**exponent)
    if rope.rope_type == "default":
        return frequencies
    if rope.rope_type == "linear":
        return frequencies / rope.factor
    # Wavelengths shorter than original/high keep their frequency, longer than original/low are divided, a ramp between.
    wavelength = 2 * math.pi / frequencies
    original = rope.original_max_position_embeddings
    ramp = (original / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    ramp = jnp.clip(ramp, 0.0, 1.0)
    return frequencies * (ramp + (1.0 - ramp) / rope.factor)


@jax.named_scope("rope")
def rope_tables(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every angle, float32 [X, H/2] each. Float32 positions are exact to 16 million."""
    angles = positions.astype(jnp.float32)[:, None] * rope_frequencies(config.rope, config.head_dim)
    return jnp.cos(angles), jnp.sin(angles)


@jax.named_scope("rope")
def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn the pairs (i, i + H/2) of every head. x [X, heads, H], cos and sin [X, H/2]."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


@jax.named_scope("mlp")
def gated_mlp(x: jax.Array, layer) -> jax.Array:
    """down(silu(gate(x)) * up(x)). Source: SwiGLU, arXiv 2002.05202."""
    gate_up = linear(x, layer.gate_up, layer.gate_up_bias)  # [X, 2, F]
    return linear(jax.nn.silu(gate_up[:, 0]) * gate_up[:, 1], layer.down, layer.down_bias)
