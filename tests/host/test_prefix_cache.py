"""The prefix cache, law by law; the simulation lives through the rest."""

from __future__ import annotations

import pytest
from fake_runner import FakeRunner

from jaxpaged.host.pages import PagePool
from jaxpaged.host.plan import Limits
from jaxpaged.host.prefix_cache import PrefixCache
from jaxpaged.host.request import Request, RequestError, SamplingParams, Sequence
from jaxpaged.host.scheduler import Scheduler

LIMITS = Limits(page_size=4, max_num_seqs=8, max_num_batched_tokens=64, tile=4, max_prefill_tiles=16)


class Machine:
    """A scheduler with a prefix cache around a fake runner."""

    def __init__(self, num_pages: int = 64):
        self.runner = FakeRunner(num_pages, LIMITS.page_size)
        self.cache = PrefixCache(LIMITS.page_size)
        self.pool = PagePool(num_pages, self.cache)
        self.scheduler = Scheduler(self.pool, LIMITS)
        self.count = 0

    def ask(self, prompt: list[int], max_tokens: int = 1, salt: str | None = None) -> None:
        self.scheduler.add(self.request(prompt, max_tokens, salt))

    def request(self, prompt: list[int], max_tokens: int = 1, salt: str | None = None) -> Request:
        self.count += 1
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        options = {"vocab_size": 60_000, "max_model_len": 1000, "max_pool_len": 1000, "cache_salt": salt}
        return Request.checked(f"r{self.count}", prompt, params, **options)

    def num_known(self, prompt: list[int]) -> int:
        """Pages of a prompt that the cache has."""
        return len(self.cache.match(Sequence.first(self.request(prompt))))

    def step(self):
        plan = self.scheduler.plan()
        events = self.scheduler.commit(plan, *self.runner.run(plan))
        self.scheduler.check()
        return plan, events

    def answer(self, prompt: list[int], max_tokens: int = 1, salt: str | None = None) -> tuple[list[int], int]:
        """The output, and how many tokens were computed for it."""
        self.ask(prompt, max_tokens, salt)
        tokens, num_computed = [], 0
        while self.scheduler.has_unfinished:
            plan, events = self.step()
            num_computed += plan.num_tokens
            tokens += [event.token_id for event in events]
        return tokens, num_computed


PROMPT = list(range(100, 118))  # four pages and two tokens


def test_an_equal_prompt_is_computed_from_its_last_full_page_on() -> None:
    machine = Machine()
    first, num_computed = machine.answer(PROMPT)
    assert num_computed == 18
    assert machine.answer(PROMPT) == (first, 2)
    assert (machine.cache.num_queried_tokens, machine.cache.num_hit_tokens) == (36, 16)


@pytest.mark.parametrize(("length", "num_computed"), [(17, 1), (16, 4), (15, 3), (5, 1), (4, 4), (1, 1)])
def test_at_least_the_last_token_is_computed(length: int, num_computed: int) -> None:
    machine = Machine()
    machine.answer(PROMPT)
    assert machine.answer(PROMPT[:length])[1] == num_computed


def test_an_answer_is_part_of_the_next_question() -> None:
    machine = Machine()
    output, _ = machine.answer(PROMPT, max_tokens=9)
    # The last token was sampled and never computed: 18 + 8 tokens are in pages, six of them full.
    assert machine.answer([*PROMPT, *output, 7])[1] == 18 + 9 + 1 - 24


def test_the_same_page_after_another_beginning_is_another_page() -> None:
    machine = Machine()
    machine.answer(PROMPT)
    assert machine.answer([1, 2, 3, 4, *PROMPT[4:]])[1] == 18
    assert machine.answer(PROMPT[4:])[1] == 14


def test_salts_share_nothing() -> None:
    machine = Machine()
    for salt in (None, "a", "b"):
        assert machine.answer(PROMPT, salt=salt)[1] == 18
        assert machine.answer(PROMPT, salt=salt)[1] == 2


@pytest.mark.parametrize("salt", ["", 3, b"a"])
def test_a_salt_is_a_text(salt) -> None:
    with pytest.raises(RequestError, match=r"cache_salt: got .*, expected a non-empty string"):
        Machine().ask(PROMPT, salt=salt)


def test_the_token_ids_decide_when_keys_collide(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = PrefixCache._entry
    monkeypatch.setattr(PrefixCache, "_entry", lambda self, *place: (bytes([place[1]]), entry(self, *place)[1]))
    machine = Machine()
    machine.answer(PROMPT)
    other = [*PROMPT[:4], *range(200, 214)]
    assert machine.answer(other)[1] == 14  # one page is the same


def test_pages_are_shared_while_both_run_and_written_by_neither() -> None:
    machine = Machine()
    machine.ask(PROMPT, max_tokens=8)
    machine.step()
    machine.ask(PROMPT, max_tokens=8)
    machine.step()
    first, second = machine.scheduler.running
    assert first.pages[:4] == second.pages[:4] and first.pages[4] != second.pages[4]
    assert machine.pool.refcount_hist()[2] == 4
    while machine.scheduler.has_unfinished:
        machine.step()
    assert machine.pool.num_used == 0 and machine.pool.num_cached > 4


def test_the_oldest_page_without_an_owner_is_evicted_first_and_a_prefix_after_what_hangs_on_it() -> None:
    machine = Machine(num_pages=12)
    machine.answer(PROMPT[:9])  # two full pages
    machine.answer(list(range(300, 309)))
    machine.answer(PROMPT[:9])  # used again: now the younger one
    machine.answer(list(range(400, 432)))  # eight of eleven pages
    assert machine.cache.num_evictions == 1
    assert machine.num_known(PROMPT[:9]) == 2
    assert machine.num_known(list(range(300, 309))) == 1


def test_a_row_that_is_not_finite_teaches_nothing() -> None:
    machine = Machine()
    machine.runner.fails = lambda request_id, num_output: request_id == "r1"
    machine.answer(PROMPT)
    assert len(machine.cache) == 0 and machine.pool.num_cached == 0
    assert machine.answer(PROMPT)[1] == 18


def test_reset_forgets_and_leaves_running_requests_alone() -> None:
    machine = Machine()
    machine.answer(PROMPT)
    machine.ask(PROMPT, max_tokens=4)
    machine.step()
    machine.pool.reset_cache()
    machine.scheduler.check()
    assert machine.pool.num_cached == 0 and machine.pool.num_used == 5
    while machine.scheduler.has_unfinished:
        machine.step()
    assert machine.answer(PROMPT)[1] == 18
