"""One step of the engine as a pure function, and the same functions for people who want arrays in and arrays out.

`step` is what the engine compiles. `prefill` and `decode` run the same forward pass without an engine.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from jaxpaged.config import ModelConfig
from jaxpaged.model.adjust import Adjustments
from jaxpaged.model.attention import PagedAttention, PagedTokens
from jaxpaged.model.cache import KVCache
from jaxpaged.model.choice import Rows, choose
from jaxpaged.model.packed import Layout
from jaxpaged.model.sampler import SamplingInputs, likeliest, logprobs_of
from jaxpaged.model.transformer import forward, logits, of_rows, products_of
from jaxpaged.model.weights import Weights
from pallas_kernels.backends import Backend


@flax.struct.dataclass
class StepInputs:
    """Everything the device needs for one step, padded to a bucket. R = D + C rows may sample: a decode row each, a tile each."""

    tokens: PagedTokens
    fed: jax.Array  # int32 [D], 1 + the place in `previous` of a decode row's token; 0 where `tokens` has it
    previous: jax.Array  # int32 [R of the largest bucket], token_ids of the step before
    sample_at: jax.Array  # int32 [R], index into the step's X tokens
    sampling: SamplingInputs
    beam_temperature: jax.Array  # float32 [R], what divides the logits of a beam; 1 where the likeliest are wanted, else 0
    wants_logprobs: jax.Array  # bool [R], rows whose token is wanted with its log-probability
    prompt_targets: jax.Array  # int32 [C*T], 1 + the prompt's token after each of the tiles' tokens; 0 where none is wanted
    adjustments: Adjustments | None = None  # of the logits that tokens are chosen by; None for a step that never changes them
    extra: Mapping[str, jax.Array] | None = None  # name -> float32 [R], for logits processors; None where there are none

    @classmethod
    @functools.cache
    def layout(cls, D: int, C: int, T: int, M: int) -> Layout:
        """Of all that the host says anew in each step."""
        X, R = D + C * T, D + C
        return Layout(
            (
                *(("token_ids", (X,), "int32"), ("positions", (X,), "int32"), ("slots", (X,), "int32")),
                *(("tables", (R, M), "int32"), ("lens", (R,), "int32"), ("fed", (D,), "int32"), ("sample_at", (R,), "int32")),
                *(("temperature", (R,), "float32"), ("top_k", (R,), "int32"), ("top_p", (R,), "float32")),
                *(("min_p", (R,), "float32"), ("seeds", (R, 2), "uint32")),
                *(("beam_temperature", (R,), "float32"), ("wants_logprobs", (R,), "bool"), ("prompt_targets", (C * T,), "int32")),
            )
        )

    @classmethod
    def of(cls, arrays: Mapping[str, Any], previous: Any, **others: Any) -> StepInputs:
        """From the arrays of `layout`, on the host or on the device."""
        D = len(arrays["fed"])
        tables, lens = arrays["tables"], arrays["lens"]
        places = {name: arrays[name] for name in ("token_ids", "positions", "slots")}
        of_rows = {"row_tables": tables[:D], "row_lens": lens[:D], "tile_tables": tables[D:], "tile_lens": lens[D:]}
        tokens = PagedTokens(**places, **of_rows)
        sampling = SamplingInputs(*(arrays[name] for name in ("temperature", "top_k", "top_p", "min_p", "seeds")))
        asked = (arrays[name] for name in ("beam_temperature", "wants_logprobs", "prompt_targets"))
        return cls(tokens, arrays["fed"], previous, arrays["sample_at"], sampling, *asked, **others)

    @property
    @jax.named_scope("sampling")
    def is_sampled(self) -> jax.Array:
        """bool [R], rows whose token the plan wants, and the first row where it holds a token: `sample_at` of all others is 0."""
        first = jnp.concatenate([self.tokens.row_lens, self.tokens.tile_lens])[:1] > 0
        return (self.sample_at > 0).at[:1].set(first)

    def rows(self) -> Rows:
        """What there is to know of the rows that may sample."""
        positions, last = self.tokens.positions[self.sample_at] + 1, self.fed_tokens().token_ids[self.sample_at]
        wanted = self.sampling, self.beam_temperature, self.wants_logprobs, self.adjustments, self.extra
        return Rows(positions, last, *wanted)

    @jax.named_scope("inputs")
    def fed_tokens(self) -> PagedTokens:
        """`tokens` with those of the step before in their places."""
        ids = self.tokens.token_ids
        taken = self.previous[jnp.maximum(self.fed - 1, 0)]
        return self.tokens.replace(token_ids=ids.at[: len(self.fed)].set(jnp.where(self.fed > 0, taken, ids[: len(self.fed)])))  # type: ignore[attr-defined]


@flax.struct.dataclass
class PackedInputs:
    """The same as the engine sends them: what is new in one array."""

    words: jax.Array  # int32 [N], as `layout` has them
    previous: jax.Array
    adjustments: Adjustments | None
    extra: Mapping[str, jax.Array] | None
    layout: Layout = flax.struct.field(pytree_node=False)

    @jax.named_scope("inputs")
    def unpack(self) -> StepInputs:
        """On the device."""
        arrays = self.layout.unpack(self.words)
        return StepInputs.of(arrays, self.previous, adjustments=self.adjustments, extra=self.extra)


def of_packed(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step that takes `PackedInputs` wherever its inputs have `StepInputs`."""

    def run(weights: Any, cache: Any, inputs: Any) -> Any:
        def is_packed(one: Any) -> bool:
            return isinstance(one, PackedInputs)

        return step(weights, cache, jax.tree.map(lambda one: one.unpack() if is_packed(one) else one, inputs, is_leaf=is_packed))

    return run


@flax.struct.dataclass
class PromptLogprobs:
    """How likely the prompt's tokens are after those before them; 0 in tiles where nobody asks."""

    logprobs: jax.Array  # float32 [C*T], of each token's target
    ranks: jax.Array  # int32 [C*T], likewise
    likeliest_ids: jax.Array  # int32 [C*T, max_logprobs or V], best first
    likeliest_logprobs: jax.Array  # float32, likewise

    @classmethod
    @jax.named_scope("prompt_logprobs")
    def of(
        cls,
        weights: Weights,
        config: ModelConfig,
        hidden: jax.Array,
        inputs: StepInputs,
        max_logprobs: int,
        *,
        backend: Backend = "auto",
        batch_invariant: bool = False,
    ) -> PromptLogprobs | None:
        """What follows from the hidden states [X, D] of a step's tokens; None in a step without tiles.

        A tile at a time, so that there are never logits of more than one, and only of those that ask.
        """
        tokens = inputs.tokens
        C, D = tokens.num_tiles, tokens.num_rows
        if not C:
            return None
        T, count = tokens.tile, min(max_logprobs, config.vocab_size)

        def compute(tile: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
            states, targets = tile
            is_wanted = targets > 0
            scores = logits(weights, config, states, **of_rows(is_wanted, backend, batch_invariant=batch_invariant))
            best = likeliest(scores, jnp.ones(T, jnp.float32), count)
            return *logprobs_of(scores, jnp.maximum(targets - 1, 0), is_wanted), *best

        def nothing(num_tokens: int) -> tuple[jax.Array, ...]:
            one, many = (num_tokens,), (num_tokens, count)
            kinds = (one, jnp.float32), (one, jnp.int32), (many, jnp.int32), (many, jnp.float32)
            return tuple(jnp.zeros(*kind) for kind in kinds)

        def each(_: None) -> tuple[jax.Array, ...]:
            tiles = hidden[D:].reshape(C, T, -1), inputs.prompt_targets.reshape(C, T)
            found = lax.map(lambda tile: lax.cond(jnp.any(tile[1] > 0), compute, lambda _: nothing(T), tile), tiles)
            return tuple(part.reshape(C * T, *part.shape[2:]) for part in found)

        return cls(*lax.cond(jnp.any(inputs.prompt_targets > 0), each, lambda _: nothing(C * T), None))


@flax.struct.dataclass
class StepOutputs:
    """What a step yields, one entry per row that may sample; rows that the plan does not sample mean nothing."""

    token_ids: jax.Array  # int32 [R of the largest bucket], so that any step can take it as its `previous`
    is_finite: jax.Array  # bool [R]: every logit of the row is a finite number, and its request left a token to choose
    likeliest_ids: jax.Array  # int32 [R, max_logprobs or V], best first; of rows that do not ask it means nothing
    likeliest_logprobs: jax.Array  # float32, likewise
    logprobs: jax.Array  # float32 [R], of the token by the model alone; 0 in a step where no row wants it
    ranks: jax.Array  # int32 [R], of the token, likewise
    prompt: PromptLogprobs | None = None
    is_sound: jax.Array | None = None  # bool [R]: all hidden states of the row or tile are finite, whether it samples or not
    logits: jax.Array | None = None  # float32 [R, V], of the model alone, for `rechoose`

    @classmethod
    def of(cls, scores: jax.Array, inputs: StepInputs, max_logprobs: int, **options: Any) -> StepOutputs:
        """What follows from the logits [R, V] of the rows that may sample; `options` are those of `choose`."""
        chosen = vars(choose(scores, inputs.rows(), max_logprobs, **options))
        token_ids = jnp.pad(chosen["token_ids"], (0, len(inputs.previous) - len(scores)))
        return cls(**{**chosen, "token_ids": token_ids}, logits=scores)

    def told(
        self,
        weights: Weights,
        hidden: jax.Array,
        inputs: StepInputs,
        max_logprobs: int,
        *,
        config: ModelConfig,
        backend: Backend = "auto",
        batch_invariant: bool = False,
    ) -> StepOutputs:
        """The same, with what follows from the hidden states [X, D] of all tokens."""
        how: dict[str, Any] = {"backend": backend, "batch_invariant": batch_invariant}
        prompt = PromptLogprobs.of(weights, config, hidden, inputs, max_logprobs, **how)
        return self.replace(prompt=prompt, is_sound=inputs.tokens.is_finite(hidden))  # type: ignore[attr-defined]


def step(
    weights: Weights,
    cache: KVCache,
    inputs: StepInputs,
    *,
    config: ModelConfig,
    backend: Backend = "auto",
    max_logprobs: int = 20,
    batch_invariant: bool = False,
    **of_tokens: Any,
) -> tuple[StepOutputs, KVCache]:
    """Compute the step's tokens, write their keys and values, and sample. Donate `cache`: it is updated in place.

    `of_tokens` are the options of `choose`.
    """
    how: dict[str, Any] = {"config": config, "backend": backend, "batch_invariant": batch_invariant}
    hidden, cache = forward_paged(weights, cache, inputs.fed_tokens(), **how)
    scores = sampled_logits(weights, hidden, inputs, **how)
    outputs = StepOutputs.of(scores, inputs, max_logprobs, backend=products_of(backend), **of_tokens)
    return outputs.told(weights, hidden, inputs, max_logprobs, **how), cache


def forward_paged(
    weights: Weights,
    cache: KVCache,
    tokens: PagedTokens,
    *,
    config: ModelConfig,
    backend: Backend = "auto",
    batch_invariant: bool = False,
) -> tuple[jax.Array, KVCache]:
    """Hidden states [X, D] of a step's tokens, and the cache with their keys and values written."""
    attention = PagedAttention(tokens, config, backend, batch_invariant)
    how = of_rows(tokens.is_real, backend, batch_invariant=batch_invariant)
    return forward(weights, config, tokens.token_ids, tokens.positions, attention, cache, **how)


def sampled_logits(
    weights: Weights,
    hidden: jax.Array,
    inputs: StepInputs,
    *,
    config: ModelConfig,
    backend: Backend = "auto",
    batch_invariant: bool = False,
) -> jax.Array:
    """Logits, float32 [R, V], of the rows that may sample, from the hidden states [X, D] of a step's tokens."""
    how = of_rows(inputs.is_sampled, backend, batch_invariant=batch_invariant)
    return logits(weights, config, hidden[inputs.sample_at], **how)


def prefill(
    weights: Weights,
    cache: KVCache,
    token_ids: jax.Array,
    block_tables: jax.Array,
    lens: jax.Array,
    *,
    config: ModelConfig,
    start: jax.Array | None = None,
    backend: Backend = "auto",
) -> tuple[jax.Array, KVCache]:
    """Compute one chunk of each of B sequences: logits of every token, float32 [B, T, V], and the new cache.

    Args:
      token_ids: int32 [B, T]; row b's tokens after lens[b] are padding.
      block_tables: int32 [B, M], with pages for start[b] + lens[b] tokens; further entries 0.
      lens: int32 [B], tokens of the chunk.
      start: int32 [B], tokens of the sequence that are already in its pages; None for none.
    """
    B, T = token_ids.shape
    start = jnp.zeros(B, jnp.int32) if start is None else start
    positions = start[:, None] + jnp.arange(T)
    is_real = jnp.arange(T) < lens[:, None]
    tokens = PagedTokens(
        token_ids=token_ids.reshape(-1),
        positions=positions.reshape(-1),
        slots=_slots(block_tables, positions, is_real, cache.page_size).reshape(-1),
        row_tables=jnp.zeros((0, block_tables.shape[1]), jnp.int32),
        row_lens=jnp.zeros(0, jnp.int32),
        tile_tables=block_tables,
        tile_lens=jnp.where(lens > 0, start + lens, 0),
    )
    hidden, cache = forward_paged(weights, cache, tokens, config=config, backend=backend)
    return logits(weights, config, hidden, backend=products_of(backend)).reshape(B, T, -1), cache


def decode(
    weights: Weights,
    cache: KVCache,
    token_ids: jax.Array,
    block_tables: jax.Array,
    lens: jax.Array,
    *,
    config: ModelConfig,
    backend: Backend = "auto",
) -> tuple[jax.Array, KVCache]:
    """Compute one more token of each of B sequences: its logits, float32 [B, V], and the new cache.

    Args:
      token_ids: int32 [B], each sequence's last token, not yet in its pages.
      block_tables: int32 [B, M], with pages for lens[b] tokens; further entries 0.
      lens: int32 [B], tokens of each sequence, this one counted; 0 marks a padding row.
    """
    positions = jnp.maximum(lens - 1, 0)
    tokens = PagedTokens(
        token_ids=token_ids,
        positions=positions,
        slots=_slots(block_tables, positions[:, None], (lens > 0)[:, None], cache.page_size)[:, 0],
        row_tables=block_tables,
        row_lens=lens,
        tile_tables=jnp.zeros((0, block_tables.shape[1]), jnp.int32),
        tile_lens=jnp.zeros(0, jnp.int32),
    )
    hidden, cache = forward_paged(weights, cache, tokens, config=config, backend=backend)
    return logits(weights, config, hidden, backend=products_of(backend)), cache


def _slots(block_tables: jax.Array, positions: jax.Array, is_real: jax.Array, page_size: int) -> jax.Array:
    """Slot of each position [B, T]; the null page's for padding."""
    index = jnp.minimum(positions // page_size, block_tables.shape[1] - 1)
    pages = jnp.take_along_axis(block_tables, index, axis=1)
    return jnp.where(is_real, pages * page_size + positions % page_size, 0)
