"""A few long conversations that are gone back to again and again, on a pool that holds hardly more than one of them.

What tiers are for: nearly every page that is asked for has been evicted since, and pages travel in both directions all the time.
"""

from __future__ import annotations

import dataclasses
import random

from simulation import Ask, Scenario, random_scenario


def revisits(seed: int, *, num_requests: int = 20, is_padded: bool = False, with_faults: bool = False) -> Scenario:
    """A scenario with tiers whose prompts begin, as far as they are as long, like one of three conversations."""
    rng = random.Random(f"revisits {seed}")
    drawn = random_scenario(seed, num_requests=1, is_padded=is_padded, tiers=True)
    page_size = rng.choice((1, 2, 4))
    num_pages = 1 + rng.randint(6, 16)
    limits = {**drawn.limits, "page_size": page_size, "max_num_seqs": rng.choice((2, 3, 8)), "max_num_batched_tokens": 64}
    limits |= {"tile": 4, "max_prefill_tiles": 16, "long_prefill_token_threshold": rng.choice((0, 0, 3))}
    scenario = dataclasses.replace(drawn, num_pages=num_pages, max_model_len=64, limits=limits, has_cache=True, asks=[])
    tiers = {"num_slots": rng.randint(2, 2 * num_pages), "has_disk": rng.random() < 0.8, "max_fetches": rng.choice((1, 2, 32))}
    scenario = dataclasses.replace(scenario, tiers=tiers)
    longest = min(scenario.max_pool_len, 60)
    talks = [[rng.randrange(1000) for _ in range(longest)] for _ in range(3)]
    arrival, patience = 0.0, rng.choice((0.2, 1.0, 4.0))
    for number in range(num_requests):
        arrival += rng.expovariate(1 / patience)
        talk = rng.choice(talks)
        params = {"max_tokens": rng.choice((1, 4, 12)), "ignore_eos": True, "stop_token_ids": (), "n": rng.choice((1, 1, 1, 2))}
        ask = Ask(
            request_id=f"r{number}",
            prompt=talk[: rng.randint(longest // 2, longest - 1)],
            params=params | ({"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} if is_padded else {}),
            eos_token_ids=(),
            seed=rng.getrandbits(64),
            arrival=int(arrival),
            abort=int(arrival) + rng.randint(0, 12) if with_faults and rng.random() < 0.2 else None,
            abort_in_flight=rng.random() < 0.5,
        )
        scenario.asks.append(ask)
    return scenario
