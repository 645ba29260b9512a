"""How strong are the simulations with beams? Each known kind of bug is planted into the source, and they have to fail."""

from __future__ import annotations

import pytest
import simulation
from beam_simulation import beam_scenario, simulate_beams
from test_mutants import BEAMS, REQUEST, SCHEDULER, SEARCHES, Mutant, plant

MOST_SCENARIOS = 120  # what a bug may survive

MUTANTS = [
    Mutant("an ended beam beyond the best counts", BEAMS, "(has_ended and rank >= self.width)", "False"),
    Mutant("one beam too few runs on", BEAMS, "len(kept) == self.width)", "len(kept) == max(self.width - 1, 1))"),
    Mutant("ended beams run on", BEAMS, "is_last or token_id in self.stop_ids", "is_last"),
    Mutant("one token more than asked", BEAMS, ") + 1 >= self.max_tokens", ") >= self.max_tokens"),
    Mutant("one token less than asked", BEAMS, ") + 1 >= self.max_tokens", ") + 2 >= self.max_tokens"),
    Mutant(
        "the oldest endings are kept, not the best",
        BEAMS,
        "        self.finished.sort(key=self.score, reverse=True)",
        "        pass",
    ),
    Mutant("worst first", BEAMS, "key=self.score, reverse=True", "key=self.score"),
    Mutant("no length penalty", BEAMS, "len(hypothesis.token_ids) ** self.length_penalty", "1"),
    Mutant("the penalty is a factor", BEAMS, "len(hypothesis.token_ids) ** self", "len(hypothesis.token_ids) * self"),
    Mutant("endings push endings out too late", BEAMS, "del self.finished[self.width :]", "del self.finished[self.width + 1 :]"),
    Mutant("never ends early", BEAMS, "if self.early_stopping is True:", "if False:"),
    Mutant("always ends early", BEAMS, "if self.early_stopping is True:", "if True:"),
    Mutant("never is never", BEAMS, 'self.early_stopping == "never" and', "False and"),
    Mutant("gives up against the best ending", BEAMS, "self.score(self.finished[-1])", "self.score(self.finished[0])"),
    Mutant("scores forget what came before", BEAMS, "-(beam.cumulative_logprob + logprob)", "-logprob"),
    Mutant("too few candidates", BEAMS, "return self.width + len(self.stop_ids)", "return self.width"),
    Mutant(
        "one candidate too few", BEAMS, "return self.width + len(self.stop_ids)", "return self.width + len(self.stop_ids) - 1"
    ),
    Mutant("keeps no rows for beams to come", BEAMS, "return self.width - 1 if", "return 0 if"),
    Mutant(
        "beams are forked with the prompt",
        REQUEST,
        "num_forks=0 if group else request.params.num_drawn - 1",
        "num_forks=request.params.num_drawn - 1",
    ),
    Mutant("goes on before all beams are there", SCHEDULER, "all(beam.candidates for beam in beams)", "True"),
    Mutant("candidates serve twice", SEARCHES, "            beam.candidates = ()\n", ""),
    Mutant(
        "pruned beams keep their pages", SEARCHES, "            self._leave(beam, FinishReason.PRUNED)\n", "            pass\n"
    ),
    Mutant("children in the wrong order", SEARCHES, "for parent, _ in children]\n", "for parent, _ in reversed(children)]\n"),
    Mutant("all children are of the best beam", SEARCHES, "beams[parent].fork(next(indices))", "beams[0].fork(next(indices))"),
    Mutant(
        "a fork forgets what it has computed",
        SCHEDULER,
        "fork.num_computed, fork.num_recorded = sequence.num_computed, ",
        "fork.num_computed, fork.num_recorded = 0, ",
    ),
    Mutant(
        "a sick beam dies alone",
        SCHEDULER,
        "self._end_beams(list(self._by_id[request_id]), FinishReason.ERROR)",
        "self._end_beams([sequence], FinishReason.ERROR)",
    ),
    Mutant(
        "an abort ends one beam",
        SCHEDULER,
        "self._end_beams(sequences, reason)",
        "self._end_beams(sequences[:1], reason)",
    ),
    Mutant("all results have ended by length", SEARCHES, "FinishReason.STOP if last in request.stop_ids else", ""),
    Mutant("copies count as owners", SCHEDULER, "sum(source == page for source, _ in self._copies) > 1", "0 > 1"),
    Mutant(
        "copies count twice",
        SCHEDULER,
        "sum(source == page for source, _ in self._copies) > 1",
        "2 * sum(source == page for source, _ in self._copies) > 1",
    ),
    Mutant(
        "children on the pages of the best beam",
        SEARCHES,
        "self._run_beside(beams[parent], fork)",
        "self._run_beside(beams[0], fork)",
    ),
    Mutant(
        "a preempted beam keeps its candidates", SEARCHES, "(*first.rank[:-1], 0), ()", "(*first.rank[:-1], 0), first.candidates"
    ),
    Mutant(
        "a search gives way beam by beam",
        SEARCHES,
        "        for beam in beams[1:]:\n            self._leave(beam, FinishReason.PRUNED)\n",
        "",
    ),
    Mutant(
        "a search gives way while it is planned",
        SCHEDULER,
        "if last.group is None or last.group is not sequence.group:",
        "if True:",
    ),
    Mutant("all beams go on as the best", SEARCHES, "            fork.tokens[fork.num_prompt :] = beam.token_ids\n", ""),
    Mutant("all beams have the keys of the best", SEARCHES, "            del fork.page_keys[num_common // size :]\n", ""),
    Mutant(
        "beams share what is the best one's own",
        SEARCHES,
        "num_common // size * size if is_beyond else sequence.num_computed",
        "sequence.num_computed",
    ),
    Mutant("beams part a token late", BEAMS, "return sum(1 for _ in", "return 1 + sum(1 for _ in"),
    Mutant(
        "forks of a search that comes back own nothing",
        SEARCHES,
        "            self.pool.share(fork.owned_pages)\n            insort",
        "            insort",
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_planted_bug_is_caught(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    simulation.house()  # imports all of them
    plant(monkeypatch, mutant)
    for seed in range(MOST_SCENARIOS):
        shares = seed % 2 == 0
        try:
            simulate_beams(beam_scenario(seed, shares=shares, with_faults=seed % 4 > 1), is_perturbed=seed % 4 < 2)
        except Exception:  # an AssertionError of a law, or whatever the broken code ran into
            return
    pytest.fail(f"{mutant.name!r} survives {MOST_SCENARIOS} scenarios")


def test_without_a_bug_nothing_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation.house()
    plant(monkeypatch, None)
    for seed in range(8):
        simulate_beams(beam_scenario(seed, shares=seed % 2 == 0, with_faults=seed % 4 > 1), is_perturbed=seed % 4 < 2)
