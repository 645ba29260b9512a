"""Copy pages of a pool onto other pages of it: what copy-on-write needs."""

from __future__ import annotations

import jax

from pallas_kernels import backends, pools


def copy_pages(
    pages: jax.Array, sources: jax.Array, targets: jax.Array, *, num_layers: int = 1, backend: backends.Backend = "auto"
) -> jax.Array:
    """Page `targets[x]` becomes a copy of page `sources[x]`, bit by bit; in place when `pages` is donated to the surrounding jit.

    Pairs are copied in no order, so no target may be a source or appear twice; what such pages then hold is not defined. One
    source may have several targets.

    >>> import jax.numpy as jnp
    >>> pages = jnp.arange(4.0)[:, None, None, None] * jnp.ones((4, 2, 8, 32))  # 4 pages of 8 tokens, 2 heads of 32
    >>> copied = copy_pages(pages, jnp.array([2, 0]), jnp.array([3, 0]))  # page 2 onto page 3; the second pair is padding
    >>> copied[:, 0, 0, 0].tolist()
    [0.0, 1.0, 2.0, 2.0]

    Args:
      pages: [L*P, K, S, H], any dtype of 8, 16 or 32 bits, and 64 where the backend has them.
      sources, targets: int32 [X], each in [0, P). Padding pairs are (0, 0), the null page onto itself.
      num_layers: L. One pair copies page p of every layer, which is row l * P + p of the pool.

    Raises:
      ValueError: shapes or dtypes that do not fit each other, or an unknown backend.
      NotImplementedError: the named backend cannot run here; the message says why.
    """
    pools.check("copy_pages", pages, num_layers, sources=sources, targets=targets)

    move = pools.implementation("copy_pages", backend, pages)
    if not sources.shape[0]:
        return pages
    return move(pages, sources, targets, num_layers)
