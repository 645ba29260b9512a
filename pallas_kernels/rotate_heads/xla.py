"""The portable path, for every device, and to be differentiated."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.matmul.around import rms_norm


def rotate_heads(
    qkv: jax.Array, cos: jax.Array, sin: jax.Array, q_norm: jax.Array | None, k_norm: jax.Array | None, eps: float
) -> tuple[jax.Array, ...]:
    """See the contract in `pallas_kernels.rotate_heads`."""
    X, G, H = len(qkv), qkv.shape[2] - 2, qkv.shape[3]
    q, k, v = qkv[:, :, :G].reshape(X, -1, H), qkv[:, :, G], qkv[:, :, G + 1]
    q, k = (x if norm is None else rms_norm(x, norm, eps) for x, norm in ((q, q_norm), (k, k_norm)))
    q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
    return told(q, k, v)


@jax.named_scope("checks")
def told(*heads: jax.Array) -> tuple[jax.Array, ...]:
    """Heads [X, ..., H] with 0 for what is not finite, and bool [X], whether all of a token's numbers were."""
    finite = [jnp.isfinite(x) for x in heads]
    is_finite = functools.reduce(jnp.logical_and, (x.all(axis=range(1, x.ndim)) for x in finite))
    return *(jnp.where(mask, x, 0) for mask, x in zip(finite, heads, strict=True)), is_finite


@jax.named_scope("rope")
def _rotated(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """The pairs (i, i + H/2) of every head of x [X, heads, H], turned by angles [X, H/2]."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
