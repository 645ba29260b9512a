"""A token for each row of logits, and what is told of it: processors, adjustments and a mask change them, then one is drawn.

Knows rows of logits. Refuses to know where they come from.
"""

from __future__ import annotations

from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from jaxpaged.model.adjust import Adjustments, adjust
from jaxpaged.model.processors import LogitsRows, Processors, process
from jaxpaged.model.sampler import SamplingInputs, likeliest, logprobs_of, processed, sample
from pallas_kernels.backends import Backend


@flax.struct.dataclass
class Rows:
    """What there is to know of each of R rows of logits."""

    positions: jax.Array  # int32 [R], where the new token goes in its sequence
    last: jax.Array  # int32 [R], the token before it
    sampling: SamplingInputs
    beam_temperature: jax.Array  # float32 [R], what divides the logits of a beam; 1 where the likeliest are wanted, else 0
    wants_logprobs: jax.Array  # bool [R], rows whose token is wanted with its log-probability
    adjustments: Adjustments | None = None  # None for rows that never change their logits
    extra: Mapping[str, jax.Array] | None = None  # name -> float32 [R], for logits processors; None where there are none


@flax.struct.dataclass
class Chosen:
    """What became of each row."""

    token_ids: jax.Array  # int32 [R]
    is_finite: jax.Array  # bool [R]: every logit of the row is a finite number, and its request left a token to choose
    likeliest_ids: jax.Array  # int32 [R, max_logprobs or V], best first; of rows that do not ask it means nothing
    likeliest_logprobs: jax.Array  # float32, likewise
    logprobs: jax.Array  # float32 [R], of the token; 0 where no row wants it
    ranks: jax.Array  # int32 [R], of the token, likewise


@flax.struct.dataclass
class Masks:
    """Which tokens some of R rows may have."""

    rows: Rows
    allowed: jax.Array  # uint32 [R, ceil(V / 32)], bit i % 32 of word i // 32 for token i
    is_masked: jax.Array  # bool [R], the others have what they have


@jax.named_scope("sampling")
def choose(
    logits: jax.Array,
    rows: Rows,
    max_logprobs: int,
    *,
    logprobs_mode: str = "raw_logprobs",
    processors: Processors = (),
    allowed: jax.Array | None = None,
    backend: Backend = "auto",
) -> Chosen:
    """What follows from logits, float32 [R, V].

    Processors come first, and tokens that are not `allowed` are taken away last, after all that a request wants of its logits:
    what is -inf stays so.

    Args:
      logprobs_mode: whether log-probabilities, or logits, are told of what the model alone finds (raw) or of what is drawn by.
      allowed: as in `Masks`; None allows all.
      backend: of `sample`.
    """
    # 0 times what is not finite is NaN. XLA's CPU backend would keep what it finds of each of 64 rows of 49,152 logits before it
    # looks at all of a row: 6.4 ms for this function against 1.8 (2 cores, jax 0.10.2, November 2026).
    is_finite, changed = jnp.sum(logits * 0.0, axis=-1) == 0.0, logits
    if processors:
        changed, has_some = process(processors, logits, LogitsRows(rows.positions, rows.last, rows.extra or {}))
        is_finite &= has_some
    is_allowed = None if allowed is None else _bits(allowed, logits.shape[1])
    token_ids, has_choice = _draw(changed, rows, is_allowed, backend)
    shown = logits if logprobs_mode.startswith("raw") else _drawn_by(logits, changed, rows, is_allowed, token_ids)
    is_logit = logprobs_mode.endswith("logits")
    is_plain = rows.wants_logprobs if is_logit else None
    best = likeliest(shown, rows.beam_temperature, min(max_logprobs, logits.shape[1]), is_plain)
    logprobs, ranks = logprobs_of(shown, token_ids, rows.wants_logprobs, is_plain=is_logit)
    return Chosen(token_ids, is_finite & has_choice, *best, logprobs, ranks)


def rechoose(
    logits: jax.Array,
    chosen: Chosen,
    masks: Masks,
    *,
    max_logprobs: int,
    logprobs_mode: str = "raw_logprobs",
    processors: Processors = (),
    backend: Backend = "auto",
) -> Chosen:
    """What a step says of its rows once it is known which tokens its masked rows may have.

    Args:
      chosen: by the step; the masked rows' is not read. It may have more `token_ids` than there are rows.
    """
    is_masked, R = masks.is_masked, len(logits)
    rows = masks.rows.replace(  # type: ignore[attr-defined]
        wants_logprobs=masks.rows.wants_logprobs & is_masked,
        beam_temperature=jnp.where(is_masked, masks.rows.beam_temperature, 0.0),
    )
    options = {"logprobs_mode": logprobs_mode, "processors": processors, "allowed": masks.allowed, "backend": backend}
    found = choose(logits, rows, max_logprobs, **options)  # type: ignore[arg-type]

    def kept(new: jax.Array, old: jax.Array) -> jax.Array:
        now = jnp.where(is_masked.reshape(R, *[1] * (new.ndim - 1)), new, old[:R])
        return old.at[:R].set(now) if len(old) > R else now

    return jax.tree.map(kept, found, chosen)


def _bits(allowed: jax.Array, size: int) -> jax.Array:
    """bool [R, size] of words of 32."""
    bits = allowed[:, :, None] >> jnp.arange(32, dtype=jnp.uint32) & 1
    return bits.reshape(len(allowed), -1)[:, :size] != 0


def _draw(logits: jax.Array, rows: Rows, is_allowed: jax.Array | None, backend: Backend) -> tuple[jax.Array, jax.Array]:
    """A token for each row, and whether its request leaves it one."""
    adjustments = rows.adjustments

    def draw(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        return sample(logits, rows.sampling, rows.positions, backend=backend), jnp.max(logits, axis=-1) > -jnp.inf

    def plainly(_: None) -> tuple[jax.Array, jax.Array]:
        if is_allowed is not None:
            return draw(_masked(logits, is_allowed))
        return sample(logits, rows.sampling, rows.positions, backend=backend), jnp.ones(len(logits), bool)

    if adjustments is None:
        return plainly(None)

    def adjusted(_: None) -> tuple[jax.Array, jax.Array]:
        return draw(_masked(adjust(logits, adjustments, rows.last)[0], is_allowed))

    # Tokens come out of the branches and not logits, which a step that changes none would copy.
    return lax.cond(adjustments.is_wanted(), adjusted, plainly, None)


def _masked(logits: jax.Array, is_allowed: jax.Array | None) -> jax.Array:
    return logits if is_allowed is None else jnp.where(is_allowed, logits, -jnp.inf)


def _drawn_by(logits: jax.Array, changed: jax.Array, rows: Rows, is_allowed: jax.Array | None, token_ids: jax.Array) -> jax.Array:
    """The logits [R, V] that tokens are drawn by, where a row wants log-probabilities of them; else the model's."""

    def compute(_: None) -> jax.Array:
        found = changed if rows.adjustments is None else adjust(changed, rows.adjustments, rows.last)[0]
        # Beams compete by what the model finds.
        drawn_by = processed(_masked(found, is_allowed), rows.sampling, token_ids)
        return jnp.where(rows.wants_logprobs[:, None], drawn_by, logits)

    return lax.cond(jnp.any(rows.wants_logprobs), compute, lambda _: logits, None)
