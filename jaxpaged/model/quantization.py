"""Matrices of int8: what their numbers stand for, how they are made of float ones, and the two things that a model does with one.

Knows `pallas_kernels.quantized_matmul`. Refuses to know which parameters are quantised: that is `jaxpaged.model.weights`.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxpaged.model.panels import PanelMatrix, flat
from pallas_kernels.quantized_matmul import quantize, quantized_matmul


@flax.struct.dataclass
class QuantizedMatrix:
    """A matrix [O..., I] of 8-bit numbers with a scale for each output. Number i of output o stands for values[o, i] * scales[o].

    Another format is another dtype of `values`, and another choice in `times`.
    """

    values: jax.Array | PanelMatrix  # int8 [O..., I]
    scales: jax.Array  # float32 [O...]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the matrix it stands for."""
        return self.values.shape

    def times(self, x: jax.Array, **around: Any) -> jax.Array:
        """x [X, I] times the matrix transposed, [X, prod(O)], with what else `pallas_kernels.quantized_matmul` does.

        Each row of x is rounded to int8 with its own largest number as 127, the products are exact integers, and the scales come
        last: a row's bits are its own, whatever stands beside it.
        """
        return quantized_matmul(x, flat(self.values), self.scales.reshape(-1), activations="int8", **around)

    def take(self, indices: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The numbers that rows of a matrix [V, D] stand for, [..., D] in `dtype`."""
        values = self.values[indices] if isinstance(self.values, jax.Array) else self.values.take(indices, jnp.float32)
        return (values.astype(jnp.float32) * self.scales[indices][..., None]).astype(dtype)


@jax.jit
def quantized(matrix: jax.Array) -> QuantizedMatrix:
    """Round a float matrix [O..., I] to int8, each output's largest number to 127. One that is not finite makes its output so."""
    values, scales = quantize(matrix.reshape(-1, matrix.shape[-1]), "int8")
    return QuantizedMatrix(values.reshape(matrix.shape), scales.reshape(matrix.shape[:-1]))


def num_bytes(shape: tuple[int, ...]) -> int:
    """Bytes of a quantised matrix of that shape; as panels it has four more for each output."""
    num_outputs = 1
    for size in shape[:-1]:
        num_outputs *= size
    return num_outputs * (shape[-1] + 4)
