"""Make quantised weights from float ones: round to nearest, one scale a group. Refuses to look at any activations."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.quantized_matmul.formats import ZERO

_LARGEST = {"int8": 127, "int4": 7, "float8_e4m3fn": 448}


def quantize(weight: jax.Array, dtype: str, *, group_size: int = 0, has_zeros: bool = False) -> Any:
    """Round a float weight to 8 or 4 bits a number.

    A group's largest number becomes the format's largest. int8 and int4 numbers are then off by at most half a scale, numbers of
    float8_e4m3fn by at most 1/16 of themselves or 2^-10 of a scale. For normal weights the relative error of a product is about
    0.01 (int8), 0.1 (int4 in groups of 32 to 128) and 0.03 (float8_e4m3fn).

    Args:
      weight: [F, D].
      dtype: "int8", "int4" (two in each byte of uint8) or "float8_e4m3fn".
      group_size: numbers along D that share a scale, a divisor of D; 0 for one scale for each output.
      has_zeros: give each group of "int4" a zero point too, so that its smallest number is 0 and its largest 15.

    Returns:
      (weight, scales) or (weight, scales, zeros) as `quantized_matmul` takes them.

    Raises:
      ValueError: an unknown dtype, a group size that does not divide D, or zero points for anything but "int4".
    """
    if dtype not in _LARGEST:
        raise ValueError(f"quantize: dtype {dtype!r}, expected one of {', '.join(_LARGEST)}")
    if weight.ndim != 2:
        raise ValueError(f"quantize: weight has {weight.ndim} axes, expected [F, D]")
    F, D = weight.shape
    group = group_size or D
    if group < 0 or D % group or (dtype == "int4" and group % 2):
        raise ValueError(f"quantize: group_size {group_size}, expected an even divisor of D, which is {D}")
    if has_zeros and dtype != "int4":
        raise ValueError(f"quantize: zero points are for 'int4', got {dtype!r}")

    values = weight.astype(jnp.float32).reshape(F, D // group, group)
    if has_zeros:
        low, high = jnp.minimum(values.min(-1), 0.0), jnp.maximum(values.max(-1), 0.0)  # 0 stays a number of the format
        scales = _not_zero((high - low) / 15)
        zeros = jnp.round(-low / scales)
    else:
        scales = _not_zero(jnp.abs(values).max(-1) / _LARGEST[dtype])
        zeros = jnp.full_like(scales, ZERO)
    scales += jnp.sum(values * 0.0, axis=-1)  # NaN where one is not finite: XLA's CPU backend may lose it in a maximum
    numbers = (values / scales[..., None]).reshape(F, D)
    if dtype == "int8":
        out = jnp.round(numbers).astype(jnp.int8)
    elif dtype == "int4":
        out = jnp.clip(jnp.round(numbers) + jnp.repeat(zeros, group, axis=1), 0, 15).astype(jnp.uint8)
        out = out[:, ::2] | (out[:, 1::2] << 4)
    else:
        out = numbers.astype(jnp.float8_e4m3fn)
    scales, zeros = (a.T if group_size else a[:, 0] for a in (scales, zeros))
    return (out, scales, zeros) if has_zeros else (out, scales)


def _not_zero(scales: jax.Array) -> jax.Array:
    """A group of zeros has any scale but 0, which nothing can be divided by."""
    return jnp.where(scales == 0, 1.0, scales)
