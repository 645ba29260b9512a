"""The transformer as one function over a flat list of tokens: embed, the layers, the final norm.

Knows every flag of `ModelConfig`. Refuses to know how keys and values are kept: attention is a function that the caller
passes in, so that paged steps, dense training and tests run the very same layers.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol, TypeVar

import jax

from jaxpaged.config import ModelConfig
from jaxpaged.model.layers import gated_mlp, linear, lookup, rms_norm, rope_tables
from jaxpaged.model.weights import Layer, Weights
from pallas_kernels import Heads, rotate_heads
from pallas_kernels.backends import Backend
from pallas_kernels.row_tiles import RowTiles, by_rows

State = TypeVar("State")


class Attend(Protocol):
    """Attention of the heads over whatever the state holds: (layer, heads, state) -> (out [X, N, H], state).

    The state is threaded through the layers in order.
    """

    def __call__(self, layer: int, heads: Heads, state: Any, /) -> tuple[jax.Array, Any]: ...


def forward(
    weights: Weights,
    config: ModelConfig,
    token_ids: jax.Array,
    positions: jax.Array,
    attend: Attend,
    state: State,
    *,
    tiles: RowTiles | None = None,
    backend: Backend = "xla",
) -> tuple[jax.Array, State]:
    """Hidden states after the final norm, [X, D], and the state after the last layer.

    Args:
      token_ids: int32 [X], tokens of any number of sequences in any order; only `attend` relates them to each other.
      positions: int32 [X], each token's place in its own sequence.
      tiles: those that tokens are computed in, so that a token's bits depend on that token and on `attend` alone.
      backend: of the products and of what is done to heads; only "xla" can be differentiated.
    """
    x = lookup(weights.embed, token_ids, weights.norm.dtype)  # the norms are never quantised
    cos, sin = by_rows(tiles, functools.partial(rope_tables, config), positions)
    for index, layer in enumerate(weights.layers):
        heads = by_rows(tiles, functools.partial(_project, layer, config, backend), x, cos, sin)
        attended, state = attend(index, heads, state)
        x = by_rows(tiles, functools.partial(_combine, layer, config, backend), x, attended)
    return by_rows(tiles, lambda x: rms_norm(x, weights.norm, config.rms_norm_eps), x), state


def _project(layer: Layer, config: ModelConfig, backend: Backend, x: jax.Array, cos: jax.Array, sin: jax.Array) -> Heads:
    """The heads of x [X, D]."""
    eps = config.rms_norm_eps
    qkv = linear(x, layer.qkv, layer.qkv_bias, backend=backend, norm=layer.attention_norm, eps=eps)  # [X, K, G+2, H]
    with jax.named_scope("rope"):
        return rotate_heads(qkv, cos, sin, layer.q_norm, layer.k_norm, eps=eps, backend=backend)


def _combine(layer: Layer, config: ModelConfig, backend: Backend, x: jax.Array, attended: jax.Array) -> jax.Array:
    """x [X, D] with what attention [X, N, H] and then the MLP add to it."""
    x = linear(attended.reshape(x.shape[0], -1), layer.o, layer.o_bias, residual=x, backend=backend)
    return gated_mlp(x, layer, norm=layer.mlp_norm, eps=config.rms_norm_eps, residual=x, backend=backend)


def logits(
    weights: Weights, config: ModelConfig, hidden: jax.Array, *, tiles: RowTiles | None = None, backend: Backend = "xla"
) -> jax.Array:
    """Scores of the next token: hidden [R, D] -> float32 [R, V]; `tiles` and `backend` as in `forward`."""
    head = weights.embed if weights.lm_head is None else weights.lm_head
    return by_rows(tiles, lambda hidden: linear(hidden, head, out_dtype="float32", backend=backend, scope="head"), hidden)


def products_of(backend: Backend) -> Backend:
    """The backend of `forward` in a step whose attention has this one: C++ goes with C++, all others with XLA's."""
    return "auto" if backend in ("auto", "native") else "xla"
