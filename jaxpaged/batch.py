"""The bridge between host and device: a StepPlan and a Bucket become StepInputs, padded numpy arrays.

The only place that knows both what a plan means and how a compiled step wants it.
"""

from __future__ import annotations

import operator
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


_NUMBERS = dict.fromkeys(("temperature", "top_p", "min_p", "beam_temperature"), np.float32)
_DRAWINGS = {**_NUMBERS, "top_k": np.int32, "seeds": np.dtype((np.uint32, 2)), "wants_logprobs": np.bool_}


class DecodeRows:
    """What the sequences of the last step that decoded have in every step alike: their pages, and how their tokens are drawn.

    A step tells a few new pages, not the thousands that were known. Invariant: a sequence's row is that of its list of pages when
    it was last seen, and a list changes but at its end only by what a plan copies and by what is behind every window.
    """

    def __init__(self, max_blocks_per_seq: int):
        self._sequences: list[Sequence] = []
        # One row of nobody's, so that there is always one.
        self._pages: list[list[int] | None] = [None]
        self._lens, self._behind = [0], [0]
        self._tables = np.zeros((1, max_blocks_per_seq), np.int32)
        self._drawings = {name: np.zeros(1, kind) for name, kind in _DRAWINGS.items()}

    def update(self, sequences: list[Sequence], *, are_copied: bool) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The rows of these in their order: tables, int32 [rows, M], and the fields of their drawings. To be read at once.

        Args:
          are_copied: whether the plan copies pages, so that any page of any of them may be another.
        """
        if sequences != self._sequences:
            self._arrange(sequences)
        pages, behind = [sequence.pages for sequence in sequences], [sequence.num_behind for sequence in sequences]
        lens = list(map(len, pages))
        if are_copied or lens != self._lens or behind != self._behind or not all(map(operator.is_, pages, self._pages)):
            for row, own in enumerate(pages):
                known = self._lens[row]
                if are_copied or own is not self._pages[row] or behind[row] != self._behind[row] or lens[row] < known:
                    self._tables[row] = 0
                    self._tables[row, : len(own)] = own
                elif lens[row] > known:
                    self._tables[row, known : len(own)] = own[known:]
            self._pages, self._lens, self._behind = pages, lens, behind  # type: ignore[assignment]
        return self._tables, self._drawings

    def _arrange(self, sequences: list[Sequence]) -> None:
        """Give these their rows. Those who are new have some row's: their pages are still to be told."""
        places = {sequence: row for row, sequence in enumerate(self._sequences)}
        known = [places.get(sequence, -1) for sequence in sequences]
        new, taken = [row for row, place in enumerate(known) if place < 0], np.maximum(known, 0)
        self._tables = self._tables[taken]
        self._drawings = {name: values[taken] for name, values in self._drawings.items()}
        if new:
            drawings = zip(*(sequences[row].drawing for row in new), strict=True)
            for name, values in zip(Drawing._fields, drawings, strict=True):
                self._drawings[name][new] = values
        self._pages = [self._pages[place] if place >= 0 else None for place in known]
        self._lens, self._behind = [self._lens[place] for place in taken], [self._behind[place] for place in taken]
        self._sequences = sequences


def pad(
    plan: StepPlan,
    bucket: Bucket,
    feed: Feed,
    *,
    tile: int,
    page_size: int,
    max_blocks_per_seq: int,
    known: DecodeRows | None = None,
) -> Padded:
    """The step's inputs.

    Padding is zeros: token 0 at position 0, slot 0 of the null page, a length of 0, and greedy sampling.

    Args:
      known: what the steps before have left; the plans come in their order, none left out.
    """
    layout = StepInputs.layout(bucket.decode_rows, bucket.prefill_tiles, tile, max_blocks_per_seq)
    words, arrays = layout.new()
    arrays["top_p"].fill(1.0)
    rows: list[int] = []
    if plan.decodes:
        rows += _put_decodes(plan, arrays, feed, page_size, known or DecodeRows(max_blocks_per_seq))
    if plan.prefills:
        rows += _put_tiles(plan.prefills, arrays, bucket.decode_rows, tile, page_size)
    return Padded(StepInputs.of(arrays, feed.token_ids), rows, words, layout)


def _put_decodes(plan: StepPlan, arrays: dict[str, np.ndarray], feed: Feed, page_size: int, known: DecodeRows) -> list[int]:
    """A row for each token of each chunk, from the first on; they are returned.

    Drafts are rows of the same pages: all of them are written before any is attended to, and each sees those before it.
    """
    chunks = plan.decodes
    sequences, starts = [chunk.sequence for chunk in chunks], [chunk.start for chunk in chunks]
    tables, drawings = known.update(sequences, are_copied=bool(plan.copies))
    # The token that the host does not know is the pending one.
    tokens = [sequence.tokens for sequence in sequences]
    token_ids = [own[start] if start < len(own) else -1 for own, start in zip(tokens, starts, strict=True)]
    positions, rows_before = np.array(starts, np.int32), range(len(chunks))
    count = plan.num_rows
    if count > len(chunks):
        counts = np.array([chunk.num_tokens for chunk in chunks])
        rows_before = (np.cumsum(counts) - counts).tolist()  # and so the first row of each
        positions = np.arange(count, dtype=np.int32) - np.repeat(rows_before - positions, counts)
        token_ids = [token for one, chunk in zip(token_ids, chunks, strict=True) for token in (one, *chunk.drafts)]
        tables = np.repeat(tables, counts, axis=0)
        drawings = {name: np.repeat(values, counts, axis=0) for name, values in drawings.items()}
    if -1 in token_ids:
        for row, sequence in zip(rows_before, sequences, strict=True):
            if token_ids[row] < 0:
                arrays["fed"][row], token_ids[row] = 1 + feed.rows[sequence], 0
    rows = np.arange(count)
    pages, places = np.divmod(positions, page_size)
    arrays["token_ids"][:count] = token_ids
    arrays["positions"][:count] = positions
    arrays["tables"][:count] = tables
    arrays["slots"][:count] = tables[rows, pages] * page_size + places
    arrays["lens"][:count] = positions + 1
    arrays["sample_at"][:count] = rows
    for name, values in drawings.items():
        arrays[name][:count] = values
    return list(range(count))


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
