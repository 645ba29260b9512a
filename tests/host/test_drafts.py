"""Drafts: whatever is proposed, the outputs are those without, and a right proposal saves steps."""

from __future__ import annotations

import random
from collections import deque

import pytest
from fake_runner import FakeRunner, isolated, watched

from jaxpaged.host.pages import PagePool
from jaxpaged.host.plan import Limits
from jaxpaged.host.prefix_cache import PrefixCache
from jaxpaged.host.request import Request, SamplingParams
from jaxpaged.host.scheduler import Scheduler

PAGE_SIZE = 4


class Drafted:
    """A scheduler and a fake device with a proposer that knows the outputs and is right as often as it is told to be."""

    def __init__(self, *, num_pages: int, max_num_seqs: int, max_num_rows: int, rightness: float, seed: int, lookahead: int = 0):
        self.rng, self.rightness = random.Random(seed), rightness
        limits = Limits(PAGE_SIZE, max_num_seqs, 64, 4, 16, max_num_rows=max_num_rows, lookahead=lookahead)
        cache = PrefixCache(PAGE_SIZE, "")
        self.runner = FakeRunner(num_pages, PAGE_SIZE)
        self.pool = watched(PagePool, num_pages, order="random", seed=seed, on_free=self.runner.poison, cache=cache)
        self.scheduler, self.limits = Scheduler(self.pool, limits), limits
        self.expected: dict[str, list[list[int]]] = {}
        self.outputs: dict[tuple[str, int], list[int]] = {}
        self.in_flight: deque = deque()
        self.num_steps = self.num_drafts = self.num_tokens = 0

    def add(self, name: str, prompt: list[int], **options) -> None:
        request = Request.checked(
            *(name, prompt, SamplingParams(**options)), vocab_size=50_021, max_model_len=64, max_pool_len=1024
        )
        self.expected[name] = [isolated(prompt, request.max_len, index=index) for index in range(request.params.n)]
        self.scheduler.add(request)

    def proposals(self) -> dict:
        found = {}
        for sequence in self.scheduler.running:
            num_known = sequence.num_tokens - sequence.num_prompt
            coming = self.expected[sequence.request.request_id][sequence.index][num_known:]
            length = self.rng.randrange(8)
            # Longer than the output is allowed to come, now and then, and wrong from anywhere on.
            drafts = [*coming, 1, 2, 3][:length]
            found[sequence] = [one if self.rng.random() < self.rightness else 7 for one in drafts]
        return found

    def step(self, *, ahead: bool) -> None:
        plan = self.scheduler.plan(self.proposals())
        self.scheduler.check()
        if plan is not None:
            self.num_drafts += sum(len(chunk.drafts) for chunk in plan.chunks())
            assert plan.num_rows <= max(self.limits.max_num_rows, self.limits.max_num_seqs)
            self.num_tokens += plan.num_tokens
            # The last token of an output is sampled and takes no place.
            assert all(chunk.end < chunk.sequence.request.max_len for chunk in plan.chunks())
            assert plan.num_tokens <= self.limits.max_num_batched_tokens
            self.in_flight.append((plan, self.runner.submit(plan)))
        if plan is not None and ahead and len(self.in_flight) == 1:
            return
        plan, result = self.in_flight.popleft()
        for event in self.scheduler.commit(plan, *result()):
            self.outputs.setdefault((event.request_id, event.index), []).append(event.token_id)
        self.scheduler.check()
        self.num_steps += 1

    def run(self, *, ahead: bool) -> None:
        while self.scheduler.has_unfinished:
            self.step(ahead=ahead)
        for name, outputs in self.expected.items():
            for index, tokens in enumerate(outputs):
                assert self.outputs[name, index] == tokens


@pytest.mark.parametrize("seed", range(40))
def test_drafts_change_no_output(seed):
    rng = random.Random(seed)
    max_num_seqs = rng.randint(1, 6)
    drafted = Drafted(
        num_pages=rng.choice((20, 40, 200)),
        max_num_seqs=max_num_seqs,
        max_num_rows=rng.choice((0, max_num_seqs + 3, 5 * max_num_seqs)),
        rightness=rng.choice((0.0, 0.5, 0.9, 1.0)),
        lookahead=rng.choice((0, 0, 5)),
        seed=seed,
    )
    for number in range(12):
        prompt = [rng.randrange(9) for _ in range(rng.randint(1, 20))]
        drafted.add(str(number), prompt, n=rng.choice((1, 1, 3)), max_tokens=rng.randint(1, 30), temperature=1.0)
    drafted.run(ahead=rng.random() < 0.5)


def test_right_drafts_save_steps():
    steps = {}
    for rightness in (0.0, 1.0):
        drafted = Drafted(num_pages=100, max_num_seqs=4, max_num_rows=32, rightness=rightness, seed=1)
        drafted.add("a", [1, 2, 3], max_tokens=50)
        drafted.run(ahead=False)
        steps[rightness] = drafted.num_steps
        # What was right is not computed again, and of what was wrong nothing stays.
        num_wrong = 0 if rightness else drafted.num_drafts
        assert drafted.num_drafts and drafted.num_tokens == 52 + num_wrong
    assert steps[0.0] == 50 and steps[1.0] < 20


@pytest.mark.parametrize("seed", range(10))
def test_no_page_is_taken_for_drafts_that_somebody_lacks(seed):
    drafted = Drafted(num_pages=16, max_num_seqs=6, max_num_rows=32, rightness=0.5, seed=seed, lookahead=6)
    scheduler, num_taken, reserve_ahead = drafted.scheduler, 0, drafted.scheduler._reserve_ahead

    def watch(sequence, num_tokens):
        nonlocal num_taken
        before = len(sequence.pages)
        reserve_ahead(sequence, num_tokens)
        if len(sequence.pages) > before:
            num_taken += 1
            assert sum(max(0, scheduler._num_pages_lacking(other)) for other in scheduler.running) <= drafted.pool.num_free

    scheduler._reserve_ahead = watch
    for number in range(8):
        drafted.add(str(number), [number] * (4 + number % 3), max_tokens=20)
    drafted.run(ahead=False)
    assert num_taken
