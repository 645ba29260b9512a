"""Hidden states of whole prompts: the forward pass of a step over pages of its own, which are gone when it returns.

Knows tiles. Refuses to know which of them are of one prompt.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxpaged.config import ModelConfig
from jaxpaged.model.attention import PagedTokens
from jaxpaged.model.cache import init_cache
from jaxpaged.model.step import forward_paged
from jaxpaged.model.weights import Weights


@flax.struct.dataclass
class TileStates:
    """What each of C tiles of tokens comes to after the final norm; 0 for a tile of padding."""

    sums: jax.Array  # float32 [C, D], over the tile's tokens
    lasts: jax.Array  # float32 [C, D], of its last one
    is_sound: jax.Array  # bool [C], all of them are finite numbers


def tile_states(
    weights: Weights, tokens: PagedTokens, *, config: ModelConfig, num_pages: int, page_size: int, dtype: str, **options: Any
) -> TileStates:
    """Compute tiles alone, no decode rows, in `num_pages` pages of `dtype` (the null page included).

    `options` are those of `forward_paged`.
    """
    cache = init_cache(config, num_pages, page_size, dtype)
    hidden, _ = forward_paged(weights, cache, tokens, config=config, **options)
    C, T = tokens.num_tiles, tokens.tile
    states = jnp.where(tokens.is_real[:, None], hidden.astype(jnp.float32), 0).reshape(C, T, -1)
    counts = jnp.clip(tokens.tile_lens - tokens.first_positions, 0, T)
    lasts = jnp.take_along_axis(states, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
    return TileStates(jnp.sum(states, axis=1), lasts, tokens.is_finite(hidden))
