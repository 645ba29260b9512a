"""Attention over a set of keys from attention over its parts: split contexts, shared prefixes."""

from __future__ import annotations

import importlib

import jax

from pallas_kernels import backends
from pallas_kernels.target import Target

DTYPES = ("float32", "bfloat16", "float16", "float64")


def merge_states(outs: jax.Array, lses: jax.Array, *, backend: backends.Backend = "auto") -> tuple[jax.Array, jax.Array]:
    """Combine I results of attention over disjoint sets of keys into the result over all of those keys.

    out = sum_i exp(lse_i - lse) out_i, where lse = log(sum_i exp(lse_i)); sums are float32.

    >>> import jax.numpy as jnp
    >>> outs = jnp.array([[[1.0, 2.0]], [[3.0, 6.0]]])  # 2 parts, 1 query, heads of 2
    >>> out, lse = merge_states(outs, jnp.log(jnp.array([[1.0], [3.0]])), backend="xla")
    >>> out.tolist(), round(float(lse[0]), 4)
    ([[2.5, 5.0]], 1.3863)

    Args:
      outs: [I, ..., H], of float32, bfloat16 or float16; the axes in between are any, [B, T, N] for example.
      lses: float32 [I, ...], natural logarithms of the softmax's sums, as attention returns them with `return_lse`. A part of no
        keys has -inf, and what it holds, NaN or not, is never used. A sink belongs to one part alone.

    Returns:
      [..., H] in outs' dtype, and float32 [...]; where every part is empty 0 and -inf.

    Raises:
      ValueError: shapes or dtypes that do not fit each other, or an unknown backend.
      NotImplementedError: the named backend cannot run here; the message says why.

    Source: Rabe and Staats 2021 (arXiv 2112.05682); FlashInfer's merge_state, Ye et al. 2025 (arXiv 2501.01005).
    """
    if outs.ndim < 2 or lses.shape != outs.shape[:-1] or outs.shape[0] == 0:
        raise ValueError(
            f"merge_states: outs are {list(outs.shape)} and lses {list(lses.shape)}, expected [I, ..., H] and [I, ...]"
        )
    if outs.dtype.name not in DTYPES or lses.dtype.name not in ("float32", "float64"):
        raise ValueError(f"merge_states: outs are {outs.dtype} and lses {lses.dtype}, expected {', '.join(DTYPES)} and float32")

    def mosaic(target: Target) -> str | None:
        return _module("mosaic").unavailable(target, head_dim=outs.shape[-1], dtype=outs.dtype.name)

    choice = backends.choose("merge_states", backend, mosaic=mosaic)
    if choice.target is not None:
        return _module("mosaic").merge(outs, lses, choice.target)
    return _module(choice.name).merge(outs, lses)


def _module(name: str):
    return importlib.import_module(f"pallas_kernels.merge_states.{name}")
