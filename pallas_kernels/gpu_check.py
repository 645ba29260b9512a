"""Everything that a GPU can tell about this package, in one bounded run: `python -m pallas_kernels.gpu_check --out DIR`.

Every operation and case on the device against float64, twice with equal bits; then the two ceilings, a copy and a matrix product;
then the timed cases beside them, beside the portable path, and beside the peers that are installed. The most telling comes first,
and everything is written as it comes: DIR/results.json, DIR/summary.md and, with matplotlib, DIR/roofline.png.

Exit code: 0 all right, 1 something is wrong, 2 nothing could be done.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

from pallas_kernels import bench, check, command, figures, peers, timing
from pallas_kernels.command import RIGHT, WRONG, UsageError
from pallas_kernels.goals import GOALS
from pallas_kernels.operations import Operation
from pallas_kernels.timing import Floors, Row

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "numpy", "torch", "triton", "flashinfer-python", "vllm")
# Checks may take this share of the time before the first case is timed; what they leave is checked at the end.
CHECKS_SHARE = 0.45
LAST_S = 15.0  # no case is begun with less left


class Clock:
    """Time until the deadline."""

    def __init__(self, minutes: float):
        self._begin, self._seconds = time.monotonic(), minutes * 60

    @property
    def left_s(self) -> float:
        """Seconds until the deadline; negative after it."""
        return self._begin + self._seconds - time.monotonic()

    @property
    def share(self) -> float:
        """Of the time that is gone."""
        return (time.monotonic() - self._begin) / self._seconds


class Report:
    """What has been found so far; `save` writes all of it, so that a run that is cut off keeps what it has."""

    def __init__(self, folder: Path, backends: Sequence[str]):
        self.folder, self.backends = folder, list(backends)
        self.environment = environment()
        self.lines: list[check.Line] = []
        self.absent: list[str] = []
        self.floors: Floors | None = None
        self.rows: list[Row] = []
        self.notes: list[str] = []

    @property
    def wrong(self) -> list[check.Line]:
        """Outputs that are wrong."""
        return [line for line in self.lines if not line.is_right]

    def save(self) -> None:
        """Write results.json and summary.md."""
        found: dict[str, Any] = {
            "environment": self.environment,
            "checked": check.plain(self.lines),
            "cannot_run": self.absent,
            "goals": [
                {**asdict(goal), "measured": value, "verdict": goal.verdict(value)}
                for goal in GOALS
                for value in [goal.measured(self.rows, self.backends[0])]
            ],
            "notes": self.notes,
        }
        if self.floors is not None:
            found["timed"] = bench.as_json(self.rows, self.floors)
        _replace(self.folder / "results.json", json.dumps(found, indent=1))
        _replace(self.folder / "summary.md", self.summary())

    def summary(self) -> str:
        """The report for people, in Markdown."""
        about = ", ".join(f"{key} {value}" for key, value in self.environment.items())
        parts = ["# Kernels on a GPU", about, f"Ours is `{self.backends[0]}`. Floors: {self.floors or 'not measured'}."]
        parts.append(f"## Right\n\n{len(self.lines)} outputs checked against float64, each twice, {len(self.wrong)} wrong.")
        parts += [f"- {line.operation} {line.case} {line.output}: {line.verdict}" for line in self.wrong]
        parts += [f"- {line}" for line in self.absent]
        header = "| what | unit | must | goal | measured | reaches |\n|---|---|---|---|---|---|"
        lines = [header]
        for goal in GOALS:
            value = goal.measured(self.rows, self.backends[0])
            what = f"{goal.what} ({goal.note})" if goal.note else goal.what
            bars = f"{goal.show(goal.must)} | {goal.show(goal.goal)} | {goal.show(value)} | {goal.verdict(value)}"
            lines.append(f"| {what} | {goal.unit} | {bars} |")
        parts.append("## Goals\n\nThe worst of each line's cases counts.\n\n" + "\n".join(lines))
        if self.rows:
            parts.append(f"## Times\n\n```\n{bench.table(self.rows)}\n```")
        if self.notes:
            parts.append("## Not done\n\n" + "\n".join(f"- {note}" for note in dict.fromkeys(self.notes)))
        return "\n\n".join(parts) + "\n"


def environment() -> dict[str, str]:
    """Chip, driver, versions and date."""
    device = jax.devices()[0]
    found = {"date": datetime.date.today().isoformat(), "device": device.device_kind, "python": platform.python_version()}
    # A driver that cannot be asked cheaply is left out.
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        found["driver, clock, power"] = subprocess.run(
            query, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def breadth_first(chosen: Sequence[Operation]) -> list[tuple[Operation, Any]]:
    """All cases to check, so that every operation has had some whenever the time is up."""
    cases = [((i + 1) / len(op.cases.CHECK), op, case) for op in chosen for i, case in enumerate(op.cases.CHECK)]
    return [(op, case) for _, op, case in sorted(cases, key=lambda each: each[0])]


def most_telling_first(chosen: Sequence[Operation]) -> list[tuple[Operation, Any]]:
    """All cases to time: first those of the goals, in their order."""
    cases = [(op, case) for op in chosen for case in op.cases.BENCH]

    def place(each: tuple[Operation, Any]) -> int:
        op, case = each
        num_bytes = op.cases.cost(case).num_bytes
        return next((i for i, goal in enumerate(GOALS) if goal.takes(op.name, str(case), num_bytes)), len(GOALS))

    return sorted(cases, key=place)


def _check(work: Iterator[tuple[Operation, Any]], report: Report, clock: Clock, share: float) -> None:
    """Check cases until there are none or the share of the time is gone."""
    for operation, case in work:
        name, backend = str(case), report.backends[0]
        call = operation.cases.make(case)
        try:
            lines = check.lines(operation, name, call, backend, check.Truth(operation, call), is_repeated=True)
            report.lines += lines
            _say(f"{operation.name} {name}: {'; '.join(f'{line.output} {line.verdict}' for line in lines)}")
        except NotImplementedError as error:
            report.absent.append(f"{operation.name} {name}: {command.first_line(error).removeprefix(f'{operation.name}: ')}")
        report.save()
        if clock.share > share or clock.left_s < LAST_S:
            return


def _time(chosen: Sequence[Operation], report: Report, clock: Clock, limits: tuple[int, float], repeats: int) -> None:
    floors = report.floors
    if floors is None:
        return
    work = most_telling_first(chosen)
    for i, (operation, case) in enumerate(work):
        where = f"{operation.name} {case}"
        if clock.left_s < LAST_S:
            report.notes.append(f"{len(work) - i} of {len(work)} cases were not timed, the time was up; the first is {where}")
            return
        if reason := timing.too_large(operation, case, floors, *limits):
            report.notes.append(f"{where}: not timed, {reason}")
            continue
        # The slow starters at the end of the peers need time to compile.
        others = [peer for peer in peers.of(operation.name) if peer is not peers.torch_flex or clock.left_s > 90]
        try:
            call = operation.cases.make(case)
            rows, reasons = timing.time_case(operation, case, call, report.backends, floors, repeats=repeats, more=others)
        except Exception as error:  # out of memory, say: the next case may fit
            report.notes.append(f"{where}: {type(error).__name__}: {command.first_line(error)}")
            continue
        report.rows += rows
        report.notes += [f"{where}: {name}: {reason}" for name, reason in reasons.items()]
        _say(f"{where}: " + ", ".join(f"{row.name} {row.median_us:.1f} us ({row.share:.0%})" for row in rows))
        report.save()


def _say(line: str) -> None:
    print(line, flush=True)


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    os.replace(new, path)


def _command(argv: Sequence[str] | None) -> int:
    parser = command.Parser("gpu_check", (__doc__ or "").split("\n\n")[0])
    command.add_choice(parser, backends="mosaic, xla; the first is checked")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results go")
    parser.add_argument("--minutes", type=float, default=8.0, help="no case is begun after this (%(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="samples of each candidate, in turn (%(default)s)")
    parser.add_argument("--anywhere", action="store_true", help="run without a GPU, on small cases: to try the script itself")
    given = parser.parse(argv)
    chosen, backends = command.chosen_operations(given.op), command.chosen_backends(given.backend, ("mosaic", "xla"))
    if given.minutes <= 0 or given.repeats < 1:
        raise UsageError(f"--minutes and --repeats: got {given.minutes:g} and {given.repeats}, expected more than nothing")
    is_gpu = jax.default_backend() == "gpu"
    if not is_gpu and not given.anywhere:
        raise UsageError(f"it needs an NVIDIA GPU, jax's default backend here is {jax.default_backend()}")

    clock = Clock(given.minutes)
    given.out.mkdir(parents=True, exist_ok=True)
    report = Report(given.out, backends)
    _say(", ".join(f"{key} {value}" for key, value in report.environment.items()))
    report.save()
    work = iter(breadth_first(chosen))
    _check(work, report, clock, CHECKS_SHARE)
    report.floors = timing.measure_floors(is_small=not is_gpu)
    _say(f"floors: {report.floors}")
    _time(chosen, report, clock, (8192, 1000.0) if is_gpu else (32, 2.0), given.repeats)
    if clock.left_s >= LAST_S:
        _check(work, report, clock, 1.0)
    unchecked = sum(1 for _ in work)
    if unchecked:
        report.notes.append(f"{unchecked} cases were not checked, the time was up")
    report.save()
    if reason := figures.unavailable():
        _say(f"no roofline.png: {reason}")
    elif report.rows and report.floors is not None:
        figures.draw(report.rows, report.floors, command.here(), given.out / "roofline.png")
    _say(f"{given.out / 'summary.md'}: {len(report.lines)} outputs checked, {len(report.wrong)} wrong, {len(report.rows)} timed")
    if not report.lines:
        raise UsageError(f"nothing could be checked: {next(iter(report.absent), 'there was no time')}")
    return WRONG if report.wrong else RIGHT


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    return command.main("gpu_check", _command, argv)


if __name__ == "__main__":
    raise SystemExit(main())
