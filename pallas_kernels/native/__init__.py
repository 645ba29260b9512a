"""Paged attention and page writes on a CPU, in C++, called by XLA on its own threads.

XLA's CPU backend reads a page pool through a gather at a small part of what memory gives (see TRIED.md). The source beside this
file is compiled for the very machine at first use, with the compiler found there, and kept in the user's cache folder.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bits import as_bits
from pallas_kernels.native import building

if TYPE_CHECKING:
    from pallas_kernels.paged_decode_attention.dispatch import Arrays, Options

_SOURCE = Path(__file__).with_name("paged_attention.cc")
_KINDS = {"float32": 0, "bfloat16": 1, "float16": 2, "float8_e4m3fn": 3, "int8": 4}  # of pages that `attend` reads


def unavailable(head_dim: int, page_dtype: str = "float32") -> str | None:
    """Why this backend cannot run here for such pages, or None when it can. Builds and registers it at the first call."""
    if page_dtype not in _KINDS:
        return f"pages of {page_dtype} are not among {', '.join(_KINDS)}"
    return _unavailable(head_dim)


@functools.cache
def _unavailable(head_dim: int) -> str | None:
    if jax.default_backend() == "cpu" and (head_dim % 16 or head_dim > 256):
        return f"head size {head_dim} is not a multiple of 16 up to 256"
    handlers = {name: _target(name, head_dim) for name in ("PagedAttend", "WritePages")}
    purpose = f"attention backend for head size {head_dim}"
    return building.register(_SOURCE, handlers, (*building.MATH, f"-DHEAD_SIZE={head_dim}"), purpose)


def _target(name: str, head_dim: int) -> str:
    return f"pallas_kernels.{name}.{head_dim}"


def attend(arrays: Arrays, options: Options) -> tuple[jax.Array, jax.Array]:
    """Causal attention of T consecutive queries per row, the first at `first_positions[b]`: [B, T, N, H] and LSE [B, T, N]."""
    q, k_pages, v_pages, block_tables, kv_lens, first_positions, sinks, k_scales, v_scales = arrays
    dtype = q.dtype if q.dtype.name in ("float32", "bfloat16", "float16") else jnp.dtype(jnp.float32)
    outputs = jax.ShapeDtypeStruct(q.shape, dtype), jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)
    call = jax.ffi.ffi_call(_target("PagedAttend", q.shape[-1]), outputs)
    optional = (jnp.zeros(0) if x is None else x.astype(jnp.float32) for x in (sinks, k_scales, v_scales))
    out, lse = call(
        q.astype(dtype),
        *(as_bits(k_pages), as_bits(v_pages), block_tables, kv_lens, first_positions),
        *optional,
        scale=np.float32(options.scale),
        soft_cap=np.float32(options.soft_cap),
        window=np.int64(options.window),
        kind=np.int64(_KINDS[k_pages.dtype.name]),
    )
    return out.astype(q.dtype), lse


def write_kv_pages(pages: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
    """See the contract in `pallas_kernels.write_kv_pages`."""
    bits = as_bits(pages)
    name = _target("WritePages", pages.shape[-1])
    call = jax.ffi.ffi_call(name, jax.ShapeDtypeStruct(bits.shape, bits.dtype), input_output_aliases={0: 0})
    return call(bits, new.astype(pages.dtype), slots.astype(jnp.int32)).view(pages.dtype)  # bits of few tokens would be a copy
