"""What a plan's requests want of their logits, as arrays for the step, and the marks that penalties need, kept on the device.

Knows both requests and arrays, as `batch` does. Refuses to know what is done with them: that is `jaxpaged.model.adjust`.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import NamedTuple
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np

from jaxpaged.batch import Feed
from jaxpaged.host.plan import Chunk, StepPlan
from jaxpaged.host.request import MAX_RULES, Sequence
from jaxpaged.model import adjust
from jaxpaged.model.adjust import Adjustments

_RULES = ("rule_ids", "rule_after", "rule_values")


class _Marked(NamedTuple):
    place: int
    num_tokens: int  # of the sequence, that its line tells of


class Adjuster:
    """Owns a line of marks for each sequence that can run at a time.

    A line is written from the tokens that the host knows when a sequence comes, and from then on each step that decodes the
    sequence counts those that have come since, the last of which may be one that only the device knows. Whenever a line does not
    tell of the beginning of what its sequence is now (it was preempted, a step failed, its line was given to another), it is
    written anew; nobody has to tell. Proposed tokens are in no line: each of their rows brings those before it along.

    Memory is taken at the start and never again: no request can be the one for which there is none.

    Invariant: the line of a sequence in `_marked` tells of its first `num_tokens` tokens, once the steps in flight have run.
    """

    def __init__(self, *, num_sequences: int, vocab_size: int, max_model_len: int, num_fed: int, max_drafts: int = 0):
        """
        Args:
          num_fed: tokens that a step hands to the next.
          max_drafts: tokens that are proposed for a sequence at a time.
        """
        self.num_sequences, self.vocab_size, self.max_model_len = num_sequences, vocab_size, max_model_len
        self.num_fed, self.max_drafts = num_fed, max_drafts
        self.marks = jnp.zeros((num_sequences, vocab_size), jnp.int32)
        self._marked: OrderedDict[Sequence, _Marked] = OrderedDict()  # the one that ran longest ago first
        self._biases: WeakKeyDictionary[Sequence, tuple[np.ndarray, np.ndarray]] = WeakKeyDictionary()
        self._plain: dict[int, Adjustments] = {}

    @functools.cached_property
    def _begin(self) -> jax.stages.Compiled:
        tokens, lens, refused = np.zeros(self.max_model_len, np.int32), np.zeros(2, np.int32), np.zeros(self.vocab_size, bool)
        jitted = jax.jit(adjust.begin, donate_argnums=0)
        return jitted.lower(self.marks, np.int32(0), tokens, lens, refused).compile()

    @functools.cached_property
    def _count_last(self) -> jax.stages.Compiled:
        numbers = np.zeros(self.num_fed, np.int32)
        jitted = jax.jit(adjust.count_last, donate_argnums=0)
        return jitted.lower(self.marks, numbers, numbers, numbers, numbers, numbers > 0).compile()

    def warm_up(self) -> None:
        """Compile everything that a request can need."""
        _ = self._begin, self._count_last

    def plain(self, num_rows: int) -> Adjustments:
        """Those of a step whose rows keep their logits. They stay on the device, so that such a step sends nothing there."""
        if num_rows not in self._plain:
            self._plain[num_rows] = jax.device_put(_nothing(num_rows, self.max_drafts))
        if self._plain[num_rows].marks is not self.marks:
            self._plain[num_rows] = self._plain[num_rows].replace(marks=self.marks)  # type: ignore[attr-defined]
        return self._plain[num_rows]

    def adjustments(self, plan: StepPlan, rows: Seq[int], num_rows: int, feed: Feed) -> Adjustments:
        """Those of a step, whose marks are brought up to date.

        Args:
          rows: of `plan.outputs()`.
          num_rows: of the step that may sample.
          feed: as the step's.
        """
        changed = [(row, *output) for row, output in zip(rows, plan.outputs(), strict=True) if _is_changed(output[0])]
        if not changed:
            return self.plain(num_rows)
        wanted = _nothing(num_rows, self.max_drafts)
        arrays: dict[str, np.ndarray] = vars(wanted)  # type: ignore[assignment]
        for row, chunk, num_drafts in changed:
            params, found = chunk.sequence.request.params, list(rules(chunk, num_drafts))
            for name, values in zip(_RULES, zip(*found, strict=True), strict=False):  # nothing to put where there is none
                arrays[name][row, : len(found)] = values
            num_rules = len(found) + len(params.biases)
            if params.biases:
                biased = slice(len(found), num_rules)
                arrays["rule_ids"][row, biased], arrays["rule_values"][row, biased] = self._biases_of(chunk.sequence)
            arrays["num_rules"][row] = num_rules
            arrays["repetition"][row] = params.repetition_penalty
            arrays["frequency"][row] = params.frequency_penalty
            arrays["presence"][row] = params.presence_penalty
        marked = [one for one in changed if _needs_marks(one[1])]
        places = self._mark([chunk for _, chunk, num_drafts in marked if not num_drafts], feed)
        for row, chunk, num_drafts in marked:
            arrays["places"][row] = 1 + places[chunk.sequence]
            arrays["num_drafts"][row] = num_drafts
            arrays["drafts"][row, :num_drafts] = chunk.drafts[:num_drafts]
        if not arrays["num_rules"].any():  # these are large, and those of nobody are on the device already
            wanted = wanted.replace(**{name: getattr(self.plain(num_rows), name) for name in _RULES})  # type: ignore[attr-defined]
        return wanted.replace(marks=self.marks)  # type: ignore[attr-defined]

    def _biases_of(self, sequence: Sequence) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and what is added to their logits, in every step of the sequence."""
        if sequence not in self._biases:
            token_ids, values = zip(*sequence.request.params.biases, strict=True)
            self._biases[sequence] = np.array(token_ids, np.int32), np.array(values, np.float32)
        return self._biases[sequence]

    def _mark(self, chunks: Seq[Chunk], feed: Feed) -> dict[Sequence, int]:
        """Bring the lines of these up to date, and say which they are."""
        for chunk in chunks:
            if chunk.sequence in self._marked:
                self._marked.move_to_end(chunk.sequence)
        counted: list[tuple[int, int, int]] = []  # a line, a token, and where in the feed that is when only the device knows it
        for num_others, chunk in zip(reversed(range(len(chunks))), chunks, strict=True):
            sequence, end = chunk.sequence, chunk.end - len(chunk.drafts)
            found = self._marked.get(sequence)
            place = found.place if found is not None else self._free_place()
            # A line is written whole where the host knows all tokens and counts the last where it may not.
            is_counted = chunk.is_decode and chunk.start >= sequence.num_prompt
            first = found.num_tokens if found is not None else 0
            room = self.num_fed - len(counted) - num_others
            if not is_counted or not sequence.num_prompt <= first <= chunk.start or end - first > room:
                first = chunk.start if is_counted else end
                self._write(place, sequence, first)
            self._marked[sequence] = _Marked(place, end)
            for position in range(first, end):
                is_pending = position == len(sequence.tokens)
                counted.append((place, 0, 1 + feed.rows[sequence]) if is_pending else (place, sequence.tokens[position], 0))
        if counted:
            arrays, is_new = np.zeros((3, self.num_fed), np.int32), np.arange(self.num_fed) < len(counted)
            arrays[:, : len(counted)] = np.transpose(counted)
            self.marks = self._count_last(self.marks, *arrays, feed.token_ids, is_new)
        return {chunk.sequence: self._marked[chunk.sequence].place for chunk in chunks}

    def _free_place(self) -> int:
        """A line that nobody has, or that of the sequence that ran longest ago: a step has no more sequences than there are."""
        taken = {marked.place for marked in self._marked.values()}
        if len(taken) < self.num_sequences:
            return next(place for place in range(self.num_sequences) if place not in taken)
        return self._marked.popitem(last=False)[1].place

    def _write(self, place: int, sequence: Sequence, num_tokens: int) -> None:
        tokens = np.zeros(self.max_model_len, np.int32)
        tokens[:num_tokens] = sequence.tokens[:num_tokens]
        lens = np.array([min(sequence.num_prompt, num_tokens), num_tokens], np.int32)
        allowed = sequence.request.params.allowed_token_ids
        refused = np.full(self.vocab_size, allowed is not None)
        refused[list(allowed or ())] = False
        self.marks = self._begin(self.marks, np.int32(place), tokens, lens, refused)

    def recover(self) -> None:
        """A step has failed, and nobody knows what it has left of the marks: they are made anew."""
        self._marked.clear()
        if not self.marks.is_deleted():
            self.marks.delete()
        self.marks = jnp.zeros((self.num_sequences, self.vocab_size), jnp.int32)

    def close(self) -> None:
        """Give the memory back."""
        self._marked.clear()
        for array in (self.marks, *jax.tree.leaves(list(self._plain.values()))):
            if isinstance(array, jax.Array) and not array.is_deleted():
                array.delete()
        self._plain.clear()


def rules(chunk: Chunk, num_drafts: int = 0) -> Iterator[tuple[int, int, float]]:
    """What counts by id for the token after a chunk and so many of its drafts, but biases: (whose logit, after which token or -1
    for any, what is added).

    The last token may be known to the device alone: which one it has to be is part of the rule.
    """
    sequence, request = chunk.sequence, chunk.sequence.request
    end = chunk.end - len(chunk.drafts) + num_drafts
    params, num_outputs = request.params, end - sequence.num_prompt
    if num_outputs < params.min_tokens:
        for token_id in {*request.eos_token_ids, *params.stop_token_ids}:
            yield token_id, -1, -np.inf
    for *before, last in params.bad_words_token_ids:
        if not before:
            yield last, -1, -np.inf
        elif len(before) <= num_outputs and all(
            chunk.token(position) == token_id for position, token_id in enumerate(before[:-1], end - len(before))
        ):
            yield last, before[-1], -np.inf


def _is_changed(chunk: Chunk) -> bool:
    return chunk.sequence.request.params.changes_logits


def _needs_marks(chunk: Chunk) -> bool:
    params = chunk.sequence.request.params
    return params.has_penalties or params.allowed_token_ids is not None


def _nothing(num_rows: int, max_drafts: int) -> Adjustments:
    """As numpy arrays that can be written to, without marks."""
    R = num_rows
    return Adjustments(
        num_rules=np.zeros(R, np.int32),  # type: ignore[arg-type]
        rule_ids=np.zeros((R, MAX_RULES), np.int32),  # type: ignore[arg-type]
        rule_after=np.full((R, MAX_RULES), -1, np.int32),  # type: ignore[arg-type]
        rule_values=np.zeros((R, MAX_RULES), np.float32),  # type: ignore[arg-type]
        places=np.zeros(R, np.int32),  # type: ignore[arg-type]
        repetition=np.ones(R, np.float32),  # type: ignore[arg-type]
        frequency=np.zeros(R, np.float32),  # type: ignore[arg-type]
        presence=np.zeros(R, np.float32),  # type: ignore[arg-type]
        num_drafts=np.zeros(R, np.int32),  # type: ignore[arg-type]
        drafts=np.zeros((R, max_drafts), np.int32),  # type: ignore[arg-type]
        marks=None,  # type: ignore[arg-type]
    )
