"""Functions of one's own that change logits, compiled into the step: what they are given, and the check that they fit.

Knows arrays. Refuses to know requests: their numbers come by name, a row each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import flax.struct
import jax
import jax.numpy as jnp

from jaxpaged.config import ConfigError


@flax.struct.dataclass
class LogitsRows:
    """What a processor may know of the R rows of a step; of padding rows it means nothing."""

    positions: jax.Array  # int32 [R], where the new token goes in its sequence
    token_ids: jax.Array  # int32 [R], the last token of each row's sequence
    extra: Mapping[str, jax.Array]  # name -> float32 [R], of `SamplingParams.extra_args`, or the processor's default


@dataclass(frozen=True)
class LogitsProcessor:
    """A pure JAX function of an engine's logits: `LLM(logits_processors=[...])`. A plain function is one without numbers.

        def favour(logits, rows):  # token 7 never follows token 3, and where a request says boost it likes token 5
            is_banned = (rows.token_ids == 3)[:, None] & (jnp.arange(logits.shape[1]) == 7)
            return jnp.where(is_banned, -jnp.inf, logits).at[:, 5].add(rows.extra["boost"])

        llm = LLM(logits_processors=[LogitsProcessor(favour, {"boost": 0.0})])
        llm.generate("Once", SamplingParams(extra_args={"boost": 2.5}))

    It gets float32 [R, V], all rows of a step and padding among them, and LogitsRows; it returns as many float32 numbers, -inf
    for tokens that cannot be chosen. It runs in every step, before all that requests want themselves; a row must not depend on
    others. A row with NaN, +inf or nothing but -inf ends its request with an error. Beams are scored without it, as in vLLM.

    Args:
      extra_args: the names of the numbers that it reads from `rows.extra`, with what they are where a request gives none.
    """

    function: Callable[[jax.Array, LogitsRows], jax.Array]
    extra_args: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, logits: jax.Array, rows: LogitsRows) -> jax.Array:
        return self.function(logits, rows)


Processors = Seq[Callable[[jax.Array, LogitsRows], jax.Array]]


def check(processors: Processors, names: Iterable[str], num_rows: int, vocab_size: int) -> None:
    """Raise ConfigError, with a line that names the function, unless each returns float32 [R, V] for it."""
    logits = jax.ShapeDtypeStruct((num_rows, vocab_size), jnp.float32)
    numbers, each = (jax.ShapeDtypeStruct((num_rows,), dtype) for dtype in (jnp.int32, jnp.float32))
    rows = LogitsRows(numbers, numbers, dict.fromkeys(names, each))  # type: ignore[arg-type]
    for index, processor in enumerate(processors):
        inner = processor.function if isinstance(processor, LogitsProcessor) else processor
        name = f"logits_processors[{index}], {getattr(inner, '__name__', type(inner).__name__)}"
        try:
            found = jax.eval_shape(processor, logits, rows)
        except Exception as error:  # whatever a function of somebody else's raises
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ConfigError(f"{name}: {reason[:200]}") from error
        if getattr(found, "shape", None) != logits.shape or found.dtype != logits.dtype:
            got = f"{found.dtype}{list(found.shape)}" if hasattr(found, "shape") else type(found).__name__
            raise ConfigError(f"{name}: returned {got}, expected float32{list(logits.shape)}, as it was given")


def process(processors: Processors, logits: jax.Array, rows: LogitsRows) -> tuple[jax.Array, jax.Array]:
    """The logits after all of them in turn, and whether a row is one that a token can be chosen by, bool [R]."""
    for processor in processors:
        logits = processor(logits, rows)
    is_number = jnp.all(~jnp.isnan(logits) & (logits < jnp.inf), axis=-1)
    return logits, is_number & (jnp.max(logits, axis=-1) > -jnp.inf)
