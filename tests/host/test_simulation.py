"""The scheduler as a whole: 20,000 requests on a fake device, each equal to its isolated run, and the laws one by one.

The laws that hold at every step (progress, order, limits, invariants, no event after the end) are asserted in simulation.py.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
from fake_runner import FakeRunner, isolated, watched
from simulation import Ask, Scenario, output_of, random_scenario, simulate

from jaxpaged.host.pages import PagePool
from jaxpaged.host.plan import Limits
from jaxpaged.host.prefix_cache import PrefixCache
from jaxpaged.host.request import FinishReason, Request, RequestError, SamplingParams
from jaxpaged.host.scheduler import Scheduler

REQUESTS_PER_SCENARIO = 20
SCENARIOS_PER_TEST = 40


def seeds(first: int, count: int) -> range:
    return range(first, first + count)


@pytest.mark.parametrize("first", range(0, 800, SCENARIOS_PER_TEST))  # 16,000 requests
def test_every_request_equals_its_isolated_run(first: int) -> None:
    for seed in seeds(first, SCENARIOS_PER_TEST):
        simulate(random_scenario(seed, num_requests=REQUESTS_PER_SCENARIO))


@pytest.mark.parametrize("first", range(10_000, 10_200, SCENARIOS_PER_TEST))  # 4,000 requests
def test_every_request_equals_its_isolated_run_through_the_bridge(first: int) -> None:
    for seed in seeds(first, SCENARIOS_PER_TEST):
        simulate(random_scenario(seed, num_requests=REQUESTS_PER_SCENARIO, is_padded=True))


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("order", ["newest", "random"])
def test_the_order_of_free_pages_does_not_matter(order: str, is_padded: bool) -> None:
    for seed in seeds(20_000, 20 if is_padded else 60):
        scenario = random_scenario(seed, is_padded=is_padded)
        assert simulate(scenario, order=order).outputs == simulate(scenario).outputs


@pytest.mark.parametrize("is_padded", [False, True])
def test_forced_preemptions_and_changing_chunks_do_not_matter(is_padded: bool) -> None:
    num_preemptions = 0
    for seed in seeds(30_000, 20 if is_padded else 60):
        # Faults come at fixed steps, and a perturbed run takes other steps.
        scenario = random_scenario(seed, is_padded=is_padded, with_faults=False)
        outcome = simulate(scenario, is_perturbed=True, order="random")
        assert outcome.outputs == simulate(scenario).outputs
        num_preemptions += outcome.num_preemptions
    assert num_preemptions > 100


@pytest.mark.parametrize("first", range(70_000, 70_200, SCENARIOS_PER_TEST))  # 4,000 requests
def test_every_request_equals_its_isolated_run_with_shared_prefixes(first: int) -> None:
    num_hit_tokens = num_evictions = 0
    for seed in seeds(first, SCENARIOS_PER_TEST):
        outcome = simulate(random_scenario(seed, num_requests=REQUESTS_PER_SCENARIO, shares=True), order="random")
        num_hit_tokens += outcome.num_hit_tokens
        num_evictions += outcome.num_evictions
    assert num_hit_tokens > 500 and num_evictions > 200


def test_shared_prefixes_through_the_bridge_with_forced_preemptions_and_resets() -> None:
    for seed in seeds(80_000, 40):
        scenario = random_scenario(seed, is_padded=seed % 2 == 0, with_faults=False, shares=True)
        perturbed = simulate(scenario, is_perturbed=True, order="random")
        assert perturbed.outputs == simulate(scenario).outputs
        assert perturbed.outputs == simulate(dataclasses.replace(scenario, has_cache=False)).outputs


@pytest.mark.parametrize("first", range(90_000, 90_160, SCENARIOS_PER_TEST))  # 3,200 requests, 11,000 outputs
def test_every_output_of_a_forked_request_equals_its_isolated_run(first: int) -> None:
    num_copies = 0
    for seed in seeds(first, SCENARIOS_PER_TEST):
        scenario = random_scenario(
            seed, num_requests=REQUESTS_PER_SCENARIO, is_padded=seed % 4 == 0, shares=seed % 2 == 0, forks=True
        )
        num_copies += simulate(scenario, order="random").num_copies
    assert num_copies > 200


def test_forks_with_forced_preemptions_do_not_matter() -> None:
    for seed in seeds(95_000, 40):
        scenario = random_scenario(seed, is_padded=seed % 4 == 0, with_faults=False, shares=seed % 2 == 0, forks=True)
        assert simulate(scenario, is_perturbed=True, order="random").outputs == simulate(scenario).outputs


@pytest.mark.parametrize("first", range(97_000, 97_120, SCENARIOS_PER_TEST))  # 2,400 requests
def test_pages_behind_a_window_are_given_back_and_not_missed(first: int) -> None:
    num_hit_tokens = num_copies = 0
    for seed in seeds(first, SCENARIOS_PER_TEST):
        kinds = {"shares": seed % 2 == 0, "forks": seed % 3 == 0}
        scenario = random_scenario(seed, num_requests=REQUESTS_PER_SCENARIO, has_window=True, **kinds)
        outcome = simulate(scenario, order="random")
        num_hit_tokens += outcome.num_hit_tokens
        num_copies += outcome.num_copies
    assert num_hit_tokens > 100 and num_copies > 50


@pytest.mark.parametrize("has_cache", [False, True])
def test_a_sequence_owns_no_more_than_its_window(has_cache: bool) -> None:
    limits = Limits(page_size=4, max_num_seqs=2, max_num_batched_tokens=8, tile=4, max_prefill_tiles=2, sliding_window=10)
    pool = PagePool(40, PrefixCache(4) if has_cache else None)
    scheduler, most_used = Scheduler(pool, limits), 0
    request = Request.checked("a", [1] * 30, SamplingParams(max_tokens=100), vocab_size=9, max_model_len=200, max_pool_len=39 * 4)
    scheduler.add(request)
    while (plan := scheduler.plan()) is not None:
        scheduler.check()
        (chunk,) = plan.chunks()
        first = max(0, chunk.start + 1 - 10) // 4  # the page of the first token that the chunk's first one sees
        assert all(chunk.sequence.pages[first:]) and len(chunk.sequence.pages) == -(-chunk.end // 4)
        if not has_cache or len(chunk.sequence.output_token_ids) > 1:
            assert not any(chunk.sequence.pages[:first]) and pool.num_used <= -(-(10 + chunk.num_tokens) // 4) + 1
            most_used = max(most_used, pool.num_used)
        scheduler.commit(plan, [3] * len(plan.sampling()), [True] * len(plan.sampling()))
    assert pool.num_used == 0 and 3 <= most_used <= 6
    assert pool.num_cached == (32 if has_cache else 0)  # what was given back is still known: 129 tokens are 32 full pages


def test_the_scenarios_reach_what_they_are_for() -> None:
    reasons: Counter = Counter()
    num_preemptions = most = 0
    for seed in seeds(40_000, 60):
        outcome = simulate(random_scenario(seed))
        reasons += outcome.reasons
        num_preemptions += outcome.num_preemptions
        most = max(most, outcome.max_preemptions)
    assert set(reasons) == {"stop", "length", "abort", "error"} and min(reasons.values()) >= 20
    assert num_preemptions >= 50 and most >= 2


def test_a_crowd_of_four_hundred() -> None:
    outcome = simulate(random_scenario(50_003, num_requests=400))
    assert sum(outcome.reasons.values()) == 400


def test_the_same_scenario_twice_is_the_same() -> None:
    assert simulate(random_scenario(7)) == simulate(random_scenario(7))


# --- overload: nobody starves, nobody is thrown out for ever (R06) ---


@pytest.mark.parametrize("threshold", [0, 1, 7])
@pytest.mark.parametrize("page_size", [1, 2, 16])
def test_overload_makes_progress(page_size: int, threshold: int) -> None:
    """All come at once, each could fill the pool alone. `Simulation` bounds the steps; here the preemptions of each."""
    limits = dict(page_size=page_size, max_num_seqs=16, max_num_batched_tokens=64, tile=4, max_prefill_tiles=16)
    for num_pages in (2, 3, 5, 9):
        max_pool_len = (num_pages - 1) * page_size
        asks = [
            Ask(f"r{n}", [n * 1000 + i for i in range(1 + n % max_pool_len)], plain_params(), (), 1, arrival=0) for n in range(24)
        ]
        scenario = Scenario(0, num_pages, 256, {**limits, "long_prefill_token_threshold": threshold}, asks, is_padded=False)
        outcome = simulate(scenario)
        assert outcome.reasons == {"length": 24}
        assert outcome.max_preemptions <= 8


@pytest.mark.parametrize("page_size", [1, 2, 16])
def test_half_done_prompts_do_not_preempt_each_other(page_size: int) -> None:
    """With one new token each nothing grows after its prompt, so every prompt token is computed once."""
    for seed in seeds(60_000, 30):
        random_one = random_scenario(seed, with_faults=False)
        asks = [dataclasses.replace(ask, params=plain_params(1)) for ask in random_one.asks]
        limits = {**random_one.limits, "page_size": page_size, "long_prefill_token_threshold": 1 + seed % 7}
        num_pages = 2 + max(len(ask.prompt) for ask in asks) * (1 + seed % 3) // page_size
        outcome = simulate(dataclasses.replace(random_one, asks=asks, limits=limits, num_pages=num_pages))
        assert outcome.num_preemptions == 0
        assert outcome.num_tokens == sum(len(ask.prompt) for ask in asks)


def plain_params(max_tokens: int | None = None) -> dict:
    return {"max_tokens": max_tokens, "ignore_eos": False, "stop_token_ids": ()}


# --- requests that fit just so, or not at all (R05) ---


@pytest.mark.parametrize("page_size", [1, 2, 16])
def test_every_pool_and_every_prompt_around_its_limit_comes_to_an_end(page_size: int) -> None:
    limits = dict(page_size=page_size, max_num_seqs=4, max_num_batched_tokens=32, tile=8, max_prefill_tiles=4)
    for num_pages in range(2, 41):
        max_pool_len = (num_pages - 1) * page_size
        for max_model_len in sorted({2, max_pool_len, max_pool_len + 1, max_pool_len + 2, max_pool_len + 40} - {1}):
            longest = min(max_pool_len, max_model_len - 1)
            around = {*range(max(1, longest - 2), longest + 3), max(1, longest - page_size), longest + page_size}
            for num_prompt in sorted(around):
                ask = Ask("alone", list(range(num_prompt)), plain_params(), (), 1, arrival=0)
                scenario = Scenario(0, num_pages, max_model_len, limits, [ask], is_padded=False)
                if num_prompt > longest:
                    with pytest.raises(RequestError, match=r"tokens, the (limit is|whole page pool holds)"):
                        simulate(scenario)
                    continue
                outcome = simulate(scenario)
                assert outcome.reasons == {"length": 1} and outcome.num_preemptions == 0
                assert len(outcome.outputs["alone"]) == min(max_model_len, max_pool_len + 1) - num_prompt >= 1


# --- one law, one small case ---


class Bench:
    """A scheduler and a fake runner, stepped by hand."""

    def __init__(self, num_pages: int = 9, page_size: int = 4, *, fails=lambda request_id, num_output: False, **limits: int):
        self.runner = FakeRunner(num_pages, page_size, fails)
        self.pool = watched(PagePool, num_pages, on_free=self.runner.poison)
        options = dict(max_num_seqs=4, max_num_batched_tokens=64, tile=4, max_prefill_tiles=16) | limits
        self.scheduler = Scheduler(self.pool, Limits(page_size=page_size, **options))

    def add(self, request_id: str, num_prompt: int, max_tokens: int | None = None) -> Request:
        params = SamplingParams(max_tokens=max_tokens)
        prompt = [len(request_id) * 100 + ord(request_id[0]) + i for i in range(num_prompt)]
        max_pool_len = self.pool.num_usable * self.scheduler.limits.page_size
        request = Request.checked(request_id, prompt, params, vocab_size=50_000, max_model_len=64, max_pool_len=max_pool_len)
        self.scheduler.add(request)
        return request

    def step(self, in_flight=lambda: None):
        plan = self.scheduler.plan()
        assert plan is not None
        result = self.runner.run(plan)
        in_flight()
        events = self.scheduler.commit(plan, *result)
        self.scheduler.check()
        return events

    def drain(self) -> dict[str, list[int]]:
        outputs: dict[str, list[int]] = {}
        while self.scheduler.has_unfinished:
            for event in self.step():
                outputs.setdefault(output_of(event), []).append(event.token_id)
        assert self.pool.num_used == 0
        return outputs


def test_nothing_to_do_plans_nothing() -> None:
    bench = Bench()
    assert bench.scheduler.plan() is None and not bench.scheduler.has_unfinished
    assert bench.scheduler.abort("unknown") == []


def test_a_preempted_sequence_ends_with_the_same_tokens() -> None:
    bench = Bench(num_pages=6)  # 20 tokens: enough for either alone, not for both
    requests = [bench.add("old", 7, 12), bench.add("young", 7, 12)]
    outputs = bench.drain()
    assert bench.scheduler.num_preemptions >= 1
    for request in requests:
        assert outputs[request.request_id] == isolated(request.prompt_token_ids, request.max_len)


def test_preemption_takes_the_youngest_and_keeps_its_place_in_the_queue() -> None:
    bench = Bench(num_pages=4, page_size=4, max_num_seqs=3)
    for name in ("a", "bb", "ccc", "dddd"):
        bench.add(name, 4, 8)
    bench.step()  # three prompts of one page each fill the pool
    assert [s.request.request_id for s in bench.scheduler.running] == ["a", "bb", "ccc"]
    bench.step()  # each now needs a second page
    assert [s.request.request_id for s in bench.scheduler.running] == ["a"]
    assert [s.request.request_id for s in bench.scheduler.waiting] == ["bb", "ccc", "dddd"]
    assert bench.scheduler.num_preemptions == 2


def test_admission_is_first_come_first_served_even_when_a_later_one_would_fit() -> None:
    bench = Bench(num_pages=6, page_size=4)
    bench.add("first", 12, 2)
    bench.add("too big for now", 12, 2)
    bench.add("tiny", 1, 2)
    bench.step()
    assert [s.request.request_id for s in bench.scheduler.running] == ["first"]
    assert len(bench.drain()) == 3


@pytest.mark.parametrize(
    "when", ["waiting", "prefilling", "decoding", "in flight, prefilling", "in flight, decoding", "preempted"]
)
def test_abort_frees_everything_and_is_the_last_event(when: str) -> None:
    bench = Bench(num_pages=6, long_prefill_token_threshold=4)
    other = bench.add("other", 6, 12)
    events = []
    if when == "waiting":
        bench.add("victim", 8)
        events.extend(bench.scheduler.abort("victim"))
    else:
        bench.add("victim", 4 if when.endswith("decoding") else 8)
        bench.step()
        if when.startswith("in flight"):
            held = next(s for s in bench.scheduler.running if s.request.request_id == "victim")
            after = bench.step(in_flight=lambda: events.extend(bench.scheduler.abort("victim")))
            assert all(event.request_id == "other" for event in after)
            assert held.pages == [] and held.finish_reason is FinishReason.ABORT
        else:
            if when == "preempted":
                bench.scheduler._preempt(bench.scheduler.running[-1])
            events.extend(bench.scheduler.abort("victim"))
    assert [(event.request_id, event.token_id, event.finish_reason) for event in events] == [("victim", None, FinishReason.ABORT)]
    assert bench.pool.num_used == sum(len(s.pages) for s in bench.scheduler.running)
    bench.scheduler.check()
    assert bench.scheduler.abort("victim") == []
    rest = bench.drain()
    assert "victim" not in rest
    assert isolated(other.prompt_token_ids, other.max_len)[-len(rest["other"]) :] == rest["other"]


def test_an_aborted_id_may_come_again_while_its_old_step_is_in_flight() -> None:
    bench = Bench()
    bench.add("a", 3, 4)
    bench.step()

    def again() -> None:
        bench.scheduler.abort("a")
        bench.add("a", 5, 3)

    assert bench.step(in_flight=again) == []  # the old one's token is not the new one's
    request = bench.scheduler.waiting[0].request
    assert bench.drain()["a"] == isolated(request.prompt_token_ids, request.max_len)


def test_a_duplicate_id_is_refused_and_takes_nothing() -> None:
    bench = Bench()
    request = bench.add("a", 3, 2)
    with pytest.raises(RequestError, match="request_id: 'a' is already in use by an unfinished request"):
        bench.scheduler.add(dataclasses.replace(request))
    assert len(bench.scheduler.waiting) == 1
    bench.drain()
    bench.scheduler.add(request)  # over, so free again
    assert bench.drain()["a"] == isolated(request.prompt_token_ids, request.max_len)


def test_a_row_that_is_not_finite_ends_its_own_request_only() -> None:
    bench = Bench(num_pages=32, fails=lambda request_id, num_output: request_id == "sick" and num_output == 2)
    well = [bench.add("well", 5, 6), bench.add("also well", 3, 6)]
    bench.add("sick", 4, 6)
    tokens: dict[str, list[int]] = {}
    endings = {}
    while bench.scheduler.has_unfinished:
        for event in bench.step():
            tokens.setdefault(event.request_id, []).append(event.token_id)
            endings[event.request_id] = event.finish_reason
    assert endings == {"well": "length", "also well": "length", "sick": "error"}
    assert len(tokens["sick"]) == 3 and tokens["sick"][-1] is None
    for request in well:
        assert tokens[request.request_id] == isolated(request.prompt_token_ids, request.max_len)
    assert bench.pool.num_used == 0


def test_commit_refuses_a_result_of_the_wrong_size() -> None:
    bench = Bench()
    bench.add("a", 3, 4)
    plan = bench.scheduler.plan()
    assert plan is not None
    with pytest.raises(ValueError):
        bench.scheduler.commit(plan, [1, 2], [True, True])


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (lambda s: setattr(s.running[0], "num_computed", -1), "num_computed -1"),
        (lambda s: setattr(s.running[0], "num_computed", 99), "num_computed 99"),
        (lambda s: s.running[0].pages.pop(), "owners"),
        (lambda s: s.waiting.push(s.running[0]), "neither running nor waiting"),
        (lambda s: s.pool.free(s.running.pop().pages), "neither running nor waiting"),
        (lambda s: setattr(s, "limits", dataclasses.replace(s.limits, max_num_seqs=0)), "max_num_seqs is 0"),
    ],
)
def test_check_sees_a_corruption(corrupt, message: str) -> None:
    bench = Bench()
    bench.add("a", 5, 4)
    bench.step()
    bench.scheduler.check()
    corrupt(bench.scheduler)
    with pytest.raises(RuntimeError, match=message):
        bench.scheduler.check()


@pytest.mark.parametrize("seed", range(40))
def test_drafts_of_any_rightness_change_no_output(seed: int) -> None:
    shares, forks, tiers = seed % 2 == 1, seed % 5 == 1, seed % 3 == 1
    options = {"is_padded": seed % 4 == 0, "has_window": seed % 4 and seed % 7 == 1}
    scenario = random_scenario(seed, shares=shares, forks=forks, tiers=tiers, **options)
    rightness = (0.0, 0.5, 0.9, 1.0)[seed % 4]
    given = {"is_perturbed": seed % 6 == 5, "policy": ("fcfs", "lifo")[seed % 8 == 7]}
    outcome = simulate(scenario, order="random", rightness=rightness, **given)
    assert outcome.num_accepted <= outcome.num_drafts and (outcome.num_accepted or rightness < 1.0 or not outcome.num_drafts)
