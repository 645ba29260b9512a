"""The host side's figures, each a function that returns its number of cases and raises when a law is broken.

test_figures.py checks a part of each, `make fuzz` all of it. Knows the fake device only.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Iterable

import aborts
from overload import overload, staircase
from revisits import revisits
from simulation import Ask, Scenario, Simulation, output_of, outputs_of, random_scenario, simulate, with_tiers
from test_overload import Service, chaos

from jaxpaged.host.policies import POLICIES
from jaxpaged.host.request import RequestError
from jaxpaged.host.scheduler import MAX_PREEMPTIONS
from jaxpaged.host.waiting import AGEING_STEPS

REQUESTS = 20  # of one scenario


# --- R02: nobody reads another's page ---


def equal_to_isolated_runs(seeds: Iterable[int]) -> int:
    """Requests, also with shared prefixes, forks, tiers, drafts and faults: every output is that of a run without pages."""
    count = 0
    for seed in seeds:
        shares, forks = seed % 3 == 1, seed % 4 == 1
        options = {"is_padded": seed % 5 == 0, "num_requests": REQUESTS}
        if seed % 10 < 2:
            scenario = revisits(seed, with_faults=seed % 3 == 0, **options)
        else:
            scenario = random_scenario(seed, shares=shares, forks=forks, tiers=seed % 2 == 1, **options)
        rightness = (None, None, None, 0.0, 0.5, 0.9, 1.0)[seed % 7]
        simulate(scenario, order=("oldest", "newest", "random")[seed % 3], is_async=seed % 2 == 0, rightness=rightness)
        count += REQUESTS
    return count


# --- R05: what fits just so, or not at all ---


def around_the_limit(num_pages: int, page_size: int, *, is_async: bool) -> int:
    """Prompts of every length around what a pool or a model holds: each ends by length alone, or is refused with the numbers."""
    limits = dict(page_size=page_size, max_num_seqs=4, max_num_batched_tokens=32, tile=8, max_prefill_tiles=4)
    params = {"max_tokens": None, "ignore_eos": False, "stop_token_ids": ()}
    max_pool_len = (num_pages - 1) * page_size
    count = 0
    for max_model_len in sorted({2, max_pool_len, max_pool_len + 1, max_pool_len + 2, max_pool_len + 40} - {1}):
        longest = min(max_pool_len, max_model_len - 1)
        around = {*range(max(1, longest - 2), longest + 3), max(1, longest - page_size), longest + page_size}
        for num_prompt in sorted(around):
            ask = Ask("alone", list(range(num_prompt)), params, (), 1, arrival=0)
            scenario = Scenario(
                num_prompt, num_pages, max_model_len, limits, [ask], is_padded=False, has_cache=num_prompt % 2 == 0
            )
            count += 1
            try:
                outcome = simulate(scenario, is_async=is_async)
            except RequestError as error:
                limit = max_model_len - 1 if num_prompt >= max_model_len else max_pool_len
                assert num_prompt > longest and f"prompt has {num_prompt:,} tokens" in str(error) and f"{limit:,}" in str(error)
                continue
            assert num_prompt <= longest and outcome.reasons == {"length": 1} and outcome.num_preemptions == 0
            assert len(outcome.outputs["alone"]) == min(max_model_len, max_pool_len + 1) - num_prompt >= 1
    return count


def pools_and_prompts(pool_sizes: Iterable[int]) -> int:
    """All of that for pools of so many pages beside the null page."""
    return sum(
        around_the_limit(1 + size, page_size, is_async=is_async)
        for size in pool_sizes
        for page_size in (1, 2, 16)
        for is_async in (False, True)
    )


# --- R06: overload comes to an end ---


def overloads(seeds: Iterable[int]) -> int:
    """Overload schedules in which every step computes a token and nobody is preempted too often; some are preempted by force."""
    count, most, policies = 0, 0, [*POLICIES, chaos]
    for seed in seeds:
        rng = random.Random(seed)
        options = {"ageing_steps": rng.choice((0, 3, 30, 5000)), "order": rng.choice(("oldest", "newest", "random"))}
        options |= {"policy": policies[seed % len(policies)], "is_perturbed": rng.random() < 0.3, "is_async": rng.random() < 0.5}
        scenario = overload(seed, num_requests=rng.randint(8, 20)) if seed % 4 else staircase(seed)
        if rng.random() < 0.3:  # no disk: whoever waits for one is passed, aged or not
            scenario = with_tiers(scenario)
            scenario = dataclasses.replace(scenario, tiers={**scenario.tiers, "has_disk": False})
        most = max(most, simulate(scenario, **options).max_preemptions)
        count += 1
    assert most <= MAX_PREEMPTIONS
    return count


# --- R07: who waits, and how long ---


class Queue(Simulation):
    """By order of arrival nobody ends later than if all before it had run one after another, each alone."""

    def __init__(self, scenario: Scenario, **options):
        super().__init__(scenario, **options)
        self.arrived: dict[str, int] = {}
        self.ended: dict[str, int] = {}

    def add(self, ask: Ask) -> None:
        self.arrived |= dict.fromkeys(outputs_of(ask), self.outcome.num_steps)
        super().add(ask)

    def take(self, event) -> None:
        super().take(event)
        if event.finish_reason is not None:
            self.ended[output_of(event)] = self.outcome.num_steps

    def num_steps_alone(self, ask: Ask) -> int:
        """Steps of one output that runs alone: its prompt in chunks, a token each, and one for a chunk that a preemption cuts.

        With a step in flight one more may have been planned for what has just ended.
        """
        limits = self.limits
        chunk = min(limits.max_num_batched_tokens, limits.max_prefill_tiles * limits.tile)
        chunk = min(chunk, limits.long_prefill_token_threshold or chunk)
        num_prompt = len(ask.prompt)
        return -(-num_prompt // chunk) + self.scenario.max_len(ask) - num_prompt + 1 + 2 * self.is_async

    def judge(self) -> None:
        super().judge()
        bound = 0
        for ask in self.scenario.asks:
            for output in outputs_of(ask):
                bound = max(bound, self.arrived[output]) + self.num_steps_alone(ask)
                assert self.ended[output] <= bound, f"{output} ends after step {self.ended[output]}, {bound} would do"


def queues(seeds: Iterable[int]) -> int:
    """Adversarial schedules under fcfs, each request within the bound of Queue."""
    count = 0
    for seed in seeds:
        scenario = staircase(seed) if seed % 3 == 0 else overload(seed, num_requests=15)
        Queue(scenario, order="random", is_async=seed % 2 == 0).run()
        count += 1
    return count


def unpopular(seeds: Iterable[int], *, ageing_steps: int = AGEING_STEPS) -> int:
    """One request that its policy puts last, while better ones never stop coming: it advances within the bound none the less."""
    count = 0
    for seed in seeds:
        rng = random.Random(f"unpopular {seed}")
        policy = rng.choice(("priority", "lifo", "sjf"))
        options = {"ageing_steps": ageing_steps, "num_pages": rng.choice((9, 17, 65)), "max_num_seqs": rng.choice((1, 2, 4))}
        service = Service(policy, **options)
        last, longest = service.ask(rng.randint(8, 12), 20, priority=5), 0
        while last in service.scheduler:
            while len(service.scheduler.waiting) < 6:
                num_prompt, max_tokens = rng.randint(1, 7), rng.randint(1, 12)
                longest = max(longest, num_prompt + max_tokens)
                service.ask(num_prompt, max_tokens, priority=rng.randint(-5, 4))
            service.step()
        assert service.longest_gap(last) <= min(ageing_steps + 2 * (longest + 32), 10_000)
        count += 1
    return count


# --- R09: aborts ---


def abort_everywhere(*, every: int = 1) -> tuple[int, Counter[str]]:
    """Days with one abort each, at every moment of each request's life, or every so-manieth; and how many in which state."""
    states: Counter[str] = Counter()
    for seed in (5, 6, 7, 12, 21):  # in these, requests are in every state that there is
        for is_async in (False, True):
            found, _ = aborts.run(seed, is_async=is_async, every=every)
            states += found
    return states.total(), states


# --- R43: keys that collide ---


class ShortIndex(dict):
    """The index of a prefix cache, by four bits of each key: nearly every place is that of another key too."""

    def get(self, key: bytes, default=None):
        """The page under a key, or under another that looks like it."""
        return super().get(key[0] % 16, (None, default))[1]

    def items(self):
        """Whole keys and their pages."""
        return super().values()

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key[0] % 16)  # type: ignore[index]

    def __setitem__(self, key: bytes, page: int) -> None:
        super().__setitem__(key[0] % 16, (key, page))

    def __delitem__(self, key: bytes) -> None:
        assert super().__getitem__(key[0] % 16)[0] == key, "the key of another page is forgotten"
        super().__delitem__(key[0] % 16)


class ShortSighted(Simulation):
    """With such an index."""

    def __init__(self, scenario: Scenario, **options):
        super().__init__(scenario, **options)
        assert self.cache is not None
        self.cache._pages = ShortIndex()


def collage(seed: int) -> Scenario:
    """Prompts of a few pages in every order, so that most pages are there after several beginnings.

    Behind the bridge, whose fake device has a second layer: there a page depends on what comes before it.
    """
    scenario = random_scenario(seed, num_requests=REQUESTS, is_padded=True, shares=True, with_faults=False)
    rng = random.Random(f"collage {seed}")
    size = scenario.limits["page_size"]
    pieces = [[rng.randrange(50_000) for _ in range(size)] for _ in range(3)]
    asks = []
    for ask in scenario.asks:
        prompt = [token for _ in range(len(ask.prompt) // size + 1) for token in rng.choice(pieces)][: len(ask.prompt)]
        asks.append(dataclasses.replace(ask, prompt=prompt))
    return dataclasses.replace(scenario, asks=asks)


def collisions(seeds: Iterable[int]) -> tuple[int, int]:
    """Requests found by four bits of their keys whose outputs are those of isolated runs, and tokens that were not computed."""
    count = num_hit_tokens = 0
    for seed in seeds:
        outcome = ShortSighted(collage(seed), order="random", is_async=seed % 2 == 0).run()
        count += REQUESTS
        num_hit_tokens += outcome.num_hit_tokens
    return count, num_hit_tokens
