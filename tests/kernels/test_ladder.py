"""Every operation, case and backend against the definition in float64; the interpreter looks for races too."""

from __future__ import annotations

import pytest

from pallas_kernels import operations
from pallas_kernels.backends import BACKENDS

OPERATIONS = [operations.operation(name) for name in operations.NAMES]


def rungs(wanted: str = "") -> list:
    """(operation, case, backend) for all that runs without a GPU; the interpreter has a list of its own where there is one.

    wanted: only operations whose cases have a function of this name.
    """
    return [
        pytest.param(operation, case, backend, id=f"{operation.name}-{case}-{backend}")
        for operation in OPERATIONS
        if not wanted or hasattr(operation.cases, wanted)
        for backend in BACKENDS
        if backend not in ("auto", "mosaic")
        for case in (
            getattr(operation.cases, "INTERPRET", operation.cases.CHECK) if backend == "interpret" else operation.cases.CHECK
        )
    ]


def run(operation: operations.Operation, call: operations.Call, backend: str):
    try:
        return operation.run(call, backend)
    except NotImplementedError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("operation", "case", "backend"), rungs())
def test_every_backend_is_the_definition(operation: operations.Operation, case, backend: str) -> None:
    """Its error is at most twice that of the plainest implementation in the same dtypes; what only moves is bit-exact."""
    call = operation.cases.make(case)
    try:
        verdicts = operations.check(operation, call, backend)
    except NotImplementedError as error:
        pytest.skip(str(error))
    assert all(verdict.is_right for verdict in verdicts), verdicts


@pytest.mark.parametrize(("operation", "case", "backend"), rungs("poison"))
def test_nan_where_nobody_may_look_changes_no_bit(operation: operations.Operation, case, backend: str) -> None:
    call = operation.cases.make(case)
    for clean, dirty in zip(run(operation, call, backend), run(operation, operation.cases.poison(call), backend), strict=True):
        assert clean.tobytes() == dirty.tobytes()
