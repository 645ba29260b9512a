"""Real logits, bit by bit, when pages are shared, reused, given away and poisoned (R02, R03, R04).

Each function raises when a law is broken and returns how many cases it has seen. test_reuse.py does a part, `make fuzz` all.
"""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from bits import Bits, KeepingRunner, new_engine, new_runner, serve
from driving import Ask, greedy

from jaxpaged.host.beams import BeamGroup
from jaxpaged.host.request import SamplingParams

FAMILY = "qwen2-window"  # grouped heads, biases, one layer that sees everything and one with a window


@functools.cache
def runner(page_size: int, tile: int, *, tiles: int, has_buckets: bool = False) -> KeepingRunner:
    """One per shape for the life of the process. Its pool holds eight of the longest sequences, and the guard."""
    return new_runner(FAMILY, page_size, tile=tile, tiles=tiles, num_pages=8 * 128 // page_size + 2, has_buckets=has_buckets)


def same_bits(found: Bits, wanted: Bits, where: object = "") -> None:
    assert found.keys() == wanted.keys(), where
    for key, row in found.items():
        assert row.bits == wanted[key].bits, f"{where} {key}: other logits than alone, by {distance(row, wanted[key])}"


def distance(one, other) -> float:
    return float(np.abs(one.logits() - other.logits()).max())


# --- R02: a crowd on poisoned pages ---


def crowd(num_requests: int, *, seed: int = 0) -> int:
    """Requests that begin alike and fork, on few pages, what nobody owns NaN: each has the bits of a run alone on clean pages."""
    one, rng = runner(8, 16, tiles=2), random.Random(seed)
    vocab_size, asks = one.model.vocab_size, []
    beginnings = [[rng.randrange(vocab_size) for _ in range(40)] for _ in range(3)]
    for _ in range(num_requests):
        prompt = rng.choice(beginnings)[: rng.choice((0, 0, 8, 15, 16, 17, 40))]
        prompt = prompt + [rng.randrange(vocab_size) for _ in range(rng.randint(1, 20))]
        options = {"temperature": rng.choice((0.0, 1.0)), "max_tokens": rng.randint(1, 12), "seed": rng.getrandbits(40)}
        asks.append(Ask(prompt, SamplingParams(ignore_eos=True, n=rng.choice((1, 1, 1, 2, 3)), **options)))
    engine = new_engine(one, num_pages=30, plants_nan=True)
    found = serve(engine, asks, per_step=0.5)
    assert one.guard_is_untouched(), "a page behind the pool was written"
    assert np.isnan(np.asarray(one.cache.k_pages)).mean() > 0.5, "the NaN were not planted"
    stats = engine.stats()
    assert stats["num_preemptions"] > 0 and stats["prefix_cache_hits"] > 0 and engine.scheduler.num_copies > 0
    clear(one)
    for number, ask in enumerate(asks):
        alone = new_engine(one, enable_prefix_caching=False, async_scheduling=False)
        wanted = serve(alone, [ask], first=number)
        same_bits({key: row for key, row in found.items() if key[0] == str(number)}, wanted)
    return num_requests


def clear(one: KeepingRunner) -> None:
    """No NaN is left in the pages."""
    one.cache = jax.tree.map(jnp.zeros_like, one.cache)


# --- R04: a prefix of every length, reused by a prompt of every length ---


def every_reuse(page_size: int, tile: int, *, has_buckets: bool = False) -> Counter[str]:
    """Prompts of up to four pages and a token, each after a hit on every part: how often the logits had the bits of a cold run.

    What is hit is what the common beginning has in full pages, one token of the prompt left over. With one executable all bits
    are equal, wherever tiles begin and whether the last token is in a tile or a row; with several, wherever both ran the same.
    """
    most = 4 * page_size + 1
    one, rng = runner(page_size, tile, tiles=-(-most // tile), has_buckets=has_buckets), random.Random(page_size)
    vocab_size, counts = one.model.vocab_size, Counter()
    text = [rng.randrange(vocab_size) for _ in range(most)]
    cold = {}
    for length in range(1, most + 1):
        engine = new_engine(one, plants_nan=True, enable_prefix_caching=False)
        cold[length] = serve(engine, [Ask(text[:length], greedy(1))])["0", 0, length]
    for length in range(1, most + 1):
        for common in range(length + 1):
            engine = new_engine(one, plants_nan=True)
            other = (text[common] + 1) % vocab_size if common < most else 1
            serve(engine, [Ask([*text[:common], other], greedy(1))])
            (event,) = serve_one(engine, text[:length])
            assert event.num_cached_tokens == min(common, length - 1) // page_size * page_size, "another part was hit"
            warm = engine.runner.duel.bits["warm", 0, length]  # type: ignore[union-attr]
            if warm.executable == cold[length].executable:
                assert warm.bits == cold[length].bits, (
                    f"{common} of {length} tokens cached: off by {distance(warm, cold[length])}"
                )
                counts["same executable"] += 1
            else:
                assert distance(warm, cold[length]) < 1e-4
                counts["another executable, same bits" if warm.bits == cold[length].bits else "another executable"] += 1
    assert one.guard_is_untouched()
    return counts


def serve_one(engine, prompt: list[int]) -> list:
    """The events of one greedy token."""
    engine.add_request(prompt, greedy(1), request_id="warm")
    events = []
    while engine.has_unfinished:
        events += engine.step()
    return events


# --- R03: siblings that part anywhere ---


def siblings(offsets: Iterable[int], widths: Iterable[int] = range(2, 9), *, page_size: int = 8) -> int:
    """Prompts that end so many tokens behind a page: the bits of each output are those of a request of its own."""
    one, count, num_parting = runner(page_size, 16, tiles=2), 0, 0
    for offset in offsets:
        for n in widths:
            rng = random.Random(f"{offset} {n}")
            prompt = [rng.randrange(one.model.vocab_size) for _ in range(page_size + offset)]
            options = {"temperature": 2.0, "max_tokens": rng.randint(2, 2 * page_size), "ignore_eos": True}
            engine = new_engine(one, plants_nan=True, enable_prefix_caching=bool((offset + n) % 2))
            found = serve(engine, [Ask(prompt, SamplingParams(n=n, seed=n, **options))])
            assert (engine.scheduler.num_copies > 0) == bool((len(prompt) - 1) % page_size)
            clear(one)
            singles = [Ask(prompt, SamplingParams(seed=n + index, **options)) for index in range(n)]
            wanted = serve(new_engine(one, enable_prefix_caching=False), singles)
            num_parting += len({wanted[str(index), 0, len(prompt) + 1].bits for index in range(n)}) > 1
            same_bits(found, {("0", int(number), end): row for (number, _, end), row in wanted.items()}, (offset, n))
            count += 1
    assert num_parting > 0.9 * count, "most draw the same first token"
    return count


def beams(offsets: Iterable[int], widths: Iterable[int] = range(2, 9), *, page_size: int = 8) -> int:
    """Likewise for searches: each beam on shared pages is what it is when all of its text is computed by itself."""
    one, count = runner(page_size, 16, tiles=2), 0

    def candidates(texts: list[list[int]]) -> list[list[tuple[int, float]]]:
        rows = serve(new_engine(one, enable_prefix_caching=False), [Ask(text, greedy(1)) for text in texts])
        logits = np.stack([rows[str(index), 0, len(text)].logits() for index, text in enumerate(texts)])
        return [list(enumerate(row.tolist())) for row in np.asarray(jax.nn.log_softmax(logits, axis=-1))]

    for offset in offsets:
        for width in widths:
            rng = random.Random(f"{offset} {width}")
            prompt = [rng.randrange(one.model.vocab_size) for _ in range(page_size + offset)]
            max_tokens = rng.randint(2, page_size + 2)
            params = SamplingParams(use_beam_search=True, n=width, temperature=0, ignore_eos=True, max_tokens=max_tokens)
            engine = new_engine(one, plants_nan=True, enable_prefix_caching=bool((offset + width) % 2))
            engine.add_request(prompt, params)
            events = []
            while engine.has_unfinished:
                events += engine.step()
            clear(one)
            group = BeamGroup(width, max_tokens, ())
            while not group.is_over:
                group.advance(candidates([[*prompt, *beam.token_ids] for beam in group.running]))
            assert [event.token_ids for event in events] == [found.token_ids for found in group.finished], (offset, width)
            for event, found in zip(events, group.finished, strict=True):
                assert abs(event.cumulative_logprob - found.cumulative_logprob) < 1e-4
            count += 1
    return count
