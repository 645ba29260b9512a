"""The loop: plan, pad, step, commit. Token ids in, token events out.

Owns a scheduler and a runner. Refuses to know text, checkpoints' formats and the shapes of arrays.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import time
from collections import deque
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path

import jax

from jaxpaged import cpu_threads
from jaxpaged.config import MAX_SURE_DRAFTS, ConfigError, EngineConfig, ModelConfig, nearest
from jaxpaged.drafter import Draft, check_draft
from jaxpaged.duel import Duel
from jaxpaged.host import scheduler
from jaxpaged.host.beam_params import check_room
from jaxpaged.host.pages import PagePool
from jaxpaged.host.plan import StepPlan
from jaxpaged.host.preemption import SwapCosts
from jaxpaged.host.request import FinishReason, Likelihood, Request, RequestError, SamplingParams, Sequence, TokenEvent
from jaxpaged.model import weights as model_weights
from jaxpaged.model.quantization import QuantizedMatrix
from jaxpaged.model.transformer import products_of
from jaxpaged.model.weights import Matrix, Weights
from jaxpaged.observe import eyes
from jaxpaged.runner import JaxRunner, Result, Runner, attention_backend, plan_memory, use_compilation_cache
from jaxpaged.speculative import Proposer
from jaxpaged.speculative.draft_model import DraftModelProposer
from jaxpaged.speculative.drafting import Drafting, new_drafting
from jaxpaged.structured.grammars import Grammars
from jaxpaged.structured.matchers import is_constrained
from pallas_kernels.matmul import is_native


class Engine:
    """Serves requests from one page pool. Not thread-safe: one caller drives it.

    Invariant: a request that was refused or has ended owns no page.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: ModelConfig,
        runner: Runner,
        *,
        pool: PagePool | None = None,
        clock: Callable[[], float] = time.monotonic,
        costs: SwapCosts | None = None,
        proposers: Seq[Proposer] = (),
    ):
        """`config` is resolved; `pool` and `clock` are for tests and simulations, `costs` for preemption_mode auto.

        Args:
          proposers: of drafts, asked in their order and before the one that speculative_config names.
        """
        self.config, self.model, self.runner, self.clock = config, model, runner, clock
        self.matchers = runner.matchers
        self.pool = pool if pool is not None else PagePool(runner.num_pages)
        self.scheduler = scheduler.build(config, model, self.pool, costs=costs)
        self._prompts: dict[str, dict[int, Likelihood]] = {}  # of running requests that want them: by place in the prompt
        self._eyes = eyes.Eyes(config, self.scheduler, clock)
        self._row_sizes = sorted({bucket.decode_rows for bucket in config.buckets()})
        if runner.drafter is not None and config.speculation is not None and config.speculation.method == "draft_model":
            proposers = *proposers, DraftModelProposer(runner.drafter, config.speculation.num_speculative_tokens)
        self._drafting: Drafting | None = new_drafting(config, proposers, clock)
        self.num_steps = 0
        self.num_prompt_tokens = 0
        self.num_generation_tokens = 0
        self.failed_ids: frozenset[str] = frozenset()  # requests that were in the last step that raised
        self._untold: list[TokenEvent] = []  # events that no call of `step` has returned yet, of one that went on to fail too
        self._in_flight: deque[tuple[StepPlan, Callable[[], Result]]] = deque()  # steps that run, the oldest first
        self._seeds = random.Random(config.seed)
        self._ids = itertools.count()
        self._is_closed = False

    @classmethod
    def from_weights(
        cls,
        config: EngineConfig,
        model: ModelConfig,
        weights: Weights,
        *,
        draft: Draft | None = None,
        use_tqdm: bool = False,
        pool_type: type[PagePool] = PagePool,
        grammars: Grammars | None = None,
    ) -> Engine:
        """An engine on this machine's device, warmed up, from weights that are already there.

        On a CPU this process's threads are SCHED_BATCH from here on: see `jaxpaged.cpu_threads`.

        Args:
          weights: `jaxpaged.model.weights.Weights` of `config.dtype`; the engine owns them from here and `close` deletes them.
            With `config.quantization` those that are not quantised yet are; `jaxpaged.checkpoint.load` does it one by one.
          draft: the draft model with its weights, likewise, where `config.speculation` is by one.
          grammars: of the model's tokenizer, for requests with structured_outputs.

        Raises:
          ConfigError: an option cannot be, or the draft model cannot propose for this one.
        """
        config = config.resolved(model, jax.default_backend())
        if draft is not None:
            check_draft(draft.model, model)
        if jax.default_backend() == "cpu":
            cpu_threads.wake_in_turn()
        weights = _as_asked(weights, model, config)
        draft = draft._replace(weights=_as_asked(draft.weights, draft.model, config)) if draft is not None else None
        use_compilation_cache(config.compilation_cache_dir)
        num_pages = plan_memory(config, model, draft.model if draft is not None else None)
        turned: dict[int, tuple[jax.Array, Matrix]] = {}
        weights = _as_read(weights, model, config, turned)
        draft = draft._replace(weights=_as_read(draft.weights, draft.model, config, turned)) if draft is not None else None
        runner = JaxRunner(config, model, weights, num_pages=num_pages, draft=draft, grammars=grammars)
        if not config.enforce_eager:
            runner.warm_up(use_tqdm=use_tqdm)
        runner.log_memory()
        return cls(config, model, runner, pool=pool_type(num_pages), costs=runner.measure())

    # --- requests ---

    def add_request(
        self,
        prompt_token_ids: Seq[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        cache_salt: str | None = None,
        priority: int = 0,
        tenant: str = "",
    ) -> Request:
        """Queue a prompt.

        Args:
          cache_salt: requests share the pages of equal beginnings only with requests of the same salt.
          priority: lower is earlier, where scheduling_policy is priority.
          tenant: whose request it is, where scheduling_policy is fair_share.

        Raises:
          RequestError: it can never be served; nothing was taken for it.
        """
        options = {"request_id": request_id, "cache_salt": cache_salt, "priority": priority, "tenant": tenant}
        return self.queue(self.check_request(prompt_token_ids, params, **options))  # type: ignore[arg-type]

    def queue(self, request: Request) -> Request:
        """Queue a request that `check_request` gave.

        Raises:
          RequestError: an unfinished request has its id, or the engine has been closed; nothing was taken for it.
        """
        if self._is_closed:
            raise RequestError("the engine is closed")
        self.scheduler.add(request)
        self._eyes.added(request)
        self.num_prompt_tokens += len(request.prompt_token_ids)
        return request

    def check_request(
        self,
        prompt_token_ids: Seq[int],
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        cache_salt: str | None = None,
        priority: int = 0,
        tenant: str = "",
    ) -> Request:
        """The request that `add_request` would queue, without queuing it. Raises as `add_request`.

        A thread beside the one that drives the engine may ask, also while a step runs, if it names the request itself.
        """
        if self._is_closed:
            raise RequestError("the engine is closed")
        request = Request.checked(
            request_id if request_id is not None else self._new_id(),
            prompt_token_ids,
            params if params is not None else SamplingParams(),
            vocab_size=self.model.vocab_size,
            max_model_len=self.config.max_model_len,  # type: ignore[arg-type]
            max_pool_len=self.pool.num_usable * self.config.block_size,  # type: ignore[operator]
            eos_token_ids=self.model.eos_token_ids,
            default_seed=self._seeds.getrandbits(64),
            arrival_s=self.clock(),
            cache_salt=cache_salt,
            priority=priority,
            tenant=tenant,
        )
        for name in ("logprobs", "prompt_logprobs"):
            wanted, limit = getattr(request.params, name) or 0, self.config.max_logprobs
            if wanted > limit:
                raise RequestError(f"{name}: got {wanted}, the limit is max_logprobs {limit}")
        if unknown := request.params.extra_numbers.keys() - self.config.extra_args.keys():
            name, known = min(unknown), tuple(self.config.extra_args)
            takes = f"expected one of {', '.join(known)}{nearest(name, known)}" if known else "no logits processor takes any"
            raise RequestError(f"extra_args: got {name[:64]!a}, {takes}")
        mode = self.config.logprobs_mode
        if mode.endswith("logits") and request.params.best_of is not None:
            raise RequestError(f"best_of: got {request.params.best_of}, log-probabilities rank outputs, logprobs_mode is {mode}")
        check_room(
            request,
            vocab_size=self.model.vocab_size,
            page_size=self.config.block_size,  # type: ignore[arg-type]
            num_pages=self.pool.num_usable,
            max_num_seqs=self.config.max_num_seqs,  # type: ignore[arg-type]
            max_logprobs=self.config.max_logprobs,
        )
        if request.params.structured_outputs is not None:
            if self.matchers is None:
                raise RequestError("structured_outputs: this engine knows no text: it was made without grammars")
            self.matchers.check(request)
        return request

    def _new_id(self) -> str:
        """An id that no unfinished request has, those that callers chose included."""
        return next(name for name in (f"req-{number}" for number in self._ids) if name not in self.scheduler)

    def abort(self, request_id: str) -> list[TokenEvent]:
        """End a request now; its pages are free when this returns. An event for each output that had not ended, behind those that
        no step has returned yet.
        """
        self._eyes.changing()
        events = self.scheduler.abort(request_id)
        self._eyes.aborted(request_id, bool(events))
        self._prompts.pop(request_id, None)
        if self._untold:
            events = [event for event in self._untold if event.request_id == request_id] + events
            self._untold = [event for event in self._untold if event.request_id != request_id]
        return events

    def stop(self, request_id: str, index: int = 0) -> bool:
        """End one output now because of what its text says, its last event the one that came; its pages are free when this
        returns. False when it has ended already. An output that has no token yet, and a beam, cannot be stopped.
        """
        self._eyes.changing()
        was_live = self.scheduler.stop(request_id, index)
        self._eyes.stopped(request_id, index, was_live)
        return was_live

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has something to do."""
        return self.scheduler.has_unfinished or bool(self._untold)

    @property
    def is_ahead(self) -> bool:
        """Whether a step runs already that nobody has waited for."""
        return bool(self._in_flight)

    def step(self, before_waiting: Callable[[], None] = lambda: None) -> list[TokenEvent]:
        """Start the next step and finish the oldest: at most one new token per output of a running request, and one more for each
        of its drafts that was right; none of a beam search before its end.

        With async_scheduling the oldest is the step before, and the first call finishes none; when there may be drafts, it is
        finished before the next is planned. Empty also when nothing is to be done, and when only prompts and beams have advanced.

        Args:
          before_waiting: called before each wait for the device, which has as much to do then as it can have: the time for what
            may as well come late, after a compilation too where one is needed (`enforce_eager`). It may call `stop` and `abort`,
            and must not raise.
        """
        try:
            self._take_fetched(wait=False)
            drafts = self._forced()
            is_wanted = self._drafting is not None and self._drafting.is_wanted(self._unforced(drafts))
            if is_wanted or drafts or any(chunk.drafts for plan, _ in self._in_flight for chunk in plan.decodes):
                while self._in_flight:
                    before_waiting()
                    self._finish_step()
                drafts = self._forced()
            if is_wanted:
                drafts |= self._possible(self._drafting.propose(self._unforced(drafts)))  # type: ignore[union-attr]
            self._eyes.planning(drafts)
            plan = self.scheduler.plan(drafts)
            self._eyes.planned(plan)
            if self._drafting is not None:
                self._drafting.planned(plan)
            if plan is not None:
                self._in_flight.append((plan, self.runner.submit(plan)))
            elif not self._in_flight and self.scheduler.has_unfinished:
                before_waiting()
                self._take_fetched(wait=True)  # it is for these that they wait
            is_ahead = plan is not None and self.config.async_scheduling and len(self._in_flight) == 1
            if self._in_flight and not is_ahead:
                before_waiting()
                self._finish_step()
            # What runs for nobody is not waited for: all that it was for has ended.
            while self._in_flight and not any(chunk.sequence.finish_reason is None for chunk in self._in_flight[0][0].chunks()):
                self._finish_step(is_awaited=False)
        except BaseException as error:
            in_flight = [chunk.sequence for plan, _ in self._in_flight for chunk in plan.chunks()]
            self.failed_ids = frozenset(one.request.request_id for one in (*in_flight, *self.scheduler.running))
            self._eyes.failed(error)
            with contextlib.suppress(Exception):  # of a scheduler that is broken itself; what raised first is what to tell
                self._set_back()
            raise
        events, self._untold = self._untold, []
        return events

    def _set_back(self) -> None:
        """Forget the steps in flight. What runs begins again with what was committed, without pages if they are lost."""
        self._in_flight.clear()
        if self._drafting is not None:
            self._drafting.failed()
        self.scheduler.rewind()
        if not self.runner.recover():
            self.reset_prefix_cache()

    def single_out(self, request_ids: frozenset[str] | None) -> None:
        """Let these alone run from now on, where one of them may be what makes steps fail; None lets all. Others wait where they
        are. What runs is set back when it is to be others than before.
        """
        if request_ids != self.scheduler.only:
            self._eyes.changing()
            self.scheduler.only = request_ids
            self._eyes.singled_out(request_ids)
            if request_ids is not None:
                self._set_back()

    def _finish_step(self, *, is_awaited: bool = True) -> None:
        """Wait for the oldest step, if it is for anybody; what it brings is untold."""
        plan, wait = self._in_flight.popleft()
        count = len(plan.outputs())
        result = Result(*wait()) if is_awaited else Result([0] * count, [True] * count)
        for chunk, found in result.prompts:
            sequence = chunk.sequence
            if sequence.finish_reason is None:
                # What has come first stays: a prompt that gave way begins again.
                known = self._prompts.setdefault(sequence.request.request_id, {})
                for place, likelihood in enumerate(found, chunk.start + 1):
                    known.setdefault(place, likelihood)
        self._eyes.ran(*result[:3])
        events = self.scheduler.commit(plan, *result[:3])
        if self.scheduler.spoiled:
            self.runner.clean(self.scheduler.spoiled)
        self._eyes.committed()
        if self.matchers is not None and self.matchers.is_used:
            events = self._end_complete(events, plan)
        self.num_steps += 1
        if self._drafting is not None:
            self._drafting.ran(
                plan, result.token_ids if is_awaited else None, len(events), is_last=not self.scheduler.has_unfinished
            )
        if result.likelihoods is not None:
            events = _with_likelihoods(events, plan, result.likelihoods)
        self.num_generation_tokens += sum(len(event.token_ids) or event.token_id is not None for event in events)
        self._untold += map(self._with_prompt, events) if self._prompts else events

    def _end_complete(self, events: list[TokenEvent], plan: StepPlan) -> list[TokenEvent]:
        """End the outputs whose grammar lets nothing follow: the step's events, with their ends."""
        sequences = [chunk.sequence for chunk in plan.sampling() if is_constrained(chunk.sequence)]
        last = {(event.request_id, event.index): place for place, event in enumerate(events)}  # with drafts there may be several
        for sequence in sequences:
            place = last.get((sequence.request.request_id, sequence.index))
            if place is None or events[place].finish_reason not in (None, FinishReason.LENGTH):
                continue
            if self.matchers.is_complete(sequence):  # type: ignore[union-attr]
                if events[place].finish_reason is None:
                    self.stop(events[place].request_id, events[place].index)
                events[place] = events[place]._replace(finish_reason=FinishReason.STOP)
        return events

    def _unforced(self, forced: dict[Sequence, tuple[int, ...]]) -> list[Sequence]:
        """The running sequences but those."""
        return [sequence for sequence in self.scheduler.running if sequence not in forced] if forced else self.scheduler.running

    def _forced(self) -> dict[Sequence, tuple[int, ...]]:
        """Tokens that running sequences will have next because their grammars leave no choice."""
        if self.matchers is None or not self.matchers.is_used or not self.scheduler.num_draft_rows():
            return {}
        in_flight = {chunk.sequence for plan, _ in self._in_flight for chunk in plan.sampling()}
        # As many rows as the step computes anyway, or as cost little more than one.
        num_rows = len(self.scheduler.running)
        room = max(MAX_SURE_DRAFTS, next((size for size in self._row_sizes if size >= num_rows), 0)) - num_rows
        found: dict[Sequence, tuple[int, ...]] = {}
        for sequence in self.scheduler.running:
            # The token to come is the first that is forced, or nothing is known of those after it.
            num_pending = sequence in in_flight
            if room > 0 and is_constrained(sequence) and (num_pending or sequence.num_uncomputed == 1):
                most = min(room, self.config.max_drafts)
                found[sequence] = self.matchers.forced(sequence, most + num_pending)[num_pending:]
                room -= len(found[sequence])
        # Nothing may be in flight when a step with drafts is planned: a few of them are not worth it.
        is_worth_it = 2 * sum(map(len, found.values())) >= num_rows
        return {sequence: drafts for sequence, drafts in found.items() if drafts} if is_worth_it else {}

    def _possible(self, drafts: Mapping[Sequence, tuple[int, ...]]) -> dict[Sequence, tuple[int, ...]]:
        """The drafts as far as grammars let them be."""
        if self.matchers is None or not self.matchers.is_used:
            return dict(drafts)
        return {one: self.matchers.allowed(one, found) if is_constrained(one) else found for one, found in drafts.items()}

    def _with_prompt(self, event: TokenEvent) -> TokenEvent:
        """The first event of a request's first output with what was found of its prompt."""
        found = self._prompts.pop(event.request_id, None) if event.index == 0 else None
        if found is None or event.token_id is None:
            return event
        return event._replace(prompt_likelihoods=tuple(found[place] for place in sorted(found)))

    def _take_fetched(self, *, wait: bool) -> None:
        """Tell the scheduler of the pages that have come from disk since the last call."""
        if not self.scheduler.is_fetching:
            return
        for key, ok in self.runner.fetched(wait=wait):
            self._eyes.changing()
            self.scheduler.fetched(key, ok)
            self._eyes.fetched(key, ok)

    def reset_prefix_cache(self) -> None:
        """Forget what pages hold: no request after this shares a page with one before it. Running requests keep theirs."""
        self._eyes.changing()
        self.pool.reset_cache()
        self._eyes.cache_was_reset()

    # --- for people who look ---

    @property
    def duel(self) -> Duel | None:
        """What the two backends of `compare_with` differ by so far; None without it."""
        return self.runner.duel

    def stats(self) -> dict[str, int | float]:
        """Counters since the start and the state of the pool right now."""
        of_runner = self.runner.stats() if isinstance(self.runner, JaxRunner) else {}
        return {**self.counts(), **eyes.stats(self.scheduler), **of_runner}

    def counts(self) -> dict[str, int | float]:
        """Those of `stats` that are at hand: no page is looked at."""
        page_tokens = sum(sequence.num_computed for sequence in self.scheduler.running)
        return {
            "num_requests_running": len(self.scheduler.running),
            "num_requests_waiting": len(self.scheduler.waiting),
            "num_gpu_blocks": self.pool.num_usable,
            "kv_blocks_active": self.pool.num_used,
            "kv_cache_usage_perc": self.pool.num_used / self.pool.num_usable,
            "kv_blocks_cached": self.pool.num_cached,
            "kv_tokens": page_tokens,
            "num_steps": self.num_steps,
            "num_preemptions": self.scheduler.num_preemptions,
            "prefix_cache_queries": self.pool.cache.num_queried_tokens if self.pool.cache is not None else 0,
            "prefix_cache_hits": self.pool.cache.num_hit_tokens if self.pool.cache is not None else 0,
            "prompt_tokens": self.num_prompt_tokens,
            "generation_tokens": self.num_generation_tokens,
            **(self._drafting.stats() if self._drafting is not None else {}),
        }

    def save_recording(self, path: str | os.PathLike[str]) -> Path:
        """Write the flight recorder's record of this engine to a file, for `jaxpaged replay`. It holds the prompts' tokens.

        Raises:
          ConfigError: flight_recorder_bytes is 0.
          RecordingError: the file cannot be written.
        """
        return self._eyes.save_recording(path)

    def close(self) -> None:
        """End every request and give the device's memory back. A closed engine takes no requests."""
        if self._is_closed:
            return
        live = (*self.scheduler.running, *self.scheduler.waiting)
        for request_id in dict.fromkeys(sequence.request.request_id for sequence in live):
            self.abort(request_id)
        self._in_flight.clear()
        if self._drafting is not None:
            self._drafting.close()
        self._eyes.close()
        self.runner.close()
        self._is_closed = True

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _as_asked(weights: Weights, model: ModelConfig, config: EngineConfig) -> Weights:
    """The weights that a resolved `quantization` means; float matrices that it replaces are deleted.

    Raises:
      ConfigError: they are quantised, and the options do not say so.
    """
    if config.quantization is None:
        if any(map(_is_quantized, jax.tree.leaves(weights, is_leaf=_is_quantized))):
            raise ConfigError("quantization: got None, the weights are quantised; expected int8")
        return weights
    found = model_weights.quantize(weights, model)
    kept = {id(array) for array in jax.tree.leaves(jax.block_until_ready(found))}
    for array in jax.tree.leaves(weights):
        if id(array) not in kept:
            array.delete()
    return found


def _as_read(weights: Weights, model: ModelConfig, config: EngineConfig, turned: dict[int, tuple[jax.Array, Matrix]]) -> Weights:
    """The same numbers in the order in which the step's products read them fastest; matrices that it replaces are deleted."""
    # A duel computes with the products of two backends, which are to have the same weights.
    if config.compare_with is not None or not is_native(products_of(attention_backend(config, model))):
        return weights
    return model_weights.turn(weights, model, turned)


def _is_quantized(leaf: object) -> bool:
    return isinstance(leaf, QuantizedMatrix)


def _with_likelihoods(events: list[TokenEvent], plan: StepPlan, likelihoods: Seq[Likelihood | None]) -> list[TokenEvent]:
    """The events of a step with the log-probabilities of their tokens, which of each output are the first of its rows."""
    found: dict[tuple[str, int], deque[Likelihood | None]] = {}
    for (chunk, _), likelihood in zip(plan.outputs(), likelihoods, strict=True):
        found.setdefault((chunk.sequence.request.request_id, chunk.sequence.index), deque()).append(likelihood)
    # An event of a beam is not of this step alone, and has no token id.
    return [
        event if event.token_id is None else event._replace(likelihood=found[event.request_id, event.index].popleft())
        for event in events
    ]
