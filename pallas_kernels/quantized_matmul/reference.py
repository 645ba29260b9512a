"""The definition: the whole weight as floats, one product."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.quantized_matmul.formats import ZERO, Operands, by_group, floats, integers, shape_of


def matmul(operands: Operands, *, is_int8: bool) -> jax.Array:
    """[X, F] in float32."""
    F, groups, group = shape_of(operands)
    x, weight, scales, zeros, x_scales = by_group(operands)
    if is_int8:
        rows, row_scales = round_rows(x)
        parts = jnp.einsum(
            "xgd,fgd->gxf",
            rows.astype(jnp.int32).reshape(-1, groups, group),
            integers(weight).astype(jnp.int32).reshape(F, groups, group),
        ).astype(jnp.float32)
        if zeros is not None:
            parts -= (zeros - ZERO)[:, None] * rows.astype(jnp.int32).reshape(-1, groups, group).sum(-1).T[..., None]
        return jnp.sum(parts * scales[:, None], axis=0) * row_scales
    values = floats(weight).reshape(F, groups, group)
    if zeros is not None:
        values -= (zeros - ZERO).T[..., None]
    values = (values * scales.T[..., None]).reshape(F, -1)
    out = jnp.einsum("xd,fd->xf", x.astype(jnp.float32), values, precision="highest")
    return out if x_scales is None else out * x_scales[:, None]


def round_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows as int8 and their scales [X, 1]: round(x / scale) with scale = max|x| * (1 / 127), NaN of a row that is not finite."""
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    scales = jnp.where(largest == 0, 1.0, largest) * jnp.float32(1 / 127)
    scales += jnp.sum(x * 0.0, axis=-1, keepdims=True)  # XLA's CPU backend may lose a NaN in a maximum
    return jnp.round(x / scales).astype(jnp.int8), scales
