"""What the operations on whole pages of a pool agree on: its checks, where a page of a layer lies, who moves them."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import backends
from pallas_kernels.target import Target


def check(operation: str, pages: jax.Array, num_layers: int, **page_numbers: jax.Array) -> None:
    """Raises ValueError for a pool that does not hold `num_layers` layers, or page numbers that are not int32 [X]."""
    if pages.ndim != 4:
        raise ValueError(f"{operation}: pages have shape {list(pages.shape)}, expected [P, K, S, H]")
    if num_layers < 1 or pages.shape[0] % num_layers:
        raise ValueError(f"{operation}: num_layers is {num_layers}, expected a divisor of the pool's {pages.shape[0]} pages")
    lengths = {x.shape for x in page_numbers.values()}
    for name, x in page_numbers.items():
        if x.ndim != 1 or x.dtype.name != "int32" or len(lengths) > 1:
            others = (
                f" and as long as {' and '.join(key for key in page_numbers if key != name)}" if len(page_numbers) > 1 else ""
            )
            raise ValueError(f"{operation}: {name} is {x.dtype}{list(x.shape)}, expected int32 [X]{others}")


def by_layer(pages: jax.Array, num_layers: int) -> jax.Array:
    """[L, P, K, S, H] of a flat pool [L*P, K, S, H]: page p of layer l is row l * P + p."""
    return pages.reshape(num_layers, -1, *pages.shape[1:])


def rows(page_numbers: jax.Array, num_rows: int, num_layers: int) -> jax.Array:
    """[X, L], the rows of a flat pool of `num_rows` that hold the pages of these numbers."""
    return page_numbers[:, None] + jnp.arange(num_layers, dtype=jnp.int32) * (num_rows // num_layers)


def implementation(name: str, backend: backends.Backend, pages: jax.Array) -> Callable[..., jax.Array]:
    """The function of the backend that runs one of the operations that move pages. Raises as the operation does."""

    def mosaic(target: Target) -> str | None:
        return importlib.import_module(f"pallas_kernels.{name}.mosaic").unavailable(target, pages.shape, pages.dtype.name)

    choice = backends.choose(name, backend, mosaic=mosaic)
    move = getattr(importlib.import_module(f"pallas_kernels.{name}.{choice.name}"), name)
    return move if choice.target is None else functools.partial(move, target=choice.target)
