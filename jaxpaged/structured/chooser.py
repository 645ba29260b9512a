"""Tokens of rows that have a grammar, chosen late: when the tokens before them are known, while the device computes the logits.

Knows steps' rows and masks. Refuses to know what a grammar is.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpaged.host.plan import Chunk, StepPlan
from jaxpaged.model.step import Masks, StepInputs, StepOutputs, rechoose
from jaxpaged.structured.matchers import Matchers, is_constrained

_CHOSEN = "token_ids", "is_finite", "logprobs", "ranks"  # of StepOutputs, in the order of `rechoose`


class Late(NamedTuple):
    """A step whose masked rows have not chosen yet."""

    chunks: list[tuple[int, Chunk]]  # those that have a grammar, and the first row of each
    inputs: StepInputs


class Chooser:
    """Compiles one small program for each number of rows that a step has, and none after `warm_up`."""

    def __init__(self, matchers: Matchers, *, num_fed: int):
        """`num_fed`: tokens that a step hands to the next."""
        self.matchers, self.num_fed = matchers, num_fed
        self.compiled: dict[int, jax.stages.Compiled] = {}

    def late(self, plan: StepPlan, rows: Seq[int], inputs: StepInputs) -> Late | None:
        """What is to be chosen late of a step; None when it has chosen everything itself."""
        if not self.matchers.is_used:
            return None
        outputs = zip(rows, plan.outputs(), strict=True)
        chunks = [(row, chunk) for row, (chunk, num_drafts) in outputs if not num_drafts and is_constrained(chunk.sequence)]
        return Late(chunks, inputs) if chunks else None

    def choose(self, late: Late, outputs: StepOutputs) -> StepOutputs:
        """The step's outputs, whose logits are still there, with the tokens that the grammars allow."""
        masks = self._masks(late)
        num_rows = len(masks.is_masked)
        if num_rows not in self.compiled:  # enforce_eager
            self.compile(late.inputs)
        found = self.compiled[num_rows](*(getattr(outputs, name) for name in ("logits", *_CHOSEN)), masks)
        return outputs.replace(**dict(zip(_CHOSEN, found, strict=True)), logits=None)  # type: ignore[attr-defined]

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
        rows = inputs.sampling, inputs.wants_logprobs, inputs.adjustments
        return Masks(allowed, is_masked, positions.astype(np.int32), last, *rows)  # type: ignore[arg-type]

    def compile(self, padding: StepInputs) -> None:
        """Compile the program of steps of as many rows as this one has."""
        R, V = len(padding.sample_at), self.matchers.vocab_size
        shapes = ((R, V), jnp.float32), ((self.num_fed,), jnp.int32), ((R,), bool), ((R,), jnp.float32), ((R,), jnp.int32)
        arrays = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
        self.compiled[R] = jax.jit(rechoose).lower(*arrays, self._masks(Late([], padding))).compile()
