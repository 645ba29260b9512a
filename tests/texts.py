"""Texts that grow, against the plainest oracles: all deltas together are the whole (R18), and strings end them (R19).

Each function raises when a law is broken. The tests of text and of stop strings do a part, `make fuzz` all.
"""

from __future__ import annotations

import functools
import random
import tempfile
from pathlib import Path

from text_model import KINDS, write_tokenizer

from jaxpaged.growing import GrowingText
from jaxpaged.stop_strings import StopFinder
from jaxpaged.tokenizer import Tokenizer

SOME_TEXT = "hello world, Grüße 日本語 😀 lo a b"


@functools.cache
def tokenizer_of(kind: str) -> Tokenizer:
    """One of each kind for the life of the process."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), kind)
        return Tokenizer.load(Path(folder))


# --- R18: all deltas together ---


def streamed(tokenizer: Tokenizer, num_trials: int, seed: int = 0) -> int:
    """Random sequences of ids, half of them of those of a text: the pieces are, together, what decoding all at once gives."""
    rng = random.Random(seed)
    num_ids = tokenizer.max_token_id + 3  # a model may sample ids that its tokenizer does not have
    common = [*tokenizer.encode(SOME_TEXT), 0, 1, 2]
    for trial in range(num_trials):
        pool = range(num_ids) if trial % 2 else common
        check_stream(tokenizer, [rng.choice(pool) for _ in range(rng.randrange(24))], skip=bool(trial % 3))
    return num_trials


def vocabulary(tokenizer: Tokenizer) -> int:
    """Every id alone, and before and after the ids of half a character, of a space and of a special token."""
    half = tokenizer.encode("😀", add_special_tokens=False)[:-1]
    around = [[], half, tokenizer.encode(" ", add_special_tokens=False), [0], tokenizer.encode("a", add_special_tokens=False)]
    count = 0
    for token_id in range(tokenizer.max_token_id + 3):
        for before in around:
            for after in around:
                check_stream(tokenizer, [*before, token_id, *after], skip=bool(count % 2))
                count += 1
    return count


def check_stream(tokenizer: Tokenizer, ids: list[int], *, skip: bool) -> None:
    """One sequence: token by token, some at a time with the same text wherever they pause, and all at the end."""
    growing, by_some, at_end = (tokenizer.detokenizer(skip_special_tokens=skip) for _ in range(3))
    pieces, step, place = [], 2 + sum(ids) % 5, 0
    for count, token_id in enumerate(ids, 1):
        pieces.append(growing.add(token_id))
        if count % step == 0:
            by_some.add(*ids[place:count])
            place = count
            assert by_some.text == growing.text, (ids, count)
    pieces.append(growing.finish())
    by_some.finish(*ids[place:])
    at_end.finish(*ids)
    assert "".join(pieces) == growing.text == by_some.text == at_end.text == tokenizer.decode(ids, skip), ids


def all_streams(share: float) -> int:
    """All kinds of tokenizers."""
    each = max(1, round(share * 100_000 / len(KINDS)))
    return sum(streamed(tokenizer_of(kind), each, seed=1) + vocabulary(tokenizer_of(kind)) for kind in KINDS)


# --- R19: strings that end a text ---


def first_stop(text: str, stops: list[str], num_exempt: int = 0) -> tuple[str, int] | None:
    """The string that ends first, beyond `num_exempt` characters, and where: by looking everywhere."""
    for end in range(num_exempt + 1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return max(ending, key=len), end
    return None


def held_back(text: str, stops: list[str]) -> int:
    """How much of the end of a text may be the beginning of a stop string."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)


def cut(text: str, stops: list[str], *, is_included: bool = False) -> tuple[str, str | None]:
    """The text as a stop ends it, and that stop."""
    found = first_stop(text, stops)
    if found is None:
        return text, None
    stop, end = found
    return text[: end if is_included else end - len(stop)], stop


def random_text(rng: random.Random, alphabet: str, length: int) -> str:
    return "".join(rng.choices(alphabet, k=length))


def found_and_held(num_trials: int, seed: int = 0) -> tuple[int, int]:
    """How many of so many random texts had a string found, and how many pieces were held back."""
    rng, num_found, num_held = random.Random(seed), 0, 0
    for trial in range(num_trials):
        alphabet = ("ab", "aab", "é日a", "ab\n")[trial % 4]
        stops = [random_text(rng, alphabet, rng.randint(1, 5)) for _ in range(rng.choice((1, 1, 2, 3, 9)))]
        text, finder = random_text(rng, alphabet, rng.randrange(16)), StopFinder(stops)
        num_exempt, seen, found = rng.choice((0, 0, 3, 8)), "", None
        while len(seen) < len(text) and found is None:
            piece = text[len(seen) : len(seen) + rng.randrange(5)]
            if len(seen) < num_exempt:
                piece = piece[: num_exempt - len(seen)]
            found = finder.add(piece, is_exempt=len(seen) < num_exempt)
            if found is None:
                seen += piece
                assert finder.num_open == held_back(seen, stops), (seen, stops)
                num_held += finder.num_open > 0
            else:
                found = found[0], found[1] + len(seen)
        assert found == first_stop(text, stops, num_exempt), (text, stops, num_exempt)
        num_found += found is not None
    return num_found, num_held


def asked_for(kind: str, num_trials: int) -> int:
    """Random ids whose text is asked for at some places and at the end: how often it was shown before."""
    tokenizer, rng, num_shown = tokenizer_of(kind), random.Random(kind), 0
    common = [*tokenizer.encode(SOME_TEXT), 0, 1, 2]
    for trial in range(num_trials):
        ids = [rng.choice(range(tokenizer.max_token_id + 3) if trial % 2 else common) for _ in range(rng.randrange(20))]
        skip = bool(trial % 3)
        text, shown = GrowingText(tokenizer.detokenizer(skip_special_tokens=skip)), 0
        whole = tokenizer.decode(ids, skip_special_tokens=skip)
        for place, token_id in enumerate(ids):
            text.add([token_id], is_last=place == len(ids) - 1)
            if rng.random() < 0.3:
                before, shown = shown, text.shown(is_over=False)
                assert shown >= before and whole.startswith(text.text(0, shown)), ids
                num_shown += shown > before
        assert text.text(0, text.shown(is_over=True)) == whole, ids
    return num_shown


def stopped(kind: str, num_trials: int, seed: int = 1) -> int:
    """Random ids whose text holds the strings, in pieces of one or several tokens: how many ended before their last token."""
    tokenizer, rng, num_stopped = tokenizer_of(kind), random.Random(seed), 0
    common = [*tokenizer.encode(SOME_TEXT), 0, 1, 2]
    for trial in range(num_trials):
        ids = [rng.choice(range(tokenizer.max_token_id + 3) if trial % 2 else common) for _ in range(rng.randrange(1, 20))]
        skip, is_included = bool(trial % 3), not trial % 5
        whole = tokenizer.decode(ids, skip_special_tokens=skip)
        stops = [whole[at : at + rng.randint(1, 6)] for at in (rng.randrange(len(whole)) for _ in range(2))] if whole else ["x"]
        wanted, stop = cut(whole, stops, is_included=is_included)

        detokenizer = tokenizer.detokenizer(skip_special_tokens=skip)
        text, shown = GrowingText(detokenizer, tuple(stops), is_stop_included=is_included), 0
        place = 0
        while place < len(ids):
            piece = ids[place : place + rng.choice((1, 1, 2, 5))]
            place += len(piece)
            text.add(piece, is_last=place == len(ids))
            is_over = text.stop_string is not None or place == len(ids)
            assert text.shown(is_over=is_over) >= shown
            shown = text.shown(is_over=is_over)
            assert wanted.startswith(text.text(0, shown)), "shown, and then it was part of a stop string"
            if is_over:
                break
        assert (text.text(0, shown), text.stop_string) == (wanted, stop), (ids, stops)
        num_stopped += stop is not None and place < len(ids)
    return num_stopped


def all_stops(share: float) -> int:
    """Texts alone, and behind tokenizers of all kinds."""
    count = max(1, round(share * 10_000))
    found_and_held(2 * count, seed=2)
    for kind in KINDS:
        stopped(kind, count, seed=3)
    return count * (2 + len(KINDS))
