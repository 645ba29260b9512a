"""What outputs share: by hand, by an oracle that knows tokens and no pool, and laws of more and less."""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
from typing import Any

import pytest

from jaxpaged.config import ConfigError, EngineConfig
from jaxpaged.host.beams import BeamGroup
from jaxpaged.host.plan import Chunk, StepPlan
from jaxpaged.host.request import Request, Sequence
from jaxpaged.host.scheduler import Scheduler
from jaxpaged.simulate import shapes, sharing
from jaxpaged.simulate.arrivals import VOCAB_SIZE, Arrival
from jaxpaged.simulate.random_model import NUM_TOKENS, RandomModel
from jaxpaged.simulate.report import summarise
from jaxpaged.simulate.run import Run, build_scheduler, simulate
from jaxpaged.simulate.sharing import BEAMS, SAMPLING

LLAMA = shapes.named_model("llama-3-8b")
PAGE = 16


class Watcher:
    """Every step takes a second; what it saw of pages is counted here once more, from page lists alone."""

    def __init__(self) -> None:
        self.scheduler: Scheduler
        self.num_pages = self.num_held = self.num_lone = 0
        self.written: dict[str, list[int]] = {}

    def step_s(self, plan: StepPlan) -> float:
        ends = {chunk.sequence: chunk.end for chunk in plan.chunks()}
        filled: dict[int, int] = {}
        own: list[int] = []
        for sequence in self.scheduler.running:
            end = ends.get(sequence, sequence.num_computed)
            self.num_lone += sum(map(bool, sequence.pages)) * (1 + sequence.num_to_come)
            self.written[sequence.request.request_id] = sequence.tokens[sequence.num_prompt :]
            own += filter(None, sequence.pages[pages(sequence.num_prompt) :]) if sequence.group is None else ()
            for index, page in enumerate(sequence.pages):
                if page:  # not given back because no layer looks back to it
                    filled[page] = max(filled.get(page, 0), min(PAGE, max(0, end - index * PAGE)))
        self.num_pages += len(filled)
        self.num_held += sum(filled.values())
        assert len(set(own)) == len(own), "outputs that were sampled share more than their prompt"
        return 1.0


def serve(arrivals: list[Arrival], *, num_pages: int = 2000, cost=None, random_model=None, model=LLAMA, **options) -> Run:
    config = EngineConfig(**{"block_size": PAGE, "max_model_len": 2048, "enable_prefix_caching": False, **options})
    scheduler = build_scheduler(config.resolved(model, "gpu"), model, num_pages)
    watcher = cost or Watcher()
    watcher.scheduler = scheduler
    run = simulate(scheduler, arrivals, watcher, max_model_len=2048, random_model=random_model)
    scheduler.check()
    assert not scheduler.has_unfinished and scheduler.pool.num_used == 0 and not run.refused
    if isinstance(watcher, Watcher):
        assert run.occupancy.page_seconds == watcher.num_pages and run.occupancy.held_seconds == watcher.num_held
        assert run.occupancy.lone_page_seconds == watcher.num_lone
    return run


def saved(run: Run) -> float:
    return summarise(run)["kv_saved_by_sharing"]


def pages(num_tokens: int) -> int:
    return math.ceil(num_tokens / PAGE)


# --- by hand -----------------------------------------------------------------------------------------------------


def test_three_outputs_by_hand():
    """A prompt of 40 tokens, three outputs of 20, a second a step.

    Step 1 computes 39 tokens, 3 pages, for all three. Steps 2 to 21 compute the tokens 40 to 59 of each: two pages are shared for
    ever, those behind them are each one's own: 1 up to 48 tokens (9 steps), 2 after that (11 steps).
    """
    run = serve([Arrival(0.0, 40, 20, n=3)])
    assert run.num_steps == 21
    assert run.occupancy.lone_page_seconds == 3 * 3 + 9 * 3 * 3 + 11 * 3 * 4
    assert run.occupancy.page_seconds == 3 + 9 * (2 + 3 * 1) + 11 * (2 + 3 * 2)
    assert saved(run) == pytest.approx(1 - 136 / 222)


@pytest.mark.parametrize("n", [2, 5])
@pytest.mark.parametrize(("num_prompt", "num_output"), [(2, 1), (16, 40), (17, 40), (100, 3), (161, 338)])
def test_outputs_of_one_prompt_in_closed_form(n: int, num_prompt: int, num_output: int):
    run = serve([Arrival(0.0, num_prompt, num_output, n=n)])
    lengths = range(num_prompt, num_prompt + num_output)
    num_shared = (num_prompt - 1) // PAGE  # each output computes the prompt's last token itself
    assert run.occupancy.lone_page_seconds == n * (pages(num_prompt - 1) + sum(map(pages, lengths)))
    expected = (n - 1) * (pages(num_prompt - 1) + num_output * num_shared)
    assert run.occupancy.lone_page_seconds - run.occupancy.page_seconds == expected


@pytest.mark.parametrize("width", [2, 4, 6])
def test_beams_share_the_pages_whose_tokens_they_have_in_common(width: int):
    """Two beams hold one page exactly when they have written the same up to its end, or it is the prompt's."""
    expected = []

    class Oracle(Watcher):
        def step_s(self, plan: StepPlan) -> float:
            ends = [(chunk.sequence.tokens, chunk.end) for chunk in plan.chunks()]
            known = {tuple(tokens[: (index + 1) * PAGE]) for tokens, end in ends for index in range((end - 1) // PAGE)}
            expected.append(len(known) + len(ends))  # the page that is written is each one's own
            return super().step_s(plan)

    run = serve([Arrival(0.0, 50, 200, n=width, use_beam_search=True)], cost=Oracle())
    assert run.occupancy.page_seconds == sum(expected)
    prefill = width * pages(50)  # one sequence that stands for all
    assert run.occupancy.lone_page_seconds == prefill + width * sum(pages(end) for end in range(51, 250))


# --- laws --------------------------------------------------------------------------------------------------------


def crowd(seed: int, num_requests: int = 30) -> list[Arrival]:
    rng = random.Random(seed)
    found = []
    for _ in range(num_requests):
        n = rng.choice([1, 1, 2, 3, 5])
        sizes = rng.randint(1, 90), rng.randint(1, 60)
        found.append(Arrival(rng.random() * 20, *sizes, n=n, use_beam_search=n > 1 and rng.random() < 0.5))
    return sorted(found, key=lambda arrival: arrival.arrival_s)


@pytest.mark.parametrize("seed", [*range(8), 11, 54])  # the last two have outputs that sit out between a fork and a copy
def test_it_is_never_negative_whatever_happens(seed: int):
    """In pools that are too small, with steps in which some outputs sit out; places are counted twice, see `Watcher`."""
    rng = random.Random(seed)
    room: dict[str, Any] = {"num_pages": rng.choice([51, 60, 200]), "max_num_seqs": rng.choice([6, 16])}
    room |= {"max_num_batched_tokens": rng.choice([16, 64]), "prefill_tile": 16}
    run = serve(crowd(seed), **room, scheduling_policy=rng.choice(["fcfs", "lifo", "sjf"]), enable_prefix_caching=bool(seed % 2))
    assert 0 <= saved(run) < 1 and 0 < run.occupancy.held_seconds <= run.occupancy.allocated_seconds
    assert sum(life.num_output for life in run.lives) == sum(arrival.n * arrival.num_output for arrival in crowd(seed))


def test_some_of_those_preempted():
    runs = [serve(crowd(seed), num_pages=51, max_num_seqs=16, enable_prefix_caching=bool(seed % 2)) for seed in range(4)]
    assert sum(run.scheduler.num_preemptions for run in runs) > 10


@pytest.mark.parametrize("use_beam_search", [False, True])
def test_one_output_saves_nothing(use_beam_search: bool):
    run = serve([Arrival(0.0, 40, 50, n=1, use_beam_search=use_beam_search), Arrival(3.0, 70, 20)])
    assert saved(run) == 0 and run.occupancy.lone_page_seconds == run.occupancy.page_seconds > 0


def test_more_outputs_save_more_and_beams_more_than_samples():
    arrivals = {
        kind: [Arrival(0.0, 60, 150, n=n, use_beam_search=kind == BEAMS) for n in (1, 2, 4, 6)] for kind in (SAMPLING, BEAMS)
    }
    found = {kind: [saved(serve([arrival])) for arrival in several] for kind, several in arrivals.items()}
    for shares in found.values():
        assert shares == sorted(set(shares))
        assert all(share <= 1 - 1 / n for share, n in zip(shares, (1, 2, 4, 6), strict=True))
    assert all(beams > samples for samples, beams in zip(found[SAMPLING][1:], found[BEAMS][1:], strict=True))


@pytest.mark.parametrize("use_beam_search", [False, True])
def test_what_is_behind_a_window_is_neither_shared_nor_saved(use_beam_search: bool):
    model = dataclasses.replace(LLAMA, windows=(32,) * LLAMA.num_layers)
    arrival = Arrival(0.0, 100, 200, n=4, use_beam_search=use_beam_search)
    near, far = (serve([arrival], model=one, long_prefill_token_threshold=20) for one in (model, LLAMA))
    assert near.occupancy.lone_page_seconds < far.occupancy.lone_page_seconds / 2
    assert 0 < saved(near) < saved(far)


def test_prefixes_that_requests_share_count_too():
    arrivals = [Arrival(5.0 * number, 80, 40, prefix_len=64) for number in range(3)]
    assert saved(serve(arrivals)) == 0 < saved(serve(arrivals, enable_prefix_caching=True))


def test_searches_of_equal_prompts_write_different_things():
    watcher = Watcher()
    serve([Arrival(0.0, 20, 30, n=2, use_beam_search=True)] * 2, cost=watcher)
    assert len(watcher.written["0"]) == len(watcher.written["1"]) == 29 and watcher.written["0"] != watcher.written["1"]


def test_beams_that_never_forget_share_less():
    arrival = [Arrival(0.0, 20, 300, n=4, use_beam_search=True)]
    forget, remember = (saved(serve(arrival, random_model=RandomModel(kinship=kinship))) for kinship in (0.0, 1.0))
    assert remember < forget - 0.1


def compare(**options) -> list[sharing.Saving]:
    config = EngineConfig(block_size=PAGE, max_model_len=2048).resolved(LLAMA, "gpu")
    where = {"num_pages": 2000, "num_prompts": 8, "max_concurrency": 2, "seed": 0, "random_model": RandomModel(), **options}
    watcher = Watcher()
    watcher.step_s = lambda plan: 1.0  # type: ignore[method-assign]
    return sharing.compare(config, LLAMA, watcher, **where)


def test_a_comparison_serves_the_same_prompts_every_time():
    found = compare(sizes=(1, 2), kinds=(SAMPLING,))
    assert [(saving.dataset, saving.n) for saving in found] == [("alpaca", 1), ("alpaca", 2), ("sharegpt", 1), ("sharegpt", 2)]
    for one, two in zip(found[::2], found[1::2], strict=True):
        assert one.saved == 0 < two.saved < 0.5
        assert two.num_alone == pytest.approx(2 * one.num_alone, rel=0.05)


def test_a_pool_that_is_too_small_is_told():
    with pytest.raises(ConfigError, match=r"sharegpt, beam search: \d+ refused, the first: n: 6 beams of up to"):
        compare(num_pages=200, sizes=(6,), kinds=(BEAMS,))


# --- the model that does not exist -------------------------------------------------------------------------------


def chunk_of(seed: int, written: list[int], width: int = 4) -> Chunk:
    limits: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "max_model_len": 2048, "max_pool_len": 2048}
    params = Arrival(0.0, 3, 500, n=width, use_beam_search=True).sampling_params()
    sequence = Sequence.first(Request.checked("a", [1, 2, 3], params, default_seed=seed, **limits))
    sequence.tokens += written
    return Chunk(sequence, len(sequence.tokens) - 1, 1, True)


def test_a_distribution_is_of_what_was_written():
    model, other = RandomModel(kinship=0.0), RandomModel(kinship=0.0, seed=1)
    first, again = (model.candidates([chunk_of(1, [5, 6])])[0] for _ in range(2))
    assert first == again and len(first) == 4
    assert len({tuple(model.candidates([chunk_of(*place)])[0]) for place in ((1, [5, 6]), (1, [6, 6]), (2, [5, 6]))}) == 3
    assert other.candidates([chunk_of(1, [5, 6])])[0] != first
    kin = RandomModel(kinship=1.0)
    assert kin.candidates([chunk_of(1, [5, 6])]) == kin.candidates([chunk_of(1, [7, 8])])
    assert kin.candidates([chunk_of(1, [5, 6])]) != kin.candidates([chunk_of(2, [5, 6])])


def test_it_is_a_distribution():
    (row,) = RandomModel().candidates([chunk_of(1, [], width=NUM_TOKENS)])
    assert math.fsum(math.exp(logprob) for _, logprob in row) == pytest.approx(1)
    assert {token_id for token_id, _ in row} == set(range(NUM_TOKENS))
    assert [logprob for _, logprob in row] == sorted((logprob for _, logprob in row), reverse=True)


def test_the_constants_give_about_what_was_measured():
    """The figures of simulate/random_model.py: tokens behind the last common one, share of open steps, how open they are."""
    model, own, first = RandomModel(), [], []
    for seed in range(40):
        group = BeamGroup(4, 120, ())
        while not group.is_over:
            found = model.candidates([chunk_of(seed, list(beam.token_ids)) for beam in group.running])
            first += [row[0][1] for row in found]
            group.advance(found)
            if not group.is_over and len(group.running[0].token_ids) >= 16:
                own.append(len(group.running[0].token_ids) - group.num_common)
    is_open = [logprob for logprob in first if logprob < math.log(0.9)]
    assert statistics.fmean(own) == pytest.approx(26.6, rel=0.3)
    assert len(is_open) / len(first) == pytest.approx(0.31, abs=0.05)
    assert statistics.fmean(is_open) == pytest.approx(-1.30, abs=0.15)


# --- what users see of it ----------------------------------------------------------------------------------------


def test_latencies_of_several_outputs_are_each_ones():
    numbers = summarise(serve([Arrival(0.0, 40, 11, n=3)]))
    # A step for the prompt but its last token, then a token of each output a second.
    assert (numbers["mean_ttft_ms"], numbers["mean_tpot_ms"], numbers["mean_itl_ms"]) == (2000, 1000, 1000)
    assert (numbers["completed"], numbers["total_output_tokens"], numbers["max_output_tokens_per_s"]) == (1, 33, 3)


def test_a_search_answers_at_its_end():
    numbers = summarise(serve([Arrival(0.0, 40, 11, n=3, use_beam_search=True)]))
    assert numbers["mean_ttft_ms"] == numbers["mean_e2el_ms"] == 11_000 and numbers["mean_tpot_ms"] == 0
    assert (numbers["completed"], numbers["total_output_tokens"], numbers["max_output_tokens_per_s"]) == (1, 33, 33)


def test_a_search_that_the_engine_would_refuse_is_refused():
    scheduler = build_scheduler(EngineConfig(block_size=PAGE).resolved(LLAMA, "gpu"), LLAMA, 100)
    watcher = Watcher()
    watcher.scheduler = scheduler
    arrivals = [Arrival(0.0, 40, 20, n=30, use_beam_search=True), Arrival(0.0, 400, 200, n=6, use_beam_search=True)]
    arrivals.append(Arrival(0.0, 40, 20, n=129))
    run = simulate(scheduler, arrivals, watcher, max_model_len=2048)
    assert [line.partition(":")[0] for line in run.refused] == ["n"] * 3 and not run.lives
    assert "max_logprobs 20" in run.refused[0] and "the whole pool has 99" in run.refused[1] and "got 129" in run.refused[2]


def test_priorities_decide_who_goes_first():
    arrivals = [Arrival(0.0, 40, 5, priority=priority) for priority in (2, 0, 1)]
    first = [life.first_token_s for life in serve(arrivals, max_num_seqs=1, scheduling_policy="priority").lives]
    assert first[1] < first[2] < first[0]
