"""The draft model inside the compiled step: what it proposes after the tokens that the target has just sampled.

Its keys and values lie in pages of its own with the numbers of the target's. Knows arrays. Refuses to know requests: what was
accepted it finds out by itself, so that the host is asked once per step and not once per token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpaged.config import ModelConfig
from jaxpaged.model.attention import PagedTokens
from jaxpaged.model.cache import KVCache
from jaxpaged.model.sampler import SamplingInputs, sample
from jaxpaged.model.step import StepInputs, StepOutputs, forward_paged
from jaxpaged.model.transformer import logits, products_of
from jaxpaged.model.weights import Weights
from pallas_kernels.backends import Backend

BACKLOG = 16  # W: tokens of a sequence that the draft has missed and makes up for in one step, one after the other


@flax.struct.dataclass
class DraftInputs:
    """Which of a step's R rows belong to each of Q sequences that tokens are to be proposed for. One array is one transfer."""

    table: jax.Array  # int32 [Q, 4 + W]; a line of zeros is padding

    @classmethod
    def new(cls, num_sequences: int, num_drafts: int) -> DraftInputs:
        """All of it padding, as an array of numpy that can be written to."""
        table = np.zeros((num_sequences, 4 + BACKLOG), np.int32)
        table[:, 3] = num_drafts
        return cls(table)  # type: ignore[arg-type]

    @property
    def first_rows(self) -> jax.Array:
        """int32 [Q], the first of the rows that sample for the sequence."""
        return self.table[:, 0]

    @property
    def num_rows(self) -> jax.Array:
        """int32 [Q], so many after each other: one, and one for each draft that came with it; 0 for padding."""
        return self.table[:, 1]

    @property
    def num_known(self) -> jax.Array:
        """int32 [Q], tokens whose keys and values are in the draft's pages when the tiles have been computed."""
        return self.table[:, 2]

    @property
    def num_drafts(self) -> jax.Array:
        """int32 [], tokens to propose for each; 0 only keeps the draft's pages up with the target's."""
        return self.table[0, 3]

    @property
    def backlog(self) -> jax.Array:
        """int32 [Q, W], the tokens after those that are known, as far as they come before the step's; what follows is padding."""
        return self.table[:, 4:]

    def first(self, count: int) -> DraftInputs:
        """Those of the first so many sequences."""
        return DraftInputs(self.table[:count])


@flax.struct.dataclass
class Accepted:
    """Where Q sequences stand after a step: the tokens that it computed and samples, as far as they follow from each other."""

    start: jax.Array  # int32 [Q], the position of the first of them
    last: jax.Array  # int32 [Q], the position of the last, which was sampled and is not computed yet
    goal: (
        jax.Array
    )  # int32 [Q], the position up to which the draft is to compute: the last, or before `start` with a long backlog
    token_ids: jax.Array  # int32 [Q, K + 2], from `start` on; past `last` they mean nothing
    wanted: DraftInputs
    sampling: SamplingInputs  # [Q]
    tables: jax.Array  # int32 [Q, M]

    @classmethod
    def of(cls, inputs: StepInputs, sampled: jax.Array, wanted: DraftInputs, max_drafts: int) -> Accepted:
        """What follows from the tokens that the step's rows sampled, int32 [R or more]."""
        tokens, R = inputs.fed_tokens(), len(inputs.sample_at)
        rows = jnp.minimum(wanted.first_rows[:, None] + jnp.arange(max_drafts + 1), R - 1)
        computed, chosen = tokens.token_ids[inputs.sample_at[rows]], sampled[rows]
        # A draft holds when it is the token that the row before it sampled, and all drafts before it hold.
        is_draft = jnp.arange(1, max_drafts + 1) < wanted.num_rows[:, None]
        holds = jnp.cumprod((computed[:, 1:] == chosen[:, :-1]) & is_draft, axis=1)
        num_held = jnp.sum(holds, axis=1, dtype=jnp.int32)
        start = tokens.positions[inputs.sample_at[wanted.first_rows]]
        # Of a run that holds, what the rows sampled is what the next of them computed.
        token_ids = jnp.concatenate([computed[:, :1], chosen], axis=1)
        tables = jnp.concatenate([tokens.row_tables, tokens.tile_tables])[wanted.first_rows]
        sampling = jax.tree.map(lambda options: options[wanted.first_rows], inputs.sampling)
        W, last = wanted.backlog.shape[1], start + num_held + 1
        goal = jnp.where(wanted.num_known + W < start, wanted.num_known + W - 1, last)
        return cls(start, last, goal, token_ids, wanted, sampling, tables)

    def token_at(self, positions: jax.Array) -> jax.Array:
        """The tokens at one position of each sequence, int32 [Q], from `num_known` to `goal`."""
        found = _at(self.token_ids, positions - self.start)
        return jnp.where(positions < self.start, _at(self.wanted.backlog, positions - self.wanted.num_known), found)

    def rows(self, token_ids: jax.Array, positions: jax.Array, page_size: int, is_meant: jax.Array | bool = True) -> PagedTokens:
        """Decode rows [Q], a token of each sequence. A position past a sequence's pages is padding: it may not write the null
        page, which has to stay finite, nor read what others have written there. So is one past a goal that is not the last."""
        index = positions // page_size
        page = _at(self.tables, index)
        is_real = is_meant & (self.wanted.num_rows > 0) & (page > 0) & (index < self.tables.shape[1])
        is_real &= (positions <= self.goal) | (self.goal == self.last)
        return PagedTokens(
            token_ids=token_ids,
            positions=positions,
            slots=jnp.where(is_real, page * page_size + positions % page_size, 0),
            row_tables=self.tables,
            row_lens=jnp.where(is_real, positions + 1, 0),
            tile_tables=jnp.zeros((0, self.tables.shape[1]), jnp.int32),
            tile_lens=jnp.zeros(0, jnp.int32),
        )


def _at(table: jax.Array, index: jax.Array) -> jax.Array:
    """Of each row of [Q, X] the entry at one index, the nearest when there is none: [Q]."""
    return jnp.take_along_axis(table, jnp.clip(index, 0, table.shape[1] - 1)[:, None], axis=1)[:, 0]


def step_and_propose(
    weights: tuple[Weights, Weights],
    caches: tuple[KVCache, KVCache],
    inputs: tuple[StepInputs, DraftInputs],
    *,
    step: Callable[[Weights, KVCache, StepInputs], tuple[StepOutputs, KVCache]],
    config: ModelConfig,
    backend: Backend = "auto",
    max_drafts: int,
    few: int = 0,
) -> tuple[tuple[StepOutputs, jax.Array], tuple[KVCache, KVCache]]:
    """A step of the target, and what the draft model proposes after it; of each pair the target's comes first. Donate `caches`.

    Args:
      step: the target's.
      config: the draft's.
      few: a step without tiles has a way of its own for so many sequences or fewer; 0 for none.

    Returns beside the outputs the proposals, int32 [Q, 1 + max_drafts]: the position of the sequence's last token, and the tokens
    proposed after it; those past `num_drafts` mean nothing.
    """
    outputs, cache = step(weights[0], caches[0], inputs[0])
    Q = len(inputs[1].num_rows)
    sizes = (few, Q) if 0 < few < Q and not inputs[0].tokens.num_tiles else (Q,)
    run = functools.partial(propose, weights[1], config=config, backend=backend, max_drafts=max_drafts)

    def run_first(_: jax.Array, state: tuple[jax.Array, KVCache], *, count: int) -> tuple[jax.Array, KVCache]:
        proposals, draft_cache = run(state[1], inputs[0], outputs.token_ids, inputs[1].first(count))
        return jnp.pad(proposals, ((0, Q - count), (0, 0))), draft_cache

    state = jnp.zeros((Q, 1 + max_drafts), jnp.int32), caches[1]
    is_few = jnp.sum(inputs[1].num_rows > 0) <= sizes[0]
    for size in sizes:
        # Of two sizes, loops of one turn or none: a cond would copy the draft's pool.
        num_turns = (is_few == (size == sizes[0])).astype(jnp.int32) if len(sizes) > 1 else 1
        state = lax.fori_loop(0, num_turns, functools.partial(run_first, count=size), state)
    proposals, draft_cache = state
    return (outputs, proposals), (cache, draft_cache)


def propose(
    weights: Weights,
    cache: KVCache,
    inputs: StepInputs,
    sampled: jax.Array,
    wanted: DraftInputs,
    *,
    config: ModelConfig,
    backend: Backend,
    max_drafts: int,
) -> tuple[jax.Array, KVCache]:
    """Compute the step's tokens by the draft model too, as far as they hold, and let it go on from there by itself.

    Each token is drawn with the sampling options of its sequence and the very noise that the target will draw there, from the
    draft's logits: where the two models agree on what is likely, they agree on the token. (Gumbel coupling; what is accepted is
    exact whatever is proposed.)
    """
    known = Accepted.of(inputs, sampled, wanted, max_drafts)
    attend, products = functools.partial(forward_paged, config=config, backend=backend), products_of(backend)

    def draw(hidden: jax.Array, positions: jax.Array) -> jax.Array:
        return sample(logits(weights, config, hidden, backend=products), known.sampling, positions + 1, backend=products)

    def first(cache: KVCache) -> tuple[jax.Array, jax.Array, KVCache]:
        """The tiles, and of each sequence two tokens where two are not known, or else the last."""
        size, positions = cache.page_size, jnp.minimum(wanted.num_known + 1, known.goal)
        is_two = positions > wanted.num_known
        before = known.rows(known.token_at(positions - 1), positions - 1, size, is_two)
        rows = known.rows(known.token_at(positions), positions, size)
        D, tokens, both = inputs.tokens.num_rows, inputs.tokens, jax.tree.map(lambda *x: jnp.concatenate(x), before, rows)
        tiled = PagedTokens(
            token_ids=jnp.concatenate([both.token_ids, tokens.token_ids[D:]]),
            positions=jnp.concatenate([both.positions, tokens.positions[D:]]),
            slots=jnp.concatenate([both.slots, tokens.slots[D:]]),
            row_tables=both.row_tables,
            row_lens=both.row_lens,
            tile_tables=tokens.tile_tables,
            tile_lens=tokens.tile_lens,
        )
        hidden, cache = attend(weights, cache, tiled)
        Q = len(positions)
        return positions, draw(hidden[Q : 2 * Q], positions), cache

    def put(drafts: jax.Array, positions: jax.Array, token_ids: jax.Array) -> jax.Array:
        """`drafts` with those that were drawn after a last token or after another draft."""
        places = positions - known.last
        return drafts.at[jnp.arange(len(drafts)), jnp.where(places >= 0, places, max_drafts)].set(token_ids, mode="drop")

    def next_token(
        _: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array, KVCache]
    ) -> tuple[jax.Array, jax.Array, jax.Array, KVCache]:
        drafts, positions, drawn, cache = state
        positions = positions + 1
        token_ids = jnp.where(positions <= known.goal, known.token_at(positions), drawn)
        hidden, cache = attend(weights, cache, known.rows(token_ids, positions, cache.page_size))
        drawn = draw(hidden, positions)
        return put(drafts, positions, drawn), positions, drawn, cache

    positions, drawn, cache = first(cache)
    drafts = put(jnp.zeros((len(positions), max_drafts), jnp.int32), positions, drawn)
    num_behind = jnp.max(jnp.where(wanted.num_rows > 0, known.goal - positions, 0))
    state = drafts, positions, drawn, cache
    drafts, *_, cache = lax.fori_loop(0, num_behind + wanted.num_drafts - 1, next_token, state)
    return jnp.concatenate([known.last[:, None], drafts], axis=1), cache
