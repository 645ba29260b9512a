"""Paged attention of one step: write the new keys and values, then attend decode rows and prefill tiles to their pages.

Knows how a step's flat tokens split into rows and tiles. Refuses to know the formula of attention: pallas_kernels has it.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.struct
import jax
import jax.numpy as jnp

from jaxpaged.config import ModelConfig
from jaxpaged.model.cache import KVCache
from pallas_kernels import Heads, paged_decode_attention, paged_prefill_attention, write_kv_pages
from pallas_kernels.backends import Backend
from pallas_kernels.rotate_heads.xla import told


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

    @property
    def num_rows(self) -> int:
        """D, the decode rows."""
        return self.row_lens.shape[0]

    @property
    def num_tiles(self) -> int:
        """C, the prefill tiles."""
        return self.tile_lens.shape[0]

    @property
    def tile(self) -> int:
        """Tokens of one prefill tile; of no meaning without tiles."""
        return (self.token_ids.shape[0] - self.num_rows) // max(self.num_tiles, 1)

    @property
    def first_positions(self) -> jax.Array:
        """int32 [C], the position of each tile's first token."""
        return self.positions[self.num_rows :: max(self.tile, 1)]

    @property
    @jax.named_scope("checks")
    def is_real(self) -> jax.Array:
        """bool [X], false for padding."""
        lens = jnp.repeat(self.tile_lens, self.tile, total_repeat_length=self.num_tiles * self.tile)
        return jnp.concatenate([self.row_lens > 0, self.positions[self.num_rows :] < lens])

    @jax.named_scope("checks")
    def is_finite(self, hidden: jax.Array) -> jax.Array:
        """bool [R]: of each row and each tile, whether all hidden states [X, D] of its real tokens are finite."""
        is_sound = jnp.all(jnp.isfinite(hidden), axis=-1) | ~self.is_real
        tiles = is_sound[self.num_rows :].reshape(self.num_tiles, self.tile)
        return jnp.concatenate([is_sound[: self.num_rows], jnp.all(tiles, axis=-1)])

    def apart(self) -> PagedTokens:
        """The same tokens, each of them a tile of one: what it yields is one sum, whether it comes in a row or in a tile."""
        tables = jnp.repeat(self.tile_tables, self.tile, axis=0, total_repeat_length=self.num_tiles * self.tile)
        return self.replace(  # type: ignore[attr-defined]
            row_tables=self.row_tables[:0],
            row_lens=self.row_lens[:0],
            tile_tables=jnp.concatenate([self.row_tables, tables]),
            tile_lens=jnp.where(self.is_real, self.positions + 1, 0),
        )


@dataclass(frozen=True)
class PagedAttention:
    """The `attend` of `transformer.forward` for one step's tokens; its state is the KVCache.

    Invariant: no page ever holds a number that is not finite, whatever weights and activations do. What is not finite is written
    as 0, and all that its token makes of the attention is NaN, so that the token's hidden state tells of it.
    """

    tokens: PagedTokens
    config: ModelConfig
    backend: Backend
    batch_invariant: bool = False

    def __call__(self, layer: int, heads: Heads, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """Write the layer's new keys and values, then attend to all there are."""
        heads = narrowed(heads, cache)
        cache = self.write(layer, heads, cache)
        return self.told(self.read(layer, heads.q, cache), heads), cache

    @jax.named_scope("checks")
    def told(self, attended: jax.Array, heads: Heads) -> jax.Array:
        """What was read, [X, N, H], with NaN for each real token of which something is not finite."""
        is_sound = heads.is_finite | ~self.tokens.is_real
        return jnp.where(is_sound[:, None, None], attended, jnp.nan)

    @jax.named_scope("kv_write")
    def write(self, layer: int, heads: Heads, cache: KVCache) -> KVCache:
        """The cache with the tokens' keys and values, of its dtype, in their slots of a layer."""
        # Layer l's page p is row l * P + p of the flat pool, its null page row l * P.
        slots = self.tokens.slots + layer * cache.pages_per_layer(self.config) * cache.page_size
        k_pages = write_kv_pages(cache.k_pages, heads.k, slots, backend=self.backend)
        v_pages = write_kv_pages(cache.v_pages, heads.v, slots, backend=self.backend)
        return KVCache.of(k_pages, v_pages)

    @jax.named_scope("attention")
    def read(self, layer: int, q: jax.Array, cache: KVCache) -> jax.Array:
        """What the queries [X, N, H] gather from a layer's pages: [X, N, H]."""
        tokens, config = self.tokens.apart() if self.batch_invariant else self.tokens, self.config
        first_page = layer * cache.pages_per_layer(config)
        window = config.windows[layer] if config.windows else 0
        options = {"scale": config.head_dim**-0.5, "window": window, "backend": self.backend}
        pages = cache.k_pages, cache.v_pages
        D, C, tile = tokens.num_rows, tokens.num_tiles, tokens.tile
        parts = []
        if D:
            rows = paged_decode_attention(q[:D, None], *pages, tokens.row_tables + first_page, tokens.row_lens, **options)
            parts.append(rows[:, 0])
        if C:
            tables, firsts = tokens.tile_tables + first_page, tokens.first_positions
            tiles = q[D:].reshape(C, tile, *q.shape[1:])
            alone = self.batch_invariant
            tiles = paged_prefill_attention(tiles, *pages, tables, tokens.tile_lens, firsts, batch_invariant=alone, **options)
            parts.append(tiles.reshape(-1, *q.shape[1:]))
        return jnp.concatenate(parts)


@jax.named_scope("checks")
def narrowed(heads: Heads, cache: KVCache) -> Heads:
    """The heads with keys and values as pages hold them, whose dtype may lack room for a number."""
    if heads.k.dtype == cache.dtype:
        return heads
    k, v, is_finite = told(heads.k.astype(cache.dtype), heads.v.astype(cache.dtype))
    return heads._replace(k=k, v=v, is_finite=heads.is_finite & is_finite)
