"""Matrix products on a CPU, in C++, called by XLA on its own threads.

XLA's CPU backend widens a whole weight of bfloat16 for one row, and reads weights of float32 at half of what memory gives.
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.matmul.around import Around
from pallas_kernels.matmul.forms import form_of
from pallas_kernels.matmul.packed import can_pack, num_words
from pallas_kernels.native import building

_SOURCE = Path(__file__).with_name("matmul.cc")


@functools.cache
def unavailable() -> str | None:
    """Why this backend cannot run here, or None when it can. Builds and registers it at the first call."""
    handlers = {name: _target(name) for name in ("Matmul", "MatmulInt8", "PackPanels")}
    return building.register(_SOURCE, handlers, building.MATH, "matrix products")


def _target(name: str) -> str:
    return f"pallas_kernels.{name}"


def matmul(
    x: jax.Array, weight: jax.Array, around: Around, out_dtype: jax.typing.DTypeLike, scales: jax.Array | None = None
) -> jax.Array:
    """See the contract in `pallas_kernels.matmul`.

    With `scales` the weight is of int8, [F, D] or its panels, whose output f is multiplied by scales[f], and rows are rounded to
    int8 behind the norm: see `pallas_kernels.quantized_matmul`. Integers are multiplied exactly.
    """
    num_outputs = form_of(weight).num_outputs(weight) // (2 if around.is_gated else 1)
    call = jax.ffi.ffi_call(_target("Matmul"), jax.ShapeDtypeStruct((x.shape[0], num_outputs), out_dtype))
    absent = jnp.zeros(0, jnp.float32)
    bias = absent if around.bias is None else around.bias.astype(jnp.float32)
    others = (absent if a is None else a for a in (around.norm, around.residual))
    is_real = jnp.zeros(0, bool) if around.is_real is None else around.is_real
    scales = absent if scales is None else scales
    return call(x, weight, scales, bias, *others, is_real, eps=np.float32(around.eps), is_gated=around.is_gated)


def pack_panels(panels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Panels of bfloat16 as packed ones, see `pallas_kernels.matmul.packed`: uint16 [P, words], and bool [P], which of them have
    few enough numbers with rare exponents. None has where no product takes packed ones.

    Raises:
      ValueError: they are not what `can_pack`.
      NotImplementedError: this backend cannot run here; the message says why.
    """
    if not can_pack(panels):
        raise ValueError(f"panels are {panels.dtype}{list(panels.shape)}, expected what packed.can_pack")
    if (reason := unavailable()) is not None:
        raise NotImplementedError(f"panels cannot be packed: {reason}")
    num_panels, steps = panels.shape[:2]
    words = jax.ShapeDtypeStruct((num_panels, num_words(2 * steps)), jnp.uint16)
    return tuple(jax.ffi.ffi_call(_target("PackPanels"), (words, jax.ShapeDtypeStruct((num_panels,), bool)))(panels))  # type: ignore[return-value]


def matmul_int8(x: jax.Array, weight: jax.Array, scales: jax.Array) -> jax.Array:
    """Rows of floats [X, D] times a weight of int8 [F, D] whose output f is multiplied by scales[f]: float32 [X, F]."""
    call = jax.ffi.ffi_call(_target("MatmulInt8"), jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), jnp.float32))
    return call(x.astype(jnp.float32), weight, scales)
