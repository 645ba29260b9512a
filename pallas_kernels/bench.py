"""Time every backend beside the floors of this machine: `python -m pallas_kernels.bench`.

Microseconds of one call (median, lowest and highest of the samples), GB/s or TFLOP/s by what the call cannot do without, and its
share of the floor: the larger of its bytes at the speed of a copy and its arithmetic at the speed of a matrix product, both
measured in the same run. What a case fits into a cache may beat that floor. Comparisons that an operation brings along (a plain
gather, say) are rows of their own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

from pallas_kernels import command, figures, timing
from pallas_kernels.command import RIGHT, UsageError
from pallas_kernels.timing import Floors, Row

HEADER = ("operation", "case", "candidate", "median us", "lowest", "highest", "speed", "of the floor", "bound", "ratio")


def default_backends() -> tuple[str, ...]:
    """Those that somebody would use on this machine."""
    return ("mosaic", "xla") if jax.default_backend() == "gpu" else ("native", "xla")


def table(rows: Sequence[Row]) -> str:
    """Rows as text. The ratio is the time of the case's first comparison, or else of its last candidate, to the row's own."""
    lines = []
    for row in rows:
        beside = [other for other in rows if (other.operation, other.case) == (row.operation, row.case)]
        base = next((other for other in beside if other.is_peer), beside[-1])
        ratio = f"{base.median_us / row.median_us:.2f}x {base.name}"
        times = (f"{row.median_us:.1f}", f"{row.lowest_us:.1f}", f"{row.highest_us:.1f}")
        lines.append((row.operation, row.case, row.name, *times, row.speed, f"{row.share:.0%}", row.bound, ratio))
    return command.table(HEADER, lines, right="___rrrrr__")


def as_json(rows: Sequence[Row], floors: Floors) -> dict[str, Any]:
    """What --json writes, less where it was measured."""
    return {
        "floors": {"bytes_per_s": floors.bytes_per_s, "flops_per_s": dict(floors.flops_per_s)},
        "rows": [{**asdict(row), "share": row.share} for row in rows],
    }


def _command(argv: Sequence[str] | None) -> int:
    parser = command.Parser("bench", (__doc__ or "").split("\n\n")[0])
    command.add_choice(parser, backends="mosaic, xla on a GPU, native, xla on a CPU")
    parser.add_argument(
        "--case", action="extend", nargs="+", default=[], metavar="TEXT", help="cases whose name holds one of these"
    )
    parser.add_argument("--repeats", type=int, default=9, help="samples of each candidate, in turn (%(default)s)")
    memory, slowest = (8192, 1000.0) if jax.default_backend() == "gpu" else (256, 20.0)
    parser.add_argument("--memory", type=int, default=memory, metavar="MIB", help="leave out what moves more (%(default)s here)")
    parser.add_argument(
        "--slowest",
        type=float,
        default=slowest,
        metavar="MS",
        help="leave out cases whose floor is above this (%(default)s here)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them here (needs matplotlib)")
    given = parser.parse(argv)
    chosen, backends = command.chosen_operations(given.op), command.chosen_backends(given.backend, default_backends())
    if given.repeats < 1:
        raise UsageError(f"--repeats: got {given.repeats}, expected 1 or more")
    if given.plot and (reason := figures.unavailable()):
        raise UsageError(f"--plot: {reason}")
    work = [(op, case) for op in chosen for case in op.cases.BENCH if command.matches(case, given.case)]
    if not work:
        raise UsageError(f"--case: no timed case holds {' or '.join(given.case)!r}")

    floors = timing.measure_floors()
    print(f"{command.here()}: {floors}", flush=True)
    rows: list[Row] = []
    for operation, case in work:
        if reason := timing.too_large(operation, case, floors, given.memory, given.slowest):
            print(f"{operation.name} {case}: left out, {reason}", flush=True)
            continue
        found, reasons = timing.time_case(operation, case, operation.cases.make(case), backends, floors, repeats=given.repeats)
        rows += found
        if found:
            print(table(found), flush=True)
        for name, reason in reasons.items():
            print(f"{operation.name} {case}: {name}: {reason}", flush=True)
    if not rows:
        raise UsageError("nothing could be timed, see the reasons above")
    if any(row.num_copies > 1 for row in rows):
        print("small cases were rotated over copies of their arrays (num_copies in --json), so that they found the caches cold")
    if given.json:
        given.json.write_text(json.dumps({"machine": command.here(), **as_json(rows, floors)}, indent=1))
    if given.plot:
        figures.draw(rows, floors, command.here(), given.plot)
    return RIGHT


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    return command.main("bench", _command, argv)


if __name__ == "__main__":
    raise SystemExit(main())
