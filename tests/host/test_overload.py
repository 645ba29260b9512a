"""Every policy under overload (R06, R07): all requests end, none is preempted too often, none is forgotten, tenants share.

That every step computes a token, that no output differs from its isolated run and that an aged request is passed by nobody who
came later is asserted in simulation.py, at every step.
"""

from __future__ import annotations

import itertools
import random

import pytest
from overload import overload, staircase
from simulation import Simulation, random_scenario, simulate

from jaxpaged.config import SCHEDULING_POLICIES
from jaxpaged.host import scheduler as scheduler_module
from jaxpaged.host.pages import PagePool
from jaxpaged.host.plan import Limits
from jaxpaged.host.policies import OUTPUT_COST, POLICIES, PROMPT_COST
from jaxpaged.host.request import Request, SamplingParams, Sequence
from jaxpaged.host.scheduler import MAX_PREEMPTIONS, Scheduler
from jaxpaged.host.waiting import AGEING_STEPS, WaitingLine


def chaos(candidate, situation) -> float:
    """Another order at every step."""
    return random.Random(f"{candidate.request_id} {situation.step}").random()


def spite(candidate, situation) -> tuple[int, int]:
    """Who was set back most and is longest goes first, so that those who need most pages meet."""
    return -candidate.num_preemptions, -candidate.num_tokens


EVERY = [*POLICIES, chaos, spite]


def live(policy, seeds: range, num_requests: int = 12) -> int:
    most = 0
    for seed in seeds:
        rng = random.Random(seed)
        options = {"ageing_steps": rng.choice((0, 3, 30, AGEING_STEPS)), "order": rng.choice(("oldest", "newest", "random"))}
        most = max(most, simulate(overload(seed, num_requests=num_requests), policy=policy, **options).max_preemptions)
    return most


@pytest.mark.parametrize("policy", EVERY)
def test_overload_comes_to_an_end(policy) -> None:
    assert 3 <= live(policy, range(60)) <= MAX_PREEMPTIONS


@pytest.mark.parametrize("policy", EVERY)
@pytest.mark.parametrize("most", [1, 2])
def test_the_guard_holds_wherever_its_limit_lies(policy, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `fcfs` the oldest still computes a token in every step: those that give way no more never lack what it needs."""
    monkeypatch.setattr(scheduler_module, "MAX_PREEMPTIONS", most)
    assert live(policy, range(1000, 1030)) == most


@pytest.mark.slow
@pytest.mark.parametrize("policy", EVERY)
def test_ten_thousand_overloads_come_to_an_end(policy) -> None:
    seeds = range(10_000, 10_000 + -(-10_000 // len(EVERY)))
    assert live(policy, seeds, num_requests=20) <= MAX_PREEMPTIONS


@pytest.mark.parametrize("policy", ["fcfs", "sjf"])
def test_without_the_guard_somebody_is_thrown_out_more_often(policy, monkeypatch: pytest.MonkeyPatch) -> None:
    assert simulate(staircase(2, num_requests=110, num_pages=250), policy=policy).max_preemptions == MAX_PREEMPTIONS
    monkeypatch.setattr(scheduler_module, "MAX_PREEMPTIONS", 1000)
    assert simulate(staircase(2, num_requests=110, num_pages=250), policy=policy).max_preemptions > MAX_PREEMPTIONS


@pytest.mark.parametrize("policy", EVERY)
def test_a_policy_changes_no_output(policy) -> None:
    """Aborts, errors, shared prefixes, forks, forced preemptions: each output is that of the isolated run."""
    for seed in range(90_000, 90_016):
        shares, forks = seed % 2 == 0, seed % 3 == 0
        scenario = random_scenario(
            seed, shares=shares, forks=forks, with_faults=not shares and not forks, is_padded=seed % 4 == 1
        )
        simulate(scenario, policy=policy, is_perturbed=shares, ageing_steps=seed % 40, order="random")


# --- starvation ---


class Service:
    """A scheduler that is fed from outside for as long as one likes; every request's outputs are one token repeated."""

    def __init__(self, policy: str, *, ageing_steps: int = AGEING_STEPS, num_pages: int = 65, **limits: int):
        options = dict(page_size=4, max_num_seqs=4, max_num_batched_tokens=16, tile=4, max_prefill_tiles=4) | limits
        self.scheduler = Scheduler(PagePool(num_pages), Limits(**options), policy=POLICIES[policy], ageing_steps=ageing_steps)
        self.advanced: dict[str, list[int]] = {}  # request -> the steps in which tokens of it were computed
        self.tokens_of: dict[str, float] = {}  # tenant -> what it has cost
        self.num_steps = 0
        self.num_asked = 0

    def ask(self, num_prompt: int, max_tokens: int, **options) -> str:
        request_id = f"r{self.num_asked}"
        self.num_asked += 1
        limits = {"vocab_size": 10, "max_model_len": 1000, "max_pool_len": self.scheduler.pool.num_usable * 4}
        self.scheduler.add(
            Request.checked(request_id, [1] * num_prompt, SamplingParams(max_tokens=max_tokens), **limits, **options)
        )
        return request_id

    def step(self) -> None:
        plan = self.scheduler.plan()
        assert plan is not None
        for chunk in plan.chunks():
            request = chunk.sequence.request
            self.advanced.setdefault(request.request_id, []).append(self.num_steps)
            fresh = max(0, min(chunk.end, chunk.sequence.num_prompt) - chunk.start)
            cost = PROMPT_COST * fresh + OUTPUT_COST * chunk.samples
            self.tokens_of[request.tenant] = self.tokens_of.get(request.tenant, 0) + cost
        self.scheduler.commit(plan, [2] * len(plan.sampling()), [True] * len(plan.sampling()))
        self.num_steps += 1

    def longest_gap(self, request_id: str) -> int:
        """Steps between two in which a request advanced, its arrival at step 0 and its end included."""
        steps = [0, *self.advanced.get(request_id, ())]
        if request_id in self.scheduler:
            steps.append(self.num_steps)
        return max(after - before for before, after in itertools.pairwise(steps))


@pytest.mark.parametrize("seed", range(6))
def test_a_low_priority_advances_while_high_ones_never_stop_coming(seed: int) -> None:
    """The bound of R07 with a short wait: `ageing_steps`, and what was admitted before has to end."""
    rng = random.Random(seed)
    service = Service("priority", ageing_steps=100, num_pages=rng.choice((9, 17, 65)), max_num_seqs=rng.choice((1, 4)))
    low = service.ask(rng.randint(1, 12), 20, priority=5)
    longest = 0
    while low in service.scheduler:
        while len(service.scheduler.waiting) < 8:
            num_prompt, max_tokens = rng.randint(1, 12), rng.randint(1, 20)
            longest = max(longest, num_prompt + max_tokens)
            service.ask(num_prompt, max_tokens, priority=rng.randint(-5, 4))
        service.step()
    assert 100 <= service.longest_gap(low) <= 100 + 2 * longest


def test_by_default_a_low_priority_advances_within_ten_thousand_steps() -> None:
    service = Service("priority", max_num_seqs=1)
    low = service.ask(2, 2, priority=1)
    while low in service.scheduler:
        service.ask(1, 8, priority=0)
        while len(service.scheduler.waiting) > 2:
            service.step()
    assert AGEING_STEPS <= service.longest_gap(low) < 10_000


@pytest.mark.parametrize("policy", ["lifo", "priority", "sjf"])
def test_without_ageing_the_same_one_would_starve(policy: str) -> None:
    service = Service(policy, ageing_steps=2**30, max_num_seqs=2)
    first = service.ask(12, 50, priority=1)
    for _ in range(3000):
        service.ask(1, 4)
        service.ask(1, 4)
        service.step()
    assert service.longest_gap(first) == 3000


def test_a_long_prompt_that_comes_first_does_not_stop_what_decodes() -> None:
    service = Service("priority", num_pages=200)
    slow = service.ask(4, 60, priority=9)
    for _ in range(3):
        service.step()
    service.ask(400, 1, priority=0)
    for _ in range(30):
        service.step()
    assert service.longest_gap(slow) == 1


# --- what each policy is for ---


def order_of_admission(policy: str, asks: list[dict]) -> list[int]:
    service = Service(policy, max_num_seqs=1)
    names = [service.ask(**ask) for ask in asks]
    while service.scheduler.has_unfinished:
        service.step()
    return sorted(range(len(names)), key=lambda index: service.advanced[names[index]][0])


def test_each_policy_admits_in_its_order() -> None:
    asks = [
        dict(num_prompt=9, max_tokens=9, priority=2, tenant="a"),
        dict(num_prompt=2, max_tokens=9, priority=0, tenant="a"),
        dict(num_prompt=2, max_tokens=2, priority=1, tenant="a"),
        dict(num_prompt=5, max_tokens=2, priority=0, tenant="b"),
    ]
    assert order_of_admission("fcfs", asks) == [0, 1, 2, 3]
    assert order_of_admission("lifo", asks) == [3, 2, 1, 0]
    assert order_of_admission("priority", asks) == [1, 3, 2, 0]
    assert order_of_admission("sjf", asks) == [2, 3, 1, 0]
    assert order_of_admission("fair_share", asks) == [0, 3, 1, 2]  # b costs 5 + 4, a has cost 9 + 18


def test_high_priority_does_not_give_way_to_low() -> None:
    service = Service("priority", num_pages=9)  # 32 places
    low = service.ask(4, 24, priority=1)
    service.step()
    high = service.ask(4, 24, priority=0)
    while high in service.scheduler:
        service.step()
    assert low in service.scheduler and service.scheduler.num_preemptions == 1
    assert service.longest_gap(high) <= 2


def test_two_tenants_that_always_wait_are_served_alike() -> None:
    """Theorem 4.4 of the paper: never further apart than twice the larger of one prompt and all that can run at once."""
    service = Service("fair_share", num_pages=65)
    rng = random.Random(0)
    widest = 0.0
    for _ in range(3000):
        for tenant, most in (("many", 40), ("few", 2)):
            while sum(s.request.tenant == tenant for s in service.scheduler.waiting) < most:
                service.ask(rng.randint(1, 30), rng.randint(1, 30), tenant=tenant)
        service.step()
        widest = max(widest, abs(service.tokens_of.get("many", 0) - service.tokens_of.get("few", 0)))
    assert service.scheduler.num_preemptions == 0
    assert widest <= 2 * max(PROMPT_COST * 30, OUTPUT_COST * 4 * 60)
    assert min(service.tokens_of.values()) > 10_000


def test_by_arrival_the_tenant_that_sends_most_gets_most() -> None:
    service = Service("fcfs")
    for _ in range(400):
        for tenant, count in (("many", 4), ("few", 1)):
            for _ in range(count):
                service.ask(8, 8, tenant=tenant)
        service.step()
    assert service.tokens_of["many"] > 3 * service.tokens_of["few"]


# --- batch_merge_window, max_num_partial_prefills ---


def test_a_window_merges_prompts_that_come_close_together() -> None:
    def num_prefill_steps(window: int) -> int:
        service, found = Service("fcfs", batch_merge_window=window, max_num_seqs=32, num_pages=200), 0
        service.ask(1, 200)  # something runs all the time
        service.step()
        for step in range(48):
            if step % 2 == 0:
                service.ask(2, 4)
            before = len(service.scheduler.waiting)
            service.step()
            found += len(service.scheduler.waiting) < before
        return found

    counts = [num_prefill_steps(window) for window in (0, 1, 3, 5)]
    assert counts == [24, 24, 12, 8]


def test_a_window_holds_nobody_when_nothing_runs_or_a_step_can_be_filled() -> None:
    service = Service("fcfs", batch_merge_window=50)
    service.ask(2, 20)
    service.step()  # alone: at once
    assert len(service.scheduler.running) == 1
    service.ask(2, 4)
    service.step()
    assert len(service.scheduler.waiting) == 1
    service.ask(14, 4)  # with the other, more than a step's 16 tokens less the one that decodes
    service.step()
    assert len(service.scheduler.waiting) == 0


@pytest.mark.parametrize("most", [1, 2, 3])
def test_prompts_in_progress_are_no_more_than_allowed(most: int) -> None:
    service = Service("fcfs", max_num_partial_prefills=most, long_prefill_token_threshold=2, num_pages=200)
    for _ in range(6):
        service.ask(20, 2)
    seen = set()
    while service.scheduler.has_unfinished:
        service.step()
        seen.add(sum(sequence.num_uncomputed > 1 for sequence in service.scheduler.running))
    assert max(seen) == most


# --- the line itself ---


def line_of(count: int, **options) -> tuple[WaitingLine, list[Sequence]]:
    line = WaitingLine(**options)
    request = Request.checked("x", [1], SamplingParams(), vocab_size=9, max_model_len=9, max_pool_len=9)
    sequences = [Sequence.first(request, number) for number in range(count)]
    for sequence in sequences:
        line.push(sequence)
    return line, sequences


def test_who_has_waited_longest_moves_ahead_once_and_stays_there() -> None:
    line, sequences = line_of(3, policy=POLICIES["lifo"], ageing_steps=5)
    assert [sequence.number for sequence in line] == [2, 1, 0]
    line.step = 5
    line.refresh()
    assert [sequence.number for sequence in line] == [2, 1, 0]
    line.step = 6
    line.refresh()
    assert [sequence.number for sequence in line] == [0, 1, 2]
    line.remove(sequences[1])
    line.push(sequences[1])  # preempted
    assert [sequence.number for sequence in line] == [0, 1, 2]
    line.check()


def test_the_line_forgets_who_has_left() -> None:
    line, sequences = line_of(1, policy=POLICIES["priority"], ageing_steps=2**30)
    for _ in range(10_000):
        line.remove(sequences[0])
        line.push(sequences[0])
    assert len(line._by_age) < 100 and len(line) == 1
    assert any(candidate is line._candidates[sequences[0]] for candidate, _ in line._by_age)


def test_a_policy_that_fails_changes_nothing() -> None:
    def broken(candidate, situation):
        raise ZeroDivisionError

    service = Scheduler(PagePool(9), Limits(4, 4, 16, 4, 4), policy=broken)
    request = Request.checked("a", [1], SamplingParams(), vocab_size=9, max_model_len=9, max_pool_len=32)
    with pytest.raises(ZeroDivisionError):
        service.add(request)
    assert not service.has_unfinished and len(service.waiting) == 0
    service.check()


def test_the_line_sees_that_it_is_out_of_order() -> None:
    line, sequences = line_of(3)
    sequences[0].rank = (2, 0, 0, 0)
    with pytest.raises(RuntimeError, match="not in the order"):
        line.check()
    with pytest.raises(ValueError, match="does not wait"):
        line.remove(sequences[0])


def test_config_and_policies_name_the_same() -> None:
    assert tuple(POLICIES) == SCHEDULING_POLICIES


def test_a_simulation_of_the_default_is_first_come_first_served() -> None:
    assert Simulation(overload(1)).scheduler.waiting.policy is POLICIES["fcfs"]
