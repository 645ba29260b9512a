"""Padding held to a loop that puts one number after the other; and words that are what they were on the other side."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from jaxpaged import batch
from jaxpaged.config import Bucket
from jaxpaged.host.plan import Chunk, StepPlan
from jaxpaged.host.request import Request, SamplingParams, Sequence
from jaxpaged.model.step import StepInputs

TILE, PAGE, M = 4, 3, 9
NUM_FED = 16


def a_params(draw: random.Random) -> SamplingParams:
    if draw.random() < 0.2:
        return SamplingParams(use_beam_search=True, n=2, temperature=draw.choice([0.0, 0.7]), max_tokens=3)
    options = {"logprobs": draw.choice([None, 0, 2]), "prompt_logprobs": draw.choice([None, 1])}
    return SamplingParams(
        temperature=draw.random(), top_k=draw.randrange(4), top_p=draw.uniform(0.1, 1), min_p=draw.random() / 2, **options
    )


def a_sequence(draw: random.Random, number: int, num_tokens: int, num_prompt: int) -> Sequence:
    params = a_params(draw)
    prompt = tuple(draw.randrange(1, 99) for _ in range(num_prompt))
    options = {"seed": draw.getrandbits(64), "max_len": 99, "stop_ids": frozenset(), "arrival_s": 0.0}
    request = Request(str(number), prompt, params, **options)  # type: ignore[arg-type]
    tokens = [*prompt, *(draw.randrange(1, 99) for _ in range(num_tokens - num_prompt))]
    pages = [draw.randrange(1, 500) for _ in range(-(-(num_tokens + 6) // PAGE))][:M]
    return Sequence(request, tokens=tokens, pages=pages)


def a_plan(draw: random.Random, feed_rows: dict[Sequence, int]) -> tuple[StepPlan, Bucket]:
    """Decodes with drafts and without, some of whose token is pending, and prompts that end in this step or do not."""
    decodes, prefills = [], []
    for number in range(draw.randrange(4)):
        sequence = a_sequence(draw, number, draw.randrange(2, 15), 1)
        drafts = tuple(draw.randrange(1, 99) for _ in range(draw.choice([0, 0, 1, 3])))
        start = len(sequence.tokens) - 1
        if not drafts and draw.random() < 0.4:
            sequence.num_pending, start = 1, start + 1
            feed_rows[sequence] = draw.randrange(NUM_FED)
        decodes.append(Chunk(sequence, start, 1 + len(drafts), True, drafts))
    for number in range(draw.randrange(3)):
        num_prompt = draw.randrange(2, 18)
        sequence = a_sequence(draw, 9 + number, num_prompt, num_prompt)
        start = draw.randrange(num_prompt - 1)
        end = draw.choice([num_prompt, draw.randrange(start + 1, num_prompt + 1)])
        prefills.append(Chunk(sequence, start, end - start, end == num_prompt))
    plan = StepPlan(tuple(decodes), tuple(prefills))
    num_tiles = sum(-(-chunk.num_tokens // TILE) for chunk in prefills)
    return plan, Bucket(plan.num_rows + draw.randrange(3), num_tiles + draw.randrange(2))


def expected(plan: StepPlan, bucket: Bucket, feed: batch.Feed) -> tuple[dict[str, np.ndarray], list[int]]:
    """The definition, token by token."""
    D, C = bucket.decode_rows, bucket.prefill_tiles
    arrays = {name: np.zeros(shape, dtype) for name, shape, dtype in StepInputs.layout(D, C, TILE, M).fields}
    arrays["top_p"] += 1
    rows = []

    def token(chunk: Chunk, position: int, at: int) -> None:
        arrays["token_ids"][at] = chunk.token(position) or 0
        arrays["positions"][at] = position
        arrays["slots"][at] = chunk.sequence.pages[position // PAGE] * PAGE + position % PAGE

    def row_of(chunk: Chunk, row: int, end: int, last: int) -> None:
        arrays["tables"][row, : len(chunk.sequence.pages)] = chunk.sequence.pages
        arrays["lens"][row] = end
        if not chunk.samples or end < chunk.end - len(chunk.drafts):
            return
        params = chunk.sequence.request.params
        arrays["sample_at"][row], arrays["wants_logprobs"][row] = last, params.wants_logprobs
        rows.append(row)
        if params.use_beam_search:
            arrays["beam_temperature"][row] = params.temperature or 1.0
            return
        arrays["beam_temperature"][row] = 1.0 if params.logprobs else 0.0
        for name in ("temperature", "top_k", "top_p", "min_p"):
            arrays[name][row] = getattr(params, name)
        arrays["seeds"][row] = divmod(chunk.sequence.seed, 2**32)

    row = 0
    for chunk in plan.decodes:
        for position in range(chunk.start, chunk.end):
            token(chunk, position, row)
            if position == len(chunk.sequence.tokens) and not chunk.drafts:
                arrays["fed"][row] = 1 + feed.rows[chunk.sequence]
            row_of(chunk, row, position + 1, row)
            row += 1
    row, at = D, D
    for chunk in plan.prefills:
        for start in range(chunk.start, chunk.end, TILE):
            end = min(start + TILE, chunk.end)
            for place in range(TILE):
                arrays["positions"][at + place] = start + place
            for position in range(start, end):
                token(chunk, position, at + position - start)
                if chunk.sequence.needs_prompt_logprobs and position + 1 < chunk.sequence.num_prompt:
                    arrays["prompt_targets"][at - D + position - start] = 1 + chunk.sequence.tokens[position + 1]
            row_of(chunk, row, end, at + end - start - 1)
            row, at = row + 1, at + TILE
    return arrays, rows


@pytest.mark.parametrize("seed", range(200))
def test_padding_is_what_a_loop_makes_of_a_plan(seed: int) -> None:
    draw, feed_rows = random.Random(seed), {}
    plan, bucket = a_plan(draw, feed_rows)
    feed = batch.Feed(np.zeros(NUM_FED, np.int32), feed_rows)
    padded = batch.pad(plan, bucket, feed, tile=TILE, page_size=PAGE, max_blocks_per_seq=M)
    arrays, rows = expected(plan, bucket, feed)
    assert padded.rows == rows
    found = padded.layout.unpack(padded.words)  # type: ignore[arg-type]
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        got = np.asarray(found[name])
        assert got.dtype == array.dtype and got.shape == array.shape, name
        np.testing.assert_array_equal(got, array, name)
    # What the host reads of the inputs is what the device gets.
    device = StepInputs.of(found, feed.token_ids)
    for ours, theirs in zip(jax.tree.leaves(padded.inputs), jax.tree.leaves(device), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def changed(draw: random.Random, sequences: list[Sequence], numbers: Iterator[int]) -> tuple[StepPlan, list[Sequence]]:
    """The next step of sequences that decode: some end, some come in between, pages are added, copied, given back or taken."""
    sequences, copies = [sequence for sequence in sequences if draw.random() < 0.9], ()
    for _ in range(draw.choice([0, 0, 1, 2])):
        sequences.insert(draw.randint(0, len(sequences)), a_sequence(draw, next(numbers), draw.randrange(2, 15), 1))
    if draw.random() < 0.1:
        draw.shuffle(sequences)
    for sequence in sequences:
        what, pages = draw.randrange(10), sequence.pages
        if what == 0 and len(pages) < M:
            pages.append(draw.randrange(1, 500))
        elif what == 1 and sequence.num_behind < len(pages) - 1:
            sequence.num_behind += 1
            pages[: sequence.num_behind] = [0] * sequence.num_behind
        elif what == 2:  # it gave way and was admitted again
            sequence.pages = [draw.randrange(1, 500) for _ in range(draw.randint(6, M))]
            sequence.num_behind = 0
        elif what == 3:
            pages[-1] = draw.randrange(1, 500)
            copies = ((500, 501),)
        elif what == 4 and len(pages) > 6:
            pages.pop()
    chunks = [Chunk(one, min(len(one.tokens), len(one.pages) * PAGE) - 1, 1, True) for one in sequences]
    return StepPlan(tuple(chunks), (), copies), sequences


@pytest.mark.parametrize("seed", range(20))
def test_what_is_known_of_the_step_before_changes_nothing(seed: int) -> None:
    draw, known, sequences = random.Random(seed), batch.DecodeRows(M), []
    numbers, feed = itertools.count(), batch.Feed(np.zeros(NUM_FED, np.int32), {})
    for _ in range(40):
        plan, sequences = changed(draw, sequences, numbers)
        bucket = Bucket(len(sequences) + draw.randrange(2), 0)
        ours, fresh = (
            batch.pad(plan, bucket, feed, tile=TILE, page_size=PAGE, max_blocks_per_seq=M, known=one) for one in (known, None)
        )
        np.testing.assert_array_equal(ours.words, fresh.words)
        assert ours.rows == fresh.rows


def test_the_plans_are_of_every_kind() -> None:
    """Else the law above says little."""
    plans = [a_plan(random.Random(seed), {})[0] for seed in range(200)]
    chunks = [chunk for plan in plans for chunk in plan.chunks()]
    assert any(chunk.drafts for chunk in chunks) and any(chunk.sequence.num_pending for chunk in chunks)
    assert any(plan.decodes and plan.prefills for plan in plans) and any(not plan.chunks() for plan in plans)
    assert any(not chunk.samples for chunk in chunks) and any(chunk.sequence.needs_prompt_logprobs for chunk in chunks)
    assert any(chunk.sequence.request.params.use_beam_search for chunk in chunks)
