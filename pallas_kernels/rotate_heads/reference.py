"""The definition: a pair of numbers as a complex one, turned by another."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rotate_heads(
    qkv: jax.Array, cos: jax.Array, sin: jax.Array, q_norm: jax.Array | None, k_norm: jax.Array | None, eps: float
) -> tuple[jax.Array, ...]:
    """See the contract in `pallas_kernels.rotate_heads`."""
    half = qkv.shape[-1] // 2
    turn = (cos + 1j * sin)[:, None, None]

    def turned(x: jax.Array, norm: jax.Array | None) -> jax.Array:
        if norm is not None:
            wide = x.astype(jnp.float32)
            x = (wide / jnp.sqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + eps)).astype(x.dtype) * norm
        wide = x.astype(jnp.float32)
        pairs = (wide[..., :half] + 1j * wide[..., half:]) * turn
        return jnp.concatenate([pairs.real, pairs.imag], axis=-1).astype(qkv.dtype)

    q, k, v = turned(qkv[:, :, :-2], q_norm), turned(qkv[:, :, -2:-1], k_norm), qkv[:, :, -1:]
    is_finite = jnp.isfinite(jnp.concatenate([q, k, v], axis=2)).all(axis=(1, 2, 3))
    q, k, v = (jnp.where(jnp.isfinite(x), x, 0) for x in (q, k, v))
    return q.reshape(len(q), -1, 2 * half), k[:, :, 0], v[:, :, 0], is_finite
