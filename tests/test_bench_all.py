"""`jaxpaged bench all`: sides run in turn and get their own medians, and the report has what was measured.

The tables themselves compile engines, minutes in all: `pytest -m slow tests/test_bench_all.py`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from jaxpaged import cli
from jaxpaged.bench import report
from jaxpaged.bench.tables import TABLES
from jaxpaged.bench.tables.measuring import Row, Settings, in_turn, jobs


class Squares:
    name = "squares"
    title = "Squares <of> numbers"
    text = "What they are."

    def run(self, settings: Settings) -> list[Row]:
        return [{"x": x, "square": float(x * x)} for x in range(settings.pick(9, 5, 3))]

    def figure(self, rows: list[Row], axes: Any) -> None:
        axes.plot([row["x"] for row in rows], [row["square"] for row in rows])


def test_sides_run_in_turn_and_the_first_turn_does_not_count() -> None:
    order: list[str] = []

    def side(name: str, values: list[float]) -> Any:
        def run() -> Row:
            order.append(name)
            return {"value": values.pop(0)}

        return run

    found = in_turn({"a": side("a", [99.0, 1.0, 5.0, 2.0]), "b": side("b", [99.0, 7.0, 7.0, 8.0])}, 3)
    assert found == {"a": {"value": 2.0}, "b": {"value": 7.0}}
    assert "".join(order) == "baabbaab"


def test_workloads_are_the_same_in_each_run() -> None:
    ours, again = (jobs([(5, 2), (3, 1)], 100, prefix=[7, 7]) for _ in range(2))
    assert ours == again
    assert [len(job.prompt) for job in ours] == [7, 5]
    assert all(job.prompt[:2] == [7, 7] for job in ours)


def test_the_report_has_every_row(tmp_path: Path) -> None:
    tables = {"squares": Squares()}
    found = report.measure(["squares"], Settings(scale="quick"), tables=tables, on_end=lambda _: None)
    written = report.write(tmp_path / "new", found, {"model": "bundled"}, tables=tables)
    assert {path.name for path in written} >= {"report.md", "report.html", "results.json"}
    assert all(path.stat().st_size for path in written)
    assert (tmp_path / "new" / "squares.png").exists() == report.has_matplotlib()
    markdown, page = ((tmp_path / "new" / name).read_text() for name in ("report.md", "report.html"))
    assert "| 4 | 16 |" in markdown
    assert "<td>4</td><td>16</td>" in page
    assert "&lt;of&gt;" in page and "<of>" not in page
    assert json.loads((tmp_path / "new" / "results.json").read_text())["tables"]["squares"]["rows"][4] == {"x": 4, "square": 16.0}


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ([], "--out"),
        (["--out", "x", "--tables", "grids"], "grid"),
        (["--out", "x", "--rounds", "0"], "--rounds"),
        (["--out", "x", "--tiny", "--quick"], "--quick"),
    ],
)
def test_the_command_refuses_nonsense(flags: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "all", *flags]) == 2
    assert problem in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", list(TABLES))
def test_a_table(name: str, tmp_path: Path) -> None:
    found = report.measure([name], Settings(scale="tiny", rounds=1), on_end=lambda _: None)
    rows = found[name]["rows"]
    assert len(rows) >= 2
    assert all(row.keys() == rows[0].keys() for row in rows)
    assert all(math.isfinite(value) and value >= 0 for row in rows for value in row.values() if isinstance(value, float))
    report.write(tmp_path, found, {})
