"""Snapshots as tables for a terminal.

Knows columns. Refuses to know where a snapshot comes from: see `snapshot`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def as_text(found: dict[str, Any]) -> str:
    """A snapshot as tables for a terminal."""
    pool = found["pool"]
    lines = [
        f"{pool['num_pages']:,} pages of {pool['page_size']} tokens: {pool['used']:,} used, {pool['cached']:,} cached, "
        f"{pool['free']:,} free"
    ]
    if "tiers" in found:
        below = found["tiers"]
        lines.append(
            f"{below['num_cpu_blocks']:,} pages of host memory: {below['cpu_blocks_used']:,} used; "
            f"{below['num_disk_blocks']:,} pages on disk; {below['num_blocks_swapped_out']:,} moved out so far, "
            f"{below['num_blocks_swapped_in']:,} in"
        )
    lines += {"scheduler": _scheduler_text, "active-blocks": _blocks_text, "prefix-cache": _cache_text}[found["view"]](found)
    if found.get("left_out"):
        lines.append(f"... and {found['left_out']:,} more")
    return "\n".join(lines)


def _scheduler_text(found: dict[str, Any]) -> list[str]:
    limits = ", ".join(f"{name} {value}" for name, value in found["limits"].items() if value)  # 0 is off
    lines = [limits, f"{found['num_preemptions']:,} preemptions so far"]
    columns = ("request", "tokens", "of", "prompt", "computed", "pages", "cached", "preempted", "arrived")
    for state in ("running", "waiting"):
        rows = [
            [
                *(line["request"], line["tokens"], line["max_len"], line["prompt"], line["computed"], line["pages"]),
                *(line["cached_tokens"], line["preemptions"], f"{line['arrival_s']:.3f}"),
            ]
            for line in found[state]
        ]
        lines += ["", f"{state}: {found[f'num_{state}']:,}", *(table(columns, rows) if rows else [])]
    return lines


def _blocks_text(found: dict[str, Any]) -> list[str]:
    owners = ", ".join(f"{count:,} with {owners}" for owners, count in found["refcounts"].items() if owners != "0")
    share = found["wasted_places"] / found["allocated_places"] if found["allocated_places"] else 0.0
    lines = [
        f"owners: {owners or 'none'}",
        f"{found['wasted_places']:,} of {found['allocated_places']:,} allocated token places are empty ({share:.1%})",
    ]
    rows = [
        [line["request"], line["tokens"], line["num_pages"], line["num_shared"], shown_pages(line["pages"])]
        for line in found["sequences"]
    ]
    return [
        *lines,
        "",
        *(table(("request", "tokens", "pages", "shared", "which"), rows) if rows else ["no sequence owns a page"]),
    ]


def _cache_text(found: dict[str, Any]) -> list[str]:
    if not found["is_enabled"]:
        return ["the prefix cache is off (enable_prefix_caching)"]
    queried, hit = found["num_queried_tokens"], found["num_hit_tokens"]
    lines = [
        f"{found['num_known_pages']:,} pages are known, {found['num_evictions']:,} were evicted",
        f"{hit:,} of {queried:,} queried tokens were hits ({hit / queried if queried else 0.0:.1%})",
        "owners: " + (", ".join(f"{n:,} with {k}" for k, n in found["owners_of_known_pages"].items()) or "none"),
    ]
    rows = [
        [prefix["num_owners"], len(prefix["pages"]), shown_pages(prefix["pages"]), " ".join(prefix["owners"])]
        for prefix in found["shared_prefixes"]
    ]
    return [*lines, "", *(table(("owners", "pages", "which", "requests"), rows) if rows else ["no page is shared right now"])]


def shown_pages(pages: Sequence[int], limit: int = 6) -> str:
    """Page numbers as runs: 3-7 12 40-41."""
    runs: list[list[int]] = []
    for page in pages:
        if runs and page == runs[-1][1] + 1:
            runs[-1][1] = page
        else:
            runs.append([page, page])
    texts = [f"{first}-{last}" if last > first else str(first) for first, last in runs]
    return " ".join(texts[:limit]) + (" ..." if len(texts) > limit else "")


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Columns of equal width, numbers to the right."""
    cells = [list(columns), *([f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(columns))]
    is_number = [bool(rows) and isinstance(rows[0][at], int) for at in range(len(columns))]
    lines = (
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width) for cell, width, right in zip(row, widths, is_number, strict=True)
        )
        for row in cells
    )
    return [line.rstrip() for line in lines]
