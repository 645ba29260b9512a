"""The bridge between host and device: a StepPlan and a Bucket become StepInputs, padded numpy arrays.

The only place that knows both what a plan means and how a compiled step wants it.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import NamedTuple

import jax
import numpy as np

from jaxpaged.config import Bucket
from jaxpaged.host.plan import Chunk, StepPlan
from jaxpaged.host.request import Sequence
from jaxpaged.model.attention import PagedTokens
from jaxpaged.model.sampler import SamplingInputs
from jaxpaged.model.step import StepInputs


class Feed(NamedTuple):
    """The tokens that the step before has sampled, which nobody on the host need know yet."""

    token_ids: np.ndarray | jax.Array  # int32 [R of the largest bucket]
    rows: Mapping[Sequence, int]  # of each sequence that it sampled


def fit(plan: StepPlan, buckets: Seq[Bucket], tile: int) -> Bucket:
    """The first, so smallest, bucket that holds the plan.

    Raises:
      ValueError: none does; the scheduler's limits and the bucket list disagree.
    """
    num_tiles = sum(-(-chunk.num_tokens // tile) for chunk in plan.prefills)
    for bucket in buckets:
        if bucket.decode_rows >= plan.num_rows and bucket.prefill_tiles >= num_tiles:
            return bucket
    raise ValueError(f"no bucket holds {plan.num_rows} decode rows and {num_tiles} prefill tiles; the largest is {buckets[-1]}")


def pad(
    plan: StepPlan, bucket: Bucket, feed: Feed, *, tile: int, page_size: int, max_blocks_per_seq: int
) -> tuple[StepInputs, list[int]]:
    """The step's inputs in the bucket's shapes, and the row of the outputs of each of `plan.outputs()`.

    Padding is zeros: token 0 at position 0, slot 0 of the null page, a length of 0, and greedy sampling.
    """
    D, C, M = bucket.decode_rows, bucket.prefill_tiles, max_blocks_per_seq
    token_ids, positions, slots = (np.zeros(D + C * tile, np.int32) for _ in range(3))
    tables, lens, sample_at = np.zeros((D + C, M), np.int32), np.zeros(D + C, np.int32), np.zeros(D + C, np.int32)
    sampling = SamplingInputs(
        temperature=np.zeros(D + C, np.float32),  # type: ignore[arg-type]
        top_k=np.zeros(D + C, np.int32),  # type: ignore[arg-type]
        top_p=np.ones(D + C, np.float32),  # type: ignore[arg-type]
        min_p=np.zeros(D + C, np.float32),  # type: ignore[arg-type]
        seeds=np.zeros((D + C, 2), np.uint32),  # type: ignore[arg-type]
    )
    beam_temperature, wants_logprobs, fed = np.zeros(D + C, np.float32), np.zeros(D + C, bool), np.zeros(D, np.int32)
    prompt_targets = np.zeros(C * tile, np.int32)
    sampling_rows = []

    def place(row: int, at: int, chunk: Chunk, known: Seq[int], start: int, end: int) -> None:
        """Tokens [start, end) of the chunk's sequence go to places at, at + 1, ...; their table and length to `row`."""
        pages = np.asarray(chunk.sequence.pages, np.int32)
        count = end - start
        places = np.arange(start, end)
        token_ids[at : at + len(known)] = known
        slots[at : at + count] = pages[places // page_size] * page_size + places % page_size
        tables[row, : len(pages)] = pages
        lens[row] = end
        if chunk.samples and end >= chunk.end - len(chunk.drafts):
            sample_at[row] = at + count - 1
            _set_sampling(sampling, beam_temperature, row, chunk)
            wants_logprobs[row] = chunk.sequence.request.params.wants_logprobs
            sampling_rows.append(row)

    row = 0
    for chunk in plan.decodes:
        if chunk.start == len(chunk.sequence.tokens):  # its token is the pending one
            fed[row] = 1 + feed.rows[chunk.sequence]
        # Drafts are rows of the same pages: all of them are written before any is attended to, and each sees those before it.
        for position in range(chunk.start, chunk.end):
            token_id = chunk.token(position)
            place(row, row, chunk, () if token_id is None else (token_id,), position, position + 1)
            positions[row] = position
            row += 1
    row, at = D, D
    for chunk in plan.prefills:
        for start in range(chunk.start, chunk.end, tile):
            end = min(start + tile, chunk.end)
            place(row, at, chunk, chunk.sequence.tokens[start:end], start, end)
            if wanted := prompt_targets_of(chunk, start, end):
                prompt_targets[at - D : at - D + len(wanted)] = np.asarray(wanted, np.int32) + 1
            # A tile's padding keeps counting, so that its first position alone tells all of them.
            positions[at : at + tile] = np.arange(start, start + tile)
            row, at = row + 1, at + tile

    tokens = PagedTokens(token_ids, positions, slots, tables[:D], lens[:D], tables[D:], lens[D:])  # type: ignore[arg-type]
    asked = beam_temperature, wants_logprobs, prompt_targets
    inputs = StepInputs(tokens, fed, feed.token_ids, sample_at, sampling, *asked)  # type: ignore[arg-type]
    return inputs, sampling_rows


def prompt_targets_of(chunk: Chunk, start: int, end: int) -> list[int]:
    """The tokens after those from `start` to `end` whose log-probabilities are wanted: of the prompt, by the output that asks."""
    sequence = chunk.sequence
    return sequence.tokens[start + 1 : min(end + 1, sequence.num_prompt)] if sequence.needs_prompt_logprobs else []


def _set_sampling(sampling: SamplingInputs, beam_temperature: np.ndarray, row: int, chunk: Chunk) -> None:
    params, seed = chunk.sequence.request.params, chunk.sequence.seed
    arrays: dict[str, np.ndarray] = vars(sampling)  # type: ignore[assignment]
    if params.use_beam_search:  # it draws no token, and as for sampling 0 leaves the logits as they are
        beam_temperature[row] = params.temperature or 1.0
        return
    if params.logprobs:
        beam_temperature[row] = 1.0
    arrays["temperature"][row] = params.temperature
    arrays["top_k"][row] = params.top_k
    arrays["top_p"][row] = params.top_p
    arrays["min_p"][row] = params.min_p
    arrays["seeds"][row] = seed >> 32, seed & 0xFFFFFFFF
