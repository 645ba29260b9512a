"""Prompt lookup against its definition, by brute force over every place of a text."""

from __future__ import annotations

import random
import sys
import time

import pytest

from jaxpaged.host.request import Request, SamplingParams, Sequence
from jaxpaged.speculative.ngram import NgramIndex, NgramProposer


def looked_up(tokens: list[int], least: int, most: int, count: int) -> list[int]:
    """What vLLM proposes, by its definition: of the longest n-gram at the end the first earlier place, and what follows there."""
    for size in range(most, least - 1, -1):
        for start in range(len(tokens) - size):
            if tokens[start : start + size] == tokens[-size:]:
                return tokens[start + size : start + size + count]
    return []


@pytest.mark.parametrize("seed", range(12))
def test_equal_to_its_definition_however_the_text_grows(seed: int) -> None:
    rng = random.Random(seed)
    num_found = 0
    for _ in range(60):
        most = rng.randint(1, 6)
        least, count = rng.randint(1, most), rng.randint(1, 8)
        index, tokens = NgramIndex(least, most), [rng.randrange(rng.choice((2, 3, 9))) for _ in range(rng.randint(1, 30))]
        for _ in range(12):
            found = list(index.propose(tokens, count))
            assert found == looked_up(tokens, least, most, count), (tokens, least, most)
            num_found += bool(found)
            tokens += [rng.randrange(3) for _ in range(rng.randint(0, 4))]
    assert num_found > 200


@pytest.mark.parametrize(
    "tokens, proposed",
    [
        ([1, 2, 3, 9, 1, 2, 3], [9, 1, 2, 3]),  # no further than the text
        ([5, 1, 2, 8, 1, 2, 9, 1, 2], [8, 1, 2, 9]),  # the earliest place
        ([1, 2, 8, 7, 2, 9, 1, 2], [8, 7, 2, 9]),  # the longer n-gram, though the shorter one came later too
        ([4, 4, 4, 4], [4]),  # places may overlap
        ([1], []),
        ([1, 2, 3], []),
    ],
)
def test_which_place_counts(tokens: list[int], proposed: list[int]) -> None:
    assert list(NgramIndex(1, 3).propose(tokens, 4)) == proposed == looked_up(tokens, 1, 3, 4)


def sequence_of(tokens: list[int]) -> Sequence:
    options = {"vocab_size": 100, "max_model_len": 10**6, "max_pool_len": 10**6}
    return Sequence.first(Request.checked("a", tokens, SamplingParams(), **options))  # type: ignore[arg-type]


def test_each_sequence_has_its_own_index_and_takes_it_along() -> None:
    proposer = NgramProposer(prompt_lookup_min=2, prompt_lookup_max=3)
    one, other = sequence_of([1, 2, 3, 1, 2]), sequence_of([1, 2, 4, 1, 2])
    silent = sequence_of([1, 2, 3, 4])
    found = proposer.propose({one: 1, other: 5, silent: 5})
    assert {sequence: list(tokens) for sequence, tokens in found.items()} == {one: [3], other: [4, 1, 2]}
    other.tokens += [4, 1]
    assert list(proposer.propose({other: 2})[other]) == [2, 4]
    del one, found
    assert len(proposer._indexes) == 2, "the index of a sequence outlives it"
    proposer.close()
    assert not proposer._indexes and sys.getrefcount(other) < 5


def test_a_token_more_costs_the_same_in_a_long_text_as_in_a_short_one() -> None:
    rng = random.Random(0)

    def seconds(length: int) -> float:
        index, tokens = NgramIndex(2, 5), [rng.randrange(50) for _ in range(length)]
        index.read(tokens)
        best = 1.0
        for _ in range(20):
            started = time.perf_counter()
            for _ in range(50):
                tokens.append(rng.randrange(50))
                index.propose(tokens, 5)
            best = min(best, time.perf_counter() - started)
        return best

    assert seconds(40_000) < 8 * seconds(400), "a rescan would take a hundred times as long"
