"""Logits changed before a token is chosen, inside the compiled step: by id, by what is allowed, and by which tokens have been.

What a row wants is data; a row that wants nothing keeps its logits bit by bit. Knows arrays. Refuses to know requests.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

# A mark tells of one token in one sequence: how often the output has it, and beside that two bits.
IN_PROMPT = 1 << 30
REFUSED = 1 << 29
_COUNT = REFUSED - 1
RULES_AT_ONCE = 32  # rules of every row that are applied together: most requests have few, and a row has room for many


@flax.struct.dataclass
class Adjustments:
    """How the logits of each of R rows change. A row without rules and without a place is left as it is."""

    num_rules: jax.Array  # int32 [R], of the K places of the next three
    rule_ids: jax.Array  # int32 [R, K], whose logit
    rule_after: jax.Array  # int32 [R, K], the rule counts only after this token; -1 after any
    rule_values: jax.Array  # float32 [R, K], what is added; -inf takes the token away
    places: jax.Array  # int32 [R], 1 + the row's line in `marks`; 0 for a row that has none
    repetition: jax.Array  # float32 [R], 1 does nothing
    frequency: jax.Array  # float32 [R], 0 does nothing
    presence: jax.Array  # float32 [R], 0 does nothing
    num_drafts: jax.Array  # int32 [R], of the places of the next one
    drafts: jax.Array  # int32 [R, most], tokens of the row's text that `marks` does not tell of, proposed to be its last
    marks: jax.Array  # int32 [sequences, V], up to and with the tokens of this step but proposed ones

    def is_wanted(self) -> jax.Array:
        """Whether any row's logits change, bool []."""
        return jnp.any((self.num_rules > 0) | (self.places > 0))


def adjust(logits: jax.Array, wanted: Adjustments, last: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The logits [R, V] that tokens are chosen by, and whether there is one left to choose, bool [R].

    Args:
      last: int32 [R], the last token of each row's sequence.

    As in vLLM: rules (bad words, ends that come too early, biases), then penalties for repetition, frequency and presence. vLLM
    takes away what is not allowed before all these, and here it is last: what is -inf stays so under anything that is finite.
    """

    def by_rules(scores: jax.Array) -> jax.Array:
        rows = jnp.arange(len(scores))[:, None]

        def some(index: jax.Array, scores: jax.Array) -> jax.Array:
            start = index * RULES_AT_ONCE
            ids, after, values = (
                lax.dynamic_slice_in_dim(array, start, RULES_AT_ONCE, axis=1)
                for array in (wanted.rule_ids, wanted.rule_after, wanted.rule_values)
            )
            is_meant = start + jnp.arange(RULES_AT_ONCE) < wanted.num_rules[:, None]
            is_meant &= (after < 0) | (after == last[:, None])
            # An id past the end is dropped: what no rule names keeps its bits.
            return scores.at[rows, jnp.where(is_meant, ids, scores.shape[1])].add(values, mode="drop")

        return lax.fori_loop(0, -(-jnp.max(wanted.num_rules) // RULES_AT_ONCE), some, scores)

    def with_drafts(marks: jax.Array) -> jax.Array:
        is_meant = jnp.arange(wanted.drafts.shape[1]) < wanted.num_drafts[:, None]
        ids = jnp.where(is_meant, wanted.drafts, marks.shape[1])
        return marks.at[jnp.arange(len(marks))[:, None], ids].add(1, mode="drop")

    def by_marks(scores: jax.Array) -> jax.Array:
        marks = wanted.marks[jnp.maximum(wanted.places - 1, 0)]
        marks = lax.cond(jnp.any(wanted.num_drafts > 0), with_drafts, lambda x: x, marks)
        count = marks & _COUNT
        has_been = (marks & (IN_PROMPT | _COUNT)) != 0
        penalty = wanted.repetition[:, None]
        changed = jnp.where(has_been, jnp.where(scores > 0, scores / penalty, scores * penalty), scores)
        changed = changed - wanted.frequency[:, None] * count - wanted.presence[:, None] * (count > 0)
        changed = jnp.where((marks & REFUSED) != 0, -jnp.inf, changed)
        return jnp.where(wanted.places[:, None] > 0, changed, scores)

    changed = lax.cond(jnp.any(wanted.num_rules > 0), by_rules, lambda x: x, logits)
    changed = lax.cond(jnp.any(wanted.places > 0), by_marks, lambda x: x, changed)
    return changed, jnp.max(changed, axis=-1) > -jnp.inf


def begin(marks: jax.Array, place: jax.Array, tokens: jax.Array, lens: jax.Array, refused: jax.Array) -> jax.Array:
    """`marks` with line `place` written anew. Donate `marks`: it is updated in place.

    Args:
      tokens: int32 [max_model_len], of the sequence.
      lens: int32 [2], tokens of the prompt, and of prompt and output together; what follows is padding.
      refused: bool [V], tokens that are not allowed.
    """
    index = jnp.arange(len(tokens))
    in_prompt = jnp.zeros(marks.shape[1], bool).at[tokens].max(index < lens[0])
    count = jnp.zeros(marks.shape[1], jnp.int32).at[tokens].add(((index >= lens[0]) & (index < lens[1])).astype(jnp.int32))
    return marks.at[place].set(count + IN_PROMPT * in_prompt + REFUSED * refused)


def count_last(
    marks: jax.Array, places: jax.Array, known: jax.Array, fed: jax.Array, previous: jax.Array, is_new: jax.Array
) -> jax.Array:
    """`marks` with more output tokens of the sequences. Donate `marks`: it is updated in place.

    Args:
      places: int32 [N], lines of `marks`, of which one may be here several times.
      known: int32 [N], the tokens.
      fed: int32 [N], 1 + the place in `previous` of a token that only the device knows; 0 where `known` has it.
      is_new: bool [N], false for padding.
    """
    token_ids = jnp.where(fed > 0, previous[jnp.maximum(fed - 1, 0)], known)
    return marks.at[places, token_ids].add(is_new.astype(jnp.int32))
