"""The bridge between host and device: a StepPlan and a Bucket become StepInputs, padded numpy arrays.

The only place that knows both what a plan means and how a compiled step wants it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import NamedTuple

import jax
import numpy as np

from jaxpaged.config import Bucket
from jaxpaged.host.plan import Chunk, StepPlan
from jaxpaged.host.request import Drawing, Sequence
from jaxpaged.model.adjust import Adjustments
from jaxpaged.model.packed import Layout
from jaxpaged.model.step import PackedInputs, StepInputs


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


def bring(*arrays: jax.Array) -> None:
    """Let these be on their way to the host while it does something else. On a CPU they will be there without."""
    if jax.default_backend() != "cpu":
        for array in arrays:
            array.copy_to_host_async()


class Padded(NamedTuple):
    """A step's inputs in the shapes of a bucket."""

    inputs: StepInputs
    rows: list[int]  # of the outputs, that of each of `plan.outputs()`
    words: np.ndarray  # int32 [N], which the inputs' arrays but `previous` are views of
    layout: Layout

    def whole(self, adjustments: Adjustments | None, extra: Mapping[str, np.ndarray] | None) -> StepInputs:
        """The inputs with the rest of what a step takes."""
        return self.inputs.replace(adjustments=adjustments, extra=extra)  # type: ignore[attr-defined]

    def packed(self, adjustments: Adjustments | None, extra: Mapping[str, np.ndarray] | None) -> PackedInputs:
        """The same as it goes to the device."""
        return PackedInputs(self.words, self.inputs.previous, adjustments, extra, self.layout)  # type: ignore[arg-type]


def pad(plan: StepPlan, bucket: Bucket, feed: Feed, *, tile: int, page_size: int, max_blocks_per_seq: int) -> Padded:
    """The step's inputs.

    Padding is zeros: token 0 at position 0, slot 0 of the null page, a length of 0, and greedy sampling.
    """
    layout = StepInputs.layout(bucket.decode_rows, bucket.prefill_tiles, tile, max_blocks_per_seq)
    words, arrays = layout.new()
    arrays["top_p"].fill(1.0)
    rows: list[int] = []
    if plan.decodes:
        rows += _put_decodes(plan.decodes, arrays, feed, page_size)
    if plan.prefills:
        rows += _put_tiles(plan.prefills, arrays, bucket.decode_rows, tile, page_size)
    return Padded(StepInputs.of(arrays, feed.token_ids), rows, words, layout)


def _put_decodes(chunks: Seq[Chunk], arrays: dict[str, np.ndarray], feed: Feed, page_size: int) -> list[int]:
    """A row for each token of each chunk, from the first on; they are returned.

    Drafts are rows of the same pages: all of them are written before any is attended to, and each sees those before it.
    """
    sequences, num_drafts = [chunk.sequence for chunk in chunks], [len(chunk.drafts) for chunk in chunks]
    starts = np.array([chunk.start for chunk in chunks], np.int32)
    is_known = [start < len(sequence.tokens) for sequence, start in zip(sequences, starts.tolist(), strict=True)]
    first = [chunk.sequence.tokens[chunk.start] if known else 0 for chunk, known in zip(chunks, is_known, strict=True)]
    M = arrays["tables"].shape[1]
    num_pages = np.array([len(sequence.pages) for sequence in sequences])
    pages = np.fromiter(itertools.chain.from_iterable(sequence.pages for sequence in sequences), np.int32, num_pages.sum())
    tables = np.zeros((len(chunks), M), np.int32)
    tables[np.arange(M) < num_pages[:, None]] = pages
    drawings = [sequence.drawing for sequence in sequences]
    if any(num_drafts):
        counts = np.array(num_drafts) + 1
        rows_before = np.cumsum(counts) - counts  # and so the first row of each
        positions = np.arange(counts.sum()) - np.repeat(rows_before - starts, counts)
        token_ids = [token for one, chunk in zip(first, chunks, strict=True) for token in (one, *chunk.drafts)]
        tables = np.repeat(tables, counts, axis=0)
        drawings = [drawing for drawing, count in zip(drawings, counts, strict=True) for _ in range(count)]
    else:
        rows_before, positions, token_ids = range(len(chunks)), starts, first
    count = len(token_ids)
    if not all(is_known):  # the token that the host does not know is the pending one
        for row, known, sequence in zip(rows_before, is_known, sequences, strict=True):
            arrays["fed"][row] = 0 if known else 1 + feed.rows[sequence]
    rows = np.arange(count)
    arrays["token_ids"][:count] = token_ids
    arrays["positions"][:count] = positions
    arrays["tables"][:count] = tables
    arrays["slots"][:count] = tables[rows, positions // page_size] * page_size + positions % page_size
    arrays["lens"][:count] = positions + 1
    arrays["sample_at"][:count] = rows
    for name, values in zip(Drawing._fields, zip(*drawings, strict=True), strict=True):
        arrays[name][:count] = values
    return rows.tolist()


def _put_tiles(chunks: Seq[Chunk], arrays: dict[str, np.ndarray], num_rows: int, tile: int, page_size: int) -> list[int]:
    """Tiles for the tokens of each chunk, after so many rows; those that sample are returned."""
    sampling, row, at = [], num_rows, num_rows
    for chunk in chunks:
        start, end, num_tiles = chunk.start, chunk.end, -(-chunk.num_tokens // tile)
        last, after = row + num_tiles - 1, at + chunk.num_tokens
        pages = np.asarray(chunk.sequence.pages, np.int32)
        put_tiles(arrays, row, at, chunk.sequence.tokens[start:end], start, pages, tile, page_size)
        if wanted := prompt_targets_of(chunk, start, end):
            arrays["prompt_targets"][at - num_rows : at - num_rows + len(wanted)] = np.asarray(wanted, np.int32) + 1
        if chunk.samples:
            arrays["sample_at"][last] = after - 1
            for name, value in zip(Drawing._fields, chunk.sequence.drawing, strict=True):
                arrays[name][last] = value
            sampling.append(last)
        row, at = last + 1, at + num_tiles * tile
    return sampling


def put_tiles(
    arrays: dict[str, np.ndarray],
    row: int,
    at: int,
    token_ids: Seq[int],
    start: int,
    pages: np.ndarray,
    tile: int,
    page_size: int,
) -> None:
    """Consecutive tokens of one sequence, the first of them its token number `start`, in tiles: whole ones but for the last.

    Args:
      arrays: token_ids, positions and slots [X], tables [B, M], lens [B].
      row: the first tile's.
      at: the first token's.
    """
    end = start + len(token_ids)
    num_tiles, places = -(-len(token_ids) // tile), np.arange(start, end)
    arrays["token_ids"][at : at + len(token_ids)] = token_ids
    arrays["slots"][at : at + len(token_ids)] = pages[places // page_size] * page_size + places % page_size
    # A tile's padding keeps counting, so that its first position alone tells all of them.
    arrays["positions"][at : at + num_tiles * tile] = np.arange(start, start + num_tiles * tile)
    arrays["tables"][row : row + num_tiles, : len(pages)] = pages
    arrays["lens"][row : row + num_tiles] = np.minimum(np.arange(start, end, tile) + tile, end)


def prompt_targets_of(chunk: Chunk, start: int, end: int) -> list[int]:
    """The tokens after those from `start` to `end` whose log-probabilities are wanted: of the prompt, by the output that asks."""
    sequence = chunk.sequence
    return sequence.tokens[start + 1 : min(end + 1, sequence.num_prompt)] if sequence.needs_prompt_logprobs else []
