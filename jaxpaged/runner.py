"""The device side behind one interface: weights, page pool and compiled steps. StepInputs in, StepOutputs out.

Knows buckets and bytes. Refuses to know sequences. The engine takes any object with this interface, so the whole host side is
tested with a fake that has no model.
"""

from __future__ import annotations

import functools
import itertools
import logging
import operator
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import psutil
from tqdm import tqdm

from jaxpaged import batch, duel
from jaxpaged.adjuster import Adjuster
from jaxpaged.config import Bucket, ConfigError, EngineConfig, ModelConfig
from jaxpaged.drafter import Draft, Drafter
from jaxpaged.host.beams import Candidates
from jaxpaged.host.plan import Chunk, StepPlan
from jaxpaged.host.preemption import SwapCosts
from jaxpaged.host.request import Likelihood, Sequence
from jaxpaged.ledger import Ledger
from jaxpaged.model import cache as kv_cache
from jaxpaged.model import draft as model_draft
from jaxpaged.model import duel as model_duel
from jaxpaged.model import processors
from jaxpaged.model import step as model_step
from jaxpaged.model import weights as model_weights
from jaxpaged.model.adjust import Adjustments
from jaxpaged.model.cache import KVCache
from jaxpaged.model.draft import DraftInputs
from jaxpaged.model.step import PackedInputs, PromptLogprobs, StepOutputs
from jaxpaged.model.transformer import products_of
from jaxpaged.model.weights import Weights
from jaxpaged.offload.transfer import Offload
from jaxpaged.structured.chooser import Chooser, Late
from jaxpaged.structured.grammars import Grammars
from jaxpaged.structured.matchers import Matchers
from pallas_kernels import backends
from pallas_kernels.paged_decode_attention import dispatch

logger = logging.getLogger("jaxpaged")

FEW_ON_CPU = 1  # sequences that get a way of their own through the draft model: a CPU pays for each row of it
MEASURED_STEPS = 4  # the first is slower than the others
ZEROED_AT_ONCE = 64  # pages of a request that has failed, of all layers
_CPU_POOL_BYTES = 4 << 30  # as much as vLLM's CPU build takes by default


class ResourceError(RuntimeError):
    """The machine has too little memory for what was asked. One line with both numbers."""


class Result(NamedTuple):
    """What a step yields, for each of `plan.outputs()` in its order; what nobody wants is None."""

    token_ids: Seq[int]
    is_finite: Seq[bool]  # whether what was computed were finite numbers
    candidates: Seq[Candidates] | None = None  # of beams; nothing for what is no beam
    likelihoods: Seq[Likelihood | None] | None = None  # of the tokens; None for those of which it is not wanted
    prompts: Seq[tuple[Chunk, list[Likelihood]]] = ()  # of the prompt's tokens from `chunk.start + 1` on


class Runner(Protocol):
    """What the engine needs of a device."""

    num_pages: int
    duel: duel.Duel | None
    drafter: Drafter | None
    matchers: Matchers | None

    def submit(self, plan: StepPlan) -> Callable[[], Result]:
        """Start one step, behind those before it; the call that comes back waits for it.

        A chunk whose token is pending takes it from the step before. Where one of `plan.unsampled()` was not finite, `token_ids`,
        `is_finite` and `candidates` go on with those, in their order.
        """
        ...

    def clean(self, pages: Seq[int]) -> None:
        """Zero pages, behind all that is submitted."""
        ...

    def recover(self) -> bool:
        """After a step that failed, or whose result will not be asked for: make anew what it has taken along of the arrays on the
        device. Whether the pages hold what they held; else they are zeros.
        """
        ...

    def fetched(self, *, wait: bool = False) -> list[tuple[bytes, bool]]:
        """The keys of `plan.transfers.fetches` that have ended since the last call, each with whether its page is in its slot.

        Asked for only while some are in flight.

        Args:
          wait: do not return before there is one.
        """
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


@dataclass(eq=False)
class _Step:
    """One that was submitted. What its masked rows sample is put in later."""

    outputs: StepOutputs


class JaxRunner:
    """Owns the weights, the page pool and one executable per bucket.

    Invariant: after `warm_up` nothing compiles; a shape outside the bucket list is an error, never a silent recompile.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: ModelConfig,
        weights: Weights,
        *,
        num_pages: int,
        draft: Draft | None = None,
        grammars: Grammars | None = None,
    ):
        """`draft`: the model that proposes, if one does. `grammars`: those of the model's tokenizer; without them no request may
        have one.
        """
        self.config, self.model, self.weights, self.num_pages = config, model, weights, num_pages
        self.buckets = config.buckets()
        self.cache = kv_cache.init_cache(model, num_pages, config.block_size, config.kv_cache_dtype)  # type: ignore[arg-type]
        self.compiled: dict[Bucket, jax.stages.Compiled] = {}
        self.compiled_alone: dict[Bucket, jax.stages.Compiled] = {}  # where there is a draft model, those it takes no part in
        self.ledger = Ledger(config.prefill_tile)  # type: ignore[arg-type]
        sizes = {"tile": config.prefill_tile, "page_size": config.block_size, "max_blocks_per_seq": config.max_blocks_per_seq}
        self._pad = functools.partial(batch.pad, known=batch.DecodeRows(sizes["max_blocks_per_seq"]), **sizes)  # type: ignore[arg-type]
        num_rows = self.buckets[-1].decode_rows + self.buckets[-1].prefill_tiles
        self._feed = batch.Feed(np.zeros(num_rows, np.int32), {})
        limits = {"num_sequences": config.max_num_seqs, "max_model_len": config.max_model_len, "num_fed": num_rows}
        limits["max_drafts"] = config.max_drafts
        self.adjuster = Adjuster(vocab_size=model.vocab_size, **limits)  # type: ignore[arg-type]
        self.matchers, self._chooser = None, None
        backend = attention_backend(config, model)
        of_tokens = {"max_logprobs": config.max_logprobs, "logprobs_mode": config.logprobs_mode}
        of_tokens["processors"] = config.logits_processors  # type: ignore[assignment]
        processors.check(config.logits_processors, config.extra_args, num_rows, model.vocab_size)
        if grammars is not None:
            self.matchers = Matchers(grammars, vocab_size=model.vocab_size, prepare=self.warm_up_grammars)
            of_rows = {"backend": products_of(backend), **of_tokens}
            self._chooser = Chooser(self.matchers, num_fed=num_rows, **of_rows)  # type: ignore[arg-type]
        self._late: tuple[_Step, Late] | None = None
        self.duel = None
        options = {"config": model, "backend": backend, "batch_invariant": config.batch_invariant, **of_tokens}
        step = functools.partial(model_step.step, **options)
        if config.compare_with is not None:
            rival = attention_backend(config, model, "compare_with")
            self.duel = duel.Duel.between(backend, rival, config, model)
            step = functools.partial(model_duel.step, rival=rival, **options)
        self._jitted = self._jitted_alone = jax.jit(model_step.of_packed(step), donate_argnums=1)
        self.drafter = None
        if draft is not None:
            self.drafter = Drafter(*draft, config, num_pages=num_pages)
            options = {"config": draft.model, "backend": attention_backend(config, draft.model)}
            options |= {"max_drafts": self.drafter.max_drafts, "few": FEW_ON_CPU if jax.default_backend() == "cpu" else 0}
            step = functools.partial(model_draft.step_and_propose, step=step, **options)  # type: ignore[arg-type]
            self._jitted = jax.jit(model_step.of_packed(step), donate_argnums=1)
        # A step copies at most one page of each sequence; few sizes, so that a step of two copies does not move 256 null pages.
        limit: int = config.max_num_seqs  # type: ignore[assignment]
        self._copy_sizes = [*itertools.takewhile(lambda size: size < limit, (4**i for i in itertools.count(1))), limit]
        self._copiers: dict[int, jax.stages.Compiled] = {}
        models = (model,) if draft is None else (model, draft.model)
        self._jitted_copy = jax.jit(functools.partial(_copy_pages, models=models), donate_argnums=0)
        self._jitted_zero = jax.jit(functools.partial(kv_cache.zero_pages, config=model), donate_argnums=0)
        self.offload = None
        if num_slots := config.num_host_pages(model):
            where = {"offload_dir": config.offload_dir, "num_threads": config.offload_num_threads}
            self.offload = Offload(self.cache, model, num_slots=num_slots, **where)  # type: ignore[arg-type]

    def submit(self, plan: StepPlan) -> Callable[[], Result]:
        """See `Runner.submit`."""
        self._choose_late()
        if self.offload is not None and any(plan.transfers):
            self.cache = self.offload.transfer(self.cache, plan.transfers)
        if self.drafter is not None:
            self.drafter.moved(plan)
        if not plan.chunks():
            return lambda: Result([], [])
        if plan.copies:
            self._copy(plan.copies)
        bucket = batch.fit(plan, self.buckets, self.config.prefill_tile)  # type: ignore[arg-type]
        padded = self._pad(plan, bucket, self._feed)
        inputs, rows = padded.inputs, padded.rows
        self.ledger.ran(bucket, plan.num_rows, plan.num_tokens - plan.num_rows)
        adjustments = self.adjuster.adjustments(plan, rows, len(inputs.sample_at), self._feed)
        extra = self._extra(plan, rows, len(inputs.sample_at))
        drafting = None
        if self.drafter is not None:
            drafting = self.drafter.inputs(plan, bucket, rows)
        outputs, proposals = self._run(bucket, padded.packed(adjustments, extra), drafting)
        if self.duel is not None:
            outputs, evidence = outputs
            self.duel.record(plan, inputs, rows, evidence, self.cache)
        step = _Step(outputs)
        late = None
        if self._chooser is not None and self._chooser.matchers.is_used:
            late = self._chooser.late(plan, rows, padded.whole(adjustments, extra))
        if late is not None:
            self._late = step, late
        else:
            step.outputs = outputs.replace(logits=None)
            batch.bring(outputs.token_ids, outputs.is_finite)
        sequences = [chunk.sequence for chunk, _ in plan.outputs()]
        self._feed = batch.Feed(outputs.token_ids, dict(zip(sequences, rows, strict=True)))
        wanted = inputs.wants_logprobs[rows].tolist()
        prompts = [one for one in _prompt_places(plan, self.config.prefill_tile) if one[1]]  # type: ignore[arg-type]
        asked = []
        if any(wanted):
            asked = [outputs.logprobs, outputs.ranks]
            if any(sequence.request.params.logprobs for sequence in sequences):
                asked += [outputs.likeliest_ids, outputs.likeliest_logprobs]
        batch.bring(outputs.is_sound, *asked, *(jax.tree.leaves(outputs.prompt) if prompts else ()))
        result = functools.partial(self._result, step, rows, sequences, wanted, prompts)
        if self.drafter is not None and proposals is not None:
            result = self.drafter.with_proposals(result, proposals)
        return lambda: _with_faults(result(), np.asarray(outputs.is_sound), plan, bucket.decode_rows, self.config.prefill_tile)  # type: ignore[arg-type]

    def _run(self, bucket: Bucket, inputs: PackedInputs, drafting: DraftInputs | None) -> tuple[Any, jax.Array | None]:
        """Run a step on the pages: its outputs, and what the draft model proposes where it takes part."""
        is_alone = self.drafter is not None and drafting is None
        steps = self.compiled_alone if is_alone else self.compiled
        if bucket not in steps:  # enforce_eager
            steps[bucket] = self._compile(bucket, is_alone=is_alone)
        if self.drafter is None or is_alone:
            outputs, self.cache = steps[bucket](self.weights, self.cache, inputs)
            return outputs, None
        weights, caches = (self.weights, self.drafter.weights), (self.cache, self.drafter.cache)
        found, (self.cache, self.drafter.cache) = steps[bucket](weights, caches, (inputs, drafting))
        return found

    def _choose_late(self) -> None:
        """Let the rows of the step before that have a grammar choose: the tokens before them are known by now."""
        if self._late is None:
            return
        (step, late), self._late = self._late, None
        step.outputs = self._chooser.choose(late, step.outputs)  # type: ignore[union-attr]
        self._feed = self._feed._replace(token_ids=step.outputs.token_ids)
        batch.bring(step.outputs.token_ids, step.outputs.is_finite)

    def clean(self, pages: Seq[int]) -> None:
        """See `Runner.clean`."""
        for start in range(0, len(pages), ZEROED_AT_ONCE):
            some = np.zeros(ZEROED_AT_ONCE, np.int32)
            some[: len(pages) - start] = pages[start : start + ZEROED_AT_ONCE]
            self.cache = self._zeroer(self.cache, some)

    @functools.cached_property
    def _zeroer(self) -> jax.stages.Compiled:
        return self._jitted_zero.lower(self.cache, np.zeros(ZEROED_AT_ONCE, np.int32)).compile()

    def recover(self) -> bool:
        """See `Runner.recover`."""
        self._late = None
        self._feed = batch.Feed(np.zeros(len(self._feed.token_ids), np.int32), {})
        self.adjuster.recover()
        if _are_sound(self._caches()):
            return True
        for array in jax.tree.leaves(self._caches()):
            if not array.is_deleted():
                array.delete()
        size, dtype = self.config.block_size, self.config.kv_cache_dtype
        self.cache = kv_cache.init_cache(self.model, self.num_pages, size, dtype)  # type: ignore[arg-type]
        if self.drafter is not None:
            self.drafter.recover(self.num_pages, dtype)
        return False

    def fetched(self, *, wait: bool = False) -> list[tuple[bytes, bool]]:
        """See `Runner.fetched`."""
        return self.offload.fetched(wait) if self.offload is not None else []

    def _result(
        self,
        step: _Step,
        rows: list[int],
        sequences: list[Sequence],
        wanted: list[bool],
        prompts: list[tuple[Chunk, list[int]]],
    ) -> Result:
        if self._late is not None and self._late[0] is step:
            self._choose_late()
        outputs = step.outputs
        groups = [sequence.group for sequence in sequences]
        token_ids, is_finite = np.asarray(outputs.token_ids), np.asarray(outputs.is_finite)
        result = Result(token_ids[rows].tolist(), is_finite[rows].tolist())
        if any(groups):
            ids, logprobs = np.asarray(outputs.likeliest_ids), np.asarray(outputs.likeliest_logprobs)
            counts = [group.num_candidates if group is not None else 0 for group in groups]
            found = [
                list(zip(ids[row, :count].tolist(), logprobs[row, :count].tolist(), strict=True))
                for row, count in zip(rows, counts, strict=True)
            ]
            result = result._replace(candidates=found)
        if any(wanted):
            found = _likelihoods(outputs, rows, [sequence.request.params.logprobs or 0 for sequence in sequences])
            result = result._replace(likelihoods=[one if asked else None for one, asked in zip(found, wanted, strict=True)])
        if prompts:
            found = [
                (chunk, _likelihoods(outputs.prompt, places, [chunk.sequence.request.params.prompt_logprobs or 0] * len(places)))  # type: ignore[arg-type]
                for chunk, places in prompts
            ]
            result = result._replace(prompts=found)
        return result

    def warm_up(self, *, use_tqdm: bool) -> None:
        """Compile every bucket, in parallel, from the persistent cache where it has them."""
        started = time.perf_counter()
        # XLA's compiler is itself parallel on large programs; two at a time keeps two cores busy without swelling memory.
        steps = [(bucket, False) for bucket in self.buckets]
        # For when the draft model loses, the steps that read no prompt are there without it too.
        if self.drafter is not None:
            steps += [(bucket, True) for bucket in self.buckets if not bucket.prefill_tiles]
        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as executor:
            compiled = executor.map(lambda step: self._compile(step[0], is_alone=step[1]), steps)
            progress = tqdm(compiled, total=len(steps), desc="Compiling steps", unit="step", disable=not use_tqdm, leave=False)
            copiers = executor.map(self._compile_copier, self._copy_sizes)
            for (bucket, is_alone), found in zip(steps, progress, strict=True):
                (self.compiled_alone if is_alone else self.compiled)[bucket] = found
            self._copiers = dict(zip(self._copy_sizes, copiers, strict=True))
        self.adjuster.warm_up()
        _ = self._zeroer
        if self.offload is not None:
            self.offload.warm_up()
        logger.info("Compiled %d steps in %.1f s.", len(steps), time.perf_counter() - started)

    def measure(self) -> SwapCosts | None:
        """What computing and moving pages takes here, by computing and moving the null page; None when nobody will compare it.

        Attention to what came before is not in it, so long prompts look cheaper to compute than they are.
        """
        if self.offload is None or self.config.preemption_mode != "auto" or not self.compiled:
            return None
        moves, self.cache = self.offload.measure(self.cache)
        bucket = max(self.compiled, key=lambda bucket: (bucket.prefill_tiles, -bucket.decode_rows))
        padded, rest = self._padding(bucket)
        inputs, seconds = padded.packed(*rest), []
        for _ in range(MEASURED_STEPS):
            started = time.perf_counter()
            outputs, _ = self._run(bucket, inputs, self.drafter.padding(bucket) if self.drafter is not None else None)
            jax.block_until_ready(outputs)
            seconds.append(time.perf_counter() - started)
        token_s = min(seconds) / (bucket.prefill_tiles * self.config.prefill_tile)  # type: ignore[operator]
        return SwapCosts(token_s, *moves)

    def warm_up_grammars(self) -> None:
        """Compile what rows with a grammar need, once: a third of the start-up time of a small model, which most never need."""
        if self._chooser is None or self._chooser.compiled or self.config.enforce_eager:
            return
        started = time.perf_counter()
        by_rows = {bucket.decode_rows + bucket.prefill_tiles: bucket for bucket in self.buckets}
        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as executor:
            paddings = map(self._padding, by_rows.values())
            deque(executor.map(self._chooser.compile, [padded.whole(*rest) for padded, rest in paddings]), maxlen=0)
        logger.info("Compiled %d choices by a grammar in %.1f s.", len(by_rows), time.perf_counter() - started)

    def stats(self) -> dict[str, int | float]:
        """What was compiled, and how full the steps were; see `jaxpaged.series`."""
        total, free = _memory()
        return {
            "num_compilations": self.ledger.num_compilations,
            "compilation_seconds": self.ledger.compile_s,
            "num_step_places": self.ledger.num_real + self.ledger.num_padding,
            "num_padding_places": self.ledger.num_padding,
            "device_memory_usage_perc": (total - free) / total,
        }

    def _compile(self, bucket: Bucket, *, is_alone: bool = False) -> jax.stages.Compiled:
        started = time.perf_counter()
        padded, rest = self._padding(bucket)
        arguments = self.weights, self.cache, padded.packed(*rest)
        if self.drafter is not None and not is_alone:
            of_draft = self.drafter.weights, self.drafter.cache, self.drafter.padding(bucket)
            arguments = tuple(zip(arguments, of_draft, strict=True))
        compiled = (self._jitted_alone if is_alone else self._jitted).lower(*arguments).compile()
        self.ledger.compiled(bucket, time.perf_counter() - started)
        return compiled

    def _padding(self, bucket: Bucket) -> tuple[batch.Padded, tuple[Adjustments, dict[str, np.ndarray] | None]]:
        """A step of nothing, and the rest of what it takes."""
        padded = self._pad(StepPlan((), ()), bucket, self._feed)
        R = len(padded.inputs.sample_at)
        return padded, (self.adjuster.plain(R), self._extra(StepPlan((), ()), [], R))

    def _extra(self, plan: StepPlan, rows: Seq[int], num_rows: int) -> dict[str, np.ndarray] | None:
        """The numbers of `extra_args` that logits processors ask for, for each row of a step; None without processors."""
        if not self.config.logits_processors:
            return None
        found = {name: np.full(num_rows, default, np.float32) for name, default in self.config.extra_args.items()}
        for row, (chunk, _) in zip(rows, plan.outputs(), strict=True):
            for name, number in chunk.sequence.request.params.extra_numbers.items():
                found[name][row] = number
        return found

    def _copy(self, copies: Seq[tuple[int, int]]) -> None:
        """Copy pages of all layers onto others, in one call; the rest of its size is the null page onto itself."""
        size = next(size for size in self._copy_sizes if size >= len(copies))
        pairs = np.zeros((2, size), np.int32)
        pairs[:, : len(copies)] = np.transpose(copies)
        if size not in self._copiers:  # enforce_eager
            self._copiers[size] = self._compile_copier(size)
        caches = self._copiers[size](self._caches(), *pairs)
        if self.drafter is not None:
            self.drafter.cache = caches[1]
        self.cache = caches[0]

    def _caches(self) -> tuple[KVCache, ...]:
        """The pages, of the draft model too."""
        return (self.cache,) if self.drafter is None else (self.cache, self.drafter.cache)

    def _compile_copier(self, size: int) -> jax.stages.Compiled:
        return self._jitted_copy.lower(self._caches(), *np.zeros((2, size), np.int32)).compile()

    def log_memory(self) -> None:
        """The start-up table of where every byte goes, and what the pool can hold, in the words that people search logs for."""
        config, model = self.config, self.model
        page_bytes = kv_cache.page_bytes(model, config.block_size, config.kv_cache_dtype)  # type: ignore[arg-type]
        analyses = [compiled.memory_analysis() for compiled in self.compiled.values()]
        temporary_bytes = max((analysis.temp_size_in_bytes for analysis in analyses if analysis is not None), default=0)
        pages = f"KV pages ({self.num_pages:,} x {page_bytes:,} bytes, {config.kv_cache_dtype})"
        rows = [
            (f"weights ({config.weights_dtype})", _kept_bytes(self.weights)),
            (pages, self.num_pages * page_bytes),
            (f"marks for penalties ({config.max_num_seqs:,} sequences)", config.marks_bytes(model)),
            ("temporaries of the largest step", temporary_bytes),
        ]
        if self.offload is not None:
            num_slots = self.offload.host.num_slots
            rows.append((f"host memory for pages ({num_slots:,} x {page_bytes:,} bytes)", num_slots * page_bytes))
        if self.drafter is not None:
            draft = self.drafter.model
            draft_bytes = kv_cache.page_bytes(draft, config.block_size, config.kv_cache_dtype)  # type: ignore[arg-type]
            num_bytes = _kept_bytes((self.weights, self.drafter.weights)) - _kept_bytes(self.weights)  # what they share is one
            rows.append((f"weights of the draft model ({config.weights_dtype})", num_bytes))
            rows.append((f"its KV pages ({self.num_pages:,} x {draft_bytes:,} bytes)", self.num_pages * draft_bytes))
        for what, size in rows:
            logger.info("%-60s %12s", what, f"{size / 2**20:,.1f} MiB")
        num_tokens = (self.num_pages - 1) * config.block_size  # type: ignore[operator]
        max_len = config.max_model_len
        logger.info("GPU KV cache size: %s tokens", f"{num_tokens:,}")
        logger.info("Maximum concurrency for %s tokens per request: %.2fx", f"{max_len:,}", num_tokens / max_len)  # type: ignore[operator]

    def close(self) -> None:
        """See `Runner.close`."""
        if self.offload is not None:
            self.offload.close()
        self.adjuster.close()
        if self.drafter is not None:
            self.drafter.close()
        if self.matchers is not None:
            self.matchers.grammars.close()
        for array in jax.tree.leaves((self.weights, self.cache)):
            if not array.is_deleted():
                array.delete()
        self._feed = self._feed._replace(token_ids=np.zeros(0, np.int32), rows={})
        self.compiled.clear()
        self.compiled_alone.clear()
        self._copiers.clear()


def _are_sound(arrays: Any) -> bool:
    """Whether they are there and hold something: a step that fails on the device leaves arrays that raise."""
    try:
        jax.block_until_ready(arrays)
    except Exception:
        return False
    return not any(array.is_deleted() for array in jax.tree.leaves(arrays))


def _copy_pages(
    caches: tuple[KVCache, ...], sources: jax.Array, targets: jax.Array, *, models: tuple[ModelConfig, ...]
) -> tuple[KVCache, ...]:
    """The same copies in the pages of each model."""
    pairs = zip(caches, models, strict=True)
    return tuple(kv_cache.copy_pages(cache, sources, targets, config=model) for cache, model in pairs)


def _with_faults(result: Result, is_sound: np.ndarray, plan: StepPlan, num_rows: int, tile: int) -> Result:
    """A result that also tells of numbers that are not finite before the last token of a chunk."""
    if is_sound.all():
        return result
    sampled, unsampled, at = is_sound[: plan.num_rows].tolist(), [], num_rows
    for chunk in plan.prefills:
        num_tiles = -(-chunk.num_tokens // tile)
        (sampled if chunk.samples else unsampled).append(bool(is_sound[at : at + num_tiles].all()))
        at += num_tiles
    result = result._replace(is_finite=[*map(operator.and_, result.is_finite, sampled)])
    if all(unsampled):
        return result
    none = len(unsampled)
    return result._replace(
        token_ids=[*result.token_ids, *[0] * none],
        is_finite=[*result.is_finite, *unsampled],
        candidates=[*result.candidates, *[()] * none] if result.candidates is not None else None,
    )


def _prompt_places(plan: StepPlan, tile: int) -> Iterator[tuple[Chunk, list[int]]]:
    """Each prefill with the places, among the tokens of the tiles, of those whose targets are wanted."""
    at = 0
    for chunk in plan.prefills:
        yield chunk, list(range(at, at + len(batch.prompt_targets_of(chunk, chunk.start, chunk.end))))
        at += -(-chunk.num_tokens // tile) * tile


def _likelihoods(outputs: StepOutputs | PromptLogprobs, places: list[int], counts: list[int]) -> list[Likelihood]:
    """What a step has found of one token at each place, with so many likeliest ones."""
    logprobs, ranks = np.asarray(outputs.logprobs)[places].tolist(), np.asarray(outputs.ranks)[places].tolist()
    most = max(counts, default=0)
    if not most:
        return [Likelihood(*found) for found in zip(logprobs, ranks, strict=True)]
    ids, best = (np.asarray(array)[places, :most].tolist() for array in (outputs.likeliest_ids, outputs.likeliest_logprobs))
    return [
        Likelihood(logprob, rank, tuple(itertools.islice(zip(*likeliest, strict=True), count)))
        for logprob, rank, count, *likeliest in zip(logprobs, ranks, counts, ids, best, strict=True)
    ]


def attention_backend(config: EngineConfig, model: ModelConfig, option: str = "attention_backend") -> backends.Backend:
    """The backend of pallas_kernels that an option of the engine means on this machine.

    Raises:
      ConfigError: there is none of this name, or it cannot run here.
    """
    wanted = getattr(config, option)
    try:
        choice = dispatch.choose(
            dispatch.DECODE,
            wanted,
            head_dim=model.head_dim,
            page_size=config.block_size,  # type: ignore[arg-type]
            dtypes=(config.dtype, config.kv_cache_dtype),
        )
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(f"{option}: {error}") from None
    return "interpret" if wanted == "interpret" else choice.name  # type: ignore[return-value]


def plan_memory(config: EngineConfig, model: ModelConfig, draft: ModelConfig | None = None) -> int:
    """Pages of the pool that the options and the device's memory allow, the null page included.

    A draft model has as many pages beside it, and all that is said of the pool's bytes counts both.

    Raises:
      ConfigError: the pool cannot hold one page, or an option asks for more than the machine has.
    """
    models = [one for one in (model, draft) if one is not None]
    page_bytes = sum(kv_cache.page_bytes(one, config.block_size, config.kv_cache_dtype) for one in models)  # type: ignore[arg-type]
    if config.num_gpu_blocks_override is not None:
        num_pages = config.num_gpu_blocks_override
    elif config.kv_cache_memory_bytes is not None:
        num_pages = config.kv_cache_memory_bytes // page_bytes
    else:
        # More than this is never used: every sequence at its full length.
        useful = config.max_num_seqs * config.max_blocks_per_seq + 1  # type: ignore[operator]
        num_pages = min(useful, _spare_bytes(config, models) // page_bytes)
    if num_pages < 2:
        room = f"the page pool has room for {num_pages} pages of {page_bytes:,} bytes"
        raise ConfigError(f"{room}, at least 2 are needed (raise kv_cache_memory_bytes)")
    available = _memory()[1]
    if num_pages * page_bytes > available:
        needed = f"{num_pages * page_bytes / 2**30:.2f} GiB ({num_pages:,} pages)"
        raise ResourceError(f"the page pool needs {needed}, {available / 2**30:.2f} GiB are free")
    return num_pages


def _kept_bytes(arrays: Any) -> int:
    """Of all arrays in it, each once."""
    return sum(array.nbytes for array in {id(array): array for array in jax.tree.leaves(arrays)}.values())


def _spare_bytes(config: EngineConfig, models: Seq[ModelConfig]) -> int:
    total, free = _memory()
    if config.gpu_memory_utilization is None and jax.default_backend() == "cpu":
        return min(_CPU_POOL_BYTES, free // 4)
    share = config.gpu_memory_utilization or 0.92
    # The weights are on the device already when this is asked on a GPU; a twentieth is left for the step's temporaries.
    weight_bytes = sum(model_weights.num_bytes(model, config.dtype, config.quantization) for model in models)
    spare = min(total * share - weight_bytes, free) - config.marks_bytes(models[0])
    return int(spare * 0.95)


def _memory() -> tuple[int, int]:
    """Bytes of the device in all and free."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"], stats["bytes_limit"] - stats["bytes_in_use"]
    memory = psutil.virtual_memory()
    return memory.total, memory.available


def use_compilation_cache(option: str | None) -> Path | None:
    """Keep compiled steps on disk between runs; leaves a folder that the user has already set in jax alone."""
    if option == "none":
        return None
    if jax.config.jax_compilation_cache_dir and option is None:  # type: ignore[attr-defined]
        return Path(jax.config.jax_compilation_cache_dir)  # type: ignore[attr-defined]
    folder = Path(option).expanduser() if option else user_cache_dir() / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        logger.warning("Compiled steps are not kept: %s: %s", folder, error.strerror)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Every step is kept: the small ones of a small model add up to most of its start-up time.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


def user_cache_dir() -> Path:
    """The folder of jaxpaged in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME")  # the desktop standard's own variable, not an option of ours
    return (Path(base) if base else Path.home() / ".cache") / "jaxpaged"
