"""Beam search on the host: the group alone against brute force and against a second writing of it, then on shared pages."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from beam_simulation import beam_scenario, is_search, simulate_beams
from fake_runner import BEAM_VOCAB_SIZE, FakeRunner, isolated_beams, next_logprobs, watched

from jaxpaged.host.beam_params import BeamSearchParams, check_room
from jaxpaged.host.beams import BeamGroup, Hypothesis
from jaxpaged.host.pages import PagePool
from jaxpaged.host.plan import Limits
from jaxpaged.host.policies import POLICIES
from jaxpaged.host.prefix_cache import PrefixCache
from jaxpaged.host.request import Request, RequestError, SamplingParams
from jaxpaged.host.scheduler import Scheduler

PENALTIES = (-1.0, 0.0, 0.5, 1.0, 2.0)
STOPPING = (False, True, "never")


def model(prompt: int, vocab: int, tokens: tuple[int, ...]) -> list[tuple[int, float]]:
    """Log-probabilities after some tokens, by token id."""
    rng = random.Random(repr((prompt, tokens)))
    logits = [2 * rng.random() for _ in range(vocab)]
    total = math.log(sum(map(math.exp, logits)))
    return [(token_id, logit - total) for token_id, logit in enumerate(logits)]


def drive(group: BeamGroup, candidates) -> list[Hypothesis]:
    """Advance a group to its end, asking `candidates` after the tokens of each beam."""
    while not group.is_over:
        before = list(group.running)
        children = group.advance([candidates(beam.token_ids) for beam in before])
        assert [(*before[parent].token_ids, token_id) for parent, token_id in children] == [b.token_ids for b in group.running]
        sums = [beam.cumulative_logprob for beam in group.running]
        assert sums == sorted(sums, reverse=True) and len(sums) <= group.width
        assert len(set(group.running)) == len(group.running)
    return group.finished


# --- the group alone ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize(("vocab", "most", "stop_ids"), [(2, 5, ()), (3, 4, (1,)), (4, 3, (0, 2)), (5, 1, (3,)), (1, 4, ())])
def test_as_wide_as_everything_it_finds_everything(vocab: int, most: int, stop_ids: tuple[int, ...], penalty: float) -> None:
    """Brute force: every text that ends with its first stop id or at the limit, best first."""
    every = {}
    for text in itertools.product(range(vocab), repeat=most):
        ends = next((i + 1 for i, token in enumerate(text) if token in stop_ids), most)
        tokens = text[:ends]
        every[tokens] = sum(dict(model(0, vocab, tokens[:i]))[token] for i, token in enumerate(tokens))
    want = sorted(every, key=lambda tokens: -every[tokens] / len(tokens) ** penalty)
    for stopping in STOPPING:
        group = BeamGroup(vocab**most, most, stop_ids, length_penalty=penalty, early_stopping=stopping)
        found = drive(group, lambda tokens: model(0, vocab, tokens))
        assert [one.token_ids for one in found] == want
        for one in found:
            assert one.cumulative_logprob == pytest.approx(every[one.token_ids])


@pytest.mark.parametrize("stopping", STOPPING)
@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_likeliest_tokens_of_each_beam_are_enough(penalty: float, stopping: bool | str) -> None:
    """`num_candidates` of each beam lead to what whole vocabularies lead to in a second writing of the search."""
    rng = random.Random(f"{penalty} {stopping}")
    num_early = 0
    for number in range(60):
        width, most = rng.choice((1, 2, 3, 4, 8)), rng.randint(1, 20)
        stop_ids = frozenset(rng.sample(range(BEAM_VOCAB_SIZE), rng.randint(0, 4)))
        group = BeamGroup(width, most, stop_ids, length_penalty=penalty, early_stopping=stopping)

        def likeliest(tokens: tuple[int, ...], number=number, count=group.num_candidates) -> list[tuple[int, float]]:
            context = b"".join(token.to_bytes(4, "little") for token in (number, *tokens))
            return sorted(next_logprobs(context), key=lambda pair: -pair[1])[:count]

        found = drive(group, likeliest)
        want = isolated_beams([number], 1 + most, width, stop_ids, penalty, stopping)
        assert [(list(one.token_ids), one.cumulative_logprob) for one in found] == want
        assert len(found) == width
        num_early += max(len(one.token_ids) for one in found) < most
    assert num_early > 5 or (stopping == "never" and penalty > 0)


def test_one_beam_is_greedy() -> None:
    found = drive(BeamGroup(1, 12, ()), lambda tokens: sorted(model(1, 9, tokens), key=lambda one: -one[1])[:1])
    tokens: tuple[int, ...] = ()
    for _ in range(12):
        tokens += (max(model(1, 9, tokens), key=lambda one: one[1])[0],)
    assert [one.token_ids for one in found] == [tokens]


def test_ties_go_to_the_earlier_beam_and_then_to_the_lower_token() -> None:
    group = BeamGroup(3, 5, ())
    assert group.advance([[(7, -1.0), (3, -1.0), (5, -1.0), (1, -2.0)]]) == [(0, 3), (0, 5), (0, 7)]
    assert group.advance([[(2, -1.0), (1, -1.0)], [(0, -1.0), (4, -0.5)], [(9, -1.0)]]) == [(1, 4), (0, 1), (0, 2)]


def test_early_stopping() -> None:
    """Two beams; both have ended at the second token, and a running one is better at its own length than the worse of them."""
    first = [[(1, -0.5), (2, -1.0), (0, -3.0)]]

    second = [[(0, -1.0), (1, -1.2), (2, -9.0)], [(0, -0.3), (1, -9.0), (2, -9.0)]]

    def after_two(penalty: float, stopping: bool | str) -> BeamGroup:
        group = BeamGroup(2, 10, [0], length_penalty=penalty, early_stopping=stopping)
        assert group.advance(first) == [(0, 1), (0, 2)]
        group.advance(second)
        assert [one.token_ids for one in group.finished] == [(2, 0), (1, 0)]
        return group

    assert after_two(1.0, True).is_over
    assert after_two(1.0, False).is_over  # -1.7 / 2 is behind -1.5 / 2
    assert not after_two(1.0, "never").is_over  # -1.7 / 10 is not
    assert after_two(0.0, "never").is_over and after_two(-1.0, "never").is_over  # longer is never better

    group = BeamGroup(2, 10, [0], length_penalty=-1.0, early_stopping="never")
    group.advance([[(1, -0.5), (0, -0.6), (2, -1.0)]])
    group.advance([[(1, -0.4), (0, -1.0), (2, -9.0)], [(0, -0.3), (1, -9.0), (2, -9.0)]])
    assert [one.token_ids for one in group.finished] == [(0,), (2, 0)]
    assert not group.is_over  # -0.9 * 2 is ahead of -1.3 * 2, though -0.9 * 10 is not


# --- on pages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("first", range(0, 80, 20))
def test_every_search_in_a_crowd_equals_its_isolated_run(first: int, shares: bool) -> None:
    """Every law of simulation.py after every step, with aborts, rows that are not finite and pools that preempt."""
    num_searches = num_preemptions = num_copies = 0
    for seed in range(first, first + 20):
        scenario = beam_scenario(seed, shares=shares)
        num_searches += sum(map(is_search, scenario.asks))
        outcome = simulate_beams(scenario)
        num_preemptions += outcome.num_preemptions
        num_copies += outcome.num_copies
    assert num_searches > 100 and num_preemptions > 10 and num_copies > 150


@pytest.mark.parametrize("shares", [False, True])
def test_forced_preemptions_and_changing_chunks_do_not_matter(shares: bool) -> None:
    num_preemptions = 0
    for seed in range(500, 530):
        scenario = beam_scenario(seed, shares=shares, with_faults=False)
        perturbed = simulate_beams(scenario, is_perturbed=True)
        assert perturbed.outputs == simulate_beams(scenario, order="newest").outputs
        num_preemptions += perturbed.num_preemptions
    assert num_preemptions > 100


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_comes_to_the_same_end(policy: str) -> None:
    """Also where requests of another rank come between, and a search is thrown out again and again."""
    num_preemptions = 0
    for seed in range(700, 712):
        scenario = beam_scenario(seed, shares=seed % 2 == 0, with_faults=seed % 3 == 0)
        outcome = simulate_beams(scenario, policy=policy, is_perturbed=seed % 4 == 1, ageing_steps=seed % 40)
        num_preemptions += outcome.num_preemptions
    assert num_preemptions > 20


class Bench:
    """One scheduler on a fake device."""

    def __init__(self, num_pages: int = 400, page_size: int = 8, *, caches: bool = False, **limits):
        given = {"max_num_seqs": 16, "max_num_batched_tokens": 64, "tile": 16, "max_prefill_tiles": 4}
        self.runner = FakeRunner(num_pages, page_size)
        self.pool = watched(PagePool, num_pages, on_free=self.runner.poison, order="random")
        if caches:
            self.pool.cache = PrefixCache(page_size)
        self.scheduler = Scheduler(self.pool, Limits(page_size=page_size, **{**given, **limits}))
        self.most_used = 0

    def add(self, name: str, num_prompt: int, **params) -> Request:
        prompt = [random.Random(f"{name} {i}").randrange(1000) for i in range(num_prompt)]
        request = Request.checked(
            name, prompt, SamplingParams(**params), vocab_size=50_021, max_model_len=512, max_pool_len=10**6
        )
        self.scheduler.add(request)
        return request

    def step(self) -> list:
        plan = self.scheduler.plan()
        assert plan is not None
        self.scheduler.check()
        self.most_used = max(self.most_used, self.pool.num_used)
        events = self.scheduler.commit(plan, *self.runner.run(plan))
        self.scheduler.check()
        return events

    def drain(self) -> dict[str, list[list[int]]]:
        found: dict[str, list[list[int]]] = {}
        while self.scheduler.has_unfinished:
            for event in self.step():
                found.setdefault(event.request_id, []).append(list(event.token_ids))
        assert self.pool.num_used == 0
        return found


@pytest.mark.parametrize("caches", [False, True])
@pytest.mark.parametrize("width", range(1, 9))
def test_beams_part_at_every_place_of_two_pages(width: int, caches: bool) -> None:
    """R03: a beam never sees what another writes, wherever in a page they part."""
    page_size = 8
    bench = Bench(page_size=page_size, caches=caches)
    requests = {}
    for offset in range(2 * page_size + 1):
        name = f"offset {offset}"
        requests[name] = bench.add(name, 1 + offset, use_beam_search=True, n=width, max_tokens=2 * page_size + 1)
    found = bench.drain()
    for name, request in requests.items():
        want = isolated_beams(request.prompt_token_ids, request.max_len, width, frozenset(), 1.0, False)
        assert found[name] == [tokens for tokens, _ in want]
    assert bench.scheduler.num_copies > 0 or width == 1


def test_the_last_owner_of_a_page_writes_without_a_copy() -> None:
    bench = Bench()
    bench.add("a", 4, use_beam_search=True, n=4, max_tokens=2)
    bench.step()
    assert [len(sequence.pages) for sequence in bench.scheduler.running] == [1] * 4 and bench.pool.num_used == 1
    plan = bench.scheduler.plan()
    assert plan is not None and len(plan.copies) == 3 and bench.pool.num_used == 4


@pytest.mark.parametrize("width", [2, 4, 6])
def test_beams_share_pages(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    """The most pages that a search owns at once, against as many requests of the same lengths that share nothing."""
    num_prompt, num_new = 64, 64
    bench = Bench(num_pages=2000)
    bench.add("search", num_prompt, use_beam_search=True, n=width, max_tokens=num_new)
    bench.drain()
    apart = Bench(num_pages=2000)
    for index in range(width):
        apart.add(f"alone {index}", num_prompt, max_tokens=num_new)
    apart.drain()
    with capsys.disabled():
        print(f"\n{width} beams: {bench.most_used} pages at most, {apart.most_used} when apart", end=" ")
    num_shared = num_prompt // 8
    assert apart.most_used == width * (num_prompt + num_new) // 8
    # The prompt once; of the output at most all of it apart.
    assert bench.most_used <= apart.most_used - (width - 1) * num_shared


def test_a_search_as_large_as_the_pool_preempts_nobody_and_ends() -> None:
    """The last page of it too is enough: nothing is kept twice while beams part."""
    for width, num_prompt, num_new in ((4, 1, 15), (4, 7, 10), (3, 16, 9), (8, 1, 1), (2, 8, 17)):
        num_pages = width * -(-(num_prompt + num_new - 1) // 8)
        bench = Bench(num_pages=num_pages + 1)
        request = bench.add("a", num_prompt, use_beam_search=True, n=width, max_tokens=num_new)
        check_room(request, vocab_size=99, page_size=8, num_pages=num_pages, max_num_seqs=16, max_logprobs=20)
        want = isolated_beams(request.prompt_token_ids, request.max_len, width, frozenset(), 1.0, False)
        assert bench.drain() == {"a": [tokens for tokens, _ in want]}
        assert bench.scheduler.num_preemptions == 0


@pytest.mark.parametrize("num_steps", [1, 2, 9, 20])
@pytest.mark.parametrize("caches", [False, True])
def test_a_search_gives_way_as_a_whole_and_computes_what_it_shares_once(num_steps: int, caches: bool) -> None:
    bench = Bench(caches=caches, max_num_batched_tokens=512, max_prefill_tiles=32)
    request = bench.add("a", 21, use_beam_search=True, n=4, max_tokens=30)
    for _ in range(num_steps):
        bench.step()
    beams = [list(sequence.tokens) for sequence in bench.scheduler.running]
    assert len(beams) == 4
    bench.scheduler._preempt(bench.scheduler.running[2])
    assert not bench.scheduler.running and len(bench.scheduler.waiting) == 1 and not bench.pool.num_used
    if caches:
        bench.pool.reset_cache()

    num_common = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, zip(*beams, strict=True)))
    assert 21 <= num_common < 21 + num_steps
    num_computed = 0
    while len(bench.scheduler._by_id["a"][0].tokens) == 21 + num_steps:  # until all of them go on
        plan = bench.scheduler.plan()
        assert plan is not None
        num_computed += plan.num_tokens
        bench.scheduler.commit(plan, *bench.runner.run(plan))
        bench.scheduler.check()
    assert num_computed == num_common + 4 * (21 + num_steps - num_common)
    want = isolated_beams(request.prompt_token_ids, request.max_len, 4, frozenset(), 1.0, False)
    assert bench.drain() == {"a": [tokens for tokens, _ in want]}


def test_an_abort_ends_all_beams_once() -> None:
    for num_steps in range(12):
        bench = Bench(max_num_batched_tokens=4)
        bench.add("a", 9, use_beam_search=True, n=3, max_tokens=20)
        other = bench.add("b", 5, use_beam_search=True, n=2, max_tokens=6)
        for _ in range(num_steps):
            bench.step()
        events = bench.scheduler.abort("a")
        assert [(event.index, event.finish_reason, event.token_ids) for event in events] == [(i, "abort", ()) for i in range(3)]
        bench.scheduler.check()
        assert bench.scheduler.abort("a") == [] and "a" not in bench.scheduler
        want = isolated_beams(other.prompt_token_ids, other.max_len, 2, frozenset(), 1.0, False)
        assert bench.drain() == {"b": [tokens for tokens, _ in want]}


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (lambda s: s.running[0].tokens.__setitem__(-1, 99), "not the beams of its group"),
        (lambda s: s._by_id["a"].reverse(), "not the beams of its group"),
        (lambda s: setattr(s.running[0], "candidates", [(0, 0.0)]), "does not wait"),
    ],
)
def test_check_sees_a_corruption(corrupt, message: str) -> None:
    bench = Bench()
    bench.add("a", 5, use_beam_search=True, n=3, max_tokens=9)
    bench.step()
    corrupt(bench.scheduler)
    with pytest.raises(RuntimeError, match=message):
        bench.scheduler.check()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam_width": 0, "max_tokens": 4}, r"beam_width: got 0, expected a whole number in \[1, 128\]"),
        ({"beam_width": 4, "max_tokens": 0}, "max_tokens: got 0"),
        ({"max_tokens": 4}, "BeamSearchParams: beam_width is missing"),
        ({"beam_width": 2}, "BeamSearchParams: max_tokens is missing"),
        (
            {"beam_width": 2, "max_tokens": 4, "lenght_penalty": 1},
            "unknown option .*, did you mean 'length_penalty'",
        ),
        ({"beam_width": 2, "max_tokens": 4, "length_penalty": math.nan}, "length_penalty: got nan, expected a finite number"),
        ({"beam_width": 2, "max_tokens": 4, "length_penalty": 11}, r"length_penalty: got 11, expected .* \[-10, 10\]"),
        ({"beam_width": 2, "max_tokens": 4, "early_stopping": "maybe"}, "early_stopping: got 'maybe', expected True, False or"),
        ({"beam_width": 2, "max_tokens": 4, "early_stopping": 1}, "early_stopping: got 1, expected True, False or 'never'"),
        ({"beam_width": 2, "max_tokens": 4, "temperature": -1}, "temperature: got -1"),
        ({"beam_width": 2, "max_tokens": 4, "ignore_eos": 1}, "ignore_eos: got 1"),
        ({"beam_width": 2, "max_tokens": 4, "include_stop_str_in_output": "x"}, "include_stop_str_in_output: got 'x'"),
    ],
)
def test_bad_beam_search_params(options: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        BeamSearchParams(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": 0.5}, "top_p: got 0.5, expected 1.0: beam search draws no tokens"),
        ({"top_k": 5}, "top_k: got 5, expected 0: beam"),
        ({"min_p": 0.1}, "min_p: got 0.1, expected 0.0: beam"),
        ({"seed": 1}, "seed: got 1, expected None: beam"),
        ({"use_beam_search": False, "length_penalty": 2.0}, "length_penalty: got 2.0, expected 1.0: without use_beam_search"),
        ({"use_beam_search": False, "early_stopping": True}, "early_stopping: got True, expected False: without use_beam_search"),
        ({"use_beam_search": "yes"}, "use_beam_search: got 'yes', expected True or False"),
    ],
)
def test_options_that_do_not_go_together(options: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        SamplingParams(**{"use_beam_search": True, "n": 2, **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("width", "num_prompt", "room", "message"),
    [
        (5, 9, {"max_num_seqs": 4}, "n: got 5 beams, which run together; the limit is max_num_seqs 4"),
        (5, 9, {"vocab_size": 6}, "n: 5 beams and 2 ids that end them need 7 different tokens, the vocabulary has 6"),
        (5, 9, {"max_logprobs": 6}, "n: 5 beams and 2 ids .* need 7 candidates of each beam, the limit is max_logprobs 6"),
        (
            4,
            9,
            {"num_pages": 11},
            "n: 4 beams of up to 24 tokens need 12 pages of 8, the whole pool has 11; lower max",
        ),
        (4, 10, {"num_pages": 15}, "n: 4 beams of up to 25 tokens need 16 pages of 8, the whole pool has 15"),
    ],
)
def test_a_search_without_room_is_refused(width: int, num_prompt: int, room: dict, message: str) -> None:
    params = SamplingParams(use_beam_search=True, n=width, max_tokens=16, stop_token_ids=(1, 2))
    request = Request.checked("r", [1] * num_prompt, params, vocab_size=99, max_model_len=99, max_pool_len=999)
    given = {"vocab_size": 7, "page_size": 8, "num_pages": 16, "max_num_seqs": 5, "max_logprobs": 7}
    if width == 4:
        check_room(request, **given)
    with pytest.raises(RequestError, match=message) as caught:
        check_room(request, **{**given, **room})
    assert "\n" not in str(caught.value)
