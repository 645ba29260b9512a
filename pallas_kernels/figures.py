"""The figure of timed cases: a roofline, and each case's share of its floor. Needs matplotlib (the extra `notebooks`)."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pallas_kernels.timing import Floors, Row


def unavailable() -> str | None:
    """Why nothing can be drawn here, or None."""
    return None if importlib.util.find_spec("matplotlib") else "matplotlib is not installed (pip install matplotlib)"


def draw(rows: Sequence[Row], floors: Floors, title: str, path: Path) -> None:
    """Write the figure; its format is the suffix of `path`."""
    importlib.import_module("matplotlib").use("Agg")
    plt: Any = importlib.import_module("matplotlib.pyplot")
    figure, (roof, bars) = plt.subplots(1, 2, figsize=(16, max(6, 1 + 0.22 * len(rows))), layout="constrained")
    figure.suptitle(title)
    names = list(dict.fromkeys(row.name for row in rows))
    colours = {name: f"C{i % 10}" for i, name in enumerate(names)}

    least, most = floors_span(rows)
    for dtype, rate in floors.flops_per_s.items():
        ridge = rate / floors.bytes_per_s
        roof.plot([least, ridge, max(most, 2 * ridge)], [least * floors.bytes_per_s, rate, rate], "k-", linewidth=0.8)
        roof.annotate(f"{dtype} products", (max(most, 2 * ridge), rate), ha="right", va="bottom", fontsize=8)
    for name in names:
        mine = [row for row in rows if row.name == name and row.num_flops]
        roof.scatter([_intensity(row) for row in mine], [row.num_flops / row.median_us * 1e6 for row in mine], label=name, s=18)
    roof.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="operations per second", title="roofline")
    roof.legend(fontsize=8)

    labels = [f"{row.operation} {row.case} {row.name}" for row in rows]
    bars.barh(range(len(rows)), [row.share for row in rows], color=[colours[row.name] for row in rows])
    bars.set_yticks(range(len(rows)), labels, fontsize=6)
    bars.invert_yaxis()
    bars.axvline(1.0, color="k", linewidth=0.8)
    bars.set(xlabel="share of the floor", title="share of the floor")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def floors_span(rows: Sequence[Row]) -> tuple[float, float]:
    """Operations per byte from which to which the roof is drawn."""
    values = [_intensity(row) for row in rows if row.num_flops] or [1.0]
    return min(values) / 2, max(values) * 2


def _intensity(row: Row) -> float:
    return row.num_flops / max(row.num_bytes, 1)
