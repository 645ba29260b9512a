"""What a transformer does before a product and after it, as plain JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


@jax.named_scope("norm")
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last axis, computed in float32, in x's dtype. Source: arXiv 1910.07467."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    # transformers rounds to x's dtype before the scale; the same order here keeps bfloat16 logits comparable.
    return x32.astype(x.dtype) * scale


def finish(
    out: jax.Array, bias: jax.Array | None, residual: jax.Array | None, *, is_gated: bool, out_dtype: jax.typing.DTypeLike
) -> jax.Array:
    """What follows a float32 product [X, F] in `pallas_kernels.matmul`; each part rounds to the result's dtype."""
    if bias is not None:
        out = out + bias.astype(jnp.float32)
    out = out.astype(out_dtype)
    if is_gated:
        gate, up = jnp.split(out, 2, axis=-1)
        out = jax.nn.silu(gate) * up
    return out if residual is None else residual + out
