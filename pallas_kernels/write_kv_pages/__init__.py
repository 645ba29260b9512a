"""Write new keys or values into their slots of a page array, quantised on the way when the pages are."""

from __future__ import annotations

import importlib
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import backends, native
from pallas_kernels.target import Target
from pallas_kernels.write_kv_pages import quantise


def write_kv_pages(
    pages: jax.Array,
    new: jax.Array,
    slots: jax.Array,
    *,
    scales: jax.Array | None = None,
    num_layers: int = 1,
    backend: backends.Backend = "auto",
) -> Any:
    """Put token x's heads at slot `slots[x]` = page * S + offset; in place when `pages` is donated to the surrounding jit.

    Quantised pages hold new / scale, a float32, clipped to what the dtype has and rounded to its nearest number, ties to the even
    one, so that every backend gives the same bits. A scale for each token and head is max|new| of its H numbers times 1 / 448, or
    1 / 127 for int8, in float32 too, and at least 2**-100, so that a head of zeros has a scale to be divided by.

    What is not finite stays visible. A quotient that is NaN or infinite is written as NaN, in int8 as -128, which nothing finite
    becomes; a token's head that holds such a number gets the scale NaN, so that all of it is NaN to those who read it.

    >>> import jax.numpy as jnp
    >>> pages, scales = jnp.zeros((3, 2, 8, 64), jnp.int8), jnp.ones((3, 2, 8))  # 3 pages of 8 tokens, 2 heads of 64
    >>> pages, scales = write_kv_pages(pages, jnp.full((1, 2, 64), 0.5), jnp.array([17]), scales=scales)
    >>> int(pages[2, 0, 1, 0]), round(float(pages[2, 0, 1, 0] * scales[2, 0, 1]), 6)
    (127, 0.5)

    Args:
      pages: [P, K, S, H].
      new: [X, K, H], cast to the pages' dtype when there are no scales.
      slots: int32 [X], each in [0, P * S). Live tokens have distinct slots. Padding tokens all name slots of null pages, whose
        content afterwards is not defined.
      scales: for pages of float8_e4m3fn and int8. float32 [K] divides each head and stays as it is; float32 [P, K, S] receives
        the scale of each token's head, in place when donated. Readers multiply by them: `k_scales` of `paged_decode_attention`.
      num_layers: of a flat pool, whose null pages are every (P // num_layers)-th. The Mosaic kernel writes to none of them. To
        one that it is not told of all padding tokens write at once: harmless, but a race to backend="interpret".

    Returns:
      [P, K, S, H]; with scales [P, K, S] a pair of it and the new scales.

    Raises:
      ValueError: shapes or dtypes that do not fit each other, or an unknown backend.
      NotImplementedError: the named backend cannot run here; the message says why.
    """
    _check(pages, new, slots, scales, num_layers)

    def mosaic(target: Target) -> str | None:
        return importlib.import_module("pallas_kernels.write_kv_pages.mosaic").unavailable(target, pages.shape, pages.dtype.name)

    choice = backends.choose("write_kv_pages", backend, native=lambda: native.unavailable(pages.shape[-1]), mosaic=mosaic)
    if not slots.shape[0]:
        return pages if scales is None or scales.ndim == 1 else (pages, scales)
    new_scales = None
    if scales is None:
        new = new.astype(pages.dtype)
    else:
        new_scales = quantise.scales_of(new, pages.dtype) if scales.ndim == 3 else None
        new = quantise.quantise(new, scales if new_scales is None else new_scales, pages.dtype)
    if choice.target is not None:
        kernel = importlib.import_module("pallas_kernels.write_kv_pages.mosaic")
        written = kernel.write_kv_pages(pages, new, slots, scales, new_scales, num_layers, target=choice.target)
        return written if new_scales is not None else written[0]
    portable = importlib.import_module(f"pallas_kernels.write_kv_pages.{'xla' if choice.name == 'native' else choice.name}")
    write = native.write_kv_pages if choice.name == "native" else portable.write_kv_pages
    written = write(pages, new, slots)
    if scales is None or new_scales is None:
        return written
    return written, portable.write_kv_pages(scales[..., None], new_scales[..., None], slots)[..., 0]


def _check(pages: jax.Array, new: jax.Array, slots: jax.Array, scales: jax.Array | None, num_layers: int) -> None:
    def refuse(what: str) -> None:
        raise ValueError(f"write_kv_pages: {what}")

    if pages.ndim != 4 or slots.ndim != 1:
        refuse(f"pages and slots have {pages.ndim} and {slots.ndim} axes, expected 4 and 1")
    (P, K, S, H), X = pages.shape, slots.shape[0]
    if new.shape != (X, K, H):
        refuse(f"new has shape {list(new.shape)}, expected {[X, K, H]} as slots and pages have it")
    if pages.dtype.name.removeprefix("u") in ("int2", "int4") or pages.dtype.name.startswith("float4"):
        refuse(f"pages of {pages.dtype}, expected numbers of whole bytes")
    if not jnp.issubdtype(slots.dtype, jnp.integer):
        refuse(f"slots are {slots.dtype}, expected int32")
    if num_layers < 1 or P % num_layers:
        refuse(f"num_layers is {num_layers}, expected a divisor of the pool's {P} pages")
    if scales is None:
        if pages.dtype == jnp.int8 and new.dtype != jnp.int8:
            refuse(f"{new.dtype} goes into int8 pages with scales only")
        return
    if pages.dtype.name not in quantise.LARGEST:
        refuse(f"pages of {pages.dtype} have no scales; those of {' and '.join(quantise.LARGEST)} have")
    if scales.shape not in ((K,), (P, K, S)) or scales.dtype != jnp.float32:
        refuse(f"scales are {scales.dtype}{list(scales.shape)}, expected float32 {[K]} or {[P, K, S]}")
