"""Attention of a few query tokens per row over that row's pages: the decode half of a step."""

from __future__ import annotations

import jax

from pallas_kernels import backends, native
from pallas_kernels.paged_decode_attention import reference, xla


def paged_decode_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_tables: jax.Array,
    kv_lens: jax.Array,
    *,
    scale: float,
    window: int = 0,
    backend: backends.Backend = "auto",
) -> jax.Array:
    """Attend each row's query tokens to the pages of that row.

    Query token t of row b sees the first kv_lens[b] - T + 1 + t tokens of its pages, in block-table order. Query head n uses
    key/value head n // (N // K). Scores and sums are float32; the result has q's dtype.

    Args:
      q: [B, T, N, H].
      k_pages, v_pages: [P, K, S, H]. Values outside a row's first kv_lens[b] tokens are never used, NaN or not.
      block_tables: int32 [B, M], page numbers; entries past a row's last page are never read.
      kv_lens: int32 [B], in tokens, counting the T written this step. 0 marks a padding row, whose result is 0.
      scale: multiplies q.k before the softmax; usually H ** -0.5.
      window: a query sees at most the last `window` tokens, itself included; 0 for all.

    Raises:
      ValueError: N is not a multiple of K, or the backend's name is unknown.
      NotImplementedError: the named backend cannot run here; the message says why.

    Source: Kwon et al. 2023, PagedAttention (arXiv 2309.06180); online softmax, Milakov and Gimelshein 2018 (arXiv 1805.02867).
    """
    if q.shape[2] % k_pages.shape[1]:
        raise ValueError(f"q has {q.shape[2]} heads, not a multiple of the {k_pages.shape[1]} key/value heads")
    implementation = {"reference": reference, "xla": xla, "native": native}[backends.resolve(backend, q.shape[-1])]
    # A decode row is a tile that ends with its sequence, so both attention operations are one function in every backend.
    first_positions = kv_lens - q.shape[1]
    return implementation.attend_at(q, k_pages, v_pages, block_tables, kv_lens, first_positions, scale=scale, window=window)
