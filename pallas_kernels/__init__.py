"""Paged attention in JAX for people who compare kernels. Imports jax only, and never jaxpaged.

One folder an operation: the contract in `__init__.py`, the definition in `reference.py`, the fast portable path in `xla.py`.
Backends are chosen by name; one that cannot run raises NotImplementedError with the reason, and nothing falls back in silence.

Axis letters: B rows, T query tokens per row, P pages, S tokens per page, M pages per row, N query heads, K key/value heads,
G = N/K, H head size, L layers, X tokens or pages of one call.
"""

from pallas_kernels.copy_pages import copy_pages
from pallas_kernels.gather_pages import gather_pages
from pallas_kernels.matmul import matmul
from pallas_kernels.merge_states import merge_states
from pallas_kernels.paged_decode_attention import paged_decode_attention
from pallas_kernels.paged_prefill_attention import paged_prefill_attention
from pallas_kernels.quantized_matmul import quantized_matmul
from pallas_kernels.rotate_heads import Heads, rotate_heads
from pallas_kernels.sample_logits import sample_logits
from pallas_kernels.scatter_pages import scatter_pages
from pallas_kernels.write_kv_pages import write_kv_pages

__all__ = [
    "Heads",
    "copy_pages",
    "gather_pages",
    "matmul",
    "merge_states",
    "paged_decode_attention",
    "paged_prefill_attention",
    "quantized_matmul",
    "rotate_heads",
    "sample_logits",
    "scatter_pages",
    "write_kv_pages",
]
