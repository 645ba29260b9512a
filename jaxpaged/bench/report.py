"""The report of `jaxpaged bench all`: tables and figures as Markdown, HTML and JSON. Refuses to know what the tables measure."""

from __future__ import annotations

import html
import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxpaged.bench.tables import TABLES
from jaxpaged.bench.tables.measuring import Row, Settings, Table

Found = dict[str, dict[str, Any]]  # table -> its rows, and the seconds that they took

_STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto}td,th{padding:.2em .8em;text-align:right}img{max-width:100%}"
)


def measure(
    names: Iterable[str], settings: Settings, *, tables: Mapping[str, Table] = TABLES, on_end: Callable[[str], object] = print
) -> Found:
    """The rows of each table, one table after the other."""
    found: Found = {}
    for name in names:
        started = time.perf_counter()
        rows = tables[name].run(settings)
        found[name] = {"rows": rows, "seconds": time.perf_counter() - started}
        on_end(f"{name}: {len(rows)} rows in {found[name]['seconds']:.0f} s")
    return found


def write(folder: Path, found: Found, about: Mapping[str, Any], *, tables: Mapping[str, Table] = TABLES) -> list[Path]:
    """report.md, report.html, results.json, and a figure for each table where matplotlib is there. What was written.

    Raises:
      OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = {name: _draw(folder / f"{name}.png", tables[name], one["rows"]) for name, one in found.items()}
    results = folder / "results.json"
    results.write_text(json.dumps({"about": dict(about), "tables": found}, indent=1), encoding="utf-8")
    said = ", ".join(f"{key} {value}" for key, value in about.items())
    lines, body = ["# jaxpaged bench all", "", said, ""], ["<h1>jaxpaged bench all</h1>", f"<p>{html.escape(said)}</p>"]
    for name, one in found.items():
        table = tables[name]
        lines += [f"## {table.title}", "", table.text, "", *_markdown(one["rows"]), ""]
        body += [f"<h2>{html.escape(table.title)}</h2>", f"<p>{html.escape(table.text)}</p>", _html(one["rows"])]
        if figures[name]:
            lines += [f"![{table.title}]({name}.png)", ""]
            body.append(f'<img src="{name}.png" alt="{html.escape(table.title)}">')
    head = '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>jaxpaged bench all</title>'
    head += f"<style>{_STYLE}</style></head>"
    markdown, page = folder / "report.md", folder / "report.html"
    markdown.write_text("\n".join(lines), encoding="utf-8")
    page.write_text("\n".join([head, "<body>", *body, "</body></html>"]), encoding="utf-8")
    return [markdown, page, results, *(folder / f"{name}.png" for name, is_there in figures.items() if is_there)]


def has_matplotlib() -> bool:
    """Whether figures can be drawn."""
    try:
        import matplotlib  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        return False
    return True


def _draw(path: Path, table: Table, rows: list[Row]) -> bool:
    if not has_matplotlib():
        return False
    from matplotlib.figure import Figure  # type: ignore[import-not-found]

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.set_title(table.title)
    table.figure(rows, axes)
    figure.savefig(path, dpi=120)
    return True


def _shown(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _markdown(rows: list[Row]) -> list[str]:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([_shown(value) for value in row.values()] for row in rows)]
    return ["| " + " | ".join(words) + " |" for words in lines]


def _html(rows: list[Row]) -> str:
    cells = [[f"<th>{html.escape(key)}</th>" for key in rows[0]]]
    cells += [[f"<td>{html.escape(_shown(value))}</td>" for value in row.values()] for row in rows]
    return "<table>" + "".join(f"<tr>{''.join(line)}</tr>" for line in cells) + "</table>"
