"""Attention of a few query tokens per row over that row's pages: the decode half of a step."""

from __future__ import annotations

from typing import Any

import jax

from pallas_kernels import backends
from pallas_kernels.paged_decode_attention import dispatch


def paged_decode_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_tables: jax.Array,
    kv_lens: jax.Array,
    *,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    sinks: jax.Array | None = None,
    k_scales: jax.Array | None = None,
    v_scales: jax.Array | None = None,
    return_lse: bool = False,
    backend: backends.Backend = "auto",
) -> Any:
    """Attend each row's query tokens to the pages of that row.

    Query token t of row b sees the first kv_lens[b] - T + 1 + t tokens of its pages, in block-table order. Query head n uses
    key/value head n // (N // K). Scores and sums are float32.

    >>> import jax, jax.numpy as jnp
    >>> q = jax.random.normal(jax.random.key(0), (2, 1, 4, 64))  # 2 rows, 1 new token each, 4 heads
    >>> k_pages, v_pages = jax.random.normal(jax.random.key(1), (2, 8, 2, 16, 64))  # 8 pages of 16 tokens, 2 key/value heads
    >>> block_tables = jnp.array([[5, 2], [7, 0]])  # row 0 has pages 5 and 2, row 1 page 7
    >>> paged_decode_attention(q, k_pages, v_pages, block_tables, jnp.array([20, 3]), scale=64**-0.5).shape
    (2, 1, 4, 64)

    Args:
      q: [B, T, N, H].
      k_pages, v_pages: [P, K, S, H], of float32, bfloat16, float16, float8_e4m3fn or int8. What lies outside a row's first
        kv_lens[b] tokens is never used, NaN or not.
      block_tables: int32 [B, M], page numbers; entries past a row's last page are never read.
      kv_lens: int32 [B], in tokens, counting the T written this step. 0 marks a padding row, whose result is 0 and LSE -inf.
      scale: multiplies q.k before the softmax; usually H ** -0.5.
      window: a query sees at most the last `window` tokens, itself included; 0 for all.
      soft_cap: scores s become soft_cap * tanh(s / soft_cap); 0 for none.
      sinks: float32 [N], a score for each head that takes part in the softmax's sum and carries no value.
      k_scales, v_scales: float32 [K] or [P, K, S], what the numbers in the pages are to be multiplied by; both or neither.
      return_lse: return the logarithm of the softmax's sum as well; `merge_states` says what it is good for.

    Returns:
      [B, T, N, H] in q's dtype; with return_lse a pair of it and float32 [B, T, N], sinks included in the sum.

    Raises:
      ValueError: shapes or dtypes that do not fit each other, or an unknown backend.
      NotImplementedError: the named backend cannot run here; the message says why.

    Source: Kwon et al. 2023, PagedAttention (arXiv 2309.06180); online softmax, Milakov and Gimelshein 2018 (arXiv 1805.02867);
    soft cap as in Gemma 2, sinks as in gpt-oss.
    """
    # A decode row is a tile that ends with its sequence, so both attention operations are one function.
    first_positions = kv_lens - q.shape[1]
    out, lse = dispatch.attend(
        dispatch.DECODE,
        backend,
        dispatch.Arrays(q, k_pages, v_pages, block_tables, kv_lens, first_positions, sinks, k_scales, v_scales),
        dispatch.Options(scale=scale, window=window, soft_cap=soft_cap),
    )
    return (out, lse) if return_lse else out
