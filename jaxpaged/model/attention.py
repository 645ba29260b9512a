"""Paged attention of one step: write the new keys and values, then attend decode rows and prefill tiles to their pages.

Knows how a step's flat tokens split into rows and tiles. Refuses to know the formula of attention: pallas_kernels has it.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from jaxpaged.config import ModelConfig
from jaxpaged.model.cache import KVCache
from jaxpaged.model.transformer import Attend
from pallas_kernels import paged_decode_attention, paged_prefill_attention, write_kv_pages
from pallas_kernels.backends import Backend


@flax.struct.dataclass
class PagedTokens:
    """The tokens of one step, X = D + C * TILE of them: D decode rows of one token, then C tiles of TILE consecutive tokens.

    Padding: a row or tile of length 0, and tokens after a tile's last real one; all of them write to the null page.
    """

    token_ids: jax.Array  # int32 [X]
    positions: jax.Array  # int32 [X], each token's place in its sequence; consecutive within a tile, its padding included
    slots: jax.Array  # int32 [X], page * S + offset in one layer's pages; below S for padding
    row_tables: jax.Array  # int32 [D, M]
    row_lens: jax.Array  # int32 [D], tokens of the row's sequence, this one counted
    tile_tables: jax.Array  # int32 [C, M]
    tile_lens: jax.Array  # int32 [C], tokens of the tile's sequence up to its last real token


def paged_attend(tokens: PagedTokens, config: ModelConfig, num_pages: int, page_size: int, backend: Backend) -> Attend:
    """The `attend` function of `transformer.forward` for one step; its state is the KVCache."""
    D, C = tokens.row_lens.shape[0], tokens.tile_lens.shape[0]
    scale = config.head_dim**-0.5
    tile = (tokens.token_ids.shape[0] - D) // max(C, 1)
    first_positions = tokens.positions[D:].reshape(C, tile)[:, 0] if C else tokens.positions[D:]

    def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        first_page = layer * num_pages  # layer l's page p is row l * P + p of the flat pool, its null page row l * P
        slots = tokens.slots + first_page * page_size
        k_pages = write_kv_pages(cache.k_pages, k, slots, backend=backend)
        v_pages = write_kv_pages(cache.v_pages, v, slots, backend=backend)
        options = {"scale": scale, "window": config.windows[layer] if config.windows else 0, "backend": backend}
        parts = []
        if D:
            rows = paged_decode_attention(
                q[:D, None], k_pages, v_pages, tokens.row_tables + first_page, tokens.row_lens, **options
            )
            parts.append(rows[:, 0])
        if C:
            tiles = q[D:].reshape(C, tile, *q.shape[1:])
            tables = tokens.tile_tables + first_page
            tiles = paged_prefill_attention(tiles, k_pages, v_pages, tables, tokens.tile_lens, first_positions, **options)
            parts.append(tiles.reshape(-1, *q.shape[1:]))
        return jnp.concatenate(parts), KVCache.of(k_pages, v_pages)

    return attend
