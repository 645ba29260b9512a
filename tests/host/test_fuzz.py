"""The pool and the prefix cache under random operations (R01), and how strong that is: bugs planted into both (H14)."""

from __future__ import annotations

from collections import Counter

import fuzz
import pytest
import simulation
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from test_mutants import PAGES, PREFIX, RECALL, TIERS, Mutant, plant
from test_tier_mutants import MUTANTS as TIER_MUTANTS

OPERATIONS_PER_SEED = 300
SEEDS_PER_TEST = 50


@pytest.mark.parametrize("first_seed", range(0, 200, SEEDS_PER_TEST))  # 60,000 operations
def test_after_every_operation_all_is_as_the_model_says(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + SEEDS_PER_TEST):
        fuzz.live(seed, OPERATIONS_PER_SEED)


@pytest.mark.slow
def test_a_million_operations() -> None:
    for seed in range(1000, 1240):
        fuzz.live(seed, 4200)


def test_the_lives_reach_what_they_are_for() -> None:
    done: Counter[str] = Counter()
    for seed in range(2000, 2020):
        machine = fuzz.live(seed, 4 * OPERATIONS_PER_SEED)
        done += machine.num_operations + machine.num_moved
    assert done.keys() >= set(fuzz.Machine.OPERATIONS)
    assert min(done[name] for name in ("copy on write", "evict", "hit", "swap out", "swap in", "spill", "fetch")) > 20, done


class FuzzMachine(RuleBasedStateMachine):
    """The same operations, with Hypothesis to choose and to shrink."""

    machine: fuzz.Machine

    @initialize(
        num_pages=st.integers(2, 9),
        page_size=st.sampled_from([1, 2, 16]),
        num_slots=st.integers(0, 4),
        has_disk=st.booleans(),
        data=st.data(),
    )
    def start(self, num_pages: int, page_size: int, num_slots: int, has_disk: bool, data: st.DataObject) -> None:
        self.machine = fuzz.Machine(num_pages, page_size, lambda n: 0, num_slots=num_slots, has_disk=has_disk)
        self.operate("arrive", data)

    def operate(self, name: str, data: st.DataObject) -> None:
        self.machine.choose = lambda n: data.draw(st.integers(0, n - 1)) if n > 1 else 0
        self.machine.operate(name)

    @rule(data=st.data(), name=st.sampled_from(["arrive", "reserve", "write", "append"]))
    def grow(self, data: st.DataObject, name: str) -> None:
        self.operate(name, data)

    @precondition(lambda self: self.machine.sequences)
    @rule(data=st.data(), name=st.sampled_from(["fork", "fall_behind", "reserve", "write", "preempt", "resume"]))
    def go_on(self, data: st.DataObject, name: str) -> None:
        self.operate(name, data)

    @precondition(lambda self: self.machine.sequences)
    @rule(data=st.data(), name=st.sampled_from(["release", "abort"]))
    def shrink(self, data: st.DataObject, name: str) -> None:
        self.operate(name, data)

    @rule(data=st.data(), name=st.sampled_from(["evict", "end_plan", "fetch_ends", "forget", "lose", "reset", "misuse"]))
    def disturb(self, data: st.DataObject, name: str) -> None:
        self.operate(name, data)

    def teardown(self) -> None:
        if hasattr(self, "machine"):
            self.machine.choose = lambda n: 0
            self.machine.end()


TestFuzzMachine = FuzzMachine.TestCase
# derandomize: a test run says the same twice; the seeds above are for breadth.
TestFuzzMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None, derandomize=True, database=None)


# --- planted bugs ---

PLANTED = [
    Mutant("the null page is free", PAGES, "deque(range(1, num_pages))", "deque(range(num_pages))"),
    Mutant("the last page is never free", PAGES, "deque(range(1, num_pages))", "deque(range(1, num_pages - 1))"),
    Mutant("cached pages are not free", PAGES, "len(self._free) + len(self._cached)", "len(self._free)"),
    Mutant("counts free pages as cached", PAGES, "return len(self._cached)", "return len(self._free)"),
    Mutant("counts the null page as used", PAGES, "self.num_usable - self.num_free", "self.num_pages - self.num_free"),
    Mutant("keeps a page back", PAGES, "if count > self.num_free:", "if count >= self.num_free:"),
    Mutant("never evicts", PAGES, "if count > self.num_free:", "if count > len(self._free):"),
    Mutant("evicts one too many", PAGES, "while len(self._free) < count:", "while self._cached and len(self._free) <= count:"),
    Mutant("evicts the youngest", PAGES, "next(iter(self._cached))", "next(reversed(self._cached))"),
    Mutant("hands out a page twice", PAGES, "self._free.popleft() for", "self._free[0] for"),
    Mutant("hands out too few", PAGES, "for _ in range(count)]", "for _ in range(max(count - 1, 0))]"),
    Mutant("hands out with two references", PAGES, "self._refs[page] = 1\n", "self._refs[page] = 2\n"),
    Mutant("does not note the first owner", PAGES, "            self._taken(page)\n        return pages", "        return pages"),
    Mutant("shares a page that holds nothing", PAGES, "or page in self._cached)", "or True)"),
    Mutant("frees a page that is not one", PAGES, "if not 0 < page < self.num_pages or self._refs", "if self._refs"),
    Mutant("looks at the first page alone", PAGES, "in Counter(pages).items()", "in Counter(pages[:1]).items()"),
    Mutant("does not see a double free", PAGES, "self._refs[page] < times:", "self._refs[page] < 0:"),
    Mutant("a shared page stays cached", PAGES, "            self._cached.pop(page, None)\n", ""),
    Mutant("a share is not counted", PAGES, "self._refs[page] += 1", "self._refs[page] = max(1, self._refs[page])"),
    Mutant("a cached page gets an owner unseen", PAGES, "                self._taken(page)\n", "                pass\n"),
    Mutant("the first page goes first", PAGES, "for page in reversed(pages):", "for page in pages:"),
    Mutant("frees all references at once", PAGES, "self._refs[page] -= 1", "self._refs[page] = 0"),
    Mutant("frees before the last owner", PAGES, "-= 1\n            if not self._refs[page]:", "-= 1\n            if True:"),
    Mutant("counts no released page", PAGES, "                self.num_released += 1\n", ""),
    Mutant(
        "a life since the beginning",
        PAGES,
        "+= self.step - self._since[page]\n                self._since",
        "+= self.step\n                self._since",
    ),
    Mutant(
        "idle since its first owner",
        PAGES,
        "                self._since[page] = self.step\n                if",
        "                if",
    ),
    Mutant("caches what nobody knows", PAGES, "self.cache is not None and page in self.cache:", "self.cache is not None:"),
    Mutant("caches nothing", PAGES, "if self.cache is not None and page in self.cache:", "if False:"),
    Mutant(
        "loses a page",
        PAGES,
        "                else:\n                    self._free.append(page)",
        "                elif page != 1:\n                    self._free.append(page)",
    ),
    Mutant("reset loses cached pages", PAGES, "        self._free.extend(self._cached)\n", ""),
    Mutant("reset leaves them cached", PAGES, "        self._cached.clear()\n", ""),
    Mutant("reset leaves them known", PAGES, "            self.cache.clear()\n", "            pass\n"),
    Mutant("evicts and does not tell", PAGES, "held = self.cache.forget(page)", "held = self.cache._held[page]"),
    Mutant("evicts and keeps", PAGES, "is_kept = self._cached.pop(page)", "is_kept = self._cached[page]"),
    Mutant("idle from step 0 is not idle", PAGES, "if self._since[page] >= 0:", "if self._since[page] > 0:"),
    Mutant("every free page is a run", PAGES, "after - before > 1", "after - before >= 1"),
    Mutant("counts the null page as unowned", PAGES, "Counter(self._refs[1:])", "Counter(self._refs)"),
    Mutant("many owners are one", PAGES, "        return self._refs[page]\n", "        return min(1, self._refs[page])\n"),
    Mutant("leaves no token to compute", PREFIX, "(len(sequence.tokens) - 1) //", "len(sequence.tokens) //"),
    Mutant("goes on past a page it lacks", PREFIX, "                break\n", "                continue\n"),
    Mutant("tells of pages again", PREFIX, "in range(sequence.num_recorded, ", "in range(0, "),
    Mutant("knows pages that are not written", PREFIX, "sequence.num_computed // self.page_size):", "len(sequence.pages)):"),
    Mutant(
        "knows a page that is not full",
        PREFIX,
        "sequence.num_computed // self.page_size):",
        "-(-sequence.num_computed // self.page_size)):",
    ),
    Mutant("the second that holds it wins", PREFIX, "if held.key not in self._pages:", "if True:"),
    Mutant("knows the last page for each", PREFIX, "sequence.pages[index], self.wanted", "sequence.pages[-1], self.wanted"),
    Mutant("forgets a page and not its key", PREFIX, "        del self._pages[held.key]\n", ""),
    Mutant("forgets a key and not its page", PREFIX, "self._held.pop(page)", "self._held[page]"),
    Mutant("counts no eviction", PAGES, "        self.cache.num_evictions += 1  # type: ignore[union-attr]\n", ""),
    Mutant("clears pages and not keys", PREFIX, "        self._pages.clear()\n", ""),
    Mutant("clears keys and not pages", PREFIX, "        self._held.clear()\n", ""),
    Mutant("a key without what comes before", PREFIX, "blake2b(parent + tokens", "blake2b(tokens"),
    Mutant(
        "a key of the first page's tokens", PREFIX, "self._tokens(sequence.tokens, len(keys))", "self._tokens(sequence.tokens, 0)"
    ),
    Mutant("a key without the salt", PREFIX, "else (self.context, salt)", "else (self.context,)"),
]


# Those of test_tier_mutants.py that are not in the scheduler.
PLANTED += [mutant for mutant in TIER_MUTANTS if mutant.module in (PAGES, PREFIX, RECALL, TIERS)]


@pytest.mark.parametrize("mutant", PLANTED, ids=lambda mutant: mutant.name)
def test_a_planted_bug_is_caught(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    simulation.house()  # imports all of them
    plant(monkeypatch, mutant)
    for seed in range(60):
        try:
            fuzz.live(seed, 4 * OPERATIONS_PER_SEED)
        except Exception:  # an AssertionError of the model, or whatever the broken code ran into
            return
    pytest.fail(f"{mutant.name!r} survives 60 lives of {4 * OPERATIONS_PER_SEED} operations")


def test_without_a_bug_nothing_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation.house()
    plant(monkeypatch, None)
    for seed in range(10):
        fuzz.live(seed, OPERATIONS_PER_SEED)
