"""Bugs of the tiers, planted one by one: the simulation has to fail. See test_mutants.py, which has all the others."""

from __future__ import annotations

import pytest
import simulation
from revisits import revisits
from test_mutants import PAGES, PREFIX, RECALL, SCHEDULER, TIERS, Mutant, plant

MOST_SCENARIOS = 50  # what a bug may survive, of each of two kinds

MUTANTS = [
    Mutant("a pinned slot is given away", TIERS, "        self._idle.pop(slot, None)\n", ""),
    Mutant("a slot that is written is not pinned", TIERS, "(slot, tokens), key, 1\n", "(slot, tokens), key, 0\n"),
    Mutant("spills nothing", TIERS, "                self._spills.append((slot, old))\n", ""),
    Mutant("spills under the key of what comes", TIERS, "self._spills.append((slot, old))", "self._spills.append((slot, key))"),
    Mutant("spills and forgets that it did", TIERS, "                self._disk[old] = old_tokens\n", ""),
    Mutant("spills with the tokens of what comes", TIERS, "self._disk[old] = old_tokens", "self._disk[old] = tokens"),
    Mutant("saves nothing", TIERS, "        self._saves.append((page, slot))\n", ""),
    Mutant("saves the null page", PAGES, "self.tier.save(page, held)", "self.tier.save(NULL_PAGE, held)"),
    Mutant("saves what it has", TIERS, "        if held.key in self._held:\n", "        if False:\n"),
    Mutant("loads nothing", RECALL, "                tier.load(slot, page)  # type: ignore[union-attr]\n", ""),
    Mutant("loads to the page before", TIERS, "self._loads.append((slot, page))", "self._loads.append((slot, page - 1))"),
    Mutant(
        "loads in the wrong order", RECALL, "zip(found.slots, fresh, strict=True)", "zip(found.slots[::-1], fresh, strict=True)"
    ),
    Mutant("fetches nothing", TIERS, "            self._fetches.append((wanted.key, slot))\n", ""),
    Mutant(
        "takes what is still on its way",
        RECALL,
        "page is not None or (slot is not None and not tier.is_fetching(held.key))",
        "page is not None or slot is not None",
    ),
    Mutant("takes a miss for a page", TIERS, "        if not ok:\n", "        if False:\n"),
    Mutant(
        "a miss stays on disk", TIERS, "            del self._disk[key]\n            del self._held", "            del self._held"
    ),
    Mutant("what comes late is an error", TIERS, "            if key in ways:\n", "            if False:\n"),
    Mutant("lost plans are counted on", SCHEDULER, "        self.pool.rewind()\n", ""),
    Mutant(
        "what a lost plan saved is counted on",
        TIERS,
        "            moved += [self._keys[slot] for _, slot in transfers.saves]\n",
        "",
    ),
    Mutant("what is on its way is not lost by a reset", TIERS, "self._lost[key] = self._fetching.pop(key)", "pass"),
    Mutant("a reset leaves the tiers alone", PAGES, "            self.tier.clear()\n", "            pass\n"),
    Mutant("a reset leaves the disk alone", TIERS, "        self._disk.pop(key, None)\n", ""),
    Mutant(
        "what is forgotten keeps its slot",
        TIERS,
        "            del self._idle[slot]\n            self._free.append(slot)\n",
        "            pass\n",
    ),
    Mutant(
        "what is forgotten is free at once",
        TIERS,
        "        if slot in self._idle:\n            del",
        "        if True:\n            del",
    ),
    Mutant("saves stay pinned", TIERS, "        for _, slot in transfers.saves:\n            self.unpin(slot)\n", ""),
    Mutant("loads stay pinned", TIERS, "        for slot, _ in transfers.loads:\n            self.unpin(slot)\n", ""),
    Mutant(
        "slots are not pinned before room is made",
        RECALL,
        "for slot in found.slots:  # before",
        "for slot in ():  # before",
    ),
    Mutant("more fetches than may be", TIERS, "return self.num_fetching < self.max_fetches", "return True"),
    Mutant(
        "who waits no more keeps its pins", RECALL, "            self.pool.tier.unpin(slot)", "            slot or self.pool.tier"
    ),
    Mutant(
        "who is admitted still waits",
        RECALL,
        "            pages.append(page)\n        self.leave(sequence)\n",
        "            pages.append(page)\n",
    ),
    Mutant("who is aborted still waits", SCHEDULER, "        self.recall.leave(sequence)\n", ""),
    Mutant(
        "the device is told of no transfers",
        SCHEDULER,
        "StepPlan(tuple(decodes), tuple(prefills), copies, transfers)",
        "StepPlan(tuple(decodes), tuple(prefills), copies)",
    ),
    Mutant(
        "a plan of transfers alone is dropped",
        SCHEDULER,
        "if not decodes and not prefills and not any(transfers):",
        "if not decodes and not prefills:",
    ),
    Mutant("a plan's transfers never end", SCHEDULER, "            self.pool.tier.ended(plan.transfers)\n", "            pass\n"),
    Mutant("keeps what is to be let go", PAGES, "if is_kept and self.tier", "if self.tier"),
    Mutant("what is nobody's is kept", SCHEDULER, "            self._drop(sequence)\n", "            pass\n"),
    Mutant("what is dropped stays cached", PAGES, "if self._cached.pop(page, None) is not None:", "if False:"),
    Mutant("what is dropped stays below", PAGES, "            self.tier.forget(key)\n", "            pass\n"),
    Mutant("what is private is everybody's", PREFIX, "salt, sequence.number) if", "salt) if"),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_bug_is_caught(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    simulation.house()  # imports all of them
    plant(monkeypatch, mutant)
    for seed in range(MOST_SCENARIOS):
        try:
            simulation.simulate(revisits(seed, with_faults=seed % 2 == 0), is_perturbed=seed % 2 == 1)
            simulation.simulate(simulation.random_scenario(seed, num_requests=10, shares=seed % 2 == 1, tiers=True))
        except Exception:  # an AssertionError of a law, or whatever the broken code ran into
            return
    pytest.fail(f"{mutant.name!r} survives {2 * MOST_SCENARIOS} scenarios")


def test_without_a_bug_nothing_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation.house()
    plant(monkeypatch, None)
    for seed in range(10):
        simulation.simulate(revisits(seed, with_faults=seed % 2 == 0), is_perturbed=seed % 2 == 1)
        simulation.simulate(simulation.random_scenario(seed, num_requests=10, shares=seed % 2 == 1, tiers=True))
