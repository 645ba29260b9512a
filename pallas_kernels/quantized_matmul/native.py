"""Weights of int8 in C++ on a CPU: integers by rows of integers, widened for rows of floats."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.matmul.around import Around
from pallas_kernels.native import matmul as native
from pallas_kernels.quantized_matmul.formats import Operands


def unavailable(operands: Operands) -> str | None:
    """Why this backend cannot take these arrays, or None when it can."""
    if operands.weight.dtype.name != "int8" or operands.scales.ndim != 1:
        return "it takes weights of int8 with one scale for each output"
    if operands.x_scales is not None:
        return "it takes no rows of float8_e4m3fn with scales"
    return native.unavailable()


def matmul(operands: Operands, *, is_int8: bool) -> jax.Array:
    """[X, F] in float32."""
    del is_int8  # False: rows of integers have a call that does all in one
    return native.matmul_int8(operands.x, operands.weight, operands.scales)


def matmul_rounded(operands: Operands, around: Around, dtype: jnp.dtype) -> jax.Array:
    """[X, F] in `dtype`, of rows that are rounded, with all that is done around it."""
    x, weight, scales, _, _ = operands
    if dtype in (jnp.float32, x.dtype):
        return native.matmul(x, weight, around, dtype, scales)
    out = native.matmul(x, weight, around._replace(residual=None), jnp.float32, scales)
    return Around(residual=around.residual, is_real=around.is_real).result(out, dtype)
