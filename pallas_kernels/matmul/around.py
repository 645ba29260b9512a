"""What a transformer does before a product and after it: told apart from the product, and as plain JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Around(NamedTuple):
    """What stands around a product of rows x [X, D], in this order: see `pallas_kernels.matmul`."""

    norm: jax.Array | None = None  # [D], the scale of a norm of the rows
    eps: float = 0.0
    bias: jax.Array | None = None  # [F], or [2F] when gated
    is_gated: bool = False
    residual: jax.Array | None = None  # [X, F]
    is_real: jax.Array | None = None  # bool [X]

    def check(
        self, refuse: Callable[[str], object], x: jax.Array, num_outputs: int, dtype: jax.typing.DTypeLike, unit: int = 1
    ) -> None:
        """Refuse what does not fit rows x, a weight of so many outputs, in panels of `unit`, and a result of this dtype."""
        X, D = x.shape
        if self.is_gated and num_outputs // unit % 2:
            refuse(f"a gated weight has {num_outputs} outputs, expected an even number of {'panels' if unit > 1 else 'them'}")
        if self.bias is not None and self.bias.shape != (num_outputs,):
            refuse(f"bias is {list(self.bias.shape)}, expected [{num_outputs}]")
        if self.norm is not None and (self.norm.shape != (D,) or self.norm.dtype != x.dtype):
            refuse(f"norm is {self.norm.dtype}{list(self.norm.shape)}, expected {x.dtype}[{D}] as x")
        result = (X, num_outputs // (2 if self.is_gated else 1))
        if self.residual is not None and (self.residual.shape != result or self.residual.dtype != dtype):
            given = f"{self.residual.dtype}{list(self.residual.shape)}"
            refuse(f"residual is {given}, expected {jnp.dtype(dtype)}{list(result)} as the result")
        if self.is_real is not None and (self.is_real.shape != (X,) or self.is_real.dtype != bool):
            refuse(f"is_real is {self.is_real.dtype}{list(self.is_real.shape)}, expected bool[{X}]")

    @property
    def follows(self) -> bool:
        """Whether the product is not the result."""
        return self.bias is not None or self.is_gated or self.residual is not None

    def rows(self, x: jax.Array) -> jax.Array:
        """What is to be multiplied."""
        return x if self.norm is None else rms_norm(x, self.norm, self.eps)

    def result(self, out: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """What follows a float32 product [X, F]; each part rounds to the result's dtype."""
        if self.bias is not None:
            out = out + self.bias.astype(jnp.float32)
        out = out.astype(dtype)
        if self.is_gated:
            gate, up = jnp.split(out, 2, axis=-1)
            out = jax.nn.silu(gate) * up
        out = out if self.residual is None else self.residual + out
        return out if self.is_real is None else jnp.where(self.is_real[:, None], out, 0)


@jax.named_scope("norm")
def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last axis, computed in float32, in x's dtype. Source: arXiv 1910.07467."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    # transformers rounds to x's dtype before the scale; the same order here keeps bfloat16 logits comparable.
    return x32.astype(x.dtype) * scale
