"""Many small arrays as one: each transfer to the device costs as much as a thousand numbers, and a step has a score of arrays.

Knows names, shapes and types. Refuses to know what they mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_WORD = 4


@dataclass(frozen=True)
class Layout:
    """Where each array lies in one array of words, int32 [N]; a bool takes a byte, and every array begins with a word."""

    fields: tuple[tuple[str, tuple[int, ...], str], ...]  # name, shape, dtype: of four bytes, or bool

    @cached_property
    def _places(self) -> dict[str, tuple[int, int, int, tuple[int, ...], np.dtype]]:
        """The first word of each and the word after its last, its numbers, and how they lie."""
        found, at = {}, 0
        for name, shape, dtype in self.fields:
            kind, count = np.dtype(dtype), math.prod(shape)
            end = at + -(-count * kind.itemsize // _WORD)
            found[name], at = (at, end, count, shape, kind), end
        return found

    @cached_property
    def num_words(self) -> int:
        """N."""
        return max((place[1] for place in self._places.values()), default=0)

    def new(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Words that are zero, and the arrays: what is written to these is in the words."""
        words = np.zeros(self.num_words, np.int32)
        arrays = {
            name: words[start:end].view(kind)[:count].reshape(shape)
            for name, (start, end, count, shape, kind) in self._places.items()
        }
        return words, arrays

    def unpack(self, words: jax.Array) -> Mapping[str, jax.Array]:
        """The arrays, on the device."""
        arrays = {}
        for name, (start, end, count, shape, kind) in self._places.items():
            flat = words[start:end]
            if kind.kind == "b":
                flat = lax.bitcast_convert_type(flat, jnp.uint8).reshape(-1)[:count] != 0
            elif kind != np.int32:
                flat = lax.bitcast_convert_type(flat, kind)
            arrays[name] = flat.reshape(shape)
        return arrays
