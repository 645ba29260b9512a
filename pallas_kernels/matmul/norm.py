"""The norm of rows, in JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last axis, computed in float32, in x's dtype. Source: arXiv 1910.07467."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    # transformers rounds to x's dtype before the scale; the same order here keeps bfloat16 logits comparable.
    return x32.astype(x.dtype) * scale
