"""Numbers to 8 bits and a scale, by steps that round alike on every backend. Refuses to know pages.

Nothing is divided but 1 by a scale: XLA turns divisions by a constant or by what is broadcast into products with a reciprocal
where it likes, and they round differently.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

LARGEST = {"float8_e4m3fn": 448.0, "int8": 127.0}
# A lower bound that float32 holds as a normal number with room for quotients: subnormal ones are 0 on some backends.
LOWEST_SCALE = 2.0**-100
_NOT_FINITE = {"float8_e4m3fn": 0x7F, "int8": -128}  # bits


def scales_of(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """float32 [...], the scale of each head of x [..., H]; NaN for one with a number that is not finite."""
    peak = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1)
    scale = jnp.maximum(peak * np.float32(1 / LARGEST[dtype.name]), np.float32(LOWEST_SCALE))
    return jnp.where(jnp.isfinite(peak), scale, jnp.nan)


def quantise(x: jax.Array, scales: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """x [..., H] over `scales` [...], clipped and rounded half to even, in `dtype`."""
    ratio = x.astype(jnp.float32) * _reciprocal(scales)[..., None]
    largest = LARGEST[dtype.name]
    clipped = jnp.clip(ratio, -largest, largest)
    is_integer = jnp.issubdtype(dtype, jnp.integer)
    rounded = jnp.round(clipped).astype(dtype) if is_integer else clipped.astype(dtype)
    bits = rounded if is_integer else rounded.view(jnp.uint8)
    return jnp.where(jnp.isfinite(ratio), bits, jnp.asarray(_NOT_FINITE[dtype.name], bits.dtype)).view(dtype)


def _reciprocal(x: jax.Array) -> jax.Array:
    """1 / x as IEEE rounds it, on GPUs too, where XLA divides with an error of an ulp (it gives LLVM `-nvptx-prec-divf32=1`).

    One step of Newton's. The residue is summed from products of halves of 12 bits, which are exact: a compiler that fuses a
    product with a sum, as the one for GPUs does and the one for CPUs does not, then changes nothing.
    """
    shrink = jnp.where(x > 1, np.float32(2.0**-64), np.float32(1))  # or the halves of a small reciprocal are subnormal
    x = x * shrink
    guess = 1 / x
    (x_high, x_low), (guess_high, guess_low) = _halves(x), _halves(guess)
    residue = ((1 - x_high * guess_high) - x_high * guess_low - x_low * guess_high) - x_low * guess_low
    return (guess + guess * residue) * shrink


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 as a sum of two with 12 significant bits each."""
    high = (x.view(jnp.uint32) & np.uint32(0xFFFFF000)).view(jnp.float32)
    return high, x - high
