"""The tiers below the pool: 3,000 requests whose pages come and go, each equal to its isolated run, and the laws one by one.

`make test-slow` lives through 80,000 more.

What holds at every step (slots and pins, what a slot and a file hold, limits, nothing left behind) is asserted in simulation.py.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter

import pytest
from fake_runner import FakeRunner, isolated, watched
from revisits import revisits
from simulation import random_scenario, simulate

from jaxpaged.host.pages import PagePool
from jaxpaged.host.plan import Limits, Transfers
from jaxpaged.host.preemption import SwapCosts, is_worth_keeping, swap_is_cheaper
from jaxpaged.host.prefix_cache import Held, PrefixCache
from jaxpaged.host.request import Request, SamplingParams, Sequence
from jaxpaged.host.scheduler import Scheduler
from jaxpaged.host.tiers import HostTier, TierError

NOTHING = Transfers()


def held(number: int, num_tokens: int = 4) -> Held:
    """A page like no other."""
    return Held(number.to_bytes(16, "big"), array("q", [number] * 4), num_tokens)


# --- everything at once ---


SLOW = [pytest.param(first, marks=pytest.mark.slow) for first in range(10_000, 14_000, 40)]


@pytest.mark.parametrize("first", [0, 40, 80, *SLOW])  # 2,400 requests
def test_every_request_equals_its_isolated_run(first: int) -> None:
    seen: Counter = Counter()
    for seed in range(first, first + 40):
        outcome = simulate(revisits(seed, is_padded=seed % 8 == 0, with_faults=seed % 2 == 0), order="random")
        seen.update({name: count for name, count in vars(outcome).items() if isinstance(count, int)})
    for name in ("num_preemptions", "num_saved", "num_loaded", "num_spilled", "num_fetched", "num_fetch_misses", "num_idle"):
        assert seen[name] >= 5, f"{name}: {seen[name]}, the scenarios do not reach what they are for"


def test_preemptions_resets_and_lost_steps_do_not_matter() -> None:
    for seed in range(1000, 1020):
        scenario = revisits(seed, is_padded=seed % 8 == 0)
        assert simulate(scenario, is_perturbed=True, order="random").outputs == simulate(scenario).outputs


def test_whatever_is_asked_of_whatever_machine() -> None:
    for seed in range(2000, 2010):
        options = {"shares": seed % 3 > 0, "forks": seed % 4 == 0, "is_padded": seed % 8 == 0, "with_faults": seed % 2 == 0}
        simulate(random_scenario(seed, tiers=True, **options), order="random", is_perturbed=seed % 2 == 1)


def test_keys_of_four_bits_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key nominates, the tokens decide: on every tier."""

    blake2b = hashlib.blake2b

    class Short:
        def __init__(self, data: bytes, digest_size: int):
            self.data = data

        def digest(self) -> bytes:
            return bytes(15) + bytes([blake2b(self.data, digest_size=1).digest()[0] & 15])

    monkeypatch.setattr("jaxpaged.host.prefix_cache.hashlib.blake2b", Short)
    for seed in range(3000, 3012):
        simulate(revisits(seed), order="random")


# --- one law, one small case ---


class Bench:
    """A scheduler with tiers around a fake runner, stepped by hand: fetches end when `land` says so."""

    def __init__(
        self, num_pages: int, num_slots: int, *, mode: str = "swap", is_private: bool = False, max_num_seqs: int = 4, **tier
    ):
        self.runner = FakeRunner(num_pages, 4, is_slow=False)
        self.cache = PrefixCache(4, is_private=is_private)
        self.tier = HostTier(num_slots, **tier)
        self.pool = watched(PagePool, num_pages, on_free=self.runner.poison, cache=self.cache, tier=self.tier)
        limits = Limits(page_size=4, max_num_seqs=max_num_seqs, max_num_batched_tokens=64, tile=4, max_prefill_tiles=16)
        self.scheduler = Scheduler(self.pool, limits, preemption_mode=mode)
        self.outputs: dict[str, list[int]] = {}
        self.requests: dict[str, Request] = {}

    def add(self, name: str, prompt: list[int], max_tokens: int = 1) -> None:
        options = {"vocab_size": 60_000, "max_model_len": 200, "max_pool_len": self.pool.num_usable * 4}
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        self.requests[name] = Request.checked(name, prompt, params, **options)
        self.outputs[name] = []
        self.scheduler.add(self.requests[name])

    def step(self):
        """The plan, run and committed."""
        plan = self.scheduler.plan()
        self.scheduler.check()
        if plan is not None:
            for event in self.scheduler.commit(plan, *self.runner.run(plan)):
                if event.token_id is not None:
                    self.outputs[event.request_id].append(event.token_id)
            self.scheduler.check()
        return plan

    def land(self) -> int:
        """All fetches in flight end."""
        ended = self.runner.fetched()
        for key, ok in ended:
            self.scheduler.fetched(key, ok)
            self.scheduler.check()
        return len(ended)

    def serve(self, name: str, prompt: list[int], max_tokens: int = 1) -> int:
        """Alone, to its end: the tokens that were computed."""
        self.add(name, prompt, max_tokens)
        num_tokens = 0
        while self.scheduler.has_unfinished:
            plan = self.step()
            num_tokens += plan.num_tokens if plan is not None else 0
            self.land()
        self.judge(name)
        return num_tokens

    def judge(self, name: str) -> None:
        request = self.requests[name]
        assert self.outputs[name] == isolated(request.prompt_token_ids, request.max_len), name

    @property
    def running(self) -> list[str]:
        return [sequence.request.request_id for sequence in self.scheduler.running]


def prompt(number: int, length: int = 17) -> list[int]:
    """Four pages and a token, unless said otherwise."""
    return [1000 * number + place for place in range(length)]


def test_an_evicted_prefix_comes_back_from_host_memory() -> None:
    bench = Bench(num_pages=7, num_slots=16)
    assert bench.serve("first", prompt(1)) == 17
    assert bench.serve("other", prompt(2, 21)) == 21  # takes all pages
    assert bench.tier.num_saved == 4
    assert bench.serve("again", prompt(1)) == 1
    assert bench.tier.num_loaded == 4 and bench.scheduler.recall.num_host_hit_tokens == 16
    bench.serve("other again", prompt(2, 21))
    bench.serve("third", prompt(3, 21))
    assert bench.tier.num_saved == 4 + 5, "what host memory has is not saved twice"


def test_an_evicted_prefix_comes_back_from_disk_and_others_pass_meanwhile() -> None:
    bench = Bench(num_pages=9, num_slots=4, has_disk=True)
    for number in (1, 2, 3, 4, 5):
        bench.serve(f"r{number}", prompt(number))
    bench.add("held", prompt(1))
    bench.add("small", prompt(9, 3), max_tokens=3)
    plan = bench.step()
    assert len(plan.transfers.fetches) == 4 and bench.running == ["small"]
    assert bench.step().transfers == NOTHING and bench.running == ["small"], "fetches are begun once"
    assert bench.land() == 4
    plan = bench.step()
    assert bench.scheduler.recall.num_disk_hit_tokens == 16 and bench.scheduler.recall.num_host_hit_tokens == 0
    assert len(plan.transfers.loads) == 4 and plan.num_tokens == 1 + 1
    for name in ("held", "small"):
        bench.judge(name)


def test_two_that_want_the_same_page_fetch_and_load_it_once() -> None:
    bench = Bench(num_pages=12, num_slots=8, has_disk=True)
    for number in range(1, 7):
        bench.serve(f"r{number}", prompt(number))
    assert all(bench.tier.is_on_disk(bench.cache.wanted(sequence_of(1), index)) for index in range(4))
    bench.add("a", prompt(1))
    bench.add("b", prompt(1))
    plan = bench.step()
    assert plan.num_tokens == 0 and len(plan.transfers.fetches) == 4
    assert bench.scheduler.plan() is None and bench.scheduler.is_fetching and bench.scheduler.has_unfinished
    assert bench.land() == 4
    plan = bench.step()
    assert len(plan.transfers.loads) == 4 and plan.num_tokens == 2
    bench.judge("a")
    bench.judge("b")


def sequence_of(number: int) -> Sequence:
    """One that would ask for a prompt."""
    options = {"vocab_size": 60_000, "max_model_len": 200, "max_pool_len": 200}
    return Sequence.first(Request.checked("x", prompt(number), SamplingParams(), **options))


def spilled(num_slots: int = 8, num_prompts: int = 6, **options) -> Bench:
    """A bench where the first of its prompts is on disk alone."""
    bench = Bench(num_pages=12, num_slots=num_slots, has_disk=True, **options)
    for number in range(1, num_prompts + 1):
        bench.serve(f"r{number}", prompt(number))
    return bench


def test_what_does_not_come_is_computed() -> None:
    bench = spilled()
    bench.runner.fetch_fails = 1.0
    assert bench.serve("again", prompt(1)) == 17
    assert bench.tier.num_fetch_misses == 4
    bench.runner.fetch_fails = 0.0
    assert bench.serve("once more", prompt(1)) == 1, "it is on the device now"


@pytest.mark.parametrize("is_reset_first", [False, True])
def test_a_reset_while_pages_are_on_their_way(is_reset_first: bool) -> None:
    bench = spilled()
    bench.add("again", prompt(1))
    bench.step()
    if not is_reset_first:
        bench.land()
    bench.pool.reset_cache()
    bench.scheduler.check()
    plan = bench.step()
    assert plan.num_tokens == 17 and plan.transfers == NOTHING
    bench.land()
    bench.judge("again")
    assert bench.tier.num_used == 0 and not bench.scheduler.is_fetching


@pytest.mark.parametrize("has_landed", [False, True])
def test_an_abort_lets_go_of_what_was_asked_for(has_landed: bool) -> None:
    bench = spilled()
    bench.add("again", prompt(1))
    bench.step()
    if has_landed:
        bench.land()
    bench.scheduler.abort("again")
    bench.scheduler.check()
    bench.land()
    assert list(bench.scheduler.recall.pinned()) == [] and len(bench.tier._idle) == bench.tier.num_used
    assert bench.serve("once more", prompt(1)) == 1, "what has come is not lost"


def test_what_has_come_stays_until_the_one_who_waits_has_it() -> None:
    bench = spilled()
    bench.add("big", prompt(7, 37), max_tokens=6)  # takes nearly all pages
    bench.step()
    bench.add("again", prompt(1))
    bench.step()  # no room, but the fetches begin
    assert bench.land() > 0 and bench.running == ["big"]
    pinned = set(bench.scheduler.recall.pinned())
    assert pinned
    while "big" in bench.running:
        assert set(bench.scheduler.recall.pinned()) >= pinned
        bench.step()
    num_loaded = bench.tier.num_loaded
    while bench.scheduler.has_unfinished:
        bench.step()
        bench.land()
    assert bench.tier.num_loaded - num_loaded >= len(pinned)
    bench.judge("again")
    bench.judge("big")


def test_who_waits_for_a_slot_of_somebody_who_waits_computes() -> None:
    bench = spilled(num_slots=4)
    bench.add("big", prompt(7, 37), max_tokens=4)
    bench.step()
    bench.add("a", prompt(1))
    bench.step()
    bench.land()
    assert sorted(bench.scheduler.recall.pinned()) == [0, 1, 2, 3]
    bench.add("b", prompt(2))
    while bench.running == ["big"]:
        plan = bench.step()
        assert not plan.transfers.fetches
    plan = bench.step()
    assert plan.num_tokens == 1 + 17 and len(plan.transfers.loads) == 4
    for name in ("a", "b", "big"):
        bench.judge(name)


def test_fetches_are_bounded_and_the_first_in_the_line_come_first() -> None:
    bench = spilled(num_slots=16, num_prompts=9, max_fetches=2)
    bench.add("a", prompt(1))
    bench.add("b", prompt(2))
    plan = bench.step()
    wanted = [bench.cache.wanted(sequence_of(1), index).key for index in range(4)]
    assert [key for key, _ in plan.transfers.fetches] == wanted[:2]
    bench.land()
    assert [key for key, _ in bench.step().transfers.fetches] == wanted[2:]
    bench.land()
    plan = bench.step()
    assert len(plan.transfers.loads) == 4 and plan.num_tokens == 1 and len(plan.transfers.fetches) == 2
    while bench.scheduler.has_unfinished:
        bench.land()
        bench.step()
    bench.judge("a")
    bench.judge("b")


@pytest.mark.parametrize("is_private", [False, True])
@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_a_preempted_sequence_is_moved_or_computed_again(mode: str, is_private: bool) -> None:
    bench = Bench(num_pages=12, num_slots=16, mode=mode, is_private=is_private)
    bench.add("old", prompt(1), max_tokens=20)
    bench.add("young", prompt(2), max_tokens=20)
    num_tokens = 0
    while bench.scheduler.has_unfinished:
        num_tokens += bench.step().num_tokens
    assert bench.scheduler.num_preemptions > 0
    assert (bench.scheduler.num_swaps > 0) == (mode == "swap")
    num_again = num_tokens - 2 * (17 + 19)
    if mode == "swap":
        # A page that is not full, and the one that was sampled last.
        assert bench.tier.num_loaded > 0 and num_again <= 5 * bench.scheduler.num_preemptions
    else:
        assert bench.tier.num_loaded == 0 and num_again > 5 * bench.scheduler.num_preemptions
    bench.judge("old")
    bench.judge("young")


def test_nothing_is_kept_below_a_threshold() -> None:
    bench = Bench(num_pages=7, num_slots=16, threshold=12)
    bench.serve("first", prompt(1))
    bench.serve("other", prompt(2, 21))
    assert bench.tier.num_saved == 2  # the prefixes of 12 and 16 tokens
    assert bench.serve("again", prompt(1)) == 17, "a prefix without its beginning is none"


def test_requests_without_shared_prefixes_leave_nothing() -> None:
    bench = Bench(num_pages=7, num_slots=4, is_private=True, has_disk=True)
    for number in range(4):
        assert bench.serve(f"r{number}", prompt(1)) == 17
        assert not len(bench.cache) and not bench.tier.num_used and not bench.tier.num_on_disk


def test_requests_without_shared_prefixes_share_nothing_while_they_run() -> None:
    bench = Bench(num_pages=12, num_slots=4, is_private=True)
    bench.add("a", prompt(1), max_tokens=4)
    bench.step()
    bench.add("b", prompt(1), max_tokens=4)
    assert bench.step().num_tokens == 1 + 17 and bench.pool.refcount_hist()[1] == 10


# --- the directory ---


def test_the_least_recently_used_goes_first_and_goes_to_disk_once() -> None:
    tier = HostTier(2, has_disk=True)
    for number in (1, 2):
        tier.save(number, held(number))
    tier.ended(tier.take_transfers())
    tier.save(9, held(1))  # it is here already, and was used just now
    tier.save(3, held(3))
    transfers = tier.take_transfers()
    assert transfers.spills == ((1, held(2).key),) and transfers.saves == ((3, 1),)
    tier.ended(transfers)
    slot = tier.fetch(held(2))
    assert slot == 0 and tier.take_transfers().spills == ((0, held(1).key),)
    tier.fetched(held(2).key, True)
    tier.check([])
    tier.save(4, held(4))
    tier.save(5, held(5))
    assert [key for _, key in tier.take_transfers().spills] == [held(3).key], "what is on disk is not written again"


def test_a_slot_is_nobody_elses_before_its_plan_has_ended() -> None:
    tier = HostTier(1)
    tier.save(1, held(1))
    first = tier.take_transfers()
    tier.save(2, held(2))
    assert tier.take_transfers() == NOTHING and tier.num_refused == 1
    tier.ended(first)
    tier.pin(0)
    tier.load(0, 7)
    second = tier.take_transfers()
    tier.save(2, held(2))
    assert tier.take_transfers() == NOTHING and tier.num_refused == 2
    tier.ended(second)
    tier.save(2, held(2))
    assert tier.take_transfers().saves == ((2, 0),)


def test_plans_that_are_lost_leave_nothing_to_count_on() -> None:
    tier = HostTier(3, has_disk=True)
    for number in (1, 2, 3):
        tier.save(number, held(number))
    tier.ended(tier.take_transfers())
    tier.save(4, held(4))
    tier.ended(tier.take_transfers())  # 1 is on disk
    tier.pin(1)
    tier.load(1, 7)
    slot = tier.fetch(held(1))
    tier.take_transfers()
    moved = tier.rewind()
    assert held(2).key in moved, "the page it was loaded to holds nobody knows what"
    assert not tier.is_fetching(held(1).key) and not tier.is_on_disk(held(1)) and tier.num_fetching == 0
    tier.check([])
    assert tier._pins[slot] == 1, "it may still be written"
    tier.fetched(held(1).key, True)
    tier.check([])
    assert tier.find(held(1)) is None and not any(tier._pins)


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (lambda tier: tier._free.append(tier._free[0]), "twice in the free list"),
        (lambda tier: tier._free.append(0), "idle and in it"),
        (lambda tier: tier._free.pop(), "slot 2"),
        (lambda tier: tier._keys.__setitem__(0, b"x"), "disagree"),
        (lambda tier: tier._idle.pop(0), "not idle"),
        (lambda tier: tier._pins.__setitem__(0, 1), "slot 0"),
        (lambda tier: tier.pin(0), "slot 0 has 1 pins, 0 are known of"),
        (lambda tier: tier._fetching.update({held(1).key: 1}), "holds another key"),
        (lambda tier: setattr(tier, "max_fetches", -1), "0 fetches are in flight"),
    ],
)
def test_check_sees_a_corruption(corrupt, message: str) -> None:
    tier = HostTier(3)
    tier.save(1, held(1))
    tier.ended(tier.take_transfers())
    tier.check([])
    corrupt(tier)
    with pytest.raises(TierError, match=message):
        tier.check([])


def test_misuse_is_an_error() -> None:
    with pytest.raises(ValueError, match="num_slots: got 0"):
        HostTier(0)
    tier = HostTier(1)
    with pytest.raises(TierError, match="unpinned but has no pin"):
        tier.unpin(0)
    with pytest.raises(TierError, match="nobody fetched it"):
        tier.fetched(b"x", True)


# --- what is worth it ---


def test_swap_is_chosen_where_it_takes_less_time() -> None:
    costs = SwapCosts(token_s=1.0, save_fixed_s=10.0, save_page_s=1.0, load_fixed_s=20.0, load_page_s=3.0)
    assert not swap_is_cheaper(34, 1, costs) and swap_is_cheaper(35, 1, costs)  # 10 + 1 + 20 + 3
    assert not swap_is_cheaper(38, 2, costs) and swap_is_cheaper(39, 2, costs)
    for num_tokens, num_pages in ((34, 1), (35, 1), (10**6, 1), (1, 10**6)):
        assert is_worth_keeping("swap", num_tokens, num_pages, costs)
        assert not is_worth_keeping("recompute", num_tokens, num_pages, costs)
        assert is_worth_keeping("auto", num_tokens, num_pages, costs) == swap_is_cheaper(num_tokens, num_pages, costs)


def test_auto_asks_for_each_sequence() -> None:
    """The long one is worth its transfers, the short one is not."""
    bench = Bench(num_pages=20, num_slots=16, mode="auto")
    bench.scheduler.costs = SwapCosts(1.0, 10.0, 0.0, 10.0, 0.0)  # more than twenty tokens
    for name, length in (("long", 29), ("short", 9)):
        bench.add(name, prompt(len(name), length), max_tokens=30)
    bench.step()
    kept = [bench.scheduler._is_worth_keeping(sequence) for sequence in bench.scheduler.running]
    assert kept == [True, False]
