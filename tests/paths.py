"""One text by many paths (R51): computed at once, in chunks, from the prefix cache, again after a preemption, from host memory
and from disk. Each yields the same greedy tokens, and the same bits wherever the same executable computes a row of the same kind.

A token that one path computes in a decode row and another in a prefill tile (what a preempted sequence has to compute again, the
last token of a prompt that was cached up to it) is reduced in another order; there the law is closeness.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from bits import Bits, KeepingRunner, new_engine, serve
from driving import Ask, greedy

from jaxpaged.offload.transfer import Offload

CLOSE = 1e-4  # of the largest logit, float32


def conversations(count: int, vocab_size: int, *, seed: int = 0) -> list[Ask]:
    """Greedy requests; most begin as others do, so that the caches have something to give."""
    rng, asks = random.Random(seed), []
    beginnings = [[rng.randrange(vocab_size) for _ in range(60)] for _ in range(max(4, count // 25))]
    for _ in range(count):
        begin = rng.choice(beginnings)[: rng.choice((0, 8, 16, 17, 31, 48, 60))]
        asks.append(Ask(begin + [rng.randrange(vocab_size) for _ in range(rng.randint(1, 24))], greedy(rng.randint(2, 32))))
    return asks


@dataclass
class Found:
    """What a path has yielded, beside the path of one prompt at a time."""

    name: str
    num_tokens: int = 0
    num_same: int = 0  # tokens whose logits were computed by the same executable in a row of the same kind: bits compared
    largest: float = 0.0  # distance of the others, over the largest logit
    took: str = ""  # how often the path was what it is named


def compare(name: str, found: Bits, wanted: Bits, took: str) -> Found:
    """Raise AssertionError unless these are the same tokens and, where they have to be, the same bits."""
    assert found.keys() == wanted.keys(), f"{name}: other tokens"
    result = Found(name, took=took)
    for key, row in found.items():
        other = wanted[key]
        one, two = row.logits(), other.logits()
        assert one.argmax() == two.argmax(), f"{name} {key}: another token"
        result.num_tokens += 1
        if (row.kind, row.executable) == (other.kind, other.executable):
            assert row.bits == other.bits, f"{name} {key}: other bits, by {np.abs(one - two).max()}"
            result.num_same += 1
        else:
            result.largest = max(result.largest, float(np.abs(one - two).max() / np.abs(two).max()))
    assert result.largest < CLOSE, f"{name}: logits {result.largest} apart"
    return result


def all_paths(runner: KeepingRunner, count: int, folder: str, *, few_pages: int) -> list[Found]:
    """Every path of `count` requests against the cold one.

    Args:
      folder: for pages on disk.
      few_pages: of a pool in which they preempt each other.
    """
    asks = conversations(count, runner.model.vocab_size)
    cold = new_engine(runner, enable_prefix_caching=False)
    wanted, found = dict(serve(cold, asks)), []
    for threshold in (3, 8, 29):
        engine = new_engine(runner, enable_prefix_caching=False, long_prefill_token_threshold=threshold)
        found.append(compare(f"in chunks of {threshold}", serve(engine, asks), wanted, "all prompts"))
    engine = new_engine(runner)
    serve(engine, asks)
    engine.runner.duel.bits.clear()  # type: ignore[attr-defined, union-attr]
    cached = serve(engine, asks)
    found.append(compare("cached", cached, wanted, f"{engine.stats()['prefix_cache_hits']:,} tokens hit"))
    recomputed = new_engine(runner, num_pages=few_pages, enable_prefix_caching=False)
    bits = serve(recomputed, asks)
    num_preemptions = recomputed.scheduler.num_preemptions
    assert num_preemptions > count / 20, "too few preemptions to say anything"
    found.append(compare("preempted, recomputed", bits, wanted, f"{num_preemptions:,} preemptions"))

    for name, num_slots, where in (("swapped to host memory", 400, None), ("spilled to disk", 24, folder)):
        gib = (num_slots + 0.5) * runner.model.page_bytes(runner.config.block_size, "float32") / 2**30  # type: ignore[arg-type]
        runner.offload = Offload(runner.cache, runner.model, num_slots=num_slots, offload_dir=where)
        tiers = {"swap_space": gib, "offload_dir": where, "preemption_mode": "swap"}
        # In host memory a sequence's own pages and no other's, on disk whatever pool and slots had no room for.
        engine = new_engine(runner, num_pages=few_pages, enable_prefix_caching=where is not None, **tiers)
        bits, stats = serve(engine, asks), runner.offload.stats()
        runner.offload.close()
        runner.offload = None
        moved = stats.num_fetched_pages if where else stats.num_loaded_pages
        assert moved > count / 20, f"{name}: too few pages have been there to say anything"
        found.append(compare(name, bits, wanted, f"{moved:,} pages came back, {engine.scheduler.num_preemptions:,} preemptions"))
    return found
