"""The portable path: never a float copy of the whole weight.

A CPU multiplies int8 by int8 into int32 far faster than it turns a weight into floats, and exactly. So a few rows of floats are
written with int8 digits, which are rows of one integer product: two digits keep more of a number than bfloat16 and float16 do,
three as much as float32. The rest goes through blocks of outputs that stay in the cache as floats.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.bits import as_bits
from pallas_kernels.quantized_matmul.formats import MAX_SUM, ZERO, Operands, by_group, floats, integers, packing, shape_of
from pallas_kernels.quantized_matmul.reference import round_rows

# More rows than this and digits lose to blocks of floats (2048x8192, two AVX-512 cores, jax 0.10.2 and 0.12, November 2026).
DIGIT_ROWS = 16
BLOCK_OUTPUTS = 512
_BASE = 254.0  # a remainder of at most a half becomes a digit of at most 127


def matmul(operands: Operands, *, is_int8: bool) -> jax.Array:
    """[X, F] in float32."""
    _, groups, group = shape_of(operands)
    is_float = operands.weight.dtype == jnp.float8_e4m3fn
    operands = by_group(operands)
    if is_int8:
        return _digits(operands, 1)

    num_digits = 3 if operands.x.dtype == jnp.float32 else 2
    by_digits = not is_float and operands.x.dtype != jnp.float8_e4m3fn and group <= MAX_SUM
    few = by_digits and operands.x.shape[0] <= DIGIT_ROWS

    def on_cpu() -> jax.Array:
        return _digits(operands, num_digits) if few else _blocks(operands)

    def elsewhere() -> jax.Array:
        return _fused(operands) if groups == 1 and operands.zeros is None else _blocks(operands)

    return lax.platform_dependent(cpu=on_cpu, default=elsewhere)


def _digits(operands: Operands, num_digits: int) -> jax.Array:
    """Rows as `num_digits` int8 digits each, integer products of every group, then its scale."""
    x, weight, scales, zeros, _ = operands
    F, groups, group = shape_of(operands)
    X = len(x)
    digits, row_scales = _written(x.astype(jnp.float32), num_digits)
    if len(digits) == 1:
        digits = jnp.pad(digits, ((0, 1), (0, 0)))  # a CPU multiplies one int8 row ten times slower than two
    bytes_of_group = group // packing(weight)
    # What a group's numbers sum to is what a zero point multiplies; in digits, so that nothing is rounded twice.
    sums = None if zeros is None else jnp.sum(digits.astype(jnp.int32).reshape(-1, groups, group), axis=-1)

    def value(parts: jax.Array) -> jax.Array:
        parts = parts[: num_digits * X].astype(jnp.float32).reshape(num_digits, X, -1)
        return sum((parts[i] * _BASE**-i for i in range(1, num_digits)), parts[0])

    def add_group(index: jax.Array, total: jax.Array) -> jax.Array:
        rows = lax.dynamic_slice_in_dim(digits, index * group, group, 1)
        columns = integers(lax.dynamic_slice_in_dim(weight, index * bytes_of_group, bytes_of_group, 1))
        part = value(_product(rows, columns, jnp.int32))
        if zeros is not None and sums is not None:
            part -= value(sums[:, index][:, None]) * (zeros[index] - ZERO)
        return total + part * scales[index]

    total = jnp.zeros((X, F), jnp.float32)
    total = add_group(jnp.int32(0), total) if groups == 1 else lax.fori_loop(0, groups, add_group, total)
    return total * row_scales


def _written(x: jax.Array, num_digits: int) -> tuple[jax.Array, jax.Array]:
    """All rows' first digits, then their second ones and so on, int8 [num_digits * X, D], and scales [X, 1]."""
    first, scales = round_rows(x)
    digits, rest = [first], x / scales
    for _ in range(1, num_digits):
        rest = (rest - digits[-1].astype(jnp.float32)) * _BASE
        digits.append(jnp.round(rest).astype(jnp.int8))
    return jnp.concatenate(digits), scales


def _blocks(operands: Operands) -> jax.Array:
    """A loop over blocks of outputs, each made floats in turn."""
    x, weight, scales, zeros, x_scales = operands
    F, groups, group = shape_of(operands)
    # A CPU does not multiply one row but fuses it with the conversion, which it then does again and again: two rows at least.
    rows = jnp.pad(x.astype(jnp.float32), ((0, len(x) == 1), (0, 0)))
    block = next(n for n in range(min(F, BLOCK_OUTPUTS), 0, -1) if F % n == 0)
    if block * 4 < min(F, BLOCK_OUTPUTS):
        block = F  # a number of outputs with no divisor of a useful size

    def one(index: jax.Array) -> jax.Array:
        def of_block(a: jax.Array, axis: int) -> jax.Array:
            return lax.dynamic_slice_in_dim(a, index * block, block, axis)

        values = floats(of_block(as_bits(weight), 0).view(weight.dtype)).reshape(block, groups, group)
        if zeros is not None:
            values -= (of_block(zeros, 1) - ZERO).T[..., None]
        values = (values * of_block(scales, 1).T[..., None]).reshape(block, -1)
        return _product(rows, values, jnp.float32)

    out = jnp.moveaxis(lax.map(one, jnp.arange(F // block)), 0, 1).reshape(-1, F)[: len(x)]
    return out if x_scales is None else out * x_scales[:, None]


def _fused(operands: Operands) -> jax.Array:
    """One product in x's dtype, exact for every format, the scales afterwards: a GPU's compiler fuses the conversion into it."""
    x, weight, scales, _, x_scales = operands
    dtype = jnp.bfloat16 if x.dtype == jnp.float8_e4m3fn else x.dtype
    columns = weight if weight.dtype == jnp.float8_e4m3fn else integers(weight)
    out = _product(x.astype(dtype), columns.astype(dtype), jnp.float32) * scales[0]
    return out if x_scales is None else out * x_scales[:, None]


def _product(rows: jax.Array, columns: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """[X, D] times [F, D] transposed; float32 is not to become TF32 on a GPU."""
    precision = "highest" if rows.dtype == jnp.float32 else None
    return lax.dot_general(rows, columns, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=dtype)
