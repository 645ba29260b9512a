"""Random days on which most requests are beam searches, each judged against `isolated_beams`."""

from __future__ import annotations

import dataclasses
import random

from fake_runner import BEAM_VOCAB_SIZE, isolated_beams
from simulation import Ask, Outcome, Scenario, Simulation, outputs_of, random_scenario


class BeamScenario(Scenario):
    """A scenario with beam searches in it."""

    def found(self, ask: Ask) -> list[tuple[list[int], float]]:
        """The results of a search that runs without scheduler."""
        params = ask.params
        stop_ids = frozenset(params["stop_token_ids"]) | (frozenset() if params["ignore_eos"] else frozenset(ask.eos_token_ids))
        how = params["length_penalty"], params["early_stopping"]
        return isolated_beams(ask.prompt, self.max_len(ask), params["n"], stop_ids, *how)

    def expected(self, ask: Ask, index: int = 0) -> list[int]:
        return self.found(ask)[index][0] if is_search(ask) else super().expected(ask, index)


def is_search(ask: Ask) -> bool:
    return ask.params.get("use_beam_search", False)


def beam_scenario(seed: int, *, shares: bool = False, with_faults: bool = True, num_requests: int = 12) -> BeamScenario:
    """A scenario whose every search can be served; most pools have pages for hardly more than the widest of them."""
    plain = random_scenario(seed, shares=shares, forks=True, with_faults=with_faults, num_requests=num_requests)
    rng = random.Random(f"beams {seed}")
    page_size = plain.limits["page_size"]
    num_pages = rng.choice((1, 2, 4, 8)) * -(-(plain.max_model_len - 1) // page_size)
    changes = {"asks": [], "num_pages": 1 + max(num_pages, plain.num_pages - 1)}
    changes["limits"] = {**plain.limits, "max_num_seqs": rng.choice((2, 4, 8, 8, 32))}
    scenario = BeamScenario(**{f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)} | changes)
    num_pages = scenario.num_pages - 1
    for ask in plain.asks:
        stops = tuple(rng.sample(range(BEAM_VOCAB_SIZE), rng.choice((0, 1, 3, 6))))
        params = {
            "use_beam_search": True,
            "max_tokens": rng.choice((None, 1, rng.randint(1, 12), rng.randint(8, 24))),
            "ignore_eos": rng.random() < 0.5,
            "stop_token_ids": stops,
            "length_penalty": rng.choice((-1.0, 0.0, 0.5, 1.0, 2.0)),
            "early_stopping": rng.choice((True, False, "never")),
        }
        error_at = rng.randint(0, 5) if with_faults and rng.random() < 0.1 else None
        search = dataclasses.replace(
            ask, params=params, error_at=error_at, eos_token_ids=tuple(rng.sample(range(BEAM_VOCAB_SIZE), 1))
        )
        num_own = -(-(scenario.max_len(search) - 1) // page_size)
        fits = [n for n in (1, 2, 3, 4, 8) if n <= scenario.limits["max_num_seqs"] and n * num_own <= num_pages]
        if fits and rng.random() < 0.7:
            params["n"] = rng.choice((fits[-1], *fits))
            ask = search
        scenario.asks.append(ask)
    return scenario


class BeamSimulation(Simulation):
    """A BeamScenario, lived through by `run`."""

    num_preempted = 0

    def most_steps(self) -> int:
        # A group that becomes the oldest may have lost all beams but one, and computes each of them anew, once.
        return 2 * super().most_steps()

    def add(self, ask: Ask) -> None:
        super().add(ask)
        if not is_search(ask):
            return
        beam_params, limits = self.house.beam_params, self.limits
        request = next(s.request for s in self.scheduler.waiting if s.request.request_id == ask.request_id)
        room = {"page_size": limits.page_size, "num_pages": self.pool.num_usable, "max_num_seqs": limits.max_num_seqs}
        beam_params.check_room(request, vocab_size=BEAM_VOCAB_SIZE, max_logprobs=BEAM_VOCAB_SIZE, **room)

    def look_at(self, plan, waiting_before: set[str]) -> None:
        super().look_at(plan, waiting_before)
        if self.scheduler.num_preemptions == self.num_preempted:
            assert all(self.pool.num_owners(source) for source, _ in plan.copies), "the last owner of a page copies it"
        self.num_preempted = self.scheduler.num_preemptions

    def take(self, event) -> None:
        if is_search(self.asks[event.request_id]):
            assert event.token_id is None and event.finish_reason is not None, "an event before the search is over"
            name = f"{event.request_id}#{event.index}" if event.index else event.request_id
            self.outcome.outputs[name] = list(event.token_ids)
        super().take(event)

    def check(self) -> None:
        super().check()
        if self.cache is None:
            return
        for sequence in (*self.scheduler.running, *self.scheduler.waiting):
            fresh = dataclasses.replace(sequence, page_keys=[])
            keys = [self.cache._entry(fresh, index)[0] for index in range(len(sequence.page_keys))]
            assert keys == sequence.page_keys, "a beam has the keys of another"

    def judge(self) -> None:
        for ask in filter(is_search, self.scenario.asks):
            events = [self.endings[output] for output in outputs_of(ask)]
            reasons = {str(event.finish_reason) for event in events}
            self.outcome.reasons.update(str(event.finish_reason) for event in events)
            if reasons & {"abort", "error"}:
                assert len(reasons) == 1 and not any(event.token_ids for event in events), "a search ends as a whole"
                assert (ask.abort if reasons == {"abort"} else ask.error_at) is not None
                continue
            stop_ids = ask.params["stop_token_ids"] + (() if ask.params["ignore_eos"] else ask.eos_token_ids)
            for event, (tokens, total) in zip(events, self.scenario.found(ask), strict=True):
                assert list(event.token_ids) == tokens, (
                    f"{ask.request_id} of seed {self.scenario.seed} differs from its isolated run"
                )
                assert abs(event.cumulative_logprob - total) < 1e-9
                assert event.finish_reason == ("stop" if tokens[-1] in stop_ids else "length")
                assert event.stop_reason == (tokens[-1] if tokens[-1] in ask.params["stop_token_ids"] else None)
        searches = [ask for ask in self.scenario.asks if is_search(ask)]
        self.is_perturbed = self.is_perturbed or bool(searches)  # the count of tokens is another
        self.scenario = dataclasses.replace(self.scenario, asks=[ask for ask in self.scenario.asks if not is_search(ask)])
        super().judge()


def simulate_beams(scenario: BeamScenario, *, order: str = "random", **options) -> Outcome:
    """See `simulation.simulate`."""
    return BeamSimulation(scenario, order=order, **options).run()
