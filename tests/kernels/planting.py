"""Plant a bug in a kernel's source, and say which rung of the ladder sees it.

A rung is a way to be wrong that a machine without a GPU can see, from the first to be tried to the last:

| rung | what sees the bug |
|---|---|
| race | the interpreter: two threads touch the same memory in no order |
| bounds | the interpreter: a read or write beyond an array |
| definition | the outputs, held to float64, or to bits where numbers are only moved |
| poison | bits that change when there is NaN where nobody may look |

Knows no kernel: the files `test_*_mutants.py` are tables of bugs, and say what no rung sees.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest

from pallas_kernels import operations
from pallas_kernels.backends import MOSAIC_JAX
from pallas_kernels.operations import Operation

# What is raised on the interpreter: by jax 0.12 and by `check_races`, and by both versions.
RAISED = {"race": "RACE DETECTED|has a data race", "bounds": "Out-of-bounds"}


@dataclass(frozen=True)
class Bug:
    """A text in the source of a module, what is planted instead, and the rung that sees it in a case of an operation."""

    name: str
    module: str
    old: str
    new: str
    rung: str
    operation: str
    case: Any
    backend: str = "interpret"

    def __str__(self) -> str:
        return self.name


def check(bug: Bug) -> None:
    """The healthy code is clean on every rung in the case of a bug; planted, the bug is seen by its rung and by none before."""
    if bug.backend == "interpret" and jax.__version_info__[:3] < MOSAIC_JAX:
        pytest.skip("the interpreter needs a newer jax")
    assert healthy_rung(bug.operation, bug.case, bug.backend) == ""
    with planted(bug.module, bug.old, bug.new):
        assert first_rung(bug.operation, bug.case, bug.backend) == bug.rung


def first_rung(name: str, case: Any, backend: str) -> str:
    """The first rung that sees something wrong with an operation as it is now, "" for none."""
    if backend != "interpret":
        return _falls_from(fresh(name), case, backend, lambda: None)
    from pallas_kernels import _compat  # imports Mosaic, which an older jax does not have

    _compat.reset_interpreter()
    try:
        return _falls_from(fresh(name), case, backend, _compat.check_races)
    except Exception as error:  # jax wraps what its callbacks raise, tracebacks and all
        if _compat.has_raced():  # and went on in jax 0.11, until a barrier was out of step
            return "race"
        for rung, message in RAISED.items():
            if re.search(message, str(error)):
                return rung
        raise
    finally:
        _compat.reset_interpreter()  # a race leaves behind what the next kernel would trip over


def fresh(name: str) -> Operation:
    """The operation, compiled anew: operations and jit remember what they compiled by the function."""
    operation = operations.operation(name)
    return replace(operation, function=functools.partial(operation.function))


@functools.cache
def healthy_rung(name: str, case: Any, backend: str) -> str:
    """`first_rung` of the healthy code, which is the same for all bugs of a case."""
    return first_rung(name, case, backend)


def _falls_from(operation: Operation, case: Any, backend: str, check_races: Callable[[], None]) -> str:
    cases, call = operation.cases, operation.cases.make(case)
    got, exact = operation.run(call, backend), cases.define(call)
    check_races()
    plain = cases.plain(call) or (None,) * len(exact)
    if not all(operations.judge(*outputs).is_right for outputs in zip(cases.OUTPUTS, got, exact, plain, strict=False)):
        return "definition"
    if not hasattr(cases, "poison"):
        return ""
    dirty = operation.run(cases.poison(call), backend)
    check_races()
    return "" if all(np.array_equal(_bits(x), _bits(y)) for x, y in zip(got, dirty, strict=True)) else "poison"


def _bits(x: np.ndarray) -> np.ndarray:
    return np.frombuffer(x.tobytes(), np.uint8)


@contextmanager
def planted(name: str, old: str, new: str) -> Iterator[ModuleType]:
    """The module of that name with `old` replaced by `new` in its source, in place of the healthy one while the block runs.

    It takes the healthy module's place wherever `pallas_kernels` has imported that, or a function or class of it, by any name.
    `old` must stand in the source exactly once: when a line is rewritten, its bug has to be planted anew.
    """
    healthy = importlib.import_module(name)
    spec = healthy.__spec__
    if spec is None or spec.origin is None:
        raise LookupError(f"{name}: this module has no source")
    module = importlib.util.module_from_spec(spec)
    exec(compile(changed(Path(spec.origin), old, new), spec.origin, "exec"), module.__dict__)
    sick = {id(healthy): module}
    sick |= {id(x): vars(module)[key] for key, x in vars(healthy).items() if getattr(x, "__module__", None) == name}
    importers = [x for key, x in sys.modules.items() if key.partition(".")[0] == "pallas_kernels" and x is not healthy]
    found = [(importer, key, x) for importer in importers for key, x in vars(importer).items() if id(x) in sick]
    for importer, key, x in found:
        setattr(importer, key, sick[id(x)])
    sys.modules[name] = module
    try:
        yield module
    finally:
        sys.modules[name] = healthy
        for importer, key, x in found:
            setattr(importer, key, x)


def changed(path: Path, old: str, new: str) -> str:
    """The text of a source with a bug in it.

    Raises:
      LookupError: the text of the bug does not stand there exactly once.
    """
    source = path.read_text()
    if source.count(old) != 1:
        raise LookupError(f"{path}: the text of this bug stands {source.count(old)} times there; plant it anew: {old!r}")
    return source.replace(old, new)
