"""Random days of a scheduler's life: who asks what and when, lived through with a fake runner and judged against isolated runs.

`simulate` asserts every law of the host side while it runs, so that a test is a seed and a planted bug is a failure.
"""

from __future__ import annotations

import dataclasses
import importlib
import random
from collections import Counter, deque
from dataclasses import dataclass, field
from types import SimpleNamespace

from fake_runner import VOCAB_SIZE, FakeRunner, PaddedFakeRunner, isolated, isolated_padded, watched

from jaxpaged.config import Bucket
from jaxpaged.host.policies import find_policy

MODULES = (
    "jaxpaged.host.beams",
    "jaxpaged.host.request",
    "jaxpaged.host.beam_params",
    "jaxpaged.host.prefix_cache",
    "jaxpaged.host.plan",
    "jaxpaged.host.tiers",
    "jaxpaged.host.pages",
    "jaxpaged.host.preemption",
    "jaxpaged.host.recall",
    "jaxpaged.host.waiting",
    "jaxpaged.host.searches",
    "jaxpaged.host.scheduler",
    "jaxpaged.batch",
)


def house() -> SimpleNamespace:
    """The modules under test, as `sys.modules` has them now; tests/host/test_mutants.py puts others there."""
    return SimpleNamespace(**{name.rpartition(".")[2]: importlib.import_module(name) for name in MODULES})


@dataclass(frozen=True)
class Ask:
    """One request of a scenario, before any check."""

    request_id: str
    prompt: list[int]
    params: dict
    eos_token_ids: tuple[int, ...]
    seed: int
    arrival: int  # the step before which it comes
    abort: int | None = None  # the step at which it is aborted
    abort_in_flight: bool = False  # between plan and commit
    error_at: int | None = None  # output tokens after which what is computed is not finite; below 0 it is a token of the prompt
    cache_salt: str | None = None
    priority: int = 0
    tenant: str = ""


@dataclass(frozen=True)
class Scenario:
    """A machine and what is asked of it."""

    seed: int
    num_pages: int
    max_model_len: int
    limits: dict
    asks: list[Ask]
    is_padded: bool
    has_cache: bool = False
    tiers: dict | None = None  # options of the host tier; None for none
    preemption_mode: str = "auto"
    fetch_fails: float = 0.0  # share of fetches

    @property
    def max_pool_len(self) -> int:
        """Tokens in all pages but the null page."""
        return (self.num_pages - 1) * self.limits["page_size"]

    def max_len(self, ask: Ask) -> int:
        """Tokens at which the request has to end: the last one needs no place in a page."""
        asked = len(ask.prompt) + ask.params["max_tokens"] if ask.params["max_tokens"] else self.max_model_len
        return min(asked, self.max_model_len, self.max_pool_len + 1)

    def expected(self, ask: Ask, index: int = 0) -> list[int]:
        """One of the outputs of a run without scheduler."""
        stop_ids = frozenset(ask.params["stop_token_ids"])
        stop_ids |= frozenset() if ask.params["ignore_eos"] else frozenset(ask.eos_token_ids)
        if not self.is_padded:
            return isolated(ask.prompt, self.max_len(ask), stop_ids, index, self.limits.get("sliding_window", 0))
        params = SimpleNamespace(**{"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **ask.params})
        return isolated_padded(ask.prompt, self.max_len(ask), stop_ids, params, (ask.seed + index) % 2**64)


def random_scenario(
    seed: int,
    *,
    num_requests: int = 20,
    is_padded: bool = False,
    with_faults: bool = True,
    shares: bool = False,
    forks: bool = False,
    has_window: bool = False,
    tiers: bool = False,
) -> Scenario:
    """A scenario whose every request can be served. Half of them have a pool too small for their crowd.

    shares: there is a prefix cache, and most prompts begin as an earlier request's prompt and output do.
    forks: most requests want several outputs.
    has_window: no token sees all that comes before it, so that pages are given back.
    tiers: there is host memory below the pool, more often than not with a disk below it.
    """
    rng = random.Random(f"scenario {seed}")
    page_size = rng.choice((1, 2, 16))
    max_model_len = rng.randint(2, 64)
    if rng.random() < 0.7:  # about as many pages as one or two of its longest sequences need
        num_pages = max(2, min(64, 1 + int(max_model_len * rng.choice((0.5, 1.0, 1.3, 1.6, 2.5)) / page_size)))
    else:
        num_pages = rng.randint(2, 64)
    tile = rng.choice((1, 4, 16))
    budget = rng.choice((1, 3, 16, 64, 512))
    limits = {
        "page_size": page_size,
        "max_num_seqs": rng.choice((1, 2, 3, 8, 8, 32)),
        "max_num_batched_tokens": budget,
        "tile": tile,
        "max_prefill_tiles": rng.choice((1, -(-budget // tile), -(-budget // tile))),
        "long_prefill_token_threshold": rng.choice((0, 1, 7, page_size)),
    }
    if has_window:
        limits["sliding_window"] = rng.randint(1, max_model_len)
    if forks:
        limits["eager_copy"] = seed % 4 >= 2
    scenario = Scenario(seed, num_pages, max_model_len, limits, [], is_padded, shares)
    longest = min(scenario.max_model_len - 1, scenario.max_pool_len)
    arrival, patience = 0.0, rng.choice((0.0, 0.5, 4.0))
    for number in range(num_requests):
        arrival += rng.expovariate(1 / patience) if patience else 0.0
        # Short, anything, or as long as the limits allow.
        num_prompt = rng.choice(
            (rng.randint(1, min(longest, 5)), rng.randint(1, longest), rng.randint(max(1, longest - 2), longest))
        )
        params = {
            "max_tokens": rng.choice((None, None, 1, rng.randint(1, 8), rng.randint(1, 48))),
            "ignore_eos": rng.random() < 0.3,
            "stop_token_ids": (),
        }
        if forks:
            params["n"] = rng.choice((1, 2, 3, 4, 8))
        if is_padded:
            params |= {"temperature": rng.random(), "top_k": rng.randint(-1, 9), "top_p": 1 - rng.random(), "min_p": rng.random()}
        ask = Ask(
            request_id=f"r{number}",
            prompt=_prompt(scenario, num_prompt, rng) if shares else [rng.randrange(VOCAB_SIZE) for _ in range(num_prompt)],
            params=params,
            eos_token_ids=(),
            seed=rng.getrandbits(64),
            arrival=int(arrival),
            abort=int(arrival) + rng.randint(0, 30) if with_faults and rng.random() < 0.1 else None,
            abort_in_flight=rng.random() < 0.5,
            cache_salt=rng.choice((None, None, None, "a")) if shares else None,
            error_at=rng.randint(0, 5) if with_faults and not is_padded and rng.random() < 0.05 else None,
        )
        if ask.error_at is not None and ask.error_at > 3:  # every third of them
            ask = dataclasses.replace(ask, error_at=-(number * ask.error_at % num_prompt))
        if rng.random() < 0.3:  # tokens that will come, so that they stop it
            output = scenario.expected(ask)
            eos = (rng.choice(output),) if rng.random() < 0.5 else ()
            stops = (rng.choice(output), rng.randrange(VOCAB_SIZE)) if rng.random() < 0.7 else ()
            ask = dataclasses.replace(ask, eos_token_ids=eos, params={**params, "stop_token_ids": stops})
        scenario.asks.append(ask)
    return with_tiers(scenario) if tiers else scenario


def with_tiers(scenario: Scenario) -> Scenario:
    """The same with random tiers below the pool, smaller than one sequence now and then."""
    rng = random.Random(f"tiers {scenario.seed}")
    options = {
        "num_slots": rng.choice((1, 2, 3, scenario.num_pages, 2 * scenario.num_pages)),
        "has_disk": rng.random() < 0.7,
        "threshold": rng.choice((0, 0, 0, 2 * scenario.limits["page_size"])),
        "max_fetches": rng.choice((1, 2, 32)),
    }
    mode = rng.choice(("recompute", "swap", "swap", "auto"))
    has_cache, fetch_fails = scenario.has_cache and rng.random() < 0.7, rng.choice((0.0, 0.0, 0.1, 0.5))
    return dataclasses.replace(scenario, tiers=options, preemption_mode=mode, fetch_fails=fetch_fails, has_cache=has_cache)


def with_drafts(scenario: Scenario) -> Scenario:
    """The same with random room for drafts."""
    rng, limits = random.Random(f"room {scenario.seed}"), scenario.limits
    rows = rng.choice((1, 3, limits["max_num_seqs"], 5 * limits["max_num_seqs"])) + limits["max_num_seqs"]
    return dataclasses.replace(scenario, limits={**limits, "max_num_rows": rows, "lookahead": rng.choice((0, 0, 3))})


def _prompt(scenario: Scenario, num_prompt: int, rng: random.Random) -> list[int]:
    """A prompt that begins, more often than not, as an earlier conversation did, to wherever it was cut or to its very end."""
    before: list[int] = []
    if scenario.asks and rng.random() < 0.8:
        earlier = rng.choice(scenario.asks)
        before = earlier.prompt + scenario.expected(earlier)
        # Now and then without its first tokens: what follows is then the same after another beginning.
        first = rng.choice((0, 0, 0, 0, rng.choice((1, 2, 16))))
        before = before[first : rng.choice((len(before), rng.randint(1, len(before))))]
    return (before + [rng.randrange(VOCAB_SIZE) for _ in range(num_prompt)])[:num_prompt]


@dataclass
class Outcome:
    """What a simulation has seen, for those who want numbers."""

    num_steps: int = 0
    num_tokens: int = 0
    num_preemptions: int = 0
    max_preemptions: int = 0
    num_hit_tokens: int = 0
    num_evictions: int = 0
    num_copies: int = 0
    num_drafts: int = 0
    num_accepted: int = 0
    num_spoiled: int = 0
    num_saved: int = 0
    num_loaded: int = 0
    num_spilled: int = 0
    num_fetched: int = 0
    num_fetch_misses: int = 0
    num_fetches: int = 0
    num_idle: int = 0  # plans for which there was nothing but fetches to wait for
    reasons: Counter = field(default_factory=Counter)
    outputs: dict[str, list[int]] = field(default_factory=dict)


def outputs_of(ask: Ask) -> list[str]:
    """Names of a request's outputs: its id for the first, with a number for the others."""
    return [ask.request_id, *(f"{ask.request_id}#{index}" for index in range(1, ask.params.get("n", 1)))]


def output_of(event) -> str:
    """The output that an event is about."""
    return f"{event.request_id}#{event.index}" if event.index else event.request_id


def buckets_of(limits) -> list[Bucket]:
    """Compiled shapes for these limits, as `EngineConfig.buckets` orders them."""
    rows = sorted({1, min(4, limits.max_num_seqs), limits.max_num_seqs, max(limits.max_num_seqs, limits.max_num_rows)})
    tiles = sorted({0, 1, min(4, limits.max_prefill_tiles), limits.max_prefill_tiles})
    return [Bucket(decode_rows, prefill_tiles) for prefill_tiles in tiles for decode_rows in rows]


class Simulation:
    """One scenario, lived through by `run`."""

    def __init__(
        self,
        scenario: Scenario,
        *,
        order: str = "oldest",
        is_perturbed: bool = False,
        is_async: bool | None = None,
        policy="fcfs",
        ageing_steps: int = 5000,
        rightness: float | None = None,
    ):
        if rightness is not None:
            scenario = with_drafts(scenario)
        self.scenario, self.is_perturbed, self.rightness = scenario, is_perturbed, rightness
        self.draft_rng, self.coming = random.Random(f"drafts {scenario.seed}"), {}
        self.is_async = bool(scenario.seed % 2) if is_async is None else is_async  # steps are now and then planned ahead
        self.rng = random.Random(scenario.seed)
        self.in_flight: deque = deque()  # (plan, what waits for its result), the oldest first
        self.house = house()
        self.limits = self.house.plan.Limits(**scenario.limits)
        self.asks = {ask.request_id: ask for ask in scenario.asks}
        self.rank = {ask.request_id: rank for rank, ask in enumerate(scenario.asks)}
        below = {"seed": scenario.seed, "fetch_fails": scenario.fetch_fails}
        if scenario.is_padded:
            width = -(-scenario.max_model_len // self.limits.page_size)
            options = {"buckets": buckets_of(self.limits), "tile": self.limits.tile, "max_blocks_per_seq": width, **below}
            self.runner = PaddedFakeRunner(scenario.num_pages, self.limits.page_size, batch=self.house.batch, **options)
        else:
            self.runner = FakeRunner(scenario.num_pages, self.limits.page_size, self.fails, self.limits.sliding_window, **below)
        self.cache = self.tier = None
        if scenario.has_cache or scenario.tiers:
            self.cache = self.house.prefix_cache.PrefixCache(self.limits.page_size, is_private=not scenario.has_cache)
        if scenario.tiers:
            self.tier = self.house.tiers.HostTier(**scenario.tiers)
        self.has_disk = self.tier is not None and self.tier.has_disk
        self.is_running = False  # between a plan and the end of its run, when the device does not yet hold what it will
        options = {"order": order, "seed": scenario.seed, "on_free": self.runner.poison, "cache": self.cache, "tier": self.tier}
        self.pool = watched(self.house.pages.PagePool, scenario.num_pages, **options)
        self.is_fcfs, self.ageing_steps = policy == "fcfs", ageing_steps
        options = {"preemption_mode": scenario.preemption_mode, "costs": self.house.preemption.SwapCosts(1.0, 1.0, 0.1, 1.0, 0.1)}
        self.scheduler = self.house.scheduler.Scheduler(
            self.pool, self.limits, policy=find_policy(policy), ageing_steps=ageing_steps, **options
        )
        self.num_waited: Counter = Counter()  # sequence -> steps in a row that it has been in the line
        self.aged: set = set()
        self.live: list[str] = []  # in order of arrival
        self.unended: dict[str, set[str]] = {}  # of each live request, the outputs that have not ended
        self.outcome = Outcome(outputs={output: [] for ask in self.scenario.asks for output in outputs_of(ask)})
        self.endings: dict[str, object] = {}  # the last event of each output
        self.admitted: list[str] = []

    def fails(self, request_id: str, num_output: int) -> bool:
        """Whether this row's logits are to be not finite."""
        return num_output == self.asks[request_id].error_at

    def run(self) -> Outcome:
        """Live to the end of the last request; AssertionError, or whatever the code under test raises, when a law is broken."""
        coming = deque(self.scenario.asks)
        most_steps = self.most_steps()
        if not self.is_fcfs or self.has_disk:  # any may be preempted, but none too often
            most_steps *= 1 + self.house.scheduler.MAX_PREEMPTIONS
        num_perturbed = 0
        now = 0
        while coming or self.live:
            while coming and coming[0].arrival <= now:
                self.add(coming.popleft())
            self.abort(now, in_flight=False)
            if self.is_perturbed and now < 100:
                num_perturbed += 1 + self.perturb()
            self.step(now)
            most = most_steps + num_perturbed + self.outcome.num_fetches
            assert self.outcome.num_steps <= most, "livelock: more steps than the requests have tokens"
            now += 1
        self.judge()
        return self.outcome

    def most_steps(self) -> int:
        """The oldest sequence computes a token in every step and is never preempted, so its steps are fewer than its tokens.

        With a step in flight it may compute one token more, after what turns out to be its last.
        """
        most = sum((self.scenario.max_len(ask) + self.is_async) * len(outputs_of(ask)) for ask in self.scenario.asks)
        return most if self.rightness is None else 2 * most  # while its drafts are in flight, the oldest waits and others run

    def add(self, ask: Ask) -> None:
        request_module, scenario = self.house.request, self.scenario
        request = request_module.Request.checked(
            ask.request_id,
            ask.prompt,
            request_module.SamplingParams(**ask.params),
            vocab_size=VOCAB_SIZE,
            max_model_len=scenario.max_model_len,
            max_pool_len=scenario.max_pool_len,
            eos_token_ids=ask.eos_token_ids,
            default_seed=ask.seed,
            cache_salt=ask.cache_salt,
            priority=ask.priority,
            tenant=ask.tenant,
        )
        self.scheduler.add(request)
        self.live.append(ask.request_id)
        self.unended[ask.request_id] = set(outputs_of(ask))
        self.check()
        if ask.seed % 4:
            return
        try:
            self.scheduler.add(request)
        except request_module.RequestError as error:
            assert ask.request_id in str(error)
        else:
            raise AssertionError("a second request took the id of an unfinished one")
        self.check()

    def abort(self, now: int, *, in_flight: bool) -> None:
        for ask in self.scenario.asks:
            if ask.abort != now or ask.abort_in_flight != in_flight:
                continue
            free = self.pool.num_free
            mine = Counter(page for s in self.scheduler.running if s.request.request_id == ask.request_id for page in s.pages)
            owned = sum(self.pool.num_owners(page) == count for page, count in mine.items())
            events = self.scheduler.abort(ask.request_id)
            assert {output_of(event) for event in events} == self.unended.get(ask.request_id, set())
            assert self.pool.num_free == free + owned, "an aborted request keeps pages"
            for event in events:
                assert event.token_id is None and event.finish_reason == "abort"
                self.take(event)
            assert not self.scheduler.abort(ask.request_id)
            self.check()

    def perturb(self) -> int:
        """Preempt for no reason, lose steps in flight, and change the size of chunks from step to step: tokens thrown away."""
        num_lost = 0
        most = self.house.scheduler.MAX_PREEMPTIONS
        self.scheduler._advance_in_flight(is_pending=True)  # as `plan` does, which alone preempts
        if self.scheduler.running and self.rng.random() < 0.2 and self.scheduler.running[-1].num_preemptions < most:
            self.scheduler._preempt(self.scheduler.running[-1])
        if self.cache is not None and self.rng.random() < 0.05:
            self.pool.reset_cache()
            assert not len(self.cache) and not self.pool.num_cached, "a reset forgets nothing"
            assert self.tier is None or not (self.tier._held or self.tier.num_on_disk), "a reset forgets nothing below the pool"
        if self.tier is not None:
            self.scheduler.preemption_mode = self.rng.choice(("recompute", "swap", "auto"))
        threshold = self.rng.choice((0, 1, 2, 3, 7, 16))
        self.scheduler.limits = dataclasses.replace(self.limits, long_prefill_token_threshold=threshold)
        if self.rng.random() < 0.03:
            num_lost = sum(sequence.num_computed for sequence in self.scheduler.running)
            self.scheduler.rewind()
            while self.in_flight:
                self.runner.lose(self.in_flight.popleft()[0])
            self.check()
        return num_lost

    def step(self, now: int) -> None:
        assert self.scheduler.has_unfinished == bool(self.live)
        waiting_before = {s.request.request_id for s in self.scheduler.waiting}
        self.take_fetched(wait=False)
        plan = self.scheduler.plan(self.drafts())
        assert (plan is not None) == bool(self.live) or self.in_flight or self.scheduler.is_fetching, (
            "nobody is done anything for"
        )
        self.is_running = plan is not None
        self.check()
        if plan is not None:
            self.look_at(plan, waiting_before)
            self.age()
            self.in_flight.append((plan, self.runner.submit(plan)))
            self.is_running = False
            self.check()
            self.outcome.num_steps += 1
            self.outcome.num_tokens += plan.num_tokens
        elif self.live and not self.in_flight:
            self.outcome.num_idle += 1
            self.take_fetched(wait=True)
        self.abort(now, in_flight=True)
        # The next step is planned before this one is committed, or not: as it happens.
        if self.in_flight and (plan is None or len(self.in_flight) > 1 or not (self.is_async and self.rng.random() < 0.8)):
            self.commit()

    def drafts(self) -> dict:
        """What will come of some of those that run, as far as it is right; too much of it now and then, or of no use."""
        if self.rightness is None:
            return {}
        rng, found = self.draft_rng, {}
        for sequence in self.scheduler.running:
            key = sequence.request.request_id, sequence.index
            if key not in self.coming:
                self.coming[key] = self.scenario.expected(self.asks[key[0]], sequence.index)
            drafts = [*self.coming[key][sequence.num_tokens - sequence.num_prompt :], 1, 2, 3][: rng.randrange(9)]
            found[sequence] = [one if rng.random() < self.rightness else rng.randrange(VOCAB_SIZE) for one in drafts]
        return found

    def commit(self) -> None:
        plan, result = self.in_flight.popleft()
        owned = {chunk.sequence: chunk.sequence.owned_pages for chunk in plan.chunks()}
        sampled = result()
        num_accepted = self.num_accepted(plan, sampled[0])
        events = self.scheduler.commit(plan, *sampled)
        self.look_at_spoiled(owned)
        self.runner.clean(self.scheduler.spoiled)
        self.check()
        assert len(events) <= len({output_of(event) for event in events}) + num_accepted
        self.outcome.num_accepted += num_accepted
        for event in events:
            self.take(event)

    def look_at_spoiled(self, owned: dict) -> None:
        """What a request that has failed alone had, is noted to be cleaned, and nobody finds it again."""
        spoiled = set(self.scheduler.spoiled)
        of_others = {page for one, pages in owned.items() if one.finish_reason != "error" for page in pages}
        for sequence, pages in owned.items():
            if sequence.finish_reason == "error":
                mine = {page for page in pages if not self.pool.num_owners(page)} - of_others
                assert mine <= spoiled, "a page of a request that failed is not cleaned"
                self.outcome.num_spoiled += len(mine)
        assert not any(self.pool.num_owners(page) for page in spoiled), "a page that somebody owns is cleaned"
        assert self.cache is None or not any(page in self.cache for page in spoiled), "what failed is known to the prefix cache"

    def num_accepted(self, plan, token_ids: list[int]) -> int:
        """Drafts of a plan that are what was drawn, all before them too."""
        row = count = 0
        for chunk in plan.decodes:
            pairs = zip(chunk.drafts, token_ids[row : row + len(chunk.drafts)], strict=True)
            count += next((at for at, (draft, drawn) in enumerate(pairs) if draft != drawn), len(chunk.drafts))
            row += chunk.num_tokens
        return count

    def take_fetched(self, *, wait: bool) -> None:
        """Tell the scheduler what has come from disk."""
        if self.scheduler.is_fetching:
            for key, ok in self.runner.fetched(wait=wait):
                self.scheduler.fetched(key, ok)
                self.check()

    def look_at(self, plan, waiting_before: set[str]) -> None:
        """Is this plan within the limits, fair, and does it get on with the work?"""
        limits = self.scheduler.limits
        chunks = plan.chunks()
        ids = [chunk.sequence.request.request_id for chunk in chunks]
        assert 0 <= plan.num_tokens == sum(chunk.num_tokens for chunk in chunks) <= limits.max_num_batched_tokens
        assert chunks or plan.transfers.fetches, "a step for nothing"
        if self.tier is not None:
            self.look_at_tiers(plan)
        # But for a beam that waits for candidates, and for an output of which the step in flight samples the last token.
        mine = [s for s in self.scheduler.running if s.request.request_id == self.live[0]]
        waits = [s.num_tokens >= s.request.max_len or s.is_drafted or bool(s.group and not s.num_uncomputed) for s in mine]
        is_in_order = self.is_fcfs and not self.has_disk
        assert self.live[0] in ids or not is_in_order or all(waits), "the oldest request sits a step out"
        assert len({id(chunk.sequence) for chunk in chunks}) == len(chunks), "one sequence has two chunks in one step"
        targets = [target for _, target in plan.copies]
        assert len(set(targets)) == len(targets) and not set(targets) & {source for source, _ in plan.copies}
        self.outcome.num_copies += len(targets)
        assert sum(-(-chunk.num_tokens // limits.tile) for chunk in plan.prefills) <= limits.max_prefill_tiles
        assert all(chunk.num_tokens == 1 + len(chunk.drafts) and chunk.samples for chunk in plan.decodes)
        assert plan.num_rows <= max(limits.max_num_seqs, limits.max_num_rows)
        self.outcome.num_drafts += sum(len(chunk.drafts) for chunk in plan.decodes)
        for chunk in plan.prefills:
            assert 0 < chunk.num_tokens <= (limits.long_prefill_token_threshold or chunk.num_tokens)
            assert not (chunk.num_tokens == 1 and chunk.samples) and not chunk.drafts, "a decode among the prefills"
        for chunk in chunks:
            size = limits.page_size
            written = chunk.sequence.pages[chunk.start // size : -(-chunk.end // size)]
            assert all(self.pool.num_owners(page) == 1 for page in written), "a shared page is written"
            assert self.cache is None or not any(page in self.cache for page in written), "a known page is written"
            assert chunk.samples == (chunk.end - len(chunk.drafts) == chunk.sequence.num_tokens)
        ranks = [self.rank[s.request.request_id] for s in (*self.scheduler.running, *self.scheduler.waiting)]
        assert ranks == sorted(ranks) or not is_in_order, "not in order of arrival"
        new = [s.request.request_id for s in self.scheduler.running if s.request.request_id in waiting_before]
        self.admitted += [request_id for request_id in new if request_id not in self.admitted]

    def look_at_tiers(self, plan) -> None:
        """Can what is moved be found again, and does nobody find what is another's?"""
        # In host memory when another page of the same key has come there since.
        assert all(key in self.tier._disk or key in self.tier._held for _, key in plan.transfers.spills), (
            "nobody knows of what is on disk"
        )
        self.outcome.num_fetches += len(plan.transfers.fetches)
        if self.cache.is_private:
            owners = {(page, s.request.request_id) for s in self.scheduler.running for page in s.owned_pages}
            assert len({page for page, _ in owners}) == len(owners), "requests share a page"

    def age(self) -> None:
        """Who has waited longer than the bound is passed by nobody who came later."""
        waiting = set(self.scheduler.waiting)
        admitted = [self.rank[s.request.request_id] for s in self.scheduler.running if self.num_waited[s]]
        passed = [self.rank[s.request.request_id] for s in self.aged & waiting]
        assert not admitted or not passed or max(admitted) <= min(passed), "a later request passed one that has aged"
        self.num_waited = Counter({s: self.num_waited[s] + 1 for s in waiting})
        self.aged |= {s for s, count in self.num_waited.items() if count > self.ageing_steps}

    def take(self, event) -> None:
        """Book one event."""
        output = output_of(event)
        assert output in self.unended.get(event.request_id, ()), "an event after the end"
        if event.token_id is not None:
            self.outcome.outputs[output].append(event.token_id)
        if event.finish_reason is not None:
            self.endings[output] = event
            self.unended[event.request_id].remove(output)
            if not self.unended[event.request_id]:
                del self.unended[event.request_id]
                self.live.remove(event.request_id)

    def check(self) -> None:
        self.scheduler.check()
        if self.cache is not None and not self.scenario.is_padded and not self.is_running:
            size = self.limits.page_size
            for page, (_, tokens, _) in self.cache._held.items():
                held = self.runner.places[page * size : (page + 1) * size]
                assert list(held) == list(tokens), "the prefix cache is wrong about what a page holds"
            for key, (slot, tokens) in self.tier._held.items() if self.tier is not None else ():
                is_there = list(self.runner.host.get(slot, ())) == list(tokens)
                assert is_there or self.tier.is_fetching(key), "the tier is wrong about what a slot holds"
            for key, tokens in self.tier._disk.items() if self.tier is not None else ():
                is_there = list(self.runner.disk.get(key, ())) == list(tokens)
                assert is_there or self.tier.is_fetching(key), "the tier is wrong about what is on disk"
        most = max((s.num_preemptions for s in self.scheduler.waiting), default=0)
        assert most <= self.house.scheduler.MAX_PREEMPTIONS, "preempted too often"
        self.outcome.max_preemptions = max(self.outcome.max_preemptions, most)

    def judge(self) -> None:
        """Every output is that of the isolated run, and nothing is left behind."""
        assert not self.scheduler.has_unfinished and not self.scheduler.running and not self.scheduler.waiting
        assert self.pool.num_used == 0, "leaked pages"
        if self.cache is not None:
            self.outcome.num_hit_tokens, self.outcome.num_evictions = self.cache.num_hit_tokens, self.cache.num_evictions
        self.pool.check([])
        if self.tier is not None:
            self.judge_tier()
        first = [self.rank[request_id] for request_id in self.admitted]
        assert first == sorted(first) or not self.is_fcfs or self.has_disk, "a later request was admitted first"
        outputs = [(ask, index, output) for ask in self.scenario.asks for index, output in enumerate(outputs_of(ask))]
        for ask, index, request_id in outputs:
            expected, event = self.scenario.expected(ask, index), self.endings[request_id]
            output = self.outcome.outputs[request_id]
            self.outcome.reasons[str(event.finish_reason)] += 1
            if event.finish_reason == "abort":
                assert ask.abort is not None and output == expected[: len(output)]
            elif event.finish_reason == "error":
                assert event.token_id is None and event.stop_reason is None
                assert len(output) == max(0, ask.error_at) and output == expected[: len(output)]
            else:
                assert output == expected, f"{request_id} of seed {self.scenario.seed} differs from its isolated run"
                # A token of a prompt that the prefix cache has is not computed.
                assert ask.error_at is None or ask.error_at >= len(output) or (ask.error_at < 0 and self.cache is not None)
                stops = ask.params["stop_token_ids"] + (() if ask.params["ignore_eos"] else ask.eos_token_ids)
                assert event.finish_reason == ("stop" if output[-1] in stops else "length")
                assert event.stop_reason == (output[-1] if output[-1] in ask.params["stop_token_ids"] else None)
                assert output[-1] in stops or len(ask.prompt) + len(output) == self.scenario.max_len(ask)
        self.outcome.num_preemptions = self.scheduler.num_preemptions
        is_plain = self.rightness is None and not self.outcome.num_preemptions and self.cache is None and not self.is_perturbed
        if (
            is_plain
            and set(self.outcome.reasons) <= {"stop", "length"}
            and max(map(len, map(outputs_of, self.scenario.asks))) <= self.limits.max_num_seqs
        ):
            # Each prompt but for its last token once, then a token for each token of each output.
            num_prompt = sum(len(ask.prompt) - 1 for ask in self.scenario.asks)
            num_more = self.outcome.num_tokens - num_prompt - sum(map(len, self.outcome.outputs.values()))
            # A step ahead computes, of an output that a token has ended, one token more.
            assert 0 <= num_more <= self.is_async * self.outcome.reasons["stop"], "something is computed twice"

    def judge_tier(self) -> None:
        """No slot is lost, and of requests that share nothing nothing is left."""
        while self.scheduler.is_fetching:
            self.take_fetched(wait=True)
        tier, outcome = self.tier, self.outcome
        tier.check([])
        # Of plans that were lost some fetches may never end: what they may still write is nobody's.
        assert len(tier._free) + len(tier._idle) + len(tier._stray) == tier.num_slots, "leaked slots"
        assert self.cache is not None
        if self.cache.is_private:
            assert not len(self.cache) and tier.num_used == len(tier._stray) and not tier.num_on_disk, "pages are kept for nobody"
            is_alone = all(ask.params.get("n", 1) == 1 for ask in self.scenario.asks)
            if is_alone and self.scenario.preemption_mode == "recompute" and not self.is_perturbed:
                assert not tier.num_saved, "what was to be computed again is kept"
        for name in ("num_saved", "num_loaded", "num_spilled", "num_fetched", "num_fetch_misses"):
            setattr(outcome, name, getattr(tier, name))


def simulate(scenario: Scenario, *, order: str = "oldest", is_perturbed: bool = False, **options) -> Outcome:
    """Live through a scenario; raises when a law is broken.

    Args:
      order: in which the pool hands out free pages: oldest, newest or random.
      is_perturbed: preempt at random and change the chunk size from step to step, for the first hundred steps.
      options: policy and ageing_steps of the scheduler; rightness, the share of proposed tokens that are those to come.
    """
    return Simulation(scenario, order=order, is_perturbed=is_perturbed, **options).run()
