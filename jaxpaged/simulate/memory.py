"""Contiguous against paged: the same requests on the same bytes, once with room for the longest sequence set aside for each.

Contiguous allocation is paging with pages of `max_model_len` tokens, so both run in the same scheduler and pool, with the same
costs; only the page size differs. Knows loads and ratios. Refuses to know time of day and devices.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass

from jaxpaged.config import DTYPE_BYTES, ConfigError, EngineConfig, ModelConfig
from jaxpaged.host.pages import PagePool
from jaxpaged.host.scheduler import Scheduler
from jaxpaged.simulate.arrivals import Arrival
from jaxpaged.simulate.cost import CostModel
from jaxpaged.simulate.lengths import Lengths, Uniform
from jaxpaged.simulate.report import waste
from jaxpaged.simulate.run import Run, build_scheduler, simulate

# (share of requests, lengths of prompts, lengths of answers). Tutorials name these loads and give no lengths: these are ours.
Load = tuple[tuple[float, Lengths, Lengths], ...]
_SHORT = (Uniform(50, 200), Uniform(50, 200))
_MEDIUM = (Uniform(200, 1000), Uniform(100, 500))
_LONG = (Uniform(2000, 6000), Uniform(100, 500))
LOADS: dict[str, Load] = {
    "short chat": ((1.0, *_SHORT),),
    "medium chat": ((1.0, *_MEDIUM),),
    "long RAG": ((1.0, *_LONG),),
    "mixed": ((0.5, *_SHORT), (0.3, *_MEDIUM), (0.2, *_LONG)),
}


@dataclass(frozen=True)
class Outcome:
    """One load on one kind of memory, over the steps that left somebody waiting: as long as more memory would have helped.

    Args:
      pool_tokens: places of the whole pool.
      allocated, held: the mean number of places with an owner, and of those with a token.
      mean_requests: at a time.
    """

    load: str
    kind: str
    pool_tokens: int
    allocated: float
    held: float
    mean_requests: float
    peak_requests: int
    output_throughput: float
    num_preemptions: int

    @property
    def utilisation(self) -> float:
        """The share of the pool that holds tokens."""
        return self.held / self.pool_tokens

    @property
    def waste(self) -> float:
        """The share of allocated places that hold none."""
        return waste(self.held, self.allocated)


def random_load(load: Load, num_prompts: int, seed: int, max_model_len: int) -> list[Arrival]:
    """Requests of a load, all at once, cut to fit the model's limit."""
    rng = random.Random(f"load {seed}")
    kinds = rng.choices(load, weights=[share for share, _, _ in load], k=num_prompts)
    found = []
    for _, input_len, output_len in kinds:
        num_prompt = min(input_len.draw(rng), max_model_len - 1)
        found.append(Arrival(0.0, num_prompt, min(output_len.draw(rng), max_model_len - num_prompt)))
    return found


def compare(
    config: EngineConfig,
    model: ModelConfig,
    cost: CostModel,
    *,
    num_pages: int,
    num_prompts: int,
    seed: int,
    loads: Sequence[str] = tuple(LOADS),
) -> list[Outcome]:
    """Each load with contiguous memory, then with paged memory of as many bytes. `config` is resolved.

    Raises:
      ConfigError: the pool has no room for one sequence of max_model_len.
    """
    config = dataclasses.replace(config, enable_prefix_caching=False)
    max_len: int = config.max_model_len  # type: ignore[assignment]
    pool_tokens = num_pages * config.block_size  # type: ignore[operator]
    num_places = pool_tokens // max_len
    if not num_places:
        raise ConfigError(f"max_model_len: got {max_len:,}, the pool holds {pool_tokens:,} tokens (raise kv_cache_memory_bytes)")
    found = []
    for name in loads:
        arrivals = random_load(LOADS[name], num_prompts, seed, max_len)
        paged = build_scheduler(config, model, num_pages)
        # One page of the pool is the null page. It is a device's need, not of contiguous memory, so there it comes on top.
        contiguous = Scheduler(PagePool(num_places + 1), dataclasses.replace(paged.limits, page_size=max_len))
        for kind, scheduler in (("contiguous", contiguous), ("paged", paged)):
            run = simulate(scheduler, arrivals, cost, max_model_len=max_len)
            found.append(_outcome(name, kind, pool_tokens, run))
    return found


def _outcome(load: str, kind: str, pool_tokens: int, run: Run) -> Outcome:
    if not run.crowded.seconds:
        raise ConfigError(f"{load}: all requests fit at once, so that there is nothing to compare (raise num_prompts)")
    seconds = run.crowded.seconds
    return Outcome(
        load=load,
        kind=kind,
        pool_tokens=pool_tokens,
        allocated=run.crowded.allocated_seconds / seconds,
        held=run.crowded.held_seconds / seconds,
        mean_requests=run.crowded.row_seconds / seconds,
        peak_requests=run.crowded.peak_rows,
        output_throughput=sum(life.num_output for life in run.lives) / run.duration_s,
        num_preemptions=run.scheduler.num_preemptions,
    )


def arithmetic(config: EngineConfig, model: ModelConfig, num_pages: int) -> str:
    """From bytes to pages to sequences, every factor shown."""
    size: int = config.block_size  # type: ignore[assignment]
    max_len: int = config.max_model_len  # type: ignore[assignment]
    dtype, page_bytes = config.kv_cache_dtype, model.page_bytes(size, config.kv_cache_dtype)
    # Query heads instead of key/value heads, or no bytes of a number: that is where wrong page counts come from.
    factors = f"{size} tokens x 2 (key, value) x {model.num_kv_heads} heads x {model.head_dim} x {model.num_layers} layers"
    gibibytes = f"{num_pages * page_bytes / 2**30:,.2f} GiB"
    tokens, aside = num_pages * size, f"{max_len:,} set aside for each request, whatever it needs"
    return "\n".join(
        (
            f"one page   = {factors} x {DTYPE_BYTES[dtype]} bytes ({dtype}) = {page_bytes:,} bytes",
            f"the pool   = {gibibytes} / {page_bytes:,} bytes = {num_pages:,} pages x {size} = {tokens:,} tokens",
            f"contiguous = {tokens:,} tokens / {aside} = {tokens // max_len:,} requests",
            f"paged      = pages as tokens come, so at most {size - 1} empty places in each request; page 0 is the null page",
        )
    )


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes for a reader, each load's two kinds under each other, and what the columns mean."""
    rows = [("load", "memory", "requests at once", "allocated", "utilisation", "waste", "tokens/s")]
    for found in outcomes:
        requests = f"{found.mean_requests:,.1f} (peak {found.peak_requests:,})"
        shares = (f"{found.allocated / found.pool_tokens:.1%}", f"{found.utilisation:.1%}", f"{found.waste:.2%}")
        rows.append((found.load, found.kind, requests, *shares, f"{found.output_throughput:,.0f}"))
    lines = ["{:12} {:11} {:>18} {:>10} {:>12} {:>8} {:>10}".format(*row) for row in rows]
    return "\n".join(
        (
            *lines,
            "",
            "allocated: share of the pool with an owner. utilisation: share of the pool that holds tokens. waste: share of the",
            "allocated that holds none. Means over the time in which requests waited, that in which the pool filled included.",
        )
    )
