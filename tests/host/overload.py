"""Overload: more requests than the pool can hold, for as long as it lasts; the hardest days for a policy.

Knows how to make them; what has to hold on them is in simulation.py.
"""

from __future__ import annotations

import random

from simulation import Ask, Scenario


def overload(seed: int, *, num_requests: int = 12) -> Scenario:
    """A pool for one to three of its longest sequences, requests that come faster than they can be served, most of them long."""
    rng = random.Random(f"overload {seed}")
    page_size = rng.choice((1, 1, 2, 4))
    num_pages = rng.randint(3, 1 + 24 // page_size)
    max_pool_len = (num_pages - 1) * page_size
    max_model_len = max(2, rng.choice((max_pool_len + 1, max_pool_len, int(max_pool_len * rng.uniform(0.3, 1)))))
    tile = rng.choice((1, 4))
    limits = {
        "page_size": page_size,
        "max_num_seqs": rng.choice((3, 8, 16)),
        "max_num_batched_tokens": rng.choice((16, 64)),
        "tile": tile,
        "max_prefill_tiles": 64 // tile,
        "long_prefill_token_threshold": rng.choice((0, 0, 1, 3)),
        "max_num_partial_prefills": rng.choice((0, 0, 1, 2)),
        "batch_merge_window": rng.choice((0, 0, 1, 5)),
    }
    longest = min(max_model_len - 1, max_pool_len)
    asks, arrival = [], 0
    patience, most_outputs = rng.choice((0, 1, 3)), rng.choice((1, 1, 1, 3))
    for number in range(num_requests):
        arrival += rng.randint(0, patience)
        num_prompt = rng.choice((1, rng.randint(1, longest), rng.randint(1, min(longest, 4))))
        params = {"max_tokens": rng.choice((None, None, rng.randint(1, 20))), "ignore_eos": False, "stop_token_ids": ()}
        if most_outputs > 1:
            params["n"] = rng.randint(1, most_outputs)
        prompt = [number * 100 + i for i in range(num_prompt)]
        options = {"priority": rng.choice((0, 0, 1, -1, number, -number)), "tenant": rng.choice("aaab")}
        asks.append(Ask(f"r{number}", prompt, params, (), number, arrival, **options))
    return Scenario(seed, num_pages, max_model_len, limits, asks, is_padded=False, has_cache=rng.random() < 0.3)


def staircase(seed: int, *, num_requests: int = 20, num_pages: int = 40) -> Scenario:
    """All come at once and grow side by side to ends of all lengths: each end lets one in again that growth throws out again."""
    rng = random.Random(f"staircase {seed}")
    limits = dict(page_size=1, max_num_seqs=256, max_num_batched_tokens=256, tile=1, max_prefill_tiles=256)
    asks = []
    for number in range(num_requests):
        max_tokens = rng.choice((rng.randint(1, num_pages - 1), rng.randint(1, num_pages // 3)))
        params = {"max_tokens": max_tokens, "ignore_eos": False, "stop_token_ids": ()}
        options = {"priority": rng.randint(0, 3), "tenant": rng.choice("aaab")}
        asks.append(Ask(f"r{number}", [number], params, (), number, number // 2 * rng.randint(0, 1), **options))
    asks.sort(key=lambda ask: ask.arrival)
    return Scenario(seed, num_pages, num_pages, limits, asks, is_padded=False)
