"""The forms in which a product takes a weight of floats: as a checkpoint has it, as panels, as packed panels.

Knows what there is to ask of each. Refuses to know who multiplies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.matmul import packed, panels
from pallas_kernels.matmul.panels import LANES

FLOATS = ("float32", "bfloat16", "float16")


class Form(NamedTuple):
    """One of them. D is the length of the rows that are multiplied."""

    unit: int  # outputs that stand together, and are one of the weight's first axis
    fault: Callable[[jax.Array, jax.Array], str | None]  # of rows [X, D] and such a weight: why they do not fit, or None
    plain: Callable[[jax.Array, int], jax.Array]  # of such a weight and D: [F, D]
    rows_of: Callable[[jax.Array, jax.Array, int], jax.Array]  # of it, numbers of outputs and D: [..., D]

    def num_outputs(self, weight: jax.Array) -> int:
        """F, or 2F of a gated weight."""
        return weight.shape[0] * self.unit


def form_of(weight: jax.Array) -> Form:
    """That of a weight with 2 or 4 axes."""
    return _PACKED if packed.is_packed(weight) else _PANELS if weight.ndim == 4 else _PLAIN


def _fault_of_plain(x: jax.Array, weight: jax.Array) -> str | None:
    return _unsupported(weight) or _of_another_size(x, weight, weight.shape[0])


def _fault_of_panels(x: jax.Array, weight: jax.Array) -> str | None:
    if fault := _unsupported(weight):
        return fault
    if weight.shape[2] != LANES or (weight.dtype.name, weight.shape[3]) not in (("float32", 1), ("bfloat16", 2)):
        expected = "float32[P, D, 16, 1] or bfloat16[P, D / 2, 16, 2]"
        return f"panels of the weight are {weight.dtype}{list(weight.shape)}, expected {expected}"
    return _of_another_size(x, weight, weight.shape[0] * LANES)


def _fault_of_packed(x: jax.Array, weight: jax.Array) -> str | None:
    D, num_words = x.shape[1], packed.num_words(x.shape[1])
    if x.dtype == jnp.bfloat16 and not D % 8 and weight.shape[1] == num_words:
        return None
    expected = f"uint16[P, {num_words}] for rows of bfloat16 whose length is a multiple of 8"
    return f"packed panels of the weight are {list(weight.shape)} and x {x.dtype}{list(x.shape)}, expected {expected}"


def _unsupported(weight: jax.Array) -> str | None:
    return None if weight.dtype.name in FLOATS else f"weight of {weight.dtype} is not supported; {', '.join(FLOATS)} are"


def _of_another_size(x: jax.Array, weight: jax.Array, num_outputs: int) -> str | None:
    X, D = x.shape
    if weight.size == num_outputs * D:
        return None
    return f"weight is {list(weight.shape)}, expected [F, {D}] for x of [{X}, {D}]"


_PLAIN = Form(1, _fault_of_plain, lambda weight, D: weight, lambda weight, indices, D: weight[indices])
_PANELS = Form(
    LANES,
    _fault_of_panels,
    lambda weight, D: panels.from_panels(weight),
    lambda weight, indices, D: panels.rows_of(weight, indices),
)
_PACKED = Form(LANES, _fault_of_packed, packed.from_packed, packed.rows_of)
