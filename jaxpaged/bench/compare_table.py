"""A comparison's numbers for a reader: `python -m jaxpaged.bench.compare_table FILE ...` makes Markdown rows of JSON files.

Knows what `jaxpaged.bench.compare` says. Refuses to measure.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# What is shown of a side: the head of the column, and its text.
_SPEED: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("output tokens/s", lambda side: f"{side['output_tokens_per_second']:,.1f}"),
    ("total tokens/s", lambda side: f"{side['tokens_per_second']:,.1f}"),
)
_TIME: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("ms a token", lambda side: f"{side['tpot'] * 1e3:,.2f}"),
    ("ms to the first", lambda side: f"{side['ttft'] * 1e3:,.1f}"),
)


def rows(numbers: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heads and lines: each side's medians, and ours over it with the quartiles and the ends of its rounds."""
    is_latency = "tpot" in numbers["sides"][numbers["ours"]]
    columns, key = (_TIME, "tpot") if is_latency else (_SPEED, "output_tokens_per_second")
    heads = ["engine", *(head for head, _ in columns), "ours / it", "quartiles", "lowest-highest", "same tokens"]
    lines = []
    for name, side in numbers["sides"].items():
        line = [name, *(text(side) for _, text in columns)]
        ratio = numbers["ratios"].get(name, {}).get(key)
        if ratio is None:
            line += ["", "", "", ""]
        else:
            low, high = ratio["quartiles"]
            line += [f"{ratio['ratio']:.2f}", f"{low:.2f}-{high:.2f}", f"{ratio['lowest']:.2f}-{ratio['highest']:.2f}"]
            line.append(f"{side['same_tokens']:.0%}")
        lines.append(line)
    return heads, lines


def versions(numbers: dict[str, Any]) -> str:
    """Who ran, on what."""
    found: dict[str, str] = {}
    for side in numbers["sides"].values():
        found |= {name: version for name, version in side["loaded"].get("versions", {}).items() if name not in found}
    on = numbers["machine"]
    machine = f"{on['cpu']}, {on['cores']} cores, {on['memory_gib']:g} GiB, load {on['load_average']:g} at the start"
    return f"{', '.join(f'{name} {version}' for name, version in found.items())}; Python {on['python']}; {machine}"


def text(numbers: dict[str, Any]) -> str:
    """For a terminal."""
    heads, lines = rows(numbers)
    widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
    shown = []
    for first, *others in (heads, *lines):
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        shown.append("  ".join(cells).rstrip())
    better = "less than 1 is faster" if "tpot" in numbers["sides"][numbers["ours"]] else "more than 1 is faster"
    how = f"{numbers['num_rounds']} rounds in turn, {numbers['peers_loaded']}; ours / it: {better}"
    return "\n".join([*shown, how, versions(numbers)])


def markdown(numbers: dict[str, Any]) -> str:
    """A table with its command, versions and machine."""
    heads, lines = rows(numbers)
    table = ["| " + " | ".join(line) + " |" for line in (heads, ["---", *["---:"] * (len(heads) - 1)], *lines)]
    facts = f"{numbers['num_rounds']} rounds, {numbers['peers_loaded']}. {versions(numbers)}."
    return "\n".join([f"`{numbers['command']}`", "", facts, "", *table])


def main(argv: Sequence[str]) -> int:
    """Print one table for each file."""
    for path in argv:
        print(markdown(json.loads(Path(path).read_text(encoding="utf-8"))), end="\n\n")
    return 0 if argv else 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
