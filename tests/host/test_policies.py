"""The laws of the policies, one by one, and of the counters that share between tenants."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpaged.config import ConfigError
from jaxpaged.host import policies
from jaxpaged.host.policies import OUTPUT_COST, POLICIES, STATIC, Candidate, Policy, Situation, TenantCounters, find_policy

TENANTS = ("", "a", "b", "c")


def never() -> int:
    raise AssertionError("asked for the cached prefix")


@st.composite
def candidates(draw, cached: bool = True) -> Candidate:
    num_prompt = draw(st.integers(1, 50))
    num_tokens = num_prompt + draw(st.integers(0, 20))
    num_cached = draw(st.integers(0, num_tokens - 1))
    number = draw(st.integers(0, 1000))
    return Candidate(
        request_id=f"r{number}",
        number=number,
        since_step=draw(st.integers(0, 100)),
        num_prompt=num_prompt,
        num_tokens=num_tokens,
        max_len=num_tokens + draw(st.integers(1, 50)),
        priority=draw(st.integers(-3, 3)),
        tenant=draw(st.sampled_from(TENANTS)),
        num_preemptions=draw(st.integers(0, 8)),
        cached_len=(lambda: num_cached) if cached else never,
    )


situations = st.builds(
    Situation, st.integers(100, 10**6), st.dictionaries(st.sampled_from(TENANTS), st.integers(0, 10**6).map(float))
)
lines = st.lists(candidates(), min_size=1, max_size=12, unique_by=lambda candidate: candidate.number)


def ordered(policy: Policy, line: list[Candidate], situation: Situation) -> list[Candidate]:
    """As the waiting line orders: by key, then by arrival."""
    return sorted(line, key=lambda candidate: (policy(candidate, situation), candidate.number))


@given(lines, situations)
def test_fcfs_and_lifo_are_the_order_of_arrival_and_its_reverse(line, situation) -> None:
    first = ordered(policies.fcfs, line, situation)
    assert [candidate.number for candidate in first] == sorted(candidate.number for candidate in line)
    assert ordered(policies.lifo, line, situation) == first[::-1]


@given(lines, situations)
def test_priority_puts_lower_values_first_and_is_fair_within_a_value(line, situation) -> None:
    order = [(candidate.priority, candidate.number) for candidate in ordered(policies.priority, line, situation)]
    assert order == sorted(order)


@given(lines, situations)
def test_prefix_puts_longer_cached_prefixes_first(line, situation) -> None:
    order = [(-candidate.cached_len(), candidate.number) for candidate in ordered(policies.prefix, line, situation)]
    assert order == sorted(order)


@given(lines, situations)
def test_fair_share_puts_tenants_that_were_served_less_first(line, situation) -> None:
    order = [(situation.served.get(one.tenant, 0), one.number) for one in ordered(policies.fair_share, line, situation)]
    assert order == sorted(order)


@given(candidates(), situations, st.integers(1, 20), st.integers(1, 20))
def test_sjf_grows_with_what_is_to_be_computed_and_what_may_come(one, situation, more_prompt, more_output) -> None:
    def key(num_tokens: int, max_len: int) -> int:
        changed = Candidate(**{**vars(one), "num_tokens": num_tokens, "max_len": max_len})
        return policies.sjf(changed, situation)

    own, end = key(one.num_tokens, one.max_len), one.max_len
    assert own < key(one.num_tokens + more_prompt, end + more_prompt)  # as much to come, more to compute before
    assert own < key(one.num_tokens, end + more_output)
    assert key(one.num_tokens, end + 1) - own > key(one.num_tokens + 1, end + 1) - own > 0  # an output token is dearer


@given(candidates(cached=False), situations)
@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"prefix"}))
def test_only_prefix_asks_the_prefix_cache(name, one, situation) -> None:
    POLICIES[name](one, situation)
    with pytest.raises(AssertionError, match="asked for the cached prefix"):
        policies.prefix(one, situation)


@given(candidates(), situations, situations)
@pytest.mark.parametrize("name", sorted(policy.__name__ for policy in STATIC))
def test_the_key_of_a_static_policy_does_not_change_while_a_candidate_waits(name, one, before, after) -> None:
    assert POLICIES[name](one, before) == POLICIES[name](one, after)


def test_the_policies_that_are_not_static_do_change() -> None:
    assert {policies.fair_share, policies.prefix} == set(POLICIES.values()) - STATIC
    cached = iter((16, 32))
    one = Candidate(
        request_id="a", number=1, since_step=0, num_prompt=5, num_tokens=5, max_len=9, tenant="a", cached_len=lambda: next(cached)
    )
    assert policies.fair_share(one, Situation(1, {"a": 1.0})) < policies.fair_share(one, Situation(1, {"a": 2.0}))
    assert policies.prefix(one, Situation(1, {})) > policies.prefix(one, Situation(2, {}))


@given(lines, situations)
@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_policy_is_a_function_of_what_it_is_given(name, line, situation) -> None:
    served = dict(situation.served)
    assert ordered(POLICIES[name], line, situation) == ordered(POLICIES[name], line[::-1], situation)
    assert situation.served == served


def test_policies_are_found_by_name_and_functions_are_taken_as_they_are() -> None:
    assert [find_policy(name) for name in POLICIES] == list(POLICIES.values())

    def mine(candidate: Candidate, situation: Situation) -> tuple[int, int]:
        return candidate.num_prompt, -situation.step

    assert find_policy(mine) is mine


@pytest.mark.parametrize(
    ("name", "hint"),
    [("fair-share", "did you mean 'fair_share'"), ("priorty", "did you mean 'priority'"), ("fifo", "expected"), (3, "got 3")],
)
def test_an_unknown_policy_names_its_nearest(name, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint) as error:
        find_policy(name)
    assert str(error.value).startswith("scheduling_policy: got ") and "fcfs, lifo, priority" in str(error.value)
    assert "\n" not in str(error.value)


# --- tenants ---


class Paper:
    """Sheng et al. 2024, Algorithm 2, as it is printed: every client is remembered, the queue is a list of clients."""

    def __init__(self) -> None:
        self.cost: dict[str, float] = {}
        self.queue: list[str] = []
        self.last_left: str | None = None

    def join(self, client: str) -> None:
        self.cost.setdefault(client, 0)
        if client not in self.queue:
            if not self.queue:
                self.cost[client] = max(self.cost[client], self.cost[self.last_left] if self.last_left is not None else 0)
            else:
                self.cost[client] = max(self.cost[client], min(self.cost[other] for other in self.queue))
        self.queue.append(client)

    def leave(self, client: str) -> None:
        self.queue.remove(client)
        if client not in self.queue:
            self.last_left = client


@pytest.mark.parametrize("seed", range(20))
def test_the_counters_are_those_of_the_paper(seed: int) -> None:
    """Hundreds of tenants, so that idle ones are forgotten: no counter that decides anything may change by it."""
    rng = random.Random(seed)
    counters, paper = TenantCounters(), Paper()
    num_forgotten = 0
    busy = rng.choice((1, 3, 10))  # sequences that wait at a time, about
    for _ in range(3000):
        if rng.random() < 0.5 - 0.1 * (len(paper.queue) - busy) / busy:
            tenant = f"t{rng.choice((rng.randrange(5), rng.randrange(300)))}"
            counters.join(tenant)
            paper.join(tenant)
        elif paper.queue:
            tenant, cost = rng.choice(paper.queue), rng.randint(1, 40)
            counters.charge(tenant, cost)
            paper.cost[tenant] += cost
            if rng.random() < 0.7:
                counters.leave(tenant)
                paper.leave(tenant)
        assert {name: counters.served[name] for name in paper.queue} == {name: paper.cost[name] for name in paper.queue}
        num_forgotten = max(num_forgotten, len(paper.cost) - len(counters.served))
    assert num_forgotten > 20


def test_tenants_that_owe_nothing_are_forgotten_and_debtors_are_not() -> None:
    counters = TenantCounters()
    counters.join("stays")
    counters.join("debtor")
    counters.charge("debtor", 10**9)
    counters.leave("debtor")
    for number in range(10_000):
        counters.join(f"once {number}")
        counters.charge(f"once {number}", 1)
        counters.leave(f"once {number}")
        counters.charge("stays", 1)
    assert len(counters.served) < 100
    counters.join("debtor")
    assert counters.served["debtor"] == 10**9


def serve(counters: TenantCounters, waiting: dict[str, int], cost: int) -> str:
    """Serve one request of the tenant that `fair_share` puts first."""

    def key(tenant: str) -> tuple[float, str]:
        one = Candidate(request_id="x", number=0, since_step=0, num_prompt=1, num_tokens=1, max_len=2, tenant=tenant)
        return policies.fair_share(one, Situation(0, counters.served)), tenant

    tenant = min((tenant for tenant, count in waiting.items() if count), key=key)
    counters.charge(tenant, cost)
    counters.leave(tenant)
    waiting[tenant] -= 1
    return tenant


@pytest.mark.parametrize("seed", range(20))
def test_tenants_that_both_wait_are_served_alike_however_many_requests_each_sends(seed: int) -> None:
    """The paper's Theorem 4.4 where one request is served at a time: their costs are never further apart than one request."""
    rng = random.Random(seed)
    counters, waiting, cost_of = TenantCounters(), {"many": 0, "few": 0}, {"many": 0, "few": 0}
    dearest = OUTPUT_COST * 100
    for _ in range(2000):
        for tenant, most in (("many", 50), ("few", 2)):
            while waiting[tenant] < most:
                counters.join(tenant)
                waiting[tenant] += 1
        cost = rng.randint(1, dearest)
        cost_of[serve(counters, waiting, cost)] += cost
        assert abs(cost_of["many"] - cost_of["few"]) <= dearest
    assert min(cost_of.values()) > 1000 * dearest / 4


def test_nobody_saves_up_credit_by_staying_away() -> None:
    counters, waiting = TenantCounters(), {"there": 2, "away": 0}
    for _ in range(2):
        counters.join("there")
    for _ in range(1000):
        serve(counters, waiting, 10)
        counters.join("there")
        waiting["there"] += 1
    for _ in range(100):
        counters.join("away")
        waiting["away"] += 1
    turns = [serve(counters, waiting, 10) for _ in range(4)]
    assert sorted(turns[:2]) == sorted(turns[2:]) == ["away", "there"]
