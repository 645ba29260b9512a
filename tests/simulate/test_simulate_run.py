"""The loop on the virtual clock: closed forms for one request, laws for many, and the engine's own plans."""

from __future__ import annotations

import dataclasses
import math
import random
import time
from dataclasses import dataclass

import pytest

from jaxpaged.config import EngineConfig
from jaxpaged.engine import Engine
from jaxpaged.host.plan import Limits, StepPlan
from jaxpaged.host.request import FinishReason, SamplingParams
from jaxpaged.simulate import gpus, run, shapes
from jaxpaged.simulate.arrivals import Arrival, random_traffic
from jaxpaged.simulate.cost import Roofline
from jaxpaged.simulate.lengths import DATASETS, Fixed, Uniform
from jaxpaged.simulate.report import summarise
from jaxpaged.simulate.run import Run, build_scheduler, simulate

LLAMA = shapes.named_model("llama-3-8b")


@dataclass
class Price:
    """A step's time as a line in its tokens, and a list of the plans that were asked for."""

    step: float = 0.0
    token: float = 0.0

    def __post_init__(self) -> None:
        self.plans: list[tuple[int, list[tuple[int, int]]]] = []

    def step_s(self, plan: StepPlan) -> float:
        self.plans.append((len(plan.decodes), [(chunk.start, chunk.num_tokens) for chunk in plan.prefills]))
        return self.step + self.token * plan.num_tokens


def serve(arrivals, price=None, *, num_pages: int = 1000, max_model_len: int = 4096, concurrency=None, **options) -> Run:
    config = EngineConfig(**{"block_size": 16, "max_model_len": max_model_len, **options}).resolved(LLAMA, "gpu")
    scheduler = build_scheduler(config, LLAMA, num_pages)
    found = simulate(scheduler, arrivals, price or Price(1.0), max_model_len=max_model_len, max_concurrency=concurrency)
    scheduler.check()
    assert not scheduler.has_unfinished and scheduler.pool.num_used == 0
    return found


# --- one request, by hand ----------------------------------------------------------------------------------------


def test_one_request_takes_what_its_steps_cost():
    found = serve([Arrival(2.0, 100, 4)], Price(step=1.0, token=0.01))
    (life,) = found.lives
    # Steps of 100, 1, 1 and 1 tokens; the last token is not computed.
    assert (life.arrival_s, life.first_token_s, life.last_token_s) == (2.0, pytest.approx(4.0), pytest.approx(7.03))
    numbers = summarise(found)
    assert numbers["mean_ttft_ms"] == pytest.approx(2000) and numbers["mean_tpot_ms"] == pytest.approx(1010)
    assert numbers["mean_itl_ms"] == pytest.approx(1010) and numbers["mean_e2el_ms"] == pytest.approx(5030)
    assert numbers["duration"] == pytest.approx(7.03) and numbers["output_throughput"] == pytest.approx(4 / 7.03)
    assert numbers["num_steps"] == 4 and numbers["num_scheduled_tokens"] == 103
    assert numbers["device_busy"] == pytest.approx(5.03 / 7.03)


def test_one_request_on_a_roofline():
    """TTFT and TPOT from the data sheet, the shape and a pencil: Llama-3-8B's layers, and its head, are so many bytes."""
    config = EngineConfig().resolved(LLAMA, "gpu")
    price = Roofline(gpus.GPUS["H100"], LLAMA, config, bandwidth_efficiency=0.5, flops_efficiency=0.5, overhead_s=0.002)
    numbers = summarise(serve([Arrival(0.0, 50, 3)], price))
    bandwidth, operations = 0.5 * 3.35e12, 0.5 * 989.4e12
    weights = (13_959_168_000 + 1_050_673_152) / bandwidth
    read = 32 * 4096 / bandwidth  # one token's keys and values, all layers
    # 50 tokens are one tile of 64; its products (2 x 65 x 7.5e9 operations at most) hide behind the reading of the weights.
    assert 2 * 65 * 7_504_920_576 / operations < weights
    scores = 32 * 4 * 4096 * (50 * 51 / 2) / operations
    assert numbers["mean_ttft_ms"] == pytest.approx(1e3 * (weights + max(scores, 50 * read) + 0.002), rel=1e-9)
    assert numbers["mean_tpot_ms"] == pytest.approx(1e3 * (weights + (51 + 52) / 2 * read + 0.002), rel=1e-9)


def test_a_long_prompt_comes_in_chunks():
    price = Price(1.0)
    (life,) = serve([Arrival(0.0, 5000, 1)], price, max_model_len=8192).lives
    assert price.plans == [(0, [(0, 2048)]), (0, [(2048, 2048)]), (0, [(4096, 904)])]
    assert life.first_token_s == life.last_token_s == 3.0


def test_what_comes_during_a_step_waits_for_its_end():
    first, second = serve([Arrival(0.0, 10, 2), Arrival(0.25, 10, 1)], Price(1.0)).lives
    assert (first.first_token_s, first.last_token_s) == (1.0, 2.0)
    assert (second.arrival_s, second.first_token_s) == (0.25, 2.0)


def test_an_idle_engine_waits_for_the_next_arrival():
    _, second = serve([Arrival(0.0, 10, 1), Arrival(50.0, 10, 1)], Price(1.0)).lives
    assert (second.arrival_s, second.first_token_s) == (50.0, 51.0)


def test_places_by_hand():
    """Steps of one second: a prompt of 20, then one token each. Two pages of 16 hold 20, 21 and 22 tokens."""
    found = serve([Arrival(0.0, 20, 3)], Price(1.0)).occupancy
    assert (found.seconds, found.page_seconds, found.held_seconds, found.allocated_seconds) == (3, 6, 63, 96)
    assert summarise(serve([Arrival(0.0, 20, 3)]))["kv_waste"] == pytest.approx(1 - 63 / 96)


# --- many requests -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_every_request_gets_its_tokens(seed: int):
    """Half of the pools are too small for the crowd, so that requests are preempted and computed again."""
    rng = random.Random(seed)
    rate = rng.choice((math.inf, 2.0, 0.3))
    arrivals = list(random_traffic(80, Uniform(1, 300), Uniform(1, 120), request_rate=rate, seed=seed))
    found = serve(arrivals, num_pages=40 if seed % 2 else 1000, max_num_seqs=32)
    assert [(life.num_prompt, life.num_output) for life in found.lives] == [(a.num_prompt, a.num_output) for a in arrivals]
    assert {life.finish_reason for life in found.lives} == {FinishReason.LENGTH} and not found.refused
    for life in found.lives:
        assert life.arrival_s < life.first_token_s <= life.last_token_s <= found.duration_s
    assert (found.scheduler.num_preemptions > 0) == bool(seed % 2)
    # One gap between two tokens, and together they are the time from each first token to its last.
    assert found.gaps.total() == sum(life.num_output - 1 for life in found.lives)
    spans = sum(life.last_token_s - life.first_token_s for life in found.lives)
    assert sum(gap * count for gap, count in found.gaps.items()) == pytest.approx(spans)
    assert sum(found.tokens_in_second.values()) == sum(life.num_output for life in found.lives)


@pytest.mark.parametrize("num_pages", [30, 400])
@pytest.mark.parametrize("prefix_len", [0, 64])
def test_nothing_holds_more_than_it_has(num_pages: int, prefix_len: int, monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr(run.Occupancy, "add", lambda self, *state: seen.append(state))
    traffic = random_traffic(60, Uniform(1, 200), Uniform(1, 90), prefix_len=prefix_len, max_model_len=400)
    serve(traffic, num_pages=num_pages, max_model_len=400, max_num_seqs=16)
    assert len(seen) > 100
    for _, pages, held, allocated, rows in seen:
        # Each running request has at most one page that is not full.
        assert 0 < held <= allocated == pages * 16 <= (num_pages - 1) * 16 and allocated - held < 16 * rows


def test_a_seed_is_one_report():
    def report(seed: int) -> dict:
        traffic = random_traffic(60, *DATASETS["sharegpt"], request_rate=3.0, burstiness=0.5, seed=seed)
        return summarise(serve(traffic, Price(0.01, 1e-4)), goodput={"ttft": 30, "tpot": 12})

    assert report(1) == report(1) != report(2)


def test_an_infinitely_fast_device_is_bound_by_arrivals():
    arrivals = list(random_traffic(100, *DATASETS["alpaca"], request_rate=5.0))
    found = serve(arrivals, Price())
    assert found.duration_s == arrivals[-1].arrival_s
    numbers = summarise(found)
    assert numbers["mean_ttft_ms"] == numbers["p99_e2el_ms"] == numbers["device_busy"] == 0.0


def test_a_slow_device_is_bound_by_its_steps():
    found = serve(random_traffic(50, Fixed(20), Fixed(10), request_rate=1e6), Price(0.5))
    assert found.duration_s == pytest.approx(found.num_steps * 0.5) == pytest.approx(found.occupancy.seconds)


def test_more_traffic_does_not_leave_the_device_idler():
    busy, usage, throughput = [], [], []
    for rate in (0.5, 1.0, 2.0, 4.0, 8.0, 16.0):
        traffic = random_traffic(150, Uniform(20, 200), Uniform(10, 60), request_rate=rate, seed=7)
        numbers = summarise(serve(traffic, Price(0.02, 1e-4), max_num_seqs=16))
        busy.append(numbers["device_busy"])
        usage.append(numbers["mean_running_requests"])
        throughput.append(numbers["output_throughput"])
    assert busy == sorted(busy) and usage == sorted(usage) and throughput == sorted(throughput)
    assert busy[0] < 0.9 < busy[-1]


def test_a_door_keeps_the_others_out():
    """Two at a time, three steps each: the third and fourth are sent when the first two have ended, and count from then."""
    found = serve([Arrival(0.0, 10, 3) for _ in range(4)], Price(1.0), concurrency=2)
    assert found.peak_requests == 2 and found.occupancy.peak_rows == 2
    assert [life.arrival_s for life in found.lives] == [0.0, 0.0, 3.0, 3.0]
    assert [life.first_token_s for life in found.lives] == [1.0, 1.0, 4.0, 4.0]
    # Who comes later than there is room counts from the arrival.
    late = serve([Arrival(0.0, 10, 3), Arrival(4.5, 10, 3), Arrival(5.0, 10, 1)], Price(1.0), concurrency=1)
    assert [life.arrival_s for life in late.lives] == [0.0, 4.5, 7.5]


def test_what_the_engine_would_refuse_is_refused():
    found = serve([Arrival(0.0, 64, 5), Arrival(0.0, 10, 5), Arrival(0.0, 200, 5)], max_model_len=64, num_pages=9)
    assert len(found.lives) == 1 and [text.split(",")[0] for text in found.refused] == [
        "prompt has 64 tokens",
        "prompt has 200 tokens",
    ]
    assert summarise(found)["failed"] == 2


def test_an_answer_ends_at_the_models_limit():
    (life,) = serve([Arrival(0.0, 60, 100)], max_model_len=64).lives
    assert life.num_output == 4


def test_a_shared_prefix_is_computed_once_and_only_within_its_tenant():
    def hits(arrivals) -> list[int]:
        return [life.num_cached for life in serve(arrivals, Price(1.0)).lives]

    alike = [Arrival(5.0 * i, 100, 2, prefix_id=0, prefix_len=64) for i in range(4)]
    assert hits(alike) == [0, 64, 64, 64]
    assert hits([dataclasses.replace(arrival, prefix_id=i) for i, arrival in enumerate(alike)]) == [0] * 4
    assert hits([dataclasses.replace(arrival, tenant=f"t{i % 2}") for i, arrival in enumerate(alike)]) == [0, 0, 64, 64]
    assert hits([dataclasses.replace(arrival, prefix_len=0) for arrival in alike]) == [0] * 4


def test_sharing_is_faster_and_can_be_turned_off():
    traffic = list(random_traffic(40, Fixed(50), Fixed(5), prefix_len=1000, request_rate=10.0))
    on, off = (summarise(serve(traffic, Price(0.0, 1e-3), enable_prefix_caching=flag)) for flag in (True, False))
    assert on["num_scheduled_tokens"] < off["num_scheduled_tokens"] / 4 and on["mean_ttft_ms"] < off["mean_ttft_ms"]
    assert off["prefix_cache_queries"] == off["prefix_cache_hits"] == 0


def test_a_simulation_is_quick():
    """A tenth of what is measured on one core, so that only a mistake in the order of the work fails it."""
    started = time.process_time()
    found = serve(random_traffic(200, Fixed(64), Fixed(200)), Price(0.01), max_num_seqs=128)
    assert found.num_scheduled_tokens / (time.process_time() - started) > 30_000


# --- the same decisions as the engine's --------------------------------------------------------------------------


class RecordingRunner:
    """A device that takes no time and says 0, as the simulator's."""

    duel = drafter = matchers = None

    def __init__(self, num_pages: int):
        self.num_pages, self.price = num_pages, Price()

    def submit(self, plan: StepPlan):
        self.price.step_s(plan)
        return lambda: ([0] * len(plan.sampling()), [True] * len(plan.sampling()))

    def close(self) -> None:
        pass


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("num_pages", [60, 2000])
def test_plans_are_those_of_the_engine(num_pages: int, is_async: bool):
    """Equal plans, step by step, for requests that come at the same steps, with sharing and preemption."""
    options = {"block_size": 16, "max_num_seqs": 16, "max_num_batched_tokens": 128, "long_prefill_token_threshold": 100}
    config = EngineConfig(**options, max_model_len=512, async_scheduling=is_async).resolved(LLAMA, "gpu")
    lengths = {"prefix_len": 48, "num_prefixes": 4, "request_rate": 0.5, "seed": 4}
    arrivals = list(random_traffic(60, Uniform(1, 200), Uniform(1, 60), **lengths))
    price = Price(1.0)
    scheduler = build_scheduler(config, LLAMA, num_pages)
    simulate(scheduler, arrivals, price, max_model_len=512, is_async=is_async)

    # No model has as many tokens as the simulator takes to tell prompts apart.
    model = dataclasses.replace(LLAMA, vocab_size=2**31)
    runner = RecordingRunner(num_pages)
    now, pending = 0.0, list(enumerate(arrivals, start=1))
    with Engine(config, model, runner, clock=lambda: now) as engine:
        while pending or engine.has_unfinished:
            while pending and pending[0][1].arrival_s <= now:
                number, arrival = pending.pop(0)
                params = SamplingParams(max_tokens=arrival.num_output, ignore_eos=True)
                engine.add_request(arrival.prompt_token_ids(number), params)
            if engine.has_unfinished:
                num_steps = engine.num_steps
                engine.step()
                now += engine.num_steps - num_steps  # the first only begins one, when the next is planned ahead
            else:
                now = pending[0][1].arrival_s
        assert runner.price.plans == price.plans
        assert engine.scheduler.num_preemptions == scheduler.num_preemptions
        assert (scheduler.num_preemptions > 0) == (num_pages == 60)


def test_limits_come_from_the_options_of_their_name():
    config = EngineConfig(block_size=32, max_num_seqs=7, max_num_batched_tokens=100, long_prefill_token_threshold=9)
    config = config.resolved(LLAMA, "gpu")
    limits = build_scheduler(config, LLAMA, 10).limits
    found = (limits.page_size, limits.max_num_seqs, limits.max_num_batched_tokens, limits.long_prefill_token_threshold)
    assert found == (32, 7, 100, 9) and (limits.tile, limits.max_prefill_tiles) == (64, 2)
    for limit in dataclasses.fields(Limits):
        name = run._OPTION_OF.get(limit.name, limit.name)
        of_others = ("max_prefill_tiles", "sliding_window", "max_num_rows", "lookahead")  # of the options, the model, speculation
        assert name in run.OPTIONS or name in of_others, name
