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
from pallas_kernels.matmul import is_native
from pallas_kernels.row_tiles import RowTiles, by_rows

State = TypeVar("State")

# Tokens that a batch-invariant step computes at a time. Norms and products of 6 layers of the 135M shape in float32, with 1, 16
# and 512 tokens: 12, 11 and 196 ms in tiles of 16; 7, 17 and 383 in tiles of 8; 16, 15 and 204 in tiles of 32; 3, 11 and 124 all
# at once (lowest of 8 turns, 2 loaded CPU cores, jax 0.10.2, November 2026). In bfloat16 one row alone costs more than sixteen.
ROW_TILE = 16


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
    is_real: jax.Array | None = None,
    backend: Backend = "xla",
) -> tuple[jax.Array, State]:
    """Hidden states after the final norm, [X, D], and the state after the last layer.

    Args:
      token_ids: int32 [X], tokens of any number of sequences in any order; only `attend` relates them to each other.
      positions: int32 [X], each token's place in its own sequence.
      tiles: those that tokens are computed in, so that a token's bits depend on that token and on `attend` alone.
      is_real: bool [X], tokens that count: products leave the others out, and what becomes of them means nothing. None for all,
        and where there are `tiles`.
      backend: of the products and of what is done to heads; only "xla" can be differentiated.
    """
    how: dict[str, Any] = {"backend": backend, "is_real": is_real}
    x = lookup(weights.embed, token_ids, weights.norm.dtype)  # the norms are never quantised
    cos, sin = by_rows(tiles, functools.partial(rope_tables, config), positions)
    for index, layer in enumerate(weights.layers):
        heads = by_rows(tiles, functools.partial(_project, layer, config, how), x, cos, sin)
        attended, state = attend(index, heads, state)
        x = by_rows(tiles, functools.partial(_combine, layer, config, how), x, attended)
    return by_rows(tiles, lambda x: rms_norm(x, weights.norm, config.rms_norm_eps), x), state


def _project(layer: Layer, config: ModelConfig, how: dict[str, Any], x: jax.Array, cos: jax.Array, sin: jax.Array) -> Heads:
    """The heads of x [X, D]."""
    eps = config.rms_norm_eps
    qkv = linear(x, layer.qkv, layer.qkv_bias, norm=layer.attention_norm, eps=eps, **how)  # [X, K, G+2, H]
    with jax.named_scope("rope"):
        return rotate_heads(qkv, cos, sin, layer.q_norm, layer.k_norm, eps=eps, backend=how["backend"])


def _combine(layer: Layer, config: ModelConfig, how: dict[str, Any], x: jax.Array, attended: jax.Array) -> jax.Array:
    """x [X, D] with what attention [X, N, H] and then the MLP add to it."""
    x = linear(attended.reshape(x.shape[0], -1), layer.o, layer.o_bias, residual=x, **how)
    return gated_mlp(x, layer, norm=layer.mlp_norm, eps=config.rms_norm_eps, residual=x, **how)


def logits(
    weights: Weights,
    config: ModelConfig,
    hidden: jax.Array,
    *,
    tiles: RowTiles | None = None,
    is_real: jax.Array | None = None,
    backend: Backend = "xla",
) -> jax.Array:
    """Scores of the next token: hidden [R, D] -> float32 [R, V]; `tiles`, `is_real` and `backend` as in `forward`."""
    head = weights.embed if weights.lm_head is None else weights.lm_head
    how: dict[str, Any] = {"backend": backend, "is_real": is_real}
    return by_rows(tiles, lambda hidden: linear(hidden, head, out_dtype="float32", scope="head", **how), hidden)


def products_of(backend: Backend) -> Backend:
    """The backend of `forward` in a step whose attention has this one: C++ goes with C++, all others with XLA's."""
    return "auto" if backend in ("auto", "native") else "xla"


def of_rows(is_real: jax.Array, backend: Backend, *, batch_invariant: bool) -> dict[str, Any]:
    """What `forward` and `logits` take to compute, of rows [X], those that count and as few others as can be, in a step whose
    attention has this backend.
    """
    products = products_of(backend)
    return {
        "backend": products,
        "tiles": RowTiles.of(is_real, ROW_TILE) if batch_invariant else None,
        # Tiles leave them out already, and XLA would compute all and take them away again.
        "is_real": is_real if is_native(products) and not batch_invariant else None,
    }
