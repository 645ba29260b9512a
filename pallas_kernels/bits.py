"""16-bit floats as integers, for operations that only move them."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def as_bits(x: jax.Array) -> jax.Array:
    """x's bits as uint16 when it is a 16-bit float, else x itself. `.view(dtype)` is the way back.

    XLA's CPU backend has no 16-bit floats: it rewrites a scatter or gather of them to convert the whole operand to float32 and
    back, which for a page pool is a copy of three times its size per layer. Integers are left alone.
    """
    return x.view(jnp.uint16) if x.dtype in (jnp.bfloat16, jnp.float16) else x
