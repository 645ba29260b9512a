"""Queries, keys and values of a layer out of one product: normalised where the model says so, rotated, and looked through."""

from __future__ import annotations

import importlib
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import backends
from pallas_kernels.native import heads as native

__all__ = ["Heads", "rotate_heads"]

_FLOATS = ("float32", "bfloat16", "float16")


class Heads(NamedTuple):
    """What a layer's attention is of, for each of X tokens; 0 for what is not finite."""

    q: jax.Array  # [X, N, H]
    k: jax.Array  # [X, K, H]
    v: jax.Array  # [X, K, H]
    is_finite: jax.Array  # bool [X], whether all numbers of the token's q, k and v were


def rotate_heads(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    q_norm: jax.Array | None = None,
    k_norm: jax.Array | None = None,
    *,
    eps: float = 0.0,
    backend: backends.Backend = "auto",
) -> Heads:
    """Part each token's numbers into heads, normalise and rotate those of queries and keys, and tell what is not finite.

    Of a group's G + 2 heads the last two are its key and value, the others the queries that read them; query n is number n % G of
    group n // G. A head with a norm becomes x / sqrt(mean(x^2) + eps) in float32, rounded to its dtype, times the norm, rounded
    again. Then number i and number i + H/2 turn by angle i, in float32, and are rounded to qkv's dtype.

    >>> import jax.numpy as jnp
    >>> heads = rotate_heads(jnp.ones((5, 2, 3 + 2, 64)), jnp.ones((5, 32)), jnp.zeros((5, 32)))
    >>> heads.q.shape, heads.k.shape, heads.v.shape, bool(heads.is_finite.all())
    ((5, 6, 64), (5, 2, 64), (5, 2, 64), True)

    Args:
      qkv: [X, K, G + 2, H], of float32, bfloat16 or float16.
      cos: float32 [X, H/2], of each token's angles.
      sin: likewise.
      q_norm: [H] of qkv's dtype, the scale of a norm of each query head; None for none.
      k_norm: likewise of each key head.
      eps: of both norms.
      backend: "auto" is "native" on a CPU, "xla" elsewhere; only "xla" can be differentiated.

    Raises:
      ValueError: shapes or dtypes that do not fit each other.
      NotImplementedError: the named backend cannot run here; the message says why.

    Source: RoFormer (arXiv 2104.09864), in the halves of transformers' Llama; the norms are those of Qwen3.
    """
    _check(qkv, cos, sin, q_norm, k_norm)
    choice = backends.choose("rotate_heads", backend, native=native.unavailable)
    module = native if choice.name == "native" else importlib.import_module(f"pallas_kernels.rotate_heads.{choice.name}")
    return Heads(*module.rotate_heads(qkv, cos, sin, q_norm, k_norm, eps))


def _check(qkv: jax.Array, cos: jax.Array, sin: jax.Array, q_norm: jax.Array | None, k_norm: jax.Array | None) -> None:
    def refuse(what: str) -> None:
        raise ValueError(f"rotate_heads: {what}")

    if qkv.ndim != 4:
        refuse(f"qkv has {qkv.ndim} axes, expected 4: [X, K, G + 2, H]")
    X, K, num_heads, H = qkv.shape
    if qkv.dtype.name not in _FLOATS:
        refuse(f"qkv of {qkv.dtype} is not supported; {', '.join(_FLOATS)} are")
    if num_heads < 3 or H % 2 or not K:
        refuse(f"qkv is {list(qkv.shape)}, expected [X, K, G + 2, H] of at least one query a group and an even H")
    for name, angles in (("cos", cos), ("sin", sin)):
        if angles.shape != (X, H // 2) or angles.dtype != jnp.float32:
            refuse(f"{name} is {angles.dtype}{list(angles.shape)}, expected float32{[X, H // 2]} for qkv of {list(qkv.shape)}")
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None and (norm.shape != (H,) or norm.dtype != qkv.dtype):
            refuse(f"{name} is {norm.dtype}{list(norm.shape)}, expected {qkv.dtype}[{H}] as qkv")
