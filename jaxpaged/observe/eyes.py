"""Everything that looks at an engine, behind the few calls that the engine makes around each change of its scheduler.

Knows who wants to be told what. Refuses to change anything, and to stop a step for its own sake.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from jaxpaged.config import ConfigError, EngineConfig
from jaxpaged.host.beams import Candidates
from jaxpaged.host.plan import StepPlan
from jaxpaged.host.policies import POLICIES
from jaxpaged.host.request import Request, Sequence
from jaxpaged.host.scheduler import Scheduler
from jaxpaged.observe.debug_socket import DebugSocket
from jaxpaged.observe.recorder import Recorder
from jaxpaged.observe.records import RecordingError
from jaxpaged.observe.snapshot import num_wasted_places, tier_counts
from jaxpaged.observe.watch import Watch
from jaxpaged.version import __version__

logger = logging.getLogger("jaxpaged")


class Eyes:
    """The flight recorder, the watch and the debug socket of one engine, each where the options ask for it.

    `planning`, `changing` or `ran` comes before each change of the scheduler, one of the other calls after it.
    """

    def __init__(self, config: EngineConfig, scheduler: Scheduler, clock: Callable[[], float]):
        """Raises ConfigError when debug_socket cannot be opened."""
        self._config, self._scheduler = config, scheduler
        self._recorder: Recorder | None = None
        if config.flight_recorder_bytes:
            header = describe(config, scheduler)
            self._recorder = Recorder(scheduler, max_bytes=config.flight_recorder_bytes, clock=clock, header=header)
        self._watch = Watch(scheduler)
        self._socket = DebugSocket(config.debug_socket, scheduler) if config.debug_socket else None
        self._stage = "plan"

    def changing(self) -> None:
        """The scheduler is about to change."""
        if self._socket is not None:
            self._socket.begin()

    def planning(self, drafts: Mapping[Sequence, Seq[int]]) -> None:
        """It is about to decide a step, with these drafts."""
        self._stage = "plan"
        if drafts and self._recorder is not None:
            self._recorder.proposed(drafts)
        if self._socket is not None:
            self._socket.begin()

    def _end(self) -> None:
        if self._socket is not None:
            self._socket.end()

    def added(self, request: Request) -> None:
        """The scheduler has queued a request."""
        if self._recorder is not None:
            self._recorder.added(request)
        self._end()

    def aborted(self, request_id: str, was_live: bool) -> None:
        """The scheduler has ended a request, or did not know it."""
        if was_live and self._recorder is not None:
            self._recorder.aborted(request_id)
        self._end()

    def stopped(self, request_id: str, index: int, was_live: bool) -> None:
        """The scheduler has ended an output for its text, or it had ended."""
        if was_live and self._recorder is not None:
            self._recorder.stopped(request_id, index)
        self._end()

    def fetched(self, key: bytes, ok: bool) -> None:
        """The scheduler was told of a page that has come from disk, or has not."""
        if self._recorder is not None:
            self._recorder.fetched(key, ok)
        self._end()

    def cache_was_reset(self) -> None:
        """The prefix cache has been emptied."""
        if self._recorder is not None:
            self._recorder.cache_was_reset()
        self._end()

    def singled_out(self, request_ids: Collection[str] | None) -> None:
        """See `Engine.single_out`."""
        if self._recorder is not None:
            self._recorder.singled_out(request_ids)
        self._end()

    def planned(self, plan: StepPlan | None) -> None:
        """The scheduler has decided a step, or that there is none."""
        self._scheduler.pool.step += 1
        if self._recorder is not None and (plan is not None or self._scheduler.has_unfinished):
            self._recorder.planned(plan)
        if plan is not None:
            self._watch.planned(plan)
        self._stage = "run"
        if self._socket is not None:
            self._socket.end()

    def ran(self, token_ids: Seq[int], is_finite: Seq[bool], candidates: Seq[Candidates] | None = None) -> None:
        """The oldest step in flight has run and is about to be committed."""
        self._stage = "commit"
        if self._socket is not None:
            self._socket.begin()
        if self._recorder is not None:
            self._recorder.ran(token_ids, is_finite, candidates)

    def committed(self) -> None:
        """It has been committed."""
        if self._recorder is not None:
            self._recorder.committed()
        self._watch.committed()
        if self._socket is not None:
            self._socket.end()

    def failed(self, error: BaseException) -> None:
        """A step raised, and what runs will be set back. Says what the pool's own check finds, and writes the recording where
        recording_dir says, unless somebody has just interrupted the program.
        """
        try:
            self._scheduler.check()
        except Exception as problem:
            self._watch.wrong_count(problem)
        if self._recorder is None:
            return self._end()
        self._recorder.failed(self._stage, error)
        if self._config.recording_dir is not None and isinstance(error, Exception):
            folder = Path(self._config.recording_dir)
            path = folder / f"step-{self._recorder.num_steps}-{os.getpid()}.recording"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._recorder.save(path)
            except (RecordingError, OSError) as problem:
                logger.warning("The recording of the step that failed is lost: %s", problem)
            else:
                logger.error("A step failed. Run it again without the model: jaxpaged replay %s", path)
                error.add_note(f"recording: {path}")
        self._end()

    def save_recording(self, path: str | os.PathLike[str]) -> Path:
        """Write what the flight recorder holds. Raises ConfigError when there is none, RecordingError when it cannot."""
        if self._recorder is None:
            raise ConfigError("save_recording: there is no recording, flight_recorder_bytes is 0")
        return self._recorder.save(path)

    def close(self) -> None:
        """Close the socket."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def describe(config: EngineConfig, scheduler: Scheduler) -> dict[str, Any]:
    """The header of a recording: what a replay needs to begin at the beginning, and what a reader wants to know."""
    pool = scheduler.pool
    return {
        "jaxpaged": __version__,
        "limits": asdict(scheduler.limits),
        "num_pages": pool.num_pages,
        "page_size": scheduler.limits.page_size,
        "pool": f"{type(pool).__module__}.{type(pool).__qualname__}",
        "prefix_cache": pool.cache is not None,
        "private_prefixes": pool.cache is not None and pool.cache.is_private,
        "cache_context": pool.cache.context if pool.cache is not None else "",
        "tier": pool.tier.options if pool.tier is not None else None,
        "preemption_mode": scheduler.preemption_mode,
        "costs": asdict(scheduler.costs),
        "policy": next((name for name, policy in POLICIES.items() if policy is scheduler.waiting.policy), None),
        "ageing_steps": scheduler.waiting.ageing_steps,
        "options": {field.name: getattr(config, field.name) for field in fields(config)},
    }


def stats(scheduler: Scheduler) -> dict[str, int | float]:
    """What the pool has been through, and how well it is used right now.

    tail waste: allocated token places that hold nothing, of all that are allocated. Scatter: 0 when the free pages that hold
    nothing lie together, 1 when no two of them are neighbours. Lifetime and reuse gap: mean steps a page had an owner, and had
    none between two owners.
    """
    pool, cache = scheduler.pool, scheduler.pool.cache
    allocated = pool.num_used * scheduler.limits.page_size
    num_empty = pool.num_free - pool.num_cached
    return {
        "kv_tail_waste_perc": num_wasted_places(scheduler.running, scheduler.limits.page_size) / allocated if allocated else 0.0,
        "kv_free_scatter_perc": (pool.num_free_runs() - 1) / (num_empty - 1) if num_empty > 1 else 0.0,
        "prefix_cache_evictions": cache.num_evictions if cache is not None else 0,
        "num_blocks_copied": scheduler.num_copies,
        "num_blocks_released": pool.num_released,
        "kv_block_lifetime_steps": pool.owned_steps / pool.num_released if pool.num_released else 0.0,
        "kv_block_reuse_gap_steps": pool.idle_steps / pool.num_reused if pool.num_reused else 0.0,
        **tier_stats(scheduler),
    }


def tier_stats(scheduler: Scheduler) -> dict[str, int | float]:
    """What the tiers below the pool hold and have moved. `external` is what the pool did not have, as vLLM counts it.

    A page is refused when every slot of host memory is in use by a transfer or by somebody who waits.
    """
    counts, cache = tier_counts(scheduler), scheduler.pool.cache
    is_asked = scheduler.pool.tier is not None and cache is not None
    num_slots = counts["num_cpu_blocks"]
    return {
        **counts,
        "cpu_cache_usage_perc": counts["cpu_blocks_used"] / num_slots if num_slots else 0.0,
        "external_prefix_cache_queries": cache.num_queried_tokens - cache.num_hit_tokens if is_asked else 0,  # type: ignore[union-attr]
        "external_prefix_cache_hits": counts["host_prefix_cache_hits"] + counts["disk_prefix_cache_hits"],
    }
