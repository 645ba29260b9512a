"""Matrices of int8: what their numbers stand for, how they are made of float ones, and the two things that a model does with one.

Knows `pallas_kernels.quantized_matmul`. Refuses to know which parameters are quantised: that is `jaxpaged.model.weights`.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from pallas_kernels.quantized_matmul import quantize, quantized_matmul


@flax.struct.dataclass
class QuantizedMatrix:
    """A matrix [O..., I] of 8-bit numbers with a scale for each output. Number i of output o stands for values[o, i] * scales[o].

    Another format is another dtype of `values`, and another choice in `times`.
    """

    values: jax.Array  # int8 [O..., I]
    scales: jax.Array  # float32 [O...]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the matrix it stands for."""
        return self.values.shape

    def times(self, x: jax.Array) -> jax.Array:
        """x [..., I] times the matrix transposed, float32 [..., prod(O)].

        Each row of x is rounded to int8 with its own largest number as 127, the products are exact integers, and the scales come
        last: a row's bits are its own, whatever stands beside it.
        """
        rows, flat = x.reshape(-1, x.shape[-1]), self.values.reshape(-1, self.values.shape[-1])
        out = quantized_matmul(rows, flat, self.scales.reshape(-1), activations="int8", out_dtype="float32")
        return out.reshape(*x.shape[:-1], -1)

    def take(self, indices: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The numbers that rows of a matrix [V, D] stand for, [..., D] in `dtype`."""
        return (self.values[indices].astype(jnp.float32) * self.scales[indices][..., None]).astype(dtype)


@jax.jit
def quantized(matrix: jax.Array) -> QuantizedMatrix:
    """Round a float matrix [O..., I] to int8, each output's largest number to 127. One that is not finite makes its output so."""
    values, scales = quantize(matrix.reshape(-1, matrix.shape[-1]), "int8")
    return QuantizedMatrix(values.reshape(matrix.shape), scales.reshape(matrix.shape[:-1]))


def num_bytes(shape: tuple[int, ...]) -> int:
    """Bytes of a quantised matrix of that shape."""
    num_outputs = 1
    for size in shape[:-1]:
        num_outputs *= size
    return num_outputs * (shape[-1] + 4)
