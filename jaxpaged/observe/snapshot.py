"""What scheduler, pool and prefix cache hold at one moment, as plain values that JSON can carry.

Knows what people ask about. Reads and never changes; every list is bounded, so that a look costs little however much there is.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from jaxpaged.host import request
from jaxpaged.host.scheduler import Scheduler

MAX_LINES = 1000
VIEWS = ("scheduler", "active-blocks", "prefix-cache")


def snapshot(scheduler: Scheduler, view: str, *, max_lines: int = MAX_LINES) -> dict[str, Any]:
    """One of VIEWS. Of longer lists the first `max_lines` are given, and `left_out` counts the rest.

    Raises:
      ValueError: no such view.
    """
    if view not in VIEWS:
        raise ValueError(f"view: got {view!r}, expected one of {', '.join(VIEWS)}")
    make = {"scheduler": _scheduler, "active-blocks": _active_blocks, "prefix-cache": _prefix_cache}[view]
    below = {"tiers": tier_counts(scheduler)} if scheduler.pool.tier is not None else {}
    return {"view": view, "pool": pool_counts(scheduler), **below, **make(scheduler, max_lines)}


def pool_counts(scheduler: Scheduler) -> dict[str, int]:
    """The pool in a few numbers."""
    pool = scheduler.pool
    return {
        "num_pages": pool.num_usable,
        "page_size": scheduler.limits.page_size,
        "used": pool.num_used,
        "cached": pool.num_cached,
        "free": pool.num_free - pool.num_cached,
    }


def tier_counts(scheduler: Scheduler) -> dict[str, int]:
    """The tiers below it, by the names of `Engine.stats`; nothing but zeros without a host tier."""
    tier, recall = scheduler.pool.tier, scheduler.recall
    return {
        "num_cpu_blocks": tier.num_slots if tier is not None else 0,
        "cpu_blocks_used": tier.num_used if tier is not None else 0,
        "num_disk_blocks": tier.num_on_disk if tier is not None else 0,
        "num_swaps": scheduler.num_swaps,
        "num_blocks_swapped_out": tier.num_saved if tier is not None else 0,
        "num_blocks_swapped_in": tier.num_loaded if tier is not None else 0,
        "num_blocks_spilled": tier.num_spilled if tier is not None else 0,
        "num_blocks_fetched": tier.num_fetched if tier is not None else 0,
        "num_fetch_misses": tier.num_fetch_misses if tier is not None else 0,
        "num_blocks_refused": tier.num_refused if tier is not None else 0,
        "host_prefix_cache_hits": recall.num_host_hit_tokens,
        "disk_prefix_cache_hits": recall.num_disk_hit_tokens,
    }


def num_wasted_places(sequences: Iterable[request.Sequence], page_size: int) -> int:
    """Token places that are allocated and hold nothing: the tails of sequences, a tail that is shared counted once."""
    wasted: dict[int, int] = {}
    for sequence in sequences:
        num_full = sequence.num_computed // page_size
        for index, page in enumerate(sequence.pages[num_full:], num_full):
            places = min(page_size, (index + 1) * page_size - sequence.num_computed)
            wasted[page] = min(wasted.get(page, page_size), places)
    wasted.pop(0, None)
    return sum(wasted.values())


def _scheduler(scheduler: Scheduler, max_lines: int) -> dict[str, Any]:
    running, waiting = list(scheduler.running), list(scheduler.waiting)
    return {
        "limits": asdict(scheduler.limits),
        "num_running": len(running),
        "num_waiting": len(waiting),
        "num_preemptions": scheduler.num_preemptions,
        "running": [sequence_line(sequence) for sequence in running[:max_lines]],
        "waiting": [sequence_line(sequence) for sequence in waiting[:max_lines]],
        "left_out": max(0, len(running) - max_lines) + max(0, len(waiting) - max_lines),
    }


def sequence_line(sequence: request.Sequence) -> dict[str, Any]:
    """How far one sequence has come."""
    return {
        "request": _name(sequence),
        "prompt": sequence.num_prompt,
        "tokens": sequence.num_tokens,
        "computed": sequence.num_computed,
        "max_len": sequence.request.max_len,
        "pages": len(sequence.owned_pages),
        "cached_tokens": sequence.num_cached_tokens,
        "preemptions": sequence.num_preemptions,
        "arrival_s": sequence.request.arrival_s,
    }


def _name(sequence: request.Sequence) -> str:
    """Of several outputs of a request, those after the first have a number."""
    return f"{sequence.request.request_id}#{sequence.index}" if sequence.index else sequence.request.request_id


def _active_blocks(scheduler: Scheduler, max_lines: int) -> dict[str, Any]:
    pool, running = scheduler.pool, list(scheduler.running)
    allocated = pool.num_used * scheduler.limits.page_size
    wasted = num_wasted_places(running, scheduler.limits.page_size)
    lines = []
    for sequence in running[:max_lines]:
        pages = list(sequence.owned_pages)
        lines.append(
            {
                "request": _name(sequence),
                "tokens": sequence.num_computed,
                "pages": pages[:max_lines],
                "num_pages": len(pages),
                "num_shared": sum(pool.num_owners(page) > 1 for page in pages),
            }
        )
    return {
        "refcounts": {str(owners): count for owners, count in pool.refcount_hist().items()},
        "allocated_places": allocated,
        "wasted_places": wasted,
        "sequences": lines,
        "left_out": max(0, len(running) - max_lines),
    }


def _prefix_cache(scheduler: Scheduler, max_lines: int) -> dict[str, Any]:
    pool, cache = scheduler.pool, scheduler.pool.cache
    if cache is None or cache.is_private:
        return {"is_enabled": False}
    owners = Counter(pool.num_owners(page) for page in range(1, pool.num_pages) if page in cache)
    return {
        "is_enabled": True,
        "num_known_pages": len(cache),
        "num_queried_tokens": cache.num_queried_tokens,
        "num_hit_tokens": cache.num_hit_tokens,
        "num_evictions": cache.num_evictions,
        **_shared_prefixes(scheduler, max_lines),
        "owners_of_known_pages": {str(owners): count for owners, count in sorted(owners.items())},
    }


def _shared_prefixes(scheduler: Scheduler, max_lines: int) -> dict[str, Any]:
    """Runs of pages that the same sequences own together, the most shared first."""
    pool = scheduler.pool
    owners: dict[int, list[str]] = {}
    for sequence in list(scheduler.running):
        for page in itertools.takewhile(lambda page: pool.num_owners(page) > 1, list(sequence.owned_pages)):
            owners.setdefault(page, []).append(_name(sequence))
    prefixes: dict[tuple[str, ...], list[int]] = {}
    for page, names in owners.items():
        prefixes.setdefault(tuple(names), []).append(page)
    found = [{"pages": pages, "num_owners": len(names), "owners": list(names[:8])} for names, pages in prefixes.items()]
    found.sort(key=lambda prefix: (-prefix["num_owners"], prefix["pages"]))
    return {"shared_prefixes": found[:max_lines], "left_out": max(0, len(found) - max_lines)}
