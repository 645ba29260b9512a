"""Hold every backend to the definition in float64 on this machine: `python -m pallas_kernels.check`.

One line for each output of each case: its largest error against float64 and how large it may be (twice that of the plainest
implementation in the same dtypes, plus 1e-5), that error in units in the last place of the number it is at, and where the first
number stands that is too far. With --case the calls are files written by `pallas_kernels.operations.save`.

Exit code: 0 all right, 1 something is wrong, 2 nothing could be checked.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from pallas_kernels import command, operations
from pallas_kernels.backends import BACKENDS, MOSAIC_JAX
from pallas_kernels.command import RIGHT, WRONG, UsageError
from pallas_kernels.operations import Call, Operation

# The interpreter takes seconds a call, so it has to be asked for.
DEFAULT = tuple(name for name in BACKENDS if name not in ("auto", "interpret"))
DTYPES = ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "int8", "int4", "uint8", "int32", "uint32")
HEADER = ("operation", "case", "backend", "output", "max error", "allowed", "relative", "ULP", "first wrong", "verdict")


@dataclass(frozen=True)
class Line:
    """One output of one case on one backend; numbers are None when the call failed."""

    operation: str
    case: str
    backend: str
    output: str
    max_error: float | None
    allowed: float | None
    relative_error: float | None
    ulp: float | None
    first_wrong: tuple[int, ...] | None
    verdict: str  # "right", "wrong", or what went wrong

    @property
    def is_right(self) -> bool:
        """Whether the output is close enough everywhere."""
        return self.verdict == "right"


@dataclass(frozen=True)
class Absent:
    """A backend that could not run some of an operation's cases, and why."""

    operation: str
    backend: str
    reason: str
    cases: tuple[str, ...]


class Truth:
    """What a call must give by definition, and what the plainest implementation gives; computed when first asked for."""

    def __init__(self, operation: Operation, call: Call):
        self._operation, self._call = operation, call

    @functools.cached_property
    def exact(self) -> Sequence[np.ndarray]:
        """The outputs in float64, or their very bits."""
        return self._operation.cases.define(self._call)

    @functools.cached_property
    def plain(self) -> Sequence[np.ndarray] | None:
        """The outputs of the plainest implementation; None when bits must be equal."""
        return self._operation.cases.plain(self._call)


def lines(operation: Operation, name: str, call: Call, backend: str, truth: Truth, *, is_repeated: bool = False) -> list[Line]:
    """Run a call on a backend and hold every output that it returns to the definition.

    Args:
      is_repeated: run it twice; other bits the second time are wrong.

    Raises:
      NotImplementedError: the backend cannot run it here.
    """
    try:
        got = _run(operation, call, backend)
        again = _run(operation, call, backend) if is_repeated else got
        exact, plain = truth.exact, truth.plain
    except NotImplementedError:
        raise
    except Exception as error:  # any kernel's failure is a finding, and the next case is still wanted
        said = str(error).strip().splitlines() or [""]
        return [
            Line(operation.name, name, backend, "-", None, None, None, None, None, f"{type(error).__name__}: {said[0][:200]}")
        ]
    found = []
    # A call may leave outputs out, as attention does without return_lse; what it returns comes first.
    for i, (output, x, wanted) in enumerate(zip(operation.cases.OUTPUTS, got, exact, strict=False)):
        line = functools.partial(Line, operation.name, name, backend, output)
        try:
            verdict = operations.judge(output, x, wanted, None if plain is None else plain[i])
        except ValueError as error:
            found.append(line(None, None, None, None, None, f"wrong: {error}"))
            continue
        units = ulp(x, wanted) if plain is not None else None
        text = "right" if verdict.is_right else "wrong"
        if again[i].tobytes() != x.tobytes():
            text = "wrong: a second run has other bits"
        found.append(line(verdict.max_error, verdict.allowed, verdict.relative_error, units, verdict.first_bad, text))
    return found


def _run(operation: Operation, call: Call, backend: str) -> tuple[np.ndarray, ...]:
    if backend != "interpret" or jax.__version_info__[:3] < MOSAIC_JAX:
        return operation.run(call, backend)
    from pallas_kernels import _compat

    _compat.reset_interpreter()
    got = operation.run(call, backend)
    _compat.check_races()
    return got


def ulp(got: np.ndarray, exact: np.ndarray) -> float:
    """The largest error in units in the last place, in the output's dtype, of the exact number that it is at."""
    if not np.issubdtype(got.dtype, np.inexact) and not hasattr(ml_dtypes, got.dtype.name):
        return float(np.abs(got.astype(np.float64) - exact).max(initial=0.0))
    values, truth = got.astype(np.float64).ravel(), np.asarray(exact, np.float64).ravel()
    counts = np.isfinite(truth)
    if not counts.any():
        return 0.0
    errors = np.abs(values[counts] - truth[counts])
    at = int(np.argmax(np.nan_to_num(errors, nan=np.inf)))
    limits = ml_dtypes.finfo(got.dtype)
    size = max(abs(truth[counts][at]), float(limits.smallest_normal))  # below it all units are the same
    exponent = math.frexp(size)[1] - 1
    return float(errors[at] / 2.0 ** (exponent - int(limits.nmant)))


def calls(
    operation: Operation, backends: Sequence[str], shapes: Sequence[str], dtypes: Sequence[str]
) -> Iterator[tuple[str, Call, list[str]]]:
    """An operation's cases that the flags choose: name, call, and the backends that take it.

    The interpreter has a list of its own where there is one.
    """
    check = operation.cases.CHECK
    interpret = getattr(operation.cases, "INTERPRET", check)
    for case in dict.fromkeys((*check, *interpret)):
        takers = [name for name in backends if case in (interpret if name == "interpret" else check)]
        if takers and command.matches(case, shapes):
            call = operation.cases.make(case)
            if not dtypes or any(x.dtype.name in dtypes for x in call.arrays.values()):
                yield str(case), call, takers


def check(
    chosen: Sequence[Operation], backends: Sequence[str], shapes: Sequence[str], dtypes: Sequence[str], files: Sequence[Path]
) -> Iterator[Line | Absent]:
    """Every line as it is found; backends that cannot run some of an operation's cases follow the operation's lines.

    Raises:
      UsageError: a file is not a case, or nothing is chosen.
    """
    work: list[tuple[Operation, Iterable[tuple[str, Call, Sequence[str]]]]]
    if files:
        loaded = [(path, *_load(path)) for path in files]
        work = [(operation, [(path.name, call, backends)]) for path, operation, call in loaded]
    else:
        work = [(operation, calls(operation, backends, shapes, dtypes)) for operation in chosen]
    is_empty = True
    for operation, named in work:
        absent: dict[tuple[str, str], list[str]] = {}
        for name, call, takers in named:
            is_empty = False
            truth = Truth(operation, call)
            for backend in takers:
                try:
                    yield from lines(operation, name, call, backend, truth)
                except NotImplementedError as error:
                    absent.setdefault((backend, str(error).removeprefix(f"{operation.name}: ")), []).append(name)
        yield from (Absent(operation.name, backend, reason, tuple(names)) for (backend, reason), names in absent.items())
    if is_empty:
        raise UsageError(f"no case holds {' or '.join((*shapes, *dtypes))!r}; `--shape -` lists the names of all")


def _load(path: Path) -> tuple[Operation, Call]:
    try:
        return operations.load(path)
    except ValueError as error:
        raise UsageError(f"--case: {error}") from None


def _names(chosen: Sequence[Operation]) -> str:
    return "\n".join(f"{operation.name}  {case}" for operation in chosen for case in operation.cases.CHECK)


def _cells(line: Line) -> tuple[str, ...]:
    def number(x: float | None) -> str:
        return "-" if x is None else f"{x:.2e}"

    units = "-" if line.ulp is None else f"{line.ulp:.1f}"
    first = "-" if line.first_wrong is None else str(list(line.first_wrong))
    numbers = (number(line.max_error), number(line.allowed), number(line.relative_error), units, first)
    return (line.operation, line.case, line.backend, line.output, *numbers, line.verdict)


def _command(argv: Sequence[str] | None) -> int:
    parser = command.Parser("check", (__doc__ or "").split("\n\n")[0])
    command.add_choice(parser, backends=", ".join(DEFAULT))
    parser.add_argument("--dtype", action="extend", nargs="+", default=[], help="cases with an array of one of these dtypes")
    parser.add_argument(
        "--shape", action="extend", nargs="+", default=[], metavar="TEXT", help="cases whose name holds one of these; - lists all"
    )
    parser.add_argument("--case", action="extend", nargs="+", default=[], type=Path, metavar="FILE", help="calls saved as .npz")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    given = parser.parse(argv)
    chosen, backends = command.chosen_operations(given.op), command.chosen_backends(given.backend, DEFAULT)
    for name in given.dtype:
        if name not in DTYPES:
            raise UsageError(command.not_one_of("--dtype", name, DTYPES))
    if given.case and (given.op or given.dtype or given.shape):
        raise UsageError("--case: a file says its operation and its arrays; leave --op, --dtype and --shape out")
    if given.shape == ["-"]:
        print(_names(chosen))
        return RIGHT

    found = list(check(chosen, backends, given.shape, given.dtype, given.case))
    checked, absent = [x for x in found if isinstance(x, Line)], [x for x in found if isinstance(x, Absent)]
    wrong = [line for line in checked if not line.is_right]
    if given.json:
        print(json.dumps({"machine": command.here(), "lines": plain(checked), "cannot_run": plain(absent)}, indent=1))
    else:
        print(command.here())
        if checked:
            print(command.table(HEADER, [_cells(line) for line in checked], right="____rrrr__"))
        for each in absent:
            print(f"{each.operation}: {each.backend} did not run {_count(len(each.cases))}: {each.reason}")
        print(f"{len(checked)} outputs checked, {len(wrong)} wrong")
    if not checked:
        raise UsageError("no backend could run anything, see the reasons above")
    return WRONG if wrong else RIGHT


def _count(number: int) -> str:
    return f"{number} case{'s' * (number != 1)}"


def plain(found: Sequence[Line | Absent]) -> list[dict[str, Any]]:
    """As JSON has it: no infinities."""
    return [
        {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in asdict(each).items()} for each in found
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    return command.main("check", _command, argv)


if __name__ == "__main__":
    raise SystemExit(main())
