"""Gather pages of a pool into contiguous memory: what swapping out needs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import backends, pools


def gather_pages(
    pages: jax.Array, page_numbers: jax.Array, *, num_layers: int = 1, backend: backends.Backend = "auto"
) -> jax.Array:
    """Copies of pages, bit by bit, each with all of its layers in one contiguous piece. `scatter_pages` is the way back.

    >>> import jax.numpy as jnp
    >>> pages = jnp.arange(6.0)[:, None, None, None] * jnp.ones((6, 2, 8, 32))  # 2 layers of 3 pages of 8 tokens, 2 heads of 32
    >>> staged = gather_pages(pages, jnp.array([2]), num_layers=2)
    >>> staged.shape, staged[0, :, 0, 0, 0].tolist()
    ((1, 2, 2, 8, 32), [2.0, 5.0])

    Args:
      pages: [L*P, K, S, H], any dtype of 8, 16 or 32 bits, and 64 where the backend has them.
      page_numbers: int32 [X], each in [0, P); a page may be named twice. Padding names page 0, whose content is then copied too.
      num_layers: L; page p of layer l is row l * P + p of the pool.

    Returns:
      [X, L, K, S, H] in the pages' dtype.

    Raises:
      ValueError: shapes or dtypes that do not fit each other, or an unknown backend.
      NotImplementedError: the named backend cannot run here; the message says why.
    """
    pools.check("gather_pages", pages, num_layers, page_numbers=page_numbers)

    move = pools.implementation("gather_pages", backend, pages)
    if not page_numbers.shape[0]:
        return jnp.zeros((0, num_layers, *pages.shape[1:]), pages.dtype)
    return move(pages, page_numbers, num_layers)
