"""Weights of int8 in C++ on a CPU: integers by rows of integers, widened for rows of floats."""

from __future__ import annotations

import jax

from pallas_kernels.native import matmul as native
from pallas_kernels.quantized_matmul.formats import Operands
from pallas_kernels.quantized_matmul.reference import round_rows


def unavailable(operands: Operands) -> str | None:
    """Why this backend cannot take these arrays, or None when it can."""
    if operands.weight.dtype.name != "int8" or operands.scales.ndim != 1:
        return "it takes weights of int8 with one scale for each output"
    if operands.x_scales is not None:
        return "it takes no rows of float8_e4m3fn with scales"
    return native.unavailable()


def matmul(operands: Operands, *, is_int8: bool) -> jax.Array:
    """[X, F] in float32."""
    x, weight, scales, _, _ = operands
    if not is_int8:
        return native.matmul_int8(x, weight, scales)
    rows, row_scales = round_rows(x)
    return native.matmul_int8(rows, weight, scales) * row_scales
