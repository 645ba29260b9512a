"""A weight as its panels, which a product in C++ reads as they are: sixteen outputs side by side, a step along D after the other.

What the checkpoint has, [F, D], it turns into panels on the way, again in each step: for few rows that takes a fifth of its time.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

LANES = 16
_AT_A_STEP = {"float32": 1, "bfloat16": 2, "int8": 4}  # numbers of an output, as many as a sum of 32 bits takes at once


def has_panels(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> bool:
    """Whether a weight of this shape, [..., F, D], can be had as panels: parts of a gated one are whole panels each."""
    at_a_step = _AT_A_STEP.get(jnp.dtype(dtype).name)
    outputs = shape[-2] if len(shape) == 3 and shape[0] == 2 else math.prod(shape[:-1])
    return at_a_step is not None and len(shape) > 1 and not outputs % LANES and not shape[-1] % at_a_step


def to_panels(weight: jax.Array) -> jax.Array:
    """[F, D] as [F / 16, D / n, 16, n], with n numbers of each output at a step: a copy. For what `has_panels`.

    Those of int8 have a step more, in front: -128 times the sum of each output, as the bytes of an int32. The processor
    multiplies bytes without a sign by bytes with one, so rows come with 128 added, and this takes it away again.
    """
    F, D = weight.shape
    at_a_step = _AT_A_STEP[weight.dtype.name]
    panels = weight.reshape(F // LANES, LANES, D // at_a_step, at_a_step).transpose(0, 2, 1, 3)
    if weight.dtype != jnp.int8:
        return panels
    starts = -128 * jnp.sum(weight, axis=1, dtype=jnp.int32)
    return jnp.concatenate([jax.lax.bitcast_convert_type(starts, jnp.int8).reshape(F // LANES, 1, LANES, 4), panels], axis=1)


def from_panels(panels: jax.Array) -> jax.Array:
    """What `to_panels` was given."""
    return panels[:, _head(panels) :].transpose(0, 2, 1, 3).reshape(panels.shape[0] * LANES, -1)


def rows_of(panels: jax.Array, indices: jax.Array) -> jax.Array:
    """Outputs of the weight by their numbers: [..., D]."""
    steps = panels[indices // LANES, :, indices % LANES]
    return steps[..., _head(panels) :, :].reshape(*indices.shape, -1)


def _head(panels: jax.Array) -> int:
    """Steps in front of those along D."""
    return int(panels.dtype == jnp.int8)
