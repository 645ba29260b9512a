"""The formulas of a layer that do not depend on how the cache is kept: norm, linear, rotary embedding, gated MLP.

Each takes arrays and returns arrays; sums and products accumulate in float32 whatever the dtype of the weights.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxpaged.config import ModelConfig, RopeConfig
from jaxpaged.model.panels import flat
from jaxpaged.model.quantization import QuantizedMatrix
from pallas_kernels import matmul
from pallas_kernels.backends import Backend
from pallas_kernels.matmul.around import rms_norm

if TYPE_CHECKING:
    from jaxpaged.model.weights import Layer, Matrix

__all__ = ["gated_mlp", "linear", "lookup", "rms_norm", "rope_frequencies", "rope_tables"]


def linear(
    x: jax.Array,
    weight: Matrix,
    bias: jax.Array | None = None,
    *,
    norm: jax.Array | None = None,
    eps: float = 0.0,
    is_gated: bool = False,
    residual: jax.Array | None = None,
    is_real: jax.Array | None = None,
    out_dtype: str | None = None,
    backend: Backend = "xla",
    scope: str = "matmul",
) -> jax.Array:
    """x [X, I] times weight [O..., I] transposed, plus bias: [X, O...], in x's dtype with float32 sums; of a gated weight
    [2, F, I] the result is [X, F].

    `scope` is its name in a profile. The other options are those of `pallas_kernels.matmul`. Of the backends, which a quantised
    matrix does not heed, only "xla" can be differentiated; rows that meet such a matrix are rounded, so nothing can.
    """
    how: dict[str, Any] = {"norm": norm, "eps": eps, "is_gated": is_gated, "residual": residual, "is_real": is_real}
    how |= {"bias": None if bias is None else bias.reshape(-1), "out_dtype": out_dtype}
    with jax.named_scope(scope):
        if isinstance(weight, QuantizedMatrix):
            out = weight.times(x, **how)
        else:
            out = matmul(x, flat(weight), backend=backend, **how)
    return out.reshape(-1, *weight.shape[1 if is_gated else 0 : -1])


def lookup(matrix: Matrix, indices: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Rows of a matrix [V, D], in `dtype`."""
    return matrix[indices].astype(dtype) if isinstance(matrix, jax.Array) else matrix.take(indices, dtype)


def rope_frequencies(rope: RopeConfig, head_dim: int) -> jax.Array:
    """Angle per position of each of the H/2 pairs: float32 [H/2].

    Source: RoFormer (arXiv 2104.09864); "linear" divides by factor; "llama3" divides the low frequencies and leaves the
    high ones, as in Llama 3.1's reference code.
    """
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequencies = 1.0 / (rope.theta**exponent)
    if rope.rope_type == "default":
        return frequencies
    if rope.rope_type == "linear":
        return frequencies / rope.factor
    # Wavelengths shorter than original/high keep their frequency, longer than original/low are divided, a ramp between.
    wavelength = 2 * math.pi / frequencies
    original = rope.original_max_position_embeddings
    ramp = (original / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    ramp = jnp.clip(ramp, 0.0, 1.0)
    return frequencies * (ramp + (1.0 - ramp) / rope.factor)


@jax.named_scope("rope")
def rope_tables(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every angle, float32 [X, H/2] each. Float32 positions are exact to 16 million."""
    angles = positions.astype(jnp.float32)[:, None] * rope_frequencies(config.rope, config.head_dim)
    return jnp.cos(angles), jnp.sin(angles)


@jax.named_scope("mlp")
def gated_mlp(
    x: jax.Array,
    layer: Layer,
    *,
    norm: jax.Array | None = None,
    eps: float = 0.0,
    residual: jax.Array | None = None,
    **how: Any,
) -> jax.Array:
    """down(silu(gate(x)) * up(x)), plus the residual; `norm` and `eps` are of a norm of x, `how` has what both products take of
    `linear`. Source: SwiGLU, arXiv 2002.05202.
    """
    gated = linear(x, layer.gate_up, layer.gate_up_bias, is_gated=True, norm=norm, eps=eps, **how)
    return linear(gated, layer.down, layer.down_bias, residual=residual, **how)
