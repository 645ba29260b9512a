"""Put gathered pages into a pool: what swapping in needs."""

from __future__ import annotations

import jax

from pallas_kernels import backends, pools


def scatter_pages(
    pages: jax.Array,
    staged: jax.Array,
    page_numbers: jax.Array,
    *,
    num_layers: int = 1,
    backend: backends.Backend = "auto",
) -> jax.Array:
    """Page `page_numbers[x]` of every layer becomes `staged[x]`, bit by bit; in place when `pages` is donated to the outer jit.

    >>> import jax.numpy as jnp
    >>> from pallas_kernels import gather_pages
    >>> pages = jnp.arange(6.0)[:, None, None, None] * jnp.ones((6, 2, 8, 32))  # 2 layers of 3 pages of 8 tokens, 2 heads of 32
    >>> staged = gather_pages(pages, jnp.array([2]), num_layers=2)  # page 2 of both layers
    >>> scatter_pages(pages, staged, jnp.array([1]), num_layers=2)[:, 0, 0, 0].tolist()
    [0.0, 2.0, 2.0, 3.0, 5.0, 5.0]

    Args:
      pages: [L*P, K, S, H], any dtype of 8, 16 or 32 bits, and 64 where the backend has them.
      staged: [X, L, K, S, H] in the pages' dtype, as `gather_pages` returns it.
      page_numbers: int32 [X], each in [0, P) and no two the same. Padding names page 0, the null page; what that holds afterwards
        is not defined.
      num_layers: L; page p of layer l is row l * P + p of the pool.

    Raises:
      ValueError: shapes or dtypes that do not fit each other, or an unknown backend.
      NotImplementedError: the named backend cannot run here; the message says why.
    """
    pools.check("scatter_pages", pages, num_layers, page_numbers=page_numbers)
    expected = (page_numbers.shape[0], num_layers, *pages.shape[1:])
    if staged.shape != expected or staged.dtype != pages.dtype:
        raise ValueError(
            f"scatter_pages: staged is {staged.dtype}{list(staged.shape)}, expected {pages.dtype}{list(expected)} as "
            f"pages and page_numbers have it"
        )

    move = pools.implementation("scatter_pages", backend, pages)
    if not page_numbers.shape[0]:
        return pages
    return move(pages, staged, page_numbers, num_layers)
