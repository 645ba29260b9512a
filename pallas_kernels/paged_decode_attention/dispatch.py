"""What both attention operations share before any arithmetic: the arguments in one piece, their checks, the choice of a backend.

Both are one function in every backend but Mosaic's: causal attention of T consecutive queries a row, the first of them at
`first_positions[b]`. A decode row is the case in which the last query is the row's last token.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import backends, native
from pallas_kernels.row_tiles import RowTiles
from pallas_kernels.target import Target

DECODE, PREFILL = "paged_decode_attention", "paged_prefill_attention"
PAGE_DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int8", "float64")


class Arrays(NamedTuple):
    """The arrays of one call; the letters are those of `pallas_kernels`."""

    q: jax.Array  # [B, T, N, H]
    k_pages: jax.Array  # [P, K, S, H]
    v_pages: jax.Array  # [P, K, S, H]
    block_tables: jax.Array  # int32 [B, M]
    kv_lens: jax.Array  # int32 [B]
    first_positions: jax.Array  # int32 [B]
    sinks: jax.Array | None = None  # float32 [N]
    k_scales: jax.Array | None = None  # float32 [K] or [P, K, S]
    v_scales: jax.Array | None = None


class Options(NamedTuple):
    """What is known when the call is compiled."""

    scale: float
    window: int = 0
    soft_cap: float = 0.0


def attend(
    operation: str, backend: str, arrays: Arrays, options: Options, *, batch_invariant: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The operation on the backend of that name: the result [B, T, N, H] and its LSE [B, T, N]. Raises as the operations say.

    Args:
      batch_invariant: a row's bits depend on nothing but that row.
    """
    arrays = jax.tree.map(jnp.asarray, arrays)  # numpy arrays are welcome outside of jit too
    check(operation, arrays, options)
    choice = choose(
        operation,
        backend,
        head_dim=arrays.q.shape[-1],
        page_size=arrays.k_pages.shape[2],
        dtypes=(arrays.q.dtype.name, arrays.k_pages.dtype.name),
    )
    if choice.name == "native":
        return native.attend(arrays, options)  # the sums of a row and head have an order of their own: batch-invariant as it is

    def call(arrays: Arrays) -> tuple[jax.Array, jax.Array]:
        if choice.target is not None:
            return _mosaic(operation).attend(arrays, options, choice.target)
        # Modules are named here, not imported above: who runs on a CPU does not wait for Mosaic's import.
        return importlib.import_module(f"pallas_kernels.paged_decode_attention.{choice.name}").attend(arrays, options)

    return _one_by_one(call, arrays) if batch_invariant else call(arrays)


def _one_by_one(call: Callable[[Arrays], tuple[jax.Array, jax.Array]], arrays: Arrays) -> tuple[jax.Array, jax.Array]:
    """`call` for each row by itself, padding left out."""

    def one(*rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        return call(arrays._replace(**dict(zip(names, rows, strict=True))))

    names = "q", "block_tables", "kv_lens", "first_positions"
    out, lse = RowTiles.of(arrays.kv_lens > 0, 1).map(one, *(getattr(arrays, name) for name in names))
    return out, jnp.where(arrays.kv_lens[:, None, None] > 0, lse, -jnp.inf)


def choose(operation: str, backend: str, *, head_dim: int, page_size: int, dtypes: tuple[str, str]) -> backends.Choice:
    """The backend that runs an attention operation for these sizes; `dtypes` are the queries' and the pages'.

    Raises:
      ValueError, NotImplementedError: as `backends.choose`.
    """

    def mosaic(target: Target) -> str | None:
        return _mosaic(operation).unavailable(target, head_dim=head_dim, page_size=page_size, dtypes=dtypes)

    return backends.choose(operation, backend, native=lambda: native.unavailable(head_dim, dtypes[1]), mosaic=mosaic)


def _mosaic(operation: str):
    return importlib.import_module(f"pallas_kernels.{operation}.mosaic")


def check(operation: str, arrays: Arrays, options: Options) -> None:
    """Raises ValueError for arguments that do not fit each other, naming what was given and what fits."""
    q, k, v, tables, lens, first, sinks, k_scales, v_scales = arrays

    def refuse(what: str) -> None:
        raise ValueError(f"{operation}: {what}")

    if q.ndim != 4 or k.ndim != 4 or tables.ndim != 2:
        refuse(f"q, pages and block_tables have {q.ndim}, {k.ndim} and {tables.ndim} axes, expected 4, 4 and 2")
    (B, _, N, H), (P, K, S, _) = q.shape, k.shape
    if k.shape != v.shape or k.dtype != v.dtype:
        refuse(f"k_pages are {k.dtype}{list(k.shape)} and v_pages {v.dtype}{list(v.shape)}, expected the same")
    if k.shape[-1] != H:
        refuse(f"q has heads of {H}, the pages heads of {k.shape[-1]}")
    if N % K:
        refuse(f"q has {N} heads, not a multiple of the {K} key/value heads")
    if k.dtype.name not in PAGE_DTYPES:
        refuse(f"pages of {k.dtype} are not supported; {', '.join(PAGE_DTYPES)} are")
    for name, x in (("block_tables", tables), ("kv_lens", lens), ("first_positions", first)):
        if x.shape[0] != B or x.dtype.name != "int32" or (x is not tables and x.ndim != 1):
            refuse(f"{name} is {x.dtype}{list(x.shape)}, expected int32 with {B} rows as q has")
    if sinks is not None and sinks.shape != (N,):
        refuse(f"sinks have shape {list(sinks.shape)}, expected [{N}], one for each head")
    if (k_scales is None) != (v_scales is None):
        refuse("k_scales and v_scales come together")
    for name, x in (("k_scales", k_scales), ("v_scales", v_scales)):
        if x is not None and x.shape not in ((K,), (P, K, S)):
            refuse(f"{name} have shape {list(x.shape)}, expected [{K}] or [{P}, {K}, {S}]")
    if k.dtype.name == "int8" and k_scales is None:
        refuse("int8 pages need k_scales and v_scales")
    if options.window < 0 or options.soft_cap < 0:
        refuse(f"window {options.window} and soft_cap {options.soft_cap} must be 0 or more")
