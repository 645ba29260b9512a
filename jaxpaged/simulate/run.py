"""The loop on a virtual clock: add who has arrived, plan a step, move the clock by its cost, commit dummy tokens.

Knows the scheduler and time. Refuses to know where requests and costs come from.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from jaxpaged.config import EngineConfig, ModelConfig
from jaxpaged.host.beam_params import check_room
from jaxpaged.host.pages import PagePool
from jaxpaged.host.plan import Limits, StepPlan
from jaxpaged.host.request import FinishReason, Request, RequestError, TokenEvent
from jaxpaged.host.scheduler import Scheduler, build
from jaxpaged.simulate.arrivals import VOCAB_SIZE, Arrival
from jaxpaged.simulate.cost import CostModel
from jaxpaged.simulate.random_model import NUM_TOKENS, RandomModel

_DUMMY_TOKEN = 0
# limit of the scheduler -> the option it comes from, where that has another name.
_OPTION_OF = {"page_size": "block_size", "tile": "prefill_tile"}
# Fields of EngineConfig that change what is simulated; the others are for devices, files and people.
OPTIONS = frozenset(
    {
        *("dtype", "kv_cache_dtype", "max_model_len", "enable_prefix_caching", "decode_row_buckets", "prefill_tile_buckets"),
        *(
            "num_gpu_blocks_override",
            "kv_cache_memory_bytes",
            "gpu_memory_utilization",
            "scheduling_policy",
            "ageing_steps",
            "async_scheduling",
        ),
        *("max_logprobs", "quantization"),
        *(_OPTION_OF.get(limit.name, limit.name) for limit in dataclasses.fields(Limits)),
    }
) & {option.name for option in dataclasses.fields(EngineConfig)}


@dataclass(slots=True)
class Life:
    """What became of one request. Times are on the virtual clock; `num_output` counts the tokens of all its outputs so far.

    The tokens of a beam search come all at once, at its end.
    """

    arrival_s: float
    num_prompt: int
    num_output: int = 0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    num_cached: int = 0
    tenant: str | None = None
    finish_reason: FinishReason | None = None
    n: int = 1  # outputs
    num_ended: int = 0  # of them
    last_tokens_s: dict[int, float] = field(default_factory=dict)  # of each output, where there are several


@dataclass
class Occupancy:
    """The pool over time, as integrals over the seconds of steps. A place is room for one token.

    `held` are places with a token that the step's end leaves there, `allocated` those of pages with an owner. `lone_page_seconds`
    count the pages that there would be if each output of each request had all of its own, as far as it has come.
    """

    seconds: float = 0.0
    page_seconds: float = 0.0
    held_seconds: float = 0.0
    allocated_seconds: float = 0.0
    row_seconds: float = 0.0
    lone_page_seconds: float = 0.0
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
    max_logprobs: int = EngineConfig.max_logprobs,
    random_model: RandomModel | None = None,
    is_async: bool = False,
) -> Run:
    """Serve all arrivals, which come in order of time, and say how it went.

    A request that the engine would refuse is refused here too. What arrives during a step is added at its end, as in the engine.

    Args:
      is_async: the next step is planned when one begins, not when it ends; see EngineConfig.async_scheduling.
      max_concurrency: at most so many requests are in the engine; the next one is sent when another ends, and counts from then.
      max_logprobs: as many beams can a search have at most.
      random_model: what beams choose among; one of seed 0 by default.
    """
    run = Run(scheduler)
    desk = _Desk(run, max_model_len, max_concurrency, max_logprobs)
    pending = iter(arrivals)
    arrival = next(pending, None)
    now = free_s = 0.0  # what the host is at, and when the device has done all that it was given
    in_flight: deque[tuple[float, StepPlan, tuple]] = deque()
    while True:
        while arrival is not None and arrival.arrival_s <= now and desk.has_room:
            desk.take(arrival, now)
            arrival = next(pending, None)
        plan = scheduler.plan()
        if plan is None and not in_flight:
            if scheduler.has_unfinished:
                raise RuntimeError(f"{len(scheduler.waiting)} requests wait and nothing runs")
            if arrival is None:
                return run
            now = max(now, arrival.arrival_s)
            continue
        if plan is not None:
            seconds = cost.step_s(plan)
            sampling = plan.sampling()
            token_ids, candidates = [_DUMMY_TOKEN] * len(sampling), None
            if desk.num_several:
                # Outputs of one prompt are not alike, or the prefix cache would take one for another.
                token_ids = [chunk.sequence.index for chunk in sampling]
            if desk.num_searches:
                random_model = random_model or RandomModel()
                candidates = random_model.candidates(sampling)
            _observe(run, plan, seconds, has_forks=bool(desk.num_several))
            free_s = max(free_s, now) + seconds
            in_flight.append((free_s, plan, (token_ids, [True] * len(sampling), candidates)))
            if is_async and len(in_flight) == 1:
                continue
        now, plan, result = in_flight.popleft()
        desk.hand_out(scheduler.commit(plan, *result), now)


class _Desk:
    """Takes requests in and hands tokens out, writing down when."""

    def __init__(self, run: Run, max_model_len: int, max_concurrency: int | None, max_logprobs: int):
        self.run, self.max_model_len = run, max_model_len
        self.max_concurrency, self.max_logprobs = max_concurrency, max_logprobs
        self.max_pool_len = run.scheduler.pool.num_usable * run.scheduler.limits.page_size
        self.live: dict[str, Life] = {}
        self.was_full = False  # during the step before
        self.num_taken = 0
        self.num_several = 0  # unfinished requests of several outputs, and those of them that are beam searches
        self.num_searches = 0

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
                arrival.sampling_params(),
                vocab_size=VOCAB_SIZE,
                max_model_len=self.max_model_len,
                max_pool_len=self.max_pool_len,
                default_seed=self.num_taken,
                arrival_s=arrival_s,
                cache_salt=arrival.tenant,
                priority=arrival.priority,
                tenant=arrival.tenant or "",
            )
            self._check_room(request)
        except RequestError as error:
            self.run.refused.append(str(error))
            return
        self.run.scheduler.add(request)
        life = Life(arrival_s, arrival.num_prompt, tenant=arrival.tenant, n=arrival.n)
        self.live[request_id] = life
        self.num_several += arrival.n > 1
        self.num_searches += arrival.use_beam_search
        self.run.lives.append(life)
        self.run.peak_requests = max(self.run.peak_requests, len(self.live))

    def _check_room(self, request: Request) -> None:
        limits, num_pages = self.run.scheduler.limits, self.run.scheduler.pool.num_usable
        sizes = {"page_size": limits.page_size, "num_pages": num_pages, "max_num_seqs": limits.max_num_seqs}
        check_room(request, vocab_size=NUM_TOKENS, max_logprobs=self.max_logprobs, **sizes)

    def hand_out(self, events: list[TokenEvent], now: float) -> None:
        """What a step that ended now has brought."""
        num_new = 0
        self.was_full = not self.has_room
        for event in events:
            life = self.live[event.request_id]
            if not life.num_output:
                life.first_token_s = now
                life.num_cached = event.num_cached_tokens
            num_more = len(event.token_ids) or 1
            self._note_gap(life, event.index, now)
            num_new += num_more
            life.num_output += num_more
            life.last_token_s = now
            if event.finish_reason is not None:
                life.num_ended += 1
                if life.num_ended == life.n:
                    self._end(event, life)
        self.run.tokens_in_second[int(now)] += num_new
        self.run.duration_s = now

    def _note_gap(self, life: Life, index: int, now: float) -> None:
        """The seconds since the last token of this output, if it has had one."""
        if life.n > 1:
            if index in life.last_tokens_s:
                self.run.gaps[now - life.last_tokens_s[index]] += 1
            life.last_tokens_s[index] = now
        elif life.num_output:
            self.run.gaps[now - life.last_token_s] += 1

    def _end(self, event: TokenEvent, life: Life) -> None:
        life.finish_reason = event.finish_reason
        life.last_tokens_s.clear()
        self.num_several -= life.n > 1
        self.num_searches -= bool(event.token_ids)  # only those of a search come together
        del self.live[event.request_id]


def _observe(run: Run, plan: StepPlan, seconds: float, *, has_forks: bool) -> None:
    """The pool during a step, which is planned and not yet committed."""
    scheduler, num_tokens = run.scheduler, plan.num_tokens
    run.num_steps += 1
    run.num_scheduled_tokens += num_tokens
    pool, page_size = scheduler.pool, scheduler.limits.page_size
    num_owned = num_computed = 0
    for sequence in scheduler.running:
        num_owned += len(sequence.owned_pages)
        num_computed += sequence.num_computed - sequence.num_behind * page_size
    # A shared page is full, but for those of forks that sit this step out: all other empty places are in pages with one owner,
    # and counted per owner none is counted twice.
    num_empty = num_owned * page_size - num_computed - num_tokens
    num_lone = num_owned
    if has_forks:
        num_empty -= _num_empty_shared(scheduler)
        num_lone += sum(len(sequence.owned_pages) * sequence.num_to_come for sequence in scheduler.running)
    num_allocated = pool.num_used * page_size
    state = (seconds, pool.num_used, num_allocated - num_empty, num_allocated, len(scheduler.running))
    run.occupancy.add(*state)
    run.occupancy.lone_page_seconds += seconds * num_lone
    if scheduler.waiting:
        run.crowded.add(*state)


def _num_empty_shared(scheduler: Scheduler) -> int:
    """Empty places of pages with several owners, for each owner but the first."""
    num_empty, seen, page_size = 0, set(), scheduler.limits.page_size
    for sequence in scheduler.running:
        index, num_filled = divmod(sequence.num_computed, page_size)
        page = sequence.pages[index] if num_filled and index < len(sequence.pages) else None
        if page is not None and scheduler.pool.num_owners(page) > 1:
            num_empty += (page_size - num_filled) * (page in seen)
            seen.add(page)
    return num_empty
