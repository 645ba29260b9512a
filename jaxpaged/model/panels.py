"""Matrices as the panels that products in C++ read as they are: the same numbers in another order, those of bfloat16 in 12 bits.

Knows `panels` and `packed` of `pallas_kernels.matmul`. Refuses to know which parameters are kept so: that is
`jaxpaged.model.weights`.
"""

from __future__ import annotations

import logging

import flax.struct
import jax

from pallas_kernels.matmul import packed
from pallas_kernels.matmul import panels as turned
from pallas_kernels.matmul.forms import form_of
from pallas_kernels.native.matmul import pack_panels

logger = logging.getLogger("jaxpaged")


@flax.struct.dataclass
class PanelMatrix:
    """A matrix of this shape, [O..., I], of which only the panels are kept."""

    panels: jax.Array  # [O / 16, I / n, 16, n]; of int8 one step more; packed [O / 16, words]
    shape: tuple[int, ...] = flax.struct.field(pytree_node=False)

    def take(self, indices: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Rows of a matrix [V, D], in `dtype`."""
        return form_of(self.panels).rows_of(self.panels, indices, self.shape[-1]).astype(dtype)


def flat(matrix: jax.Array | PanelMatrix) -> jax.Array:
    """A matrix [O..., I] as products take it: [prod(O), I], or its panels."""
    return matrix.panels if isinstance(matrix, PanelMatrix) else matrix.reshape(-1, matrix.shape[-1])


def in_panels(matrix: jax.Array) -> PanelMatrix | jax.Array:
    """The matrix in place of the one given, which is deleted; that one where it has no panels. Packed where they can be."""
    if not turned.has_panels(matrix.shape, matrix.dtype):
        return matrix
    panels = jax.block_until_ready(_turn(matrix))
    matrix.delete()
    if packed.can_pack(panels):
        smaller, fits = _pack(panels)
        if fits:
            panels.delete()
            panels = smaller
        else:
            # Of numbers with rare exponents, or on a processor without products of pairs.
            logger.debug(
                "A matrix %s stays in 16 bits a number: 12 are not enough for it, or not multiplied here.", list(matrix.shape)
            )
    return PanelMatrix(panels, matrix.shape)


@jax.jit
def _pack(panels: jax.Array) -> tuple[jax.Array, jax.Array]:
    smaller, fits = pack_panels(panels)
    return smaller, fits.all()


@jax.jit
def _turn(matrix: jax.Array) -> jax.Array:
    return turned.to_panels(matrix.reshape(-1, matrix.shape[-1]))
