"""The numbers that an engine keeps, and what each of them is: the one list that /metrics and `LLM.get_metrics` read.

Knows names; those that vLLM has mean what they mean there. Refuses to know where the numbers come from.
"""

from __future__ import annotations

from typing import Literal, NamedTuple


class Series(NamedTuple):
    """What a number is. A counter only grows, from 0 at the start."""

    kind: Literal["counter", "gauge"]
    text: str


# By the names of `Engine.stats`.
SERIES: dict[str, Series] = {
    "num_requests_running": Series("gauge", "Sequences that own pages and are computed."),
    "num_requests_waiting": Series("gauge", "Sequences that wait for pages."),
    "num_queued_requests": Series("gauge", "Outputs of requests that have been taken and have no token yet."),
    "num_queued_tokens": Series("gauge", "Tokens of their prompts."),
    "num_gpu_blocks": Series("gauge", "Pages of the pool."),
    "kv_blocks_active": Series("gauge", "Pages that have an owner."),
    "kv_cache_usage_perc": Series("gauge", "Pages that have an owner, of all. 1 means 100 percent."),
    "kv_blocks_cached": Series("gauge", "Pages without an owner whose contents can still be found."),
    "kv_tokens": Series("gauge", "Tokens of running sequences that are in pages; a page that is shared counts for each."),
    "kv_tail_waste_perc": Series("gauge", "Token places that are allocated and hold nothing, of all that are allocated."),
    "kv_free_scatter_perc": Series("gauge", "0 when the empty pages lie together, 1 when no two of them are neighbours."),
    "kv_block_lifetime_steps": Series("gauge", "Steps that a page had an owner, on the average."),
    "kv_block_reuse_gap_steps": Series("gauge", "Steps that a page had no owner between two, on the average."),
    "num_steps": Series("counter", "Steps of the engine."),
    "num_preemptions": Series("counter", "Sequences that gave their pages up for others."),
    "prefix_cache_queries": Series("counter", "Prompt tokens that were looked for in the prefix cache."),
    "prefix_cache_hits": Series("counter", "Prompt tokens that were found there."),
    "prefix_cache_evictions": Series("counter", "Cached pages that were taken for something else."),
    "prompt_tokens": Series("counter", "Tokens of prompts."),
    "generation_tokens": Series("counter", "Tokens of answers."),
    "num_blocks_copied": Series("counter", "Pages that were copied because two sequences shared them and one wrote."),
    "num_blocks_released": Series("counter", "Pages that lost their last owner."),
    "num_cpu_blocks": Series("gauge", "Pages that host memory has room for."),
    "cpu_blocks_used": Series("gauge", "Pages that it holds."),
    "cpu_cache_usage_perc": Series("gauge", "Of its room, what is in use. 1 means 100 percent."),
    "num_disk_blocks": Series("gauge", "Pages on disk."),
    "num_swaps": Series("counter", "Preempted sequences whose pages were kept in host memory."),
    "num_blocks_swapped_out": Series("counter", "Pages that went to host memory."),
    "num_blocks_swapped_in": Series("counter", "Pages that came back from host memory."),
    "num_blocks_spilled": Series("counter", "Pages that went from host memory to disk."),
    "num_blocks_fetched": Series("counter", "Pages that came from disk to host memory."),
    "num_fetch_misses": Series("counter", "Fetches from disk that brought nothing."),
    "num_blocks_refused": Series("counter", "Pages that host memory had no room for."),
    "host_prefix_cache_hits": Series("counter", "Prompt tokens that were found in host memory."),
    "disk_prefix_cache_hits": Series("counter", "Prompt tokens that were found on disk."),
    "external_prefix_cache_queries": Series("counter", "Prompt tokens that were looked for below the page pool."),
    "external_prefix_cache_hits": Series("counter", "Prompt tokens that were found below the page pool."),
    "num_compilations": Series("counter", "Steps that were compiled, or loaded from the compilation cache."),
    "compilation_seconds": Series("counter", "Seconds that this took; two at a time count twice."),
    "num_step_places": Series("counter", "Token places of the compiled steps that ran."),
    "num_padding_places": Series("counter", "Those among them that held no token: the waste of padding."),
    "device_memory_usage_perc": Series("gauge", "Of the device's memory, what is in use; or of the machine's."),
    "spec_decode_num_drafts": Series("counter", "Drafts that were checked."),
    "spec_decode_num_draft_tokens": Series("counter", "Their tokens."),
    "spec_decode_num_accepted_tokens": Series("counter", "Those that were right."),
}

_PER_POSITION = "spec_decode_num_accepted_tokens_per_pos"


def series_of(name: str) -> Series:
    """What a number of `Engine.stats` is; one that the list lacks is a counter."""
    if name.startswith(_PER_POSITION):
        return Series("counter", "Draft tokens that were right, by how many came before them.")
    return SERIES.get(name, Series("counter", name))


def position_of(name: str) -> tuple[str, str] | None:
    """A name that ends with a draft token's position, taken apart; None for any other."""
    head, _, position = name.rpartition("_")
    return (head, position) if head == _PER_POSITION else None
