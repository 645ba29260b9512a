"""Which tokens each sequence may have next: a matcher for each that has a grammar, which goes where its tokens are.

Knows sequences and masks. Refuses to know steps and devices.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

from jaxpaged.host.request import Request, Sequence
from jaxpaged.host.structured import StructuredOutputsParams
from jaxpaged.structured.grammars import Grammar, Grammars

if TYPE_CHECKING:
    import llguidance


@dataclass(eq=False)
class _State:
    """Invariant: the matcher has taken the first `num_taken` tokens of the output, or is in error for good."""

    matcher: llguidance.LLMatcher
    ends: list[tuple[int, np.uint32]]  # words of a mask, and in each the bit of an id that ends the request
    grammar: Grammar
    prototype: llguidance.LLMatcher | None  # which it is a copy of; None for one that shares nothing
    num_taken: int = 0


class Matchers:
    """The matchers of an engine's sequences, made when they are first needed and gone with their sequences.

    A sequence's tokens are what counts: a matcher that is behind them takes those that it lacks, and one that is ahead, which no
    order of events leads to, begins again. So nobody has to tell when a sequence forks, gives way or is set back by a step that
    failed.

    A row is a mask: bit i % 32 of word i // 32 says whether token i may come next. Where the grammar accepts the text, so may the
    ids that end the request; nothing else that has no text ever may.
    """

    def __init__(self, grammars: Grammars, *, vocab_size: int, prepare: Callable[[], None] = lambda: None):
        """`vocab_size` is the model's: it may have more tokens than the tokenizer, and fewer.

        Args:
          prepare: called when the first request with a grammar is checked.
        """
        self.grammars, self.vocab_size, self._prepare = grammars, vocab_size, prepare
        self.num_words = -(-vocab_size // 32)
        self._states: WeakKeyDictionary[Sequence, _State] = WeakKeyDictionary()
        self._held: dict[int, Grammar] = {}  # of each request that lives, by its id
        self.is_used = False  # whether any request has ever had a grammar

    def check(self, request: Request) -> None:
        """Have the request's grammar at hand for as long as it lives: no step waits for one.

        Raises:
          GrammarError: it is none, or compiling it takes too much.
        """
        self._held[id(request)] = self.grammars.find(_params(request))
        if not self.is_used:
            self._prepare()
        weakref.finalize(request, self._held.pop, id(request))
        self.is_used = True

    def is_complete(self, sequence: Sequence) -> bool:
        """Whether the text is of the form and nothing can follow it."""
        state = self._state(sequence)
        return state.matcher.is_stopped() and not state.matcher.is_error()

    def allowed(self, sequence: Sequence, drafts: Seq[int]) -> tuple[int, ...]:
        """The first of these proposed tokens, as far as each may follow those before it and none completes the text.

        What completes it ends the output, so that nothing has to be verified behind it.
        """
        matcher = self._state(sequence).matcher
        if matcher.is_error() or matcher.is_stopped():
            return ()
        num_valid = matcher.try_consume_tokens(list(drafts)) if drafts else 0
        is_last = num_valid > 0 and matcher.is_stopped()
        if num_valid:
            matcher.rollback(num_valid)
        return tuple(drafts[: num_valid - is_last])

    def forced(self, sequence: Sequence, most: int) -> tuple[int, ...]:
        """At most so many tokens that have to come next, where the grammar leaves one choice, as the tokenizer writes their text.

        Each is the only one that its mask has, so that what is sampled is the same with and without knowing them.
        """
        matcher = self._state(sequence).matcher
        if matcher.is_error() or matcher.is_stopped():
            return ()
        return self.allowed(sequence, matcher.compute_ff_tokens()[:most])

    def fill(self, masks: np.ndarray, sequence: Sequence, drafts: Seq[int] = ()) -> int:
        """Write the masks of the token after the sequence's last one and of those after each of the drafts.

        A draft that cannot be is not verified, nor is what comes after it. A sequence whose matcher has failed may have no token.

        Args:
          masks: uint32 [1 + drafts, ceil(V / 32)].

        Returns:
          How many rows were written; the rest is left as it is.
        """
        state = self._state(sequence)
        num_written, is_well = self._fill(masks, state, drafts)
        if not is_well and state.prototype is not None:
            num_written, _ = self._fill(masks, self._renewed(sequence, state), drafts)
        return num_written

    def _fill(self, masks: np.ndarray, state: _State, drafts: Seq[int]) -> tuple[int, bool]:
        """See `fill`; with it whether the matcher is well."""
        is_well, num_taken = self._fill_row(masks[0], state), 0
        while is_well and num_taken < len(drafts) and state.matcher.try_consume_tokens([drafts[num_taken]]):
            num_taken += 1
            is_well = self._fill_row(masks[num_taken], state)
        if num_taken:
            state.matcher.rollback(num_taken)
        return 1 + num_taken, is_well

    def _fill_row(self, row: np.ndarray, state: _State) -> bool:
        """Write one mask; whether the matcher is well."""
        matcher = state.matcher
        matcher.unsafe_compute_mask_ptr(*self._line_at)
        if matcher.is_error():
            row[:] = 0
            return False
        count = min(len(row), len(self._line))
        row[:count], row[count:] = self._line[:count], 0
        for word, bit in self._beyond:
            if word < len(row):
                row[word] &= bit
        if matcher.is_accepting():
            for word, bit in state.ends:
                row[word] |= bit
        return True

    @cached_property
    def _line(self) -> np.ndarray:
        """What a mask is written to first: a bit for each of the tokenizer's tokens, the last of them the grammar's own end."""
        return np.zeros(-(-self.grammars.vocabulary.vocab_size // 32), np.uint32)

    @cached_property
    def _line_at(self) -> tuple[int, int]:
        return self._line.ctypes.data, self._line.nbytes

    @cached_property
    def _beyond(self) -> list[tuple[int, np.uint32]]:
        """Words of a mask, and in each what it may have: neither the grammar's own end nor ids that the model does not have."""
        end = self.grammars.vocabulary.eos_token
        kept = [(end // 32, np.uint32(0xFFFFFFFF ^ 1 << end % 32))]
        if self.vocab_size % 32:
            kept.append((self.vocab_size // 32, np.uint32((1 << self.vocab_size % 32) - 1)))
        return kept

    def _state(self, sequence: Sequence) -> _State:
        """The matcher at the end of the sequence's tokens."""
        state, num_outputs = self._states.get(sequence), len(sequence.tokens) - sequence.num_prompt
        if state is None or state.num_taken > num_outputs:
            grammar = self._held.get(id(sequence.request)) or self.grammars.find(_params(sequence.request))
            ends = [(one // 32, np.uint32(1 << one % 32)) for one in sequence.request.stop_ids]
            state = _State(grammar.prototype.deep_copy(), ends, grammar, grammar.prototype)
            self._states[sequence] = state
        if state.num_taken < num_outputs:
            state.matcher.consume_tokens(sequence.tokens[sequence.num_prompt + state.num_taken :])
            state.num_taken = num_outputs
            if state.matcher.is_error() and state.prototype is not None:
                return self._renewed(sequence, state)
        return state

    def _renewed(self, sequence: Sequence, state: _State) -> _State:
        """The same with a matcher that shares nothing: others may have spent what this one shared with them."""
        matcher = state.grammar.fresh(state.prototype)  # type: ignore[arg-type]
        matcher.consume_tokens(sequence.tokens[sequence.num_prompt :])
        state = _State(matcher, state.ends, state.grammar, None, len(sequence.tokens) - sequence.num_prompt)
        self._states[sequence] = state
        return state


def is_constrained(sequence: Sequence) -> bool:
    """Whether its text has to be of some form."""
    return sequence.request.params.structured_outputs is not None


def _params(request: Request) -> StructuredOutputsParams:
    return request.params.structured_outputs  # type: ignore[return-value]
