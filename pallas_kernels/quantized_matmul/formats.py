"""What the bits of a quantised weight stand for. Knows the formats; refuses to know any product."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

DTYPES = ("int8", "float8_e4m3fn", "uint8")
MAX_SUM = (1 << 31) // (127 * 128)  # products of int8 in an int32 sum that cannot overflow
ZERO = 8  # the 4-bit number that stands for 0 where no zero points are given


class Operands(NamedTuple):
    """The arrays of one product."""

    x: jax.Array  # [X, D]
    weight: jax.Array  # [F, D], or uint8 [F, D / 2]
    scales: jax.Array  # float32 [F] or [D / group, F]
    zeros: jax.Array | None = None  # as the scales
    x_scales: jax.Array | None = None  # float32 [X]


def packing(weight: jax.Array) -> int:
    """Numbers in a byte of the weight."""
    return 2 if weight.dtype == jnp.uint8 else 1


def shape_of(operands: Operands) -> tuple[int, int, int]:
    """(F, number of groups, numbers in a group)."""
    scales = operands.scales
    groups = scales.shape[0] if scales.ndim == 2 else 1
    weight = operands.weight
    return weight.shape[0] * (weight.shape[2] if weight.ndim == 4 else 1), groups, operands.x.shape[1] // max(groups, 1)


def by_group(operands: Operands) -> Operands:
    """The same with scales and zeros of [groups, F]."""
    scales, zeros = (None if a is None else a.reshape(-1, a.shape[-1]) for a in (operands.scales, operands.zeros))
    return operands._replace(scales=scales, zeros=zeros)


def integers(weight: jax.Array) -> jax.Array:
    """The stored numbers of an int8 or 4-bit weight as int8 [F, D]; those of 4 bits less ZERO."""
    if weight.dtype == jnp.int8:
        return weight
    pairs = jnp.stack([weight & 15, weight >> 4], axis=-1).astype(jnp.int8) - jnp.int8(ZERO)
    return pairs.reshape(*weight.shape[:-1], -1)


def floats(weight: jax.Array) -> jax.Array:
    """The stored numbers as float32 [F, D], exact; those of 4 bits less ZERO."""
    if weight.dtype != jnp.float8_e4m3fn:
        return integers(weight).astype(jnp.float32)
    # XLA's CPU backend converts float8 by a long emulation, and float16 by one instruction that knows subnormals: the same bits,
    # moved to a float16's, are the number times 2^-8.
    bits = lax.bitcast_convert_type(weight, jnp.uint8).astype(jnp.uint16)
    magnitude = bits & 127
    half = lax.bitcast_convert_type(((bits & 128) << 8) | (magnitude << 7), jnp.float16)
    return jnp.where(magnitude == 127, jnp.nan, half.astype(jnp.float32) * 256.0)
