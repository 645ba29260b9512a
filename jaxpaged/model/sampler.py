"""Logits to tokens, inside the compiled step: greedy, temperature, top-k, top-p, min-p.

Randomness depends on (seed, position) alone, so a token does not depend on who shares the batch, on preemption or on restarts.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import sample_logits
from pallas_kernels.backends import Backend
from pallas_kernels.sample_logits import is_native
from pallas_kernels.sample_logits.rows import LOWEST_TEMPERATURE

# Scores of which XLA's CPU backend finds the largest with vector instructions, which it does not for a place. float32, 16 rows of
# 49,152 scores: 3.95 ms with argmax, 0.44 so; 64 rows 47 and 3.0 ms (2 loaded CPU cores, jax 0.10.2, November 2026).
_PIECE = 128


@flax.struct.dataclass
class SamplingInputs:
    """How each of R rows samples; a padding row is greedy."""

    temperature: jax.Array  # float32 [R], 0 is greedy
    top_k: jax.Array  # int32 [R], 0 or less keeps all
    top_p: jax.Array  # float32 [R], 1 keeps all
    min_p: jax.Array  # float32 [R], 0 keeps all
    seeds: jax.Array  # uint32 [R, 2], high and low half of the request's seed


def sample(logits: jax.Array, sampling: SamplingInputs, positions: jax.Array, *, backend: Backend = "auto") -> jax.Array:
    """One token id per row, int32 [R].

    Args:
      logits: float32 [R, V].
      positions: int32 [R], where the new token goes in its sequence.
      backend: of `pallas_kernels.sample_logits`, where it is C++; else all rows are drawn together, as a GPU would rather.

    As in vLLM: divide by the temperature, then min_p, then top_k, then top_p on what is left. Ties at a threshold are all kept.
    Sampling is by the Gumbel maximum: argmax(logits + Gumbel noise) is distributed as softmax(logits).
    """
    if is_native(backend, logits):
        asked = sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p
        return sample_logits(logits, sampling.seeds, positions, *asked, backend="native")
    greedy = first_largest(logits)

    def draw(_: None) -> jax.Array:
        is_greedy = sampling.temperature < LOWEST_TEMPERATURE
        scaled = logits / jnp.where(is_greedy, 1.0, sampling.temperature)[:, None]
        needs_filter = jnp.any((sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0))
        scaled = lax.cond(needs_filter, lambda x: keep_likely(x, sampling), lambda x: x, scaled)
        noise = jax.vmap(_gumbel, in_axes=(0, 0, None))(sampling.seeds, positions, logits.shape[1])
        return jnp.where(is_greedy, greedy, first_largest(scaled + noise))

    # A batch of greedy rows draws no noise.
    return lax.cond(jnp.any(sampling.temperature >= LOWEST_TEMPERATURE), draw, lambda _: greedy, None)


def first_largest(scores: jax.Array) -> jax.Array:
    """argmax of each row of scores [R, V], int32 [R]: of equal ones the first. Some place in a row that is not all numbers."""
    R, V = scores.shape
    num_pieces = -(-V // _PIECE)
    pieces = jnp.pad(scores, ((0, 0), (0, num_pieces * _PIECE - V)), constant_values=-jnp.inf).reshape(R, num_pieces, _PIECE)
    best = jnp.argmax(jnp.max(pieces, axis=-1), axis=-1)
    piece = jnp.take_along_axis(pieces, best[:, None, None], axis=1)[:, 0]
    return jnp.minimum(best * _PIECE + jnp.argmax(piece, axis=-1), V - 1).astype(jnp.int32)


def processed(logits: jax.Array, sampling: SamplingInputs, token_ids: jax.Array) -> jax.Array:
    """The logits [R, V] that `sample` draws by: over the temperature, -inf for what is cut. Greedy rows are as they were.

    Of `token_ids` [R], which were drawn, none is cut: where a threshold is hit exactly, C++ rounds in another way.
    """
    is_greedy = sampling.temperature < LOWEST_TEMPERATURE
    scaled = logits / jnp.where(is_greedy, 1.0, sampling.temperature)[:, None]
    is_drawn = jnp.arange(logits.shape[1]) == token_ids[:, None]
    return jnp.where(is_greedy[:, None], logits, jnp.where(is_drawn, scaled, keep_likely(scaled, sampling)))


def likeliest(
    logits: jax.Array, temperature: jax.Array, count: int, is_plain: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Each row's `count` likeliest tokens, int32 [R, count], best first, and their log-probabilities, float32 [R, count].

    `temperature` [R] divides the logits and is 0 for a row that does not ask. Of equal tokens the lower id comes first. All are 0
    in a step where no row asks, which does no more than look. Rows of `is_plain` [R] get the logits themselves.
    """

    def search(_: None) -> tuple[jax.Array, jax.Array]:
        scaled = logits / jnp.where(temperature > 0, temperature, 1.0)[:, None]
        best, token_ids = lax.top_k(scaled, count)
        total = jax.nn.logsumexp(scaled, axis=-1, keepdims=True)
        if is_plain is not None:
            total = jnp.where(is_plain[:, None], 0.0, total)
        return token_ids.astype(jnp.int32), best - total

    def nothing(_: None) -> tuple[jax.Array, jax.Array]:
        shape = logits.shape[0], count
        return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)

    return lax.cond(jnp.any(temperature > 0), search, nothing, None)


def logprobs_of(
    logits: jax.Array, token_ids: jax.Array, is_wanted: jax.Array, *, is_plain: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of one token of each row, float32 [R], and its rank, int32 [R], by the model alone: no temperature, nothing
    cut. The likeliest has rank 1; of equal ones all have the rank of the last, as in vLLM.

    All are 0 in a step where no row of `is_wanted` [R] asks, which does no more than look. With `is_plain` it is the logit
    itself.
    """

    def compute(_: None) -> tuple[jax.Array, jax.Array]:
        chosen = jnp.take_along_axis(logits, token_ids[:, None], axis=-1)
        ranks = jnp.sum(logits >= chosen, axis=-1, dtype=jnp.int32)
        return chosen[:, 0] if is_plain else chosen[:, 0] - jax.nn.logsumexp(logits, axis=-1), ranks

    def nothing(_: None) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros(len(logits), jnp.float32), jnp.zeros(len(logits), jnp.int32)

    return lax.cond(jnp.any(is_wanted), compute, nothing, None)


def _gumbel(seed: jax.Array, position: jax.Array, size: int) -> jax.Array:
    key = jax.random.key(0)
    for word in (seed[0], seed[1], position.astype(jnp.uint32)):
        key = jax.random.fold_in(key, word)
    return jax.random.gumbel(key, (size,), jnp.float32)


def keep_likely(logits: jax.Array, sampling: SamplingInputs) -> jax.Array:
    """logits [R, V] with -inf where min_p, top_k or top_p cut a token.

    No sort: the k-th largest value, and the value at which the probability mass passes top_p, are found bit by bit, which is 32
    counting passes over the row and exact.
    """
    V = logits.shape[1]
    # The difference of two floats that are near each other is exact; the sum of a large one and a logarithm is not.
    behind = logits - jnp.max(logits, axis=-1, keepdims=True)
    logits = jnp.where(behind < jnp.log(sampling.min_p)[:, None], -jnp.inf, logits)  # log(0) = -inf keeps all

    ranks = _ordered_bits(logits)
    k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, V), V)
    kth = _largest_threshold(ranks, jnp.ones_like(logits), k.astype(jnp.float32))
    logits = jnp.where(ranks < kth[:, None], -jnp.inf, logits)

    probabilities = jax.nn.softmax(logits, axis=-1)
    cut = _largest_threshold(ranks, probabilities, sampling.top_p)
    return jnp.where((ranks < cut[:, None]) & (sampling.top_p < 1)[:, None], -jnp.inf, logits)


def _ordered_bits(x: jax.Array) -> jax.Array:
    """uint32 numbers in the same order as the float32 numbers x."""
    x = jnp.where(x == 0, 0.0, x)  # -0.0 and 0.0 are one number with two bit patterns
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest_threshold(ranks: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
    """Per row the largest t for which the weights of the entries with rank >= t still sum to at least `target`; uint32 [R]."""

    def try_bit(index: jax.Array, threshold: jax.Array) -> jax.Array:
        candidate = threshold | (jnp.uint32(1) << (31 - index).astype(jnp.uint32))
        total = jnp.sum(jnp.where(ranks >= candidate[:, None], weights, 0.0), axis=-1)
        return jnp.where(total >= target, candidate, threshold)

    return lax.fori_loop(0, 32, try_bit, jnp.zeros(ranks.shape[0], jnp.uint32))
