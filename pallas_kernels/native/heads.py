"""Heads out of a product on a CPU, in C++, called by XLA on its own threads.

XLA's CPU backend rotates with one scalar instruction after the other and looks for what is not finite in ten small loops a layer.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.native import building

_SOURCE = Path(__file__).with_name("heads.cc")


@functools.cache
def unavailable() -> str | None:
    """Why this backend cannot run here, or None when it can. Builds and registers it at the first call."""
    return building.register(_SOURCE, {"RotateHeads": _target("RotateHeads")}, building.MATH, "rotation of heads")


def _target(name: str) -> str:
    return f"pallas_kernels.{name}"


def rotate_heads(
    qkv: jax.Array, cos: jax.Array, sin: jax.Array, q_norm: jax.Array | None, k_norm: jax.Array | None, eps: float
) -> Sequence[jax.Array]:
    """See the contract in `pallas_kernels.rotate_heads`."""
    X, K, num_heads, H = qkv.shape
    shapes = [jax.ShapeDtypeStruct((X, count, H), qkv.dtype) for count in (K * (num_heads - 2), K, K)]
    call = jax.ffi.ffi_call(_target("RotateHeads"), [*shapes, jax.ShapeDtypeStruct((X,), jnp.bool_)])
    norms = (jnp.zeros(0, qkv.dtype) if norm is None else norm for norm in (q_norm, k_norm))
    return call(qkv, cos, sin, *norms, eps=np.float32(eps))
