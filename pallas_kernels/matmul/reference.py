"""The definition, one formula after the other in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.matmul.around import Around


def matmul(x: jax.Array, weight: jax.Array, around: Around, out_dtype: jax.typing.DTypeLike) -> jax.Array:
    """See the contract in `pallas_kernels.matmul`."""
    norm, eps, bias, is_gated, residual, is_real = around
    rows = x.astype(jnp.float32)
    if norm is not None:
        rows = rows / jnp.sqrt(jnp.mean(rows**2, axis=-1, keepdims=True) + eps)
        rows = (rows.astype(x.dtype) * norm).astype(jnp.float32)
    out = jnp.einsum("xd,fd->xf", rows, weight.astype(jnp.float32), precision="highest")
    if bias is not None:
        out += bias.astype(jnp.float32)
    if is_gated:
        gate, up = jnp.split(out, 2, axis=-1)
        out = jax.nn.silu(gate) * up
    if residual is not None:
        out += residual.astype(jnp.float32)
    if is_real is not None:
        out = jnp.where(is_real[:, None], out, 0)
    return out.astype(out_dtype)
