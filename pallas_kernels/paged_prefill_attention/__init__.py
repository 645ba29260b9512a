"""Causal attention of tiles of prompt tokens over the pages of their sequences: the prefill half of a step."""

from __future__ import annotations

import jax

from pallas_kernels import backends, native
from pallas_kernels.paged_decode_attention import reference, xla


def paged_prefill_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_tables: jax.Array,
    kv_lens: jax.Array,
    first_positions: jax.Array,
    *,
    scale: float,
    window: int = 0,
    backend: backends.Backend = "auto",
) -> jax.Array:
    """Attend each tile's T consecutive query tokens to the pages of the sequence that the tile is cut from.

    Query token t of tile b sits at position first_positions[b] + t and sees positions up to its own, below kv_lens[b]. Tokens of
    a tile at kv_lens[b] and beyond are padding; what they yield is finite and means nothing.

    Args:
      q: [B, T, N, H], B tiles of T tokens.
      k_pages, v_pages: [P, K, S, H].
      block_tables: int32 [B, M], the whole table of the tile's sequence.
      kv_lens: int32 [B], tokens of the sequence up to the tile's last real token. 0 marks a padding tile, whose result is 0.
      first_positions: int32 [B], position of the tile's first token.
      scale, window, backend: as in `paged_decode_attention`, as are the errors and the source.
    """
    if q.shape[2] % k_pages.shape[1]:
        raise ValueError(f"q has {q.shape[2]} heads, not a multiple of the {k_pages.shape[1]} key/value heads")
    # Both operations are one loop over blocks with different tile heights, so they share one definition and one portable path.
    implementation = {"reference": reference, "xla": xla, "native": native}[backends.resolve(backend, q.shape[-1])]
    return implementation.attend_at(q, k_pages, v_pages, block_tables, kv_lens, first_positions, scale=scale, window=window)
