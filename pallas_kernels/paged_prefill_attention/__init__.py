"""Causal attention of tiles of prompt tokens over the pages of their sequences: the prefill half of a step."""

from __future__ import annotations

from typing import Any

import jax

from pallas_kernels import backends
from pallas_kernels.paged_decode_attention import dispatch


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
    soft_cap: float = 0.0,
    sinks: jax.Array | None = None,
    k_scales: jax.Array | None = None,
    v_scales: jax.Array | None = None,
    return_lse: bool = False,
    batch_invariant: bool = False,
    backend: backends.Backend = "auto",
) -> Any:
    """Attend each tile's T consecutive query tokens to the pages of the sequence that the tile is cut from.

    Query token t of tile b sits at position first_positions[b] + t and sees positions up to its own, below kv_lens[b]. Tokens of
    a tile at kv_lens[b] and beyond are padding; what they yield is finite (their LSE may be -inf) and means nothing.

    >>> import jax, jax.numpy as jnp
    >>> q = jax.random.normal(jax.random.key(0), (1, 16, 4, 64))  # the second tile of 16 tokens of a prompt of 30
    >>> k_pages, v_pages = jax.random.normal(jax.random.key(1), (2, 8, 2, 16, 64))
    >>> tables, kv_lens, first_positions = jnp.array([[5, 2]]), jnp.array([30]), jnp.array([16])
    >>> paged_prefill_attention(q, k_pages, v_pages, tables, kv_lens, first_positions, scale=64**-0.5).shape
    (1, 16, 4, 64)

    Args:
      q: [B, T, N, H], B tiles of T tokens.
      k_pages, v_pages: [P, K, S, H].
      block_tables: int32 [B, M], the whole table of the tile's sequence.
      kv_lens: int32 [B], tokens of the sequence up to the tile's last real token. 0 marks a padding tile, whose result is 0.
      first_positions: int32 [B], position of the tile's first token.
      batch_invariant: a tile's bits depend on nothing but that tile. Backends that sum over several at once then take one after
        the other, all but native, which never does.
      scale, window, soft_cap, sinks, k_scales, v_scales, return_lse, backend: as in `paged_decode_attention`, as are what is
        returned, what is raised, and the sources.
    """
    out, lse = dispatch.attend(
        dispatch.PREFILL,
        backend,
        dispatch.Arrays(q, k_pages, v_pages, block_tables, kv_lens, first_positions, sinks, k_scales, v_scales),
        dispatch.Options(scale=scale, window=window, soft_cap=soft_cap),
        batch_invariant=batch_invariant,
    )
    return (out, lse) if return_lse else out
