"""The loop on a virtual clock: add who has arrived, plan a step, move the clock by its cost, commit dummy tokens.

Knows the scheduler and time. Refuses to know where requests and costs come from.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from jaxpaged.config import EngineConfig, ModelConfig
from jaxpaged.host.pages import PagePool
from jaxpaged.host.plan import Limits
from jaxpaged.host.request import FinishReason, Request, RequestError, SamplingParams, TokenEvent
from jaxpaged.host.scheduler import Scheduler, build
from jaxpaged.simulate.arrivals import VOCAB_SIZE, Arrival
from jaxpaged.simulate.cost import CostModel

_DUMMY_TOKEN = 0
# limit of the scheduler -> the option it comes from, where that has another name.
_OPTION_OF = {"page_size": "block_size", "tile": "prefill_tile"}
# Fields of EngineConfig that change what is simulated; the others are for devices, files and people.
OPTIONS = frozenset(
    {
        *("dtype", "kv_cache_dtype", "max_model_len", "enable_prefix_caching", "decode_row_buckets", "prefill_tile_buckets"),
        *("num_gpu_blocks_override", "kv_cache_memory_bytes", "gpu_memory_utilization", "scheduling_policy", "ageing_steps"),
        *(_OPTION_OF.get(limit.name, limit.name) for limit in dataclasses.fields(Limits)),
    }
) & {option.name for option in dataclasses.fields(EngineConfig)}


@dataclass(slots=True)
class Life:
    """What became of one request. Times are on the virtual clock; `num_output` counts the tokens it has got."""

    arrival_s: float
    num_prompt: int
    num_output: int = 0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    num_cached: int = 0
    tenant: str | None = None
    finish_reason: FinishReason | None = None


@dataclass
class Occupancy:
    """The pool over time, as integrals over the seconds of steps. A place is room for one token.

    `held` are places with a token that the step's end leaves there, `allocated` those of pages with an owner.
    """

    seconds: float = 0.0
    page_seconds: float = 0.0
    held_seconds: float = 0.0
    allocated_seconds: float = 0.0
    row_seconds: float = 0.0
    peak_pages: int = 0
    peak_rows: int = 0

    def add(self, seconds: float, num_pages: int, num_held: int, num_allocated: int, num_rows: int) -> None:
        """A step of that many seconds."""
        self.seconds += seconds
        self.page_seconds += seconds * num_pages
        self.held_seconds += seconds * num_held
        self.allocated_seconds += seconds * num_allocated
        self.row_seconds += seconds * num_rows
        self.peak_pages = max(self.peak_pages, num_pages)
        self.peak_rows = max(self.peak_rows, num_rows)


@dataclass
class Run:
    """Everything that a simulation saw. `gaps` counts the seconds between two tokens of one request."""

    scheduler: Scheduler
    lives: list[Life] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)  # why, one line each
    gaps: Counter[float] = field(default_factory=Counter)
    tokens_in_second: Counter[int] = field(default_factory=Counter)
    occupancy: Occupancy = field(default_factory=Occupancy)
    crowded: Occupancy = field(default_factory=Occupancy)  # the same, over the steps that left somebody waiting
    num_steps: int = 0
    num_scheduled_tokens: int = 0
    peak_requests: int = 0
    duration_s: float = 0.0


def build_scheduler(config: EngineConfig, model: ModelConfig, num_pages: int) -> Scheduler:
    """The scheduler and pool that an engine of these resolved options has."""
    return build(config, model, PagePool(num_pages))


def simulate(
    scheduler: Scheduler,
    arrivals: Iterable[Arrival],
    cost: CostModel,
    *,
    max_model_len: int,
    max_concurrency: int | None = None,
) -> Run:
    """Serve all arrivals, which come in order of time, and say how it went.

    A request that the engine would refuse is refused here too. What arrives during a step is added at its end, as in the engine.

    Args:
      max_concurrency: at most so many requests are in the engine; the next one is sent when another ends, and counts from then.
    """
    run = Run(scheduler)
    desk = _Desk(run, max_model_len, max_concurrency)
    pending = iter(arrivals)
    arrival = next(pending, None)
    now = 0.0
    while True:
        while arrival is not None and arrival.arrival_s <= now and desk.has_room:
            desk.take(arrival, now)
            arrival = next(pending, None)
        plan = scheduler.plan()
        if plan is None:
            if scheduler.has_unfinished:
                raise RuntimeError(f"{len(scheduler.waiting)} requests wait and nothing runs")
            if arrival is None:
                return run
            now = max(now, arrival.arrival_s)
            continue
        seconds = cost.step_s(plan)
        num_sampled = len(plan.sampling())
        _observe(run, plan.num_tokens, seconds)
        now += seconds
        desk.hand_out(scheduler.commit(plan, [_DUMMY_TOKEN] * num_sampled, [True] * num_sampled), now)


class _Desk:
    """Takes requests in and hands tokens out, writing down when."""

    def __init__(self, run: Run, max_model_len: int, max_concurrency: int | None):
        self.run, self.max_model_len = run, max_model_len
        self.max_concurrency = max_concurrency
        self.max_pool_len = run.scheduler.pool.num_usable * run.scheduler.limits.page_size
        self.live: dict[str, Life] = {}
        self.was_full = False  # during the step before
        self.num_taken = 0

    @property
    def has_room(self) -> bool:
        """Whether one more request may be in the engine."""
        return self.max_concurrency is None or len(self.live) < self.max_concurrency

    def take(self, arrival: Arrival, now: float) -> None:
        """Check a request and queue it, or write down why not."""
        # Who came during a step that had room was sent then; who stood at the door is sent only now.
        arrival_s = now if self.was_full else arrival.arrival_s
        request_id = str(self.num_taken)
        self.num_taken += 1
        try:
            request = Request.checked(
                request_id,
                arrival.prompt_token_ids(self.num_taken),
                SamplingParams(max_tokens=arrival.num_output, ignore_eos=True),
                vocab_size=VOCAB_SIZE,
                max_model_len=self.max_model_len,
                max_pool_len=self.max_pool_len,
                arrival_s=arrival_s,
                cache_salt=arrival.tenant,
                tenant=arrival.tenant or "",
            )
        except RequestError as error:
            self.run.refused.append(str(error))
            return
        self.run.scheduler.add(request)
        life = Life(arrival_s, arrival.num_prompt, tenant=arrival.tenant)
        self.live[request_id] = life
        self.run.lives.append(life)
        self.run.peak_requests = max(self.run.peak_requests, len(self.live))

    def hand_out(self, events: list[TokenEvent], now: float) -> None:
        """What a step that ended now has brought."""
        gaps = self.run.gaps
        self.was_full = not self.has_room
        for event in events:
            life = self.live[event.request_id]
            if life.num_output:
                gaps[now - life.last_token_s] += 1
            else:
                life.first_token_s = now
                life.num_cached = event.num_cached_tokens
            life.num_output += 1
            life.last_token_s = now
            if event.finish_reason is not None:
                life.finish_reason = event.finish_reason
                del self.live[event.request_id]
        self.run.tokens_in_second[int(now)] += len(events)
        self.run.duration_s = now


def _observe(run: Run, num_tokens: int, seconds: float) -> None:
    """The pool during a step, which is planned and not yet committed."""
    scheduler = run.scheduler
    run.num_steps += 1
    run.num_scheduled_tokens += num_tokens
    pool, page_size = scheduler.pool, scheduler.limits.page_size
    num_owned = num_computed = 0
    for sequence in scheduler.running:
        num_owned += len(sequence.pages)
        num_computed += sequence.num_computed
    # A shared page is full, so all empty places are in pages with one owner: counted per owner, none is counted twice.
    num_empty = num_owned * page_size - num_computed - num_tokens
    num_allocated = pool.num_used * page_size
    state = (seconds, pool.num_used, num_allocated - num_empty, num_allocated, len(scheduler.running))
    run.occupancy.add(*state)
    if scheduler.waiting:
        run.crowded.add(*state)
