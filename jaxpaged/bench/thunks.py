"""What a compiled program spends its time on, from the profiler's trace: each thunk with the `jax.named_scope` that it is of.

Knows traces of jax's profiler and the text of compiled programs. Refuses to know models and steps.
"""

from __future__ import annotations

import re
import statistics
import warnings
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax

_CONTAINERS = ("while", "conditional", "call")  # thunks that run others, which have events of their own
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" ([a-z][a-z0-9\-]*)\((?:%?([\w.\-]+))?")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CALLS = re.compile(r"calls=%?([\w.\-]+)")


class Thunk(NamedTuple):
    """One piece of a program that ran."""

    name: str  # of its HLO instruction
    run: int  # of the program
    start_ns: float
    end_ns: float


def read_trace(folder: Path, module: str) -> list[Thunk]:
    """The thunks of a program in a trace that `jax.profiler` has written, in order of their begin.

    On a CPU a thunk may go on beside others after its call has returned; another event tells its end.

    Raises:
      ValueError: the folder has no trace.
    """
    files = sorted(folder.rglob("*.xplane.pb"))
    if not files:
        raise ValueError(f"{folder}: no trace in it")
    with warnings.catch_warnings():
        # jax 0.12 on Python 3.12 makes types that warn, and aborts where warnings are errors.
        warnings.simplefilter("ignore", DeprecationWarning)
        found, ends = _events(jax.profiler.ProfileData.from_file(str(files[-1])), module)
    thunks = [thunk._replace(end_ns=max(thunk.end_ns, ends.get(key, 0.0))) for key, thunk in found.items()]
    return sorted(thunks, key=lambda thunk: thunk.start_ns)


def _events(data: Any, module: str) -> tuple[dict[tuple[str, int], Thunk], dict[tuple[str, int], float]]:
    """The thunks, and the ends of those that went on, by name and number."""
    found: dict[tuple[str, int], Thunk] = {}
    ends: dict[tuple[str, int], float] = {}
    for plane in data.planes:
        is_device = plane.name.startswith("/device:")
        for line in plane.lines:
            if is_device and not (line.name or "").startswith("Stream"):
                continue  # the same kernels again, gathered for display
            for event in line.events:
                if event.name.startswith("end: "):
                    ends[event.name[5:], _number(event, "_c")] = event.start_ns
                    continue
                stats = dict(event.stats)
                if stats.get("hlo_module") != module or "hlo_op" not in stats:
                    continue
                key = str(stats["hlo_op"]), int(stats["_p"]) if "_p" in stats else -1 - len(found)
                found[key] = Thunk(key[0], int(stats.get("run_id", 0)), event.start_ns, event.start_ns + event.duration_ns)
    return found, ends


def _number(event: Any, name: str) -> int:
    return next((int(value) for key, value in event.stats if key == name and value is not None), -1)


@dataclass(frozen=True)
class Program:
    """The text of a compiled program, as far as it tells where instructions come from."""

    name: str
    opcodes: Mapping[str, str]
    scopes: Mapping[str, str]  # instruction -> the innermost of the wanted scopes that it is of; "" for none
    op_names: Mapping[str, str]  # instruction -> where in the traced function it comes from; "" where XLA does not say

    @classmethod
    def read(cls, text: str, wanted: Collection[str]) -> Program:
        """From `Compiled.as_text()`.

        A fusion is of the scope of its root; of what it computes most where its root has none; else of what it takes.
        """
        name = text.split(None, 2)[1].rstrip(",")
        opcodes: dict[str, str] = {}
        scopes: dict[str, str] = {}
        op_names: dict[str, str] = {}
        of_computation: dict[str, Counter[str]] = defaultdict(Counter)
        where = ""
        for line in text.splitlines():
            if header := _COMPUTATION.match(line):
                where = header[1]
                continue
            if not (match := _INSTRUCTION.match(line)):
                continue
            instruction, op_name, opcode = match[1], _OP_NAME.search(line), _OPCODE.search(line, match.end() - 1)
            scope = _innermost(op_name[1], wanted) if op_name else ""
            opcodes[instruction] = opcode[1] if opcode else ""
            op_names[instruction] = op_name[1] if op_name else ""
            if not scope and (called := _CALLS.search(line)) and of_computation[called[1]]:
                scope = of_computation[called[1]].most_common(1)[0][0]
            if not scope and op_name is None and opcode and opcode[2]:
                scope = scopes.get(opcode[2], "")
            scopes[instruction] = scope
            if scope:
                of_computation[where][scope] += 1
        return cls(name, opcodes, scopes, op_names)


def _innermost(op_name: str, wanted: Collection[str]) -> str:
    return next((part for part in reversed(op_name.split("/")) if part in wanted), "")


@dataclass(frozen=True)
class Share:
    """What the thunks of one scope take in a run of the program: medians over the runs."""

    seconds: float
    count: int


def shares(thunks: Iterable[Thunk], program: Program) -> tuple[dict[str, Share], float, float]:
    """Scope -> its share; the seconds in which some thunk ran, and those from the first begin to the last end.

    A thunk that runs others counts with the time in which none of them runs.
    """
    runs: dict[int, list[Thunk]] = defaultdict(list)
    for thunk in thunks:
        runs[thunk.run].append(thunk)
    seconds: list[dict[str, float]] = []
    counts: list[Counter[str]] = []
    busy, whole = [], []
    for run in runs.values():
        leaves = _union((one.start_ns, one.end_ns) for one in run if program.opcodes.get(one.name) not in _CONTAINERS)
        taken: dict[str, float] = defaultdict(float)
        for one in run:
            scope, span = program.scopes.get(one.name, ""), one.end_ns - one.start_ns
            if program.opcodes.get(one.name) in _CONTAINERS:
                span -= sum(max(0.0, min(end, one.end_ns) - max(start, one.start_ns)) for start, end in leaves)
            taken[scope] += span / 1e9
        seconds.append(taken)
        counts.append(Counter(program.scopes.get(one.name, "") for one in run))
        busy.append(sum(end - start for start, end in _union((one.start_ns, one.end_ns) for one in run)) / 1e9)
        whole.append((max(one.end_ns for one in run) - min(one.start_ns for one in run)) / 1e9)
    if not runs:
        return {}, 0.0, 0.0
    scopes = sorted({scope for taken in seconds for scope in taken})
    found = {
        scope: Share(
            statistics.median(taken.get(scope, 0.0) for taken in seconds), round(statistics.median(one[scope] for one in counts))
        )
        for scope in scopes
    }
    return found, statistics.median(busy), statistics.median(whole)


class Heavy(NamedTuple):
    """One of the thunks that take longest."""

    seconds: float  # in a run, all of its turns together: median
    scope: str
    name: str
    op_name: str


def heaviest(thunks: Iterable[Thunk], program: Program, count: int) -> list[Heavy]:
    """So many of those that run no others."""
    seconds: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for one in thunks:
        if program.opcodes.get(one.name) not in _CONTAINERS:
            seconds[one.name][one.run] += (one.end_ns - one.start_ns) / 1e9
    found = [
        Heavy(statistics.median(runs.values()), program.scopes.get(name, ""), name, program.op_names.get(name, ""))
        for name, runs in seconds.items()
    ]
    return sorted(found, reverse=True)[:count]


def _union(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same time in spans that do not touch, in order."""
    found: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found
