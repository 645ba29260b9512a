"""A step that runs two attention backends on the same pages and says how far apart they are, layer by layer and head by head.

Knows how to compare. Refuses to judge: what counts as a breach, and what becomes of it, is `jaxpaged.duel`'s.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxpaged.config import ModelConfig
from jaxpaged.model.attention import PagedAttention, PagedTokens, narrowed
from jaxpaged.model.cache import KVCache
from jaxpaged.model.sampler import first_largest
from jaxpaged.model.step import StepInputs, StepOutputs, sampled_logits
from jaxpaged.model.transformer import forward, of_rows, products_of
from jaxpaged.model.weights import Weights
from pallas_kernels import Heads
from pallas_kernels.backends import Backend


@flax.struct.dataclass
class Evidence:
    """What one step tells about its two backends. R = D + C: decode rows, then prefill tiles, padding among them."""

    errors: jax.Array  # float32 [L, R, N], largest distance over a row's real tokens, over the rival's largest number there
    queries: jax.Array  # [L, X, N, H], what both were asked
    best: jax.Array  # int32 [2, R], each side's likeliest next token for the rows that may sample


@dataclass(frozen=True)
class _Duellists:
    """`attend` that answers with the backend's result and notes its distance from the rival's."""

    attention: PagedAttention
    rival: PagedAttention

    def __call__(self, layer: int, heads: Heads, state: tuple) -> tuple[jax.Array, tuple]:
        cache, errors, queries = state
        heads = narrowed(heads, cache)
        cache = self.attention.write(layer, heads, cache)
        ours, theirs = self.attention.read(layer, heads.q, cache), self.rival.read(layer, heads.q, cache)
        error = _distance(ours, theirs, self.attention.tokens)
        return self.attention.told(ours, heads), (cache, (*errors, error), (*queries, heads.q))


def step(
    weights: Weights,
    cache: KVCache,
    inputs: StepInputs,
    *,
    config: ModelConfig,
    backend: Backend,
    rival: Backend,
    max_logprobs: int = 20,
    batch_invariant: bool = False,
    **of_tokens: Any,
) -> tuple[tuple[StepOutputs, Evidence], KVCache]:
    """`model.step.step` on `backend`, and beside it the evidence of its duel with `rival`. Donate `cache`.

    Every layer asks both the same: the backend's own queries. The likeliest tokens are compared between two whole forward passes
    over the pages that the backend's pass has written.
    """
    tokens = inputs.fed_tokens()
    how: dict[str, Any] = {"config": config, "batch_invariant": batch_invariant}
    attention, opponent = (PagedAttention(tokens, backend=name, **how) for name in (backend, rival))
    rows = of_rows(tokens.is_real, backend, batch_invariant=batch_invariant)
    run = functools.partial(forward, weights, config, tokens.token_ids, tokens.positions, **rows)
    how["backend"] = backend
    hidden, (cache, errors, queries) = run(_Duellists(attention, opponent), (cache, (), ()))
    scores = sampled_logits(weights, hidden, inputs, **how)
    outputs = StepOutputs.of(scores, inputs, max_logprobs, backend=products_of(backend), **of_tokens)
    outputs = outputs.told(weights, hidden, inputs, max_logprobs, **how)

    def read_only(layer: int, heads: Heads, cache: KVCache) -> tuple[jax.Array, KVCache]:
        return opponent.read(layer, heads.q, cache), cache

    hidden, cache = run(read_only, cache)
    rival_scores = sampled_logits(weights, hidden, inputs, **how)
    best = jnp.stack([first_largest(scores), first_largest(rival_scores)])
    return (outputs, Evidence(errors=jnp.stack(errors), queries=jnp.stack(queries), best=best)), cache


def _distance(ours: jax.Array, theirs: jax.Array, tokens: PagedTokens) -> jax.Array:
    """float32 [R, N] of two results [X, N, H]; infinite where one is not a number, 0 for padding."""
    D, C, is_real = tokens.num_rows, tokens.num_tiles, tokens.is_real[:, None]
    ours, theirs = ours.astype(jnp.float32), theirs.astype(jnp.float32)
    apart = jnp.where(jnp.isfinite(ours) & jnp.isfinite(theirs), jnp.abs(ours - theirs), jnp.inf)
    apart = jnp.where(is_real, jnp.max(apart, axis=-1), 0.0)
    size = jnp.where(is_real, jnp.max(jnp.abs(theirs), axis=-1), 0.0)

    def largest(x: jax.Array) -> jax.Array:
        """[X, N] to [R, N], over the tokens of each row or tile."""
        tiles = x[D:].reshape(C, tokens.tile, -1).max(axis=1) if C else x[D:]
        return jnp.concatenate([x[:D], tiles])

    apart, size = largest(apart), largest(size)
    return jnp.where(apart > 0, apart / jnp.maximum(jnp.nan_to_num(size), 1e-30), 0.0)
