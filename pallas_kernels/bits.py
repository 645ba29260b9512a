"""Narrow floats as integers, for operations that only move them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16}


def as_bits(x: jax.Array) -> jax.Array:
    """x's bits as uint8 or uint16 when it is a float of 8 or 16 bits, else x itself. `.view(dtype)` is the way back.

    XLA's CPU backend has no narrow floats: it rewrites a scatter or gather of them to convert the whole operand to float32 and
    back, which for a page pool is a copy of three or more times its size per layer. Integers are left alone.
    """
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
    return x.view(_UNSIGNED[x.dtype.itemsize]) if narrow else x
