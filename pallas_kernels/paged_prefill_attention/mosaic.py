"""The Mosaic GPU kernels of tiles of prompts: which of the two runs, and how query rows are packed for it.

Hopper's warpgroup products take pages of the queries' own 16-bit dtype. All else, and every other chip from Ampere on, runs the
decode operation's kernel: it is causal by position and cuts rows into row tiles of 64 and long rows into chunks.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.paged_decode_attention import mosaic as portable
from pallas_kernels.paged_decode_attention.dispatch import Arrays, Options
from pallas_kernels.paged_prefill_attention import mosaic_wgmma, tiles
from pallas_kernels.target import Target


def unavailable(target: Target, *, head_dim: int, page_size: int, dtypes: tuple[str, str]) -> str | None:
    """Why no kernel can run on that GPU for these sizes and dtypes (of queries, of pages), or None."""
    return portable.unavailable(target, head_dim=head_dim, page_size=page_size, dtypes=dtypes)


def attend(arrays: Arrays, options: Options, target: Target) -> tuple[jax.Array, jax.Array]:
    """Causal attention of T consecutive queries per tile, the first at `first_positions[b]`: [B, T, N, H] and LSE [B, T, N].

    Raises:
      NotImplementedError: two stages of tiles do not fit the chip's shared memory.
    """
    q, k_pages = arrays.q, arrays.k_pages
    (B, T, N, H), K = q.shape, k_pages.shape[1]
    G = N // K
    sizes = tiles.choose(target, num_queries=T * G, head_dim=H, item_bytes=q.dtype.itemsize)
    suits = q.dtype == k_pages.dtype and q.dtype.itemsize == 2 and arrays.k_scales is None and options.scale > 0
    if not target.has_wgmma or not suits or sizes is None:
        return portable.attend(arrays, options, target)
    rows = sizes.num_blocks * sizes.block_rows

    def packed(x: jax.Array) -> jax.Array:
        """[B, T, N, ...] to [B, K, rows, ...]: the rows of a key/value head, token by token, padded."""
        x = jnp.moveaxis(x.reshape(len(x), T, K, G, *x.shape[3:]), 2, 1).reshape(len(x), K, T * G, *x.shape[3:])
        return jnp.pad(x, [(0, 0), (0, 0), (0, rows - T * G)] + [(0, 0)] * (x.ndim - 3))

    def unpacked(x: jax.Array) -> jax.Array:
        x = x[:, :, : T * G].reshape(B, K, T, G, *x.shape[3:])
        return jnp.moveaxis(x, 1, 2).reshape(B, T, N, *x.shape[4:])

    sinks = arrays.sinks
    if sinks is not None:
        sinks = packed(jnp.broadcast_to(sinks.astype(jnp.float32), (1, T, N)))[0]
    out, lse = mosaic_wgmma.attend(packed(q), sinks, arrays, options, target, sizes)
    return unpacked(out), unpacked(lse)
