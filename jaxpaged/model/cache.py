"""The KV cache: the preallocated page arrays of all layers, and the arithmetic of their bytes.

Knows geometry. Refuses to know which page belongs to whom.
"""

from __future__ import annotations

import functools

import flax.struct
import jax
import jax.numpy as jnp

import pallas_kernels
from jaxpaged.config import ModelConfig
from pallas_kernels.bits import as_bits


@flax.struct.dataclass
class KVCache:
    """Pages of every layer in one flat array each for keys and values, [L*P, K, S, H]: page p of layer l is row l * P + p.

    One carried array instead of one per layer, so that a step updates it in place whatever the loop over layers is.
    Row l * P is layer l's null page, which padding reads and writes; it is always finite.

    `k` and `v` hold 16-bit floats as uint16 bits: XLA's CPU backend would otherwise convert the whole pool to float32 and back in
    every step (see pallas_kernels/bits.py). `k_pages` and `v_pages` are the numbers, a view that costs nothing inside a jit.
    """

    k: jax.Array
    v: jax.Array
    dtype: str = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, k_pages: jax.Array, v_pages: jax.Array) -> KVCache:
        """The cache that holds these pages, [L*P, K, S, H] each."""
        return cls(k=as_bits(k_pages), v=as_bits(v_pages), dtype=k_pages.dtype.name)

    @property
    def k_pages(self) -> jax.Array:
        """Keys as numbers, [L*P, K, S, H]."""
        return self.k.view(self.dtype)

    @property
    def v_pages(self) -> jax.Array:
        """Values as numbers, [L*P, K, S, H]."""
        return self.v.view(self.dtype)

    @property
    def page_size(self) -> int:
        """S, tokens per page."""
        return self.k.shape[2]

    def pages_per_layer(self, config: ModelConfig) -> int:
        """P, the null page included."""
        return self.k.shape[0] // config.num_layers


def init_cache(config: ModelConfig, num_pages: int, page_size: int, dtype: str = "float32") -> KVCache:
    """A cache of `num_pages` pages (the null page included) of zeros."""
    shape = (config.num_layers * num_pages, config.num_kv_heads, page_size, config.head_dim)
    return KVCache.of(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def copy_pages(cache: KVCache, sources: jax.Array, targets: jax.Array, *, config: ModelConfig) -> KVCache:
    """Page `targets[x]` of every layer becomes a copy of page `sources[x]`; (0, 0) is padding. Donate `cache`."""
    copy = functools.partial(pallas_kernels.copy_pages, sources=sources, targets=targets, num_layers=config.num_layers)
    return cache.replace(k=copy(cache.k), v=copy(cache.v))  # type: ignore[attr-defined]


def zero_pages(cache: KVCache, page_numbers: jax.Array, *, config: ModelConfig) -> KVCache:
    """Page `page_numbers[x]` of every layer becomes zeros; 0 is padding. Donate `cache`."""
    P = cache.pages_per_layer(config)
    rows = (jnp.arange(config.num_layers)[:, None] * P + page_numbers).reshape(-1)
    return cache.replace(k=cache.k.at[rows].set(0), v=cache.v.at[rows].set(0))  # type: ignore[attr-defined]


def gather_pages(cache: KVCache, page_numbers: jax.Array, *, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Copies of pages, keys and values as the cache holds them: [X, L, K, S, H] each, all layers of a page in one piece."""
    gather = functools.partial(pallas_kernels.gather_pages, page_numbers=page_numbers, num_layers=config.num_layers)
    return gather(cache.k), gather(cache.v)


def scatter_pages(cache: KVCache, k: jax.Array, v: jax.Array, page_numbers: jax.Array, *, config: ModelConfig) -> KVCache:
    """Page `page_numbers[x]` of every layer becomes `k[x]` and `v[x]`, which must be finite where it is 0. Donate `cache`."""
    scatter = functools.partial(pallas_kernels.scatter_pages, page_numbers=page_numbers, num_layers=config.num_layers)
    return cache.replace(k=scatter(cache.k, k), v=scatter(cache.v, v))  # type: ignore[attr-defined]


def page_bytes(config: ModelConfig, page_size: int, dtype: str) -> int:
    """Bytes of one page over all layers."""
    return config.page_bytes(page_size, dtype)
