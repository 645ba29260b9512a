"""Logits to tokens: greedy, temperature, min-p, top-k and top-p for each row, with random numbers of (seed, position) alone."""

from __future__ import annotations

import importlib
from typing import Any

import jax

from pallas_kernels import backends
from pallas_kernels.native import sampling as native
from pallas_kernels.target import Target

DTYPES = ("float32", "bfloat16", "float16")


def sample_logits(
    logits: jax.Array,
    seeds: jax.Array,
    positions: jax.Array,
    temperatures: jax.Array,
    top_ks: jax.Array,
    top_ps: jax.Array,
    min_ps: jax.Array,
    *,
    backend: backends.Backend = "auto",
) -> jax.Array:
    """Sample a token from each row's logits, as the row wants it.

    A row's logits l become weights exp(l / temperature). Then it keeps, in vLLM's order: the tokens with at least min_p of the
    largest weight; of these the top_k largest logits; of these the fewest of the largest that hold at least top_p of the weight
    of all that were left. Each filter is a threshold, and tokens that tie at it are all kept. The likeliest token is always kept.

    The token is the largest of l / temperature + noise among those kept, the lowest id on ties. The noise is Gumbel's, a function
    of (seed, position, token) that `noise.py` states. So a row's token is a sample from the softmax of what is kept, and depends
    neither on the other rows nor on the backend, unless the last bits of a threshold, of exp or of log decide.

    Everything that a row asks for is data: no combination compiles again. With temperature 0 it costs about an argmax.

    >>> import jax, jax.numpy as jnp
    >>> logits = jax.random.normal(jax.random.key(0), (2, 1000))
    >>> seeds = jnp.array([[0, 7], [0, 8]], jnp.uint32)  # high and low half of each row's seed
    >>> positions = jnp.array([12, 40])  # where each token goes in its sequence
    >>> temperatures, top_ks = jnp.array([0.0, 0.8]), jnp.array([0, 50])
    >>> sample_logits(logits, seeds, positions, temperatures, top_ks, top_ps=jnp.array([1.0, 0.9]), min_ps=jnp.zeros(2)).shape
    (2,)

    Args:
      logits: [B, V] of float32, bfloat16 or float16. -inf and NaN are never sampled, +inf counts as the largest finite number.
      seeds: uint32 [B, 2].
      positions: int32 [B], 0 or more.
      temperatures: float32 [B]; below 1e-5 the row is greedy: its largest logit, the lowest id on ties, and no filter matters.
      top_ks: int32 [B]; 0 or less, and V or more, keep all.
      top_ps: float32 [B]; 1 or more keeps all, 0 only the largest.
      min_ps: float32 [B]; 0 keeps all.

    Returns:
      int32 [B]. 0 for a row in which no token can be sampled.

    Raises:
      ValueError: shapes or dtypes that do not fit each other, or an unknown backend.
      NotImplementedError: the named backend cannot run here; the message says why.

    Source: Holtzman et al. 2020 (arXiv 1904.09751) for top-p; Nguyen et al. 2024 (arXiv 2407.01082) for min-p.
    """
    _check(logits, seeds, positions, temperatures, top_ks, top_ps, min_ps)
    choice = choose(backend, vocab_size=logits.shape[1], dtype=logits.dtype.name)
    module: Any = native if choice.name == "native" else importlib.import_module(f"pallas_kernels.sample_logits.{choice.name}")
    if choice.name == "reference":
        return module.sample(logits, seeds, positions, temperatures, top_ks, top_ps, min_ps)
    from pallas_kernels.sample_logits import rows

    asked = rows.prepare(logits.shape[1], seeds, positions, temperatures, top_ks, top_ps, min_ps)
    return module.sample(logits, asked) if choice.target is None else module.sample(logits, asked, choice.target)


def choose(backend: str, *, vocab_size: int, dtype: str) -> backends.Choice:
    """The backend that runs this operation for these sizes.

    Raises:
      ValueError, NotImplementedError: as `backends.choose`.
    """

    def mosaic(target: Target) -> str | None:
        module = importlib.import_module("pallas_kernels.sample_logits.mosaic")
        return module.unavailable(target, dtype=dtype, vocab_size=vocab_size)

    return backends.choose("sample_logits", backend, native=native.unavailable, mosaic=mosaic)


def is_native(backend: backends.Backend, logits: jax.Array) -> bool:
    """Whether these logits would be sampled in C++ here: then a filter or noise costs no passes over all rows."""
    if jax.default_backend() != "cpu":
        return False
    return choose(backend, vocab_size=logits.shape[1], dtype=logits.dtype.name).name == "native"


def _check(logits: jax.Array, seeds: jax.Array, *others: jax.Array) -> None:
    """Raises ValueError for arguments that do not fit each other, naming what was given and what fits."""
    if logits.ndim != 2 or logits.dtype.name not in DTYPES or logits.shape[1] == 0:
        given = f"{logits.dtype}{list(logits.shape)}"
        raise ValueError(f"sample_logits: logits are {given}, expected [B, V] of {', '.join(DTYPES)} with V of 1 or more")
    B = logits.shape[0]
    if seeds.shape != (B, 2) or seeds.dtype.name != "uint32":
        raise ValueError(f"sample_logits: seeds are {seeds.dtype}{list(seeds.shape)}, expected uint32[{B}, 2]")
    names = {"positions": "int32", "temperatures": "float32", "top_ks": "int32", "top_ps": "float32", "min_ps": "float32"}
    for (name, dtype), x in zip(names.items(), others, strict=True):
        if x.shape != (B,) or x.dtype.name != dtype:
            raise ValueError(f"sample_logits: {name} are {x.dtype}{list(x.shape)}, expected {dtype}[{B}]")
