"""The random function of sampling, defined once for every backend: counter-based, so that any token's number can be had alone.

    key := (0, 0)
    for word in (seed's high half, seed's low half, position):  key := Threefry-2x32-20(key, counter (0, word))
    bits of token v := the two words of Threefry-2x32-20(key, counter (0, v)), xor-ed
    uniform := float32 with the bits' upper 23 as its fraction, in [1, 2), minus 1; 0 becomes the smallest normal float32
    noise := -log(-log(uniform)), a number between -4.48 and 15.95

That is jax.random.gumbel(key, [V]) after three times jax.random.fold_in (with the default, partitionable Threefry), which
`reference.py` says in those words. Everything is int32 that wraps around: a CPU, XLA and Mosaic agree on it bit for bit.

Source: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3; Maddison et al. 2014, A* sampling (the Gumbel maximum).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

# The largest and smallest noise there is, rounded outwards.
MOST, LEAST = 15.95, -4.48

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
_ONE = 0x3F800000  # the bits of 1.0


def keys(seeds: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The key of each row, two int32 [B]; `seeds` are uint32 [B, 2], high and low half."""
    words = lax.bitcast_convert_type(seeds, jnp.int32)
    first = second = jnp.zeros_like(words[:, 0])
    for word in (words[:, 0], words[:, 1], positions.astype(jnp.int32)):
        first, second = threefry(first, second, jnp.zeros_like(word), word)
    return first, second


def gumbel(first: jax.Array, second: jax.Array, tokens: jax.Array) -> jax.Array:
    """The noise of int32 `tokens` under a row's key, float32; the key's words are scalars or broadcast against the tokens."""
    a, b = threefry(first, second, jnp.zeros_like(tokens), tokens)
    fraction = lax.shift_right_logical(a ^ b, jnp.full_like(a, 9)) | _ONE
    uniform = jnp.maximum(lax.bitcast_convert_type(fraction, jnp.float32) - 1.0, jnp.finfo(jnp.float32).tiny)
    return -jnp.log(-jnp.log(uniform))


def threefry(first: jax.Array, second: jax.Array, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 in 20 rounds of the counter (x, y) under a key."""
    schedule = (first, second, first ^ second ^ _PARITY)
    x, y = x + first, y + second
    for group in range(5):
        for distance in _ROTATIONS[group % 2]:
            x = x + y
            y = x ^ (lax.shift_left(y, jnp.full_like(y, distance)) | lax.shift_right_logical(y, jnp.full_like(y, 32 - distance)))
        x, y = x + schedule[(group + 1) % 3], y + schedule[(group + 2) % 3] + (group + 1)
    return x, y
