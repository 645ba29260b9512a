"""Tokens of rows that have a grammar, chosen late: when the tokens before them are known, while the device computes the logits.

Knows steps' rows and masks. Refuses to know what a grammar is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpaged.host.plan import Chunk, StepPlan
from jaxpaged.model.choice import Chosen, Masks, Rows, rechoose
from jaxpaged.model.step import StepInputs, StepOutputs
from jaxpaged.structured.matchers import Matchers, is_constrained


class Late(NamedTuple):
    """A step whose masked rows have not chosen yet."""

    chunks: list[tuple[int, Chunk]]  # those that have a grammar, and the first row of each
    inputs: StepInputs


class Chooser:
    """Compiles one small program for each number of rows that a step has, and none after `warm_up`."""

    def __init__(self, matchers: Matchers, *, num_fed: int, max_logprobs: int, **options: Any):
        """`num_fed`: tokens that a step hands to the next. `options`: as the step's, of `rechoose`."""
        self.matchers, self.num_fed = matchers, num_fed
        self.num_likeliest = min(max_logprobs, matchers.vocab_size)
        self._jitted = jax.jit(functools.partial(rechoose, max_logprobs=max_logprobs, **options))
        self.compiled: dict[int, jax.stages.Compiled] = {}

    def late(self, plan: StepPlan, rows: Seq[int], inputs: StepInputs) -> Late | None:
        """What is to be chosen late of a step; None when it has chosen everything itself."""
        outputs = zip(rows, plan.outputs(), strict=True)
        chunks = [(row, chunk) for row, (chunk, num_drafts) in outputs if not num_drafts and is_constrained(chunk.sequence)]
        return Late(chunks, inputs) if chunks else None

    def choose(self, late: Late, outputs: StepOutputs) -> StepOutputs:
        """The step's outputs, whose logits are still there, with the tokens that the grammars allow."""
        masks = self._masks(late)
        num_rows = len(masks.is_masked)
        if num_rows not in self.compiled:  # enforce_eager
            self.compile(late.inputs)
        chosen = Chosen(*(getattr(outputs, field.name) for field in dataclasses.fields(Chosen)))
        found = self.compiled[num_rows](outputs.logits, chosen, masks)
        return outputs.replace(**vars(found), logits=None)  # type: ignore[attr-defined]

    def _masks(self, late: Late) -> Masks:
        inputs, R = late.inputs, len(late.inputs.sample_at)
        allowed, is_masked, last = np.zeros((R, self.matchers.num_words), np.uint32), np.zeros(R, bool), np.zeros(R, np.int32)
        for row, chunk in late.chunks:
            sequence = chunk.sequence
            # One that has ended, or that a failed step has set back, has no use for what is chosen here.
            if sequence.finish_reason is None and len(sequence.tokens) == chunk.end - len(chunk.drafts):
                end = row + self.matchers.fill(allowed[row : row + 1 + len(chunk.drafts)], sequence, chunk.drafts)
                is_masked[row:end] = True
                last[row:end] = (sequence.tokens[-1], *chunk.drafts)[: end - row]
        positions = np.asarray(inputs.tokens.positions)[np.asarray(inputs.sample_at)] + 1
        wanted = inputs.sampling, inputs.beam_temperature, inputs.wants_logprobs, inputs.adjustments, inputs.extra
        return Masks(Rows(positions.astype(np.int32), last, *wanted), allowed, is_masked)  # type: ignore[arg-type]

    def compile(self, padding: StepInputs) -> None:
        """Compile the program of steps of as many rows as this one has."""
        R, V = len(padding.sample_at), self.matchers.vocab_size
        one, likeliest = (R,), (R, self.num_likeliest)
        shapes = ((self.num_fed,), jnp.int32), (one, bool), (likeliest, jnp.int32), (likeliest, jnp.float32)
        chosen = Chosen(*(jax.ShapeDtypeStruct(*shape) for shape in (*shapes, (one, jnp.float32), (one, jnp.int32))))  # type: ignore[arg-type]
        logits = jax.ShapeDtypeStruct((R, V), jnp.float32)
        self.compiled[R] = self._jitted.lower(logits, chosen, self._masks(Late([], padding))).compile()
