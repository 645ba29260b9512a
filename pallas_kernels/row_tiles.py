"""Functions of rows, computed a fixed number of rows at a time, so that a row's bits depend on nothing but the row.

How XLA sums a row depends on the shape that it is in: one row of a product is another kernel than two, a norm of 40 rows is
fused otherwise than one of 64, and a batch of attention otherwise than a row of it. Here every number of rows runs the same loop
body of the same shape. Knows arrays alone; that a body treats its rows alike wherever they are in it is what tests have to show.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowTiles:
    """Which tiles of `size` of X rows hold a row that counts. Only these are computed: padding costs nothing."""

    tiles: jax.Array  # int32 [max(2, -(-X // size))], the numbers of those tiles, then zeros
    count: jax.Array  # int32 [], how many
    size: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, is_real: jax.Array, size: int) -> RowTiles:
        """The tiles of rows [X] that hold one that is real."""
        num_rows = len(is_real)
        padded = jnp.pad(is_real, (0, max(-num_rows % size, 2 * size - num_rows))).reshape(-1, size)
        wanted = jnp.any(padded, axis=1)
        (tiles,) = jnp.nonzero(wanted, size=len(wanted), fill_value=0)
        return cls(tiles.astype(jnp.int32), jnp.sum(wanted, dtype=jnp.int32), size)

    def map(self, function: Callable[..., Any], *rows: jax.Array) -> Any:
        """`function` of the rows [X, ...], which treats each row by itself: its results [X, ...], 0 in tiles that do not count.

        The number of turns is known to the device alone. XLA would unroll a loop of one turn into what is around it, and fuse it
        otherwise than the body of a longer one. So it would a slice of one tile out of one: there are always two.
        """
        num_rows, size = len(rows[0]), self.size
        padding = len(self.tiles) * size - num_rows
        rows = tuple(jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)) for x in rows)
        results = jax.eval_shape(function, *(jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype) for x in rows))
        start = jax.tree.map(lambda one: jnp.zeros((len(rows[0]), *one.shape[1:]), one.dtype), results)

        def turn(index: jax.Array, found: Any) -> Any:
            at = self.tiles[index] * size
            new = function(*(lax.dynamic_slice_in_dim(x, at, size) for x in rows))
            return jax.tree.map(lambda x, y: lax.dynamic_update_slice_in_dim(x, y, at, 0), found, new)

        found = lax.fori_loop(0, self.count, turn, start)
        return jax.tree.map(lambda x: x[:num_rows], found)


def by_rows(tiles: RowTiles | None, function: Callable[..., Any], *rows: jax.Array) -> Any:
    """`function` of the rows [X, ...], which treats each row by itself: in tiles, or of all at once where there are none."""
    return function(*rows) if tiles is None else tiles.map(function, *rows)
