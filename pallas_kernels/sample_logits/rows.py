"""What the fast backends share: how each row samples, in the form that they need it, and logits as integers of the same order.

Every filter keeps the logits from some value on, so a row's filters are one threshold.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.sample_logits import noise

# Below this the likeliest token always wins, and dividing by it would overflow. The same bound as vLLM's.
LOWEST_TEMPERATURE = 1e-5
LOWEST_RANK = -2139095041  # of -inf, which nobody samples


class Rows(NamedTuple):
    """How each row samples: [B] each. A filter that a row does not use, or that is the same as none, has the value for none."""

    is_greedy: jax.Array
    temperatures: jax.Array  # float32, 1 for a greedy row
    inverse_temperatures: jax.Array
    top_ks: jax.Array  # int32, 0 or 1 .. V-1
    top_ps: jax.Array  # float32, 1 for none
    min_ps: jax.Array  # float32
    first_keys: jax.Array  # int32
    second_keys: jax.Array  # int32

    def lowest(self, highest: jax.Array) -> jax.Array:
        """The rank that min_p keeps from on, or everything but -inf; `highest` are the rows' largest logits."""
        floor = highest + self.temperatures * jnp.log(jnp.minimum(self.min_ps, 1.0))
        return jnp.maximum(rank(floor), LOWEST_RANK + 1)

    def below(self, highest: jax.Array, vocab_size: int) -> jax.Array:
        """A rank that top_p certainly keeps, from which a search may start.

        The likeliest token weighs 1, so what is kept by the other filters weighs Z >= 1. V tokens that weigh less than
        (1 - p) / 2V each weigh less than (1 - p) Z together: the threshold is above them all. The 2 is for rounding.
        """
        spare = (1.0 - self.top_ps) / (2.0 * vocab_size)
        return jnp.where(self.top_ps < 1, rank(highest + self.temperatures * jnp.log(spare)), LOWEST_RANK)

    def cannot_win(self, highest: jax.Array) -> jax.Array:
        """The rank below which the most noise loses to the likeliest token with the least."""
        return rank(highest - self.temperatures * (noise.MOST - noise.LEAST + 0.1))


def prepare(
    vocab_size: int,
    seeds: jax.Array,
    positions: jax.Array,
    temperatures: jax.Array,
    top_ks: jax.Array,
    top_ps: jax.Array,
    min_ps: jax.Array,
) -> Rows:
    """The rows of a call's arguments."""
    is_greedy = temperatures < LOWEST_TEMPERATURE
    temperatures = jnp.where(is_greedy, 1.0, temperatures)
    is_cut = ~is_greedy & (top_ks > 0) & (top_ks < vocab_size)
    first_keys, second_keys = noise.keys(seeds, positions)
    return Rows(
        is_greedy=is_greedy,
        temperatures=temperatures,
        inverse_temperatures=1.0 / temperatures,
        top_ks=jnp.where(is_cut, top_ks, 0),
        top_ps=jnp.where(is_greedy, 1.0, jnp.minimum(top_ps, 1.0)),
        min_ps=jnp.where(is_greedy, 0.0, min_ps),
        first_keys=first_keys,
        second_keys=second_keys,
    )


def clean(logits: jax.Array) -> jax.Array:
    """logits as float32 with -inf for NaN, the largest finite number for +inf, and one zero."""
    x = logits.astype(jnp.float32)
    x = jnp.minimum(jnp.where(x == x, x, -jnp.inf), jnp.finfo(jnp.float32).max)
    return jnp.where(x == 0.0, 0.0, x)


def rank(x: jax.Array) -> jax.Array:
    """int32 numbers in the order of the float32 numbers x, which have no NaN."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return bits ^ (lax.shift_right_arithmetic(bits, jnp.full_like(bits, 31)) & 0x7FFFFFFF)


def value(ranks: jax.Array) -> jax.Array:
    """The float32 numbers of these ranks."""
    bits = ranks ^ (lax.shift_right_arithmetic(ranks, jnp.full_like(ranks, 31)) & 0x7FFFFFFF)
    return lax.bitcast_convert_type(bits, jnp.float32)
