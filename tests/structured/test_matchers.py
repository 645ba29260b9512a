"""Masks say what may come next and nothing else, wherever a sequence comes from and however it got there."""

from __future__ import annotations

import gc
import random
from pathlib import Path

import numpy as np
import pytest

from jaxpaged.bench.forms import form
from jaxpaged.demo import MODEL_DIR
from jaxpaged.host.request import Request, SamplingParams, Sequence
from jaxpaged.host.structured import StructuredOutputsParams
from jaxpaged.structured.grammars import Grammars
from jaxpaged.structured.limits import Limits
from jaxpaged.structured.matchers import Matchers

V = 1536
EOS = (2, 0)
KEYS = {"first_long_name": {"type": "integer"}, "second_long_name": {"const": "some fixed text"}}
SCHEMA = {"type": "object", "properties": KEYS, "required": list(KEYS), "additionalProperties": False}
FIXED = StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True)


@pytest.fixture(scope="module")
def grammars():
    found = Grammars((Path(MODEL_DIR) / "tokenizer.json").read_text)
    yield found
    found.close()


@pytest.fixture
def matchers(grammars: Grammars) -> Matchers:
    return Matchers(grammars, vocab_size=V)


def sequence_of(params: StructuredOutputsParams, prompt: tuple[int, ...] = (5, 6, 7), vocab_size: int = V, **options) -> Sequence:
    """A sequence that has its prompt."""
    sampling = SamplingParams(structured_outputs=params, **options)
    limits = {"vocab_size": vocab_size, "max_model_len": 1000, "max_pool_len": 1000, "eos_token_ids": EOS}
    return Sequence.first(Request.checked("a", prompt, sampling, **limits))


def allowed(matchers: Matchers, sequence: Sequence, drafts: tuple[int, ...] = ()) -> list[list[int]]:
    """The ids of each mask."""
    masks = np.full((1 + len(drafts), matchers.num_words), 0xFFFFFFFF, np.uint32)
    count = matchers.fill(masks, sequence, drafts)
    bits = np.unpackbits(masks[:count].view(np.uint8), axis=1, bitorder="little")
    return [np.flatnonzero(row).tolist() for row in bits]


def walk(matchers: Matchers, sequence: Sequence, rng: random.Random, limit: int = 60) -> None:
    """Go on at random as far as the grammar goes, or so many tokens."""
    for _ in range(limit):
        if matchers.is_complete(sequence):
            return
        (ids,) = allowed(matchers, sequence)
        ids = [one for one in ids if one not in EOS] or ids
        if ids[0] in EOS:
            return
        sequence.tokens.append(rng.choice(ids))


def go_on(matchers: Matchers, sequence: Sequence, rng: random.Random) -> bool:
    """Append a token of letters alone, which end nothing, but a quote first; False when there is none."""
    if len(sequence.tokens) == sequence.num_prompt:
        sequence.tokens += matchers.grammars.vocabulary.tokenize_str('"')
    ids = [one for one in allowed(matchers, sequence)[0] if matchers.grammars.vocabulary.decode_bytes([one]).isalpha()]
    if ids:
        sequence.tokens.append(rng.choice(ids))
    return bool(ids)


def test_a_mask_is_what_may_follow(grammars: Grammars, matchers: Matchers) -> None:
    rng = random.Random(0)
    for _ in range(12):
        params = form(rng)
        sequence = sequence_of(params)
        prototype = grammars.find(params).prototype
        for _ in range(12):
            (ids,) = allowed(matchers, sequence)
            fresh = prototype.deep_copy()
            assert fresh.consume_tokens(sequence.output_token_ids) or not sequence.output_token_ids
            assert [one for one in EOS if one in ids] == (sorted(EOS, reverse=True) if fresh.is_accepting() else [])
            for one in {*rng.sample(range(3, V), 40), *rng.sample(ids, min(5, len(ids)))} - set(EOS):
                # Where the grammar leaves no choice of text, the mask has the one token that the tokenizer would write.
                assert one not in ids or fresh.validate_tokens([one]) == 1
                assert one in ids or fresh.validate_tokens([one]) == 0 or fresh.compute_ff_tokens()
            assert matchers.is_complete(sequence) == (not set(ids) - set(EOS))
            if matchers.is_complete(sequence):
                break
            sequence.tokens.append(rng.choice(sorted(set(ids) - set(EOS))))


def test_tokens_are_the_truth(grammars: Grammars, matchers: Matchers) -> None:
    rng = random.Random(1)
    for _ in range(10):
        params = form(rng)
        sequence = sequence_of(params)
        walk(matchers, sequence, rng, rng.randrange(1, 30))
        here = allowed(matchers, sequence)
        fork = sequence.fork(1)
        assert allowed(matchers, fork) == here  # never seen before
        assert allowed(Matchers(grammars, vocab_size=V), sequence) == here
        tokens, sequence.tokens = sequence.tokens, sequence.tokens[: sequence.num_prompt]
        first = allowed(matchers, sequence)  # it has lost its output
        assert first == allowed(matchers, sequence_of(params))
        sequence.tokens = tokens
        assert allowed(matchers, sequence) == here


def test_only_what_ends_the_request_ends_it(matchers: Matchers) -> None:
    params = StructuredOutputsParams(regex="a(b)?")
    for options, ends in [({}, {0, 2}), ({"ignore_eos": True}, set()), ({"ignore_eos": True, "stop_token_ids": [1]}, {1})]:
        sequence = sequence_of(params, **options)
        a, b = (matchers.grammars.vocabulary.tokenize_str(one)[0] for one in "ab")
        both = matchers.grammars.vocabulary.tokenize_str("ab")
        assert set(allowed(matchers, sequence)[0]) == {a, *(both if len(both) == 1 else ())}
        sequence.tokens.append(a)
        assert set(allowed(matchers, sequence)[0]) == {b} | ends
        assert not matchers.is_complete(sequence)
        sequence.tokens.append(b)
        assert set(allowed(matchers, sequence)[0]) == ends
        assert matchers.is_complete(sequence)


@pytest.mark.parametrize("vocab_size", [1000, 1504, 1535, 1536, 1537, 1567, 1569, 2000])
def test_a_model_has_more_tokens_than_its_tokenizer_or_fewer(grammars: Grammars, vocab_size: int) -> None:
    params = StructuredOutputsParams(regex="(?s).+")
    matchers, whole = Matchers(grammars, vocab_size=vocab_size), Matchers(grammars, vocab_size=4096)
    sequence = sequence_of(params, vocab_size=vocab_size)
    for _ in range(2):
        (ids,), (expected,) = allowed(matchers, sequence), allowed(whole, sequence)
        assert ids == [one for one in expected if one < vocab_size]
        assert max(expected) < V  # nor what only pads the model's, nor the grammar's own end
        sequence.tokens.append(ids[5])


def test_drafts_get_the_masks_that_tokens_would(matchers: Matchers) -> None:
    rng = random.Random(2)
    for _ in range(12):
        params = form(rng)
        whole, sequence = sequence_of(params), sequence_of(params)
        walk(matchers, whole, rng, 12)
        output, split = whole.output_token_ids, rng.randrange(len(whole.output_token_ids))
        sequence.tokens += output[:split]
        drafts = tuple(output[split:])
        masks = allowed(matchers, sequence, drafts)
        assert len(masks) == 1 + len(drafts)
        assert allowed(matchers, sequence, (*drafts, 1, 5))[: len(masks)] == masks
        assert len(allowed(matchers, sequence, (*drafts, 1, 5))) == len(masks)  # 1 is a special token: no text
        for count in range(len(drafts) + 1):
            other = sequence_of(params)
            other.tokens += output[: split + count]
            assert allowed(matchers, other) == masks[count : count + 1]
        assert allowed(matchers, sequence) == masks[:1]  # and nothing is left of them


def test_what_is_proposed_is_cut_where_it_cannot_be(matchers: Matchers) -> None:
    sequence = sequence_of(StructuredOutputsParams(regex="abc?d"))
    a, b, c, d = (matchers.grammars.vocabulary.tokenize_str(one)[0] for one in "abcd")
    assert matchers.allowed(sequence, ()) == ()
    assert matchers.allowed(sequence, (a, b, c, d)) == (a, b, c)  # d completes it
    assert matchers.allowed(sequence, (a, b, b)) == (a, b)
    assert matchers.allowed(sequence, (b, a)) == ()
    assert matchers.allowed(sequence, (a, EOS[0])) == (a,)
    sequence.tokens += [a, b]
    assert matchers.allowed(sequence, (d,)) == ()
    assert matchers.allowed(sequence, (c, c)) == (c,)


def test_forced_tokens_are_the_only_ones(grammars: Grammars, matchers: Matchers) -> None:
    sequence, num_forced = sequence_of(FIXED), 0
    rng = random.Random(3)
    while not matchers.is_complete(sequence):
        forced = matchers.forced(sequence, 16)
        assert len(forced) <= 16
        masks = allowed(matchers, sequence, forced)
        assert masks[: len(forced)] == [[one] for one in forced]
        num_forced += len(forced)
        sequence.tokens += forced
        sequence.tokens.append(rng.choice(masks[-1]))
    assert num_forced > 25
    assert matchers.forced(sequence, 16) == ()
    assert matchers.forced(sequence_of(StructuredOutputsParams(regex="[ab]c")), 16) == ()


def test_what_others_have_spent_is_nobodys_loss(grammars: Grammars) -> None:
    few = Grammars((Path(MODEL_DIR) / "tokenizer.json").read_text, Limits(lexer_states=3000, walks=1, walk_len=2))
    matchers = Matchers(few, vocab_size=V)
    params = StructuredOutputsParams(json={"type": "string", "maxLength": 100000})
    rng = random.Random(4)
    spent = sequence_of(params)
    prototype = few.find(params).prototype
    for _ in range(400):
        assert go_on(matchers, spent, rng)
        if few.find(params).prototype is not prototype:
            break
    assert few.find(params).prototype is not prototype
    assert matchers._states[spent].prototype is None  # it goes on by itself
    assert len(allowed(matchers, spent)[0]) > 100
    other = sequence_of(params)
    expected = allowed(Matchers(grammars, vocab_size=V), other)
    assert allowed(matchers, other) == expected
    few.close()


def test_a_sequence_that_has_spent_its_own_has_no_token() -> None:
    few = Grammars((Path(MODEL_DIR) / "tokenizer.json").read_text, Limits(lexer_states=3000, walks=1, walk_len=2))
    matchers = Matchers(few, vocab_size=V)
    params = StructuredOutputsParams(json={"type": "string", "maxLength": 100000})
    sequence, rng = sequence_of(params), random.Random(5)
    while go_on(matchers, sequence, rng):
        assert len(sequence.tokens) < 5000
    assert allowed(matchers, sequence) == [[]]
    assert not matchers.is_complete(sequence) and matchers.forced(sequence, 16) == () == matchers.allowed(sequence, (5,))
    few.close()


def test_nothing_outlives_its_request(grammars: Grammars) -> None:
    matchers = Matchers(grammars, vocab_size=V)
    sequences = [sequence_of(FIXED) for _ in range(3)]
    for one in sequences:
        matchers.check(one.request)
        allowed(matchers, one)
    forks = [sequences[0].fork(1)]
    allowed(matchers, forks[0])
    assert (len(matchers._states), len(matchers._held)) == (4, 3)
    del sequences[1:], one
    gc.collect()
    assert (len(matchers._states), len(matchers._held)) == (2, 1)
    sequences.clear()
    forks.clear()
    gc.collect()
    assert (len(matchers._states), len(matchers._held)) == (0, 0)
