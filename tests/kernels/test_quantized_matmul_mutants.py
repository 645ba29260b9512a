"""Bugs planted in quantized_matmul, each seen by the stated rung of the ladder.

Not seen without a GPU: anything in the cp.async form that runs below sm_90 (the interpreter has no such copy; it shares all but
the copies and their waits with the form that is interpreted, and its compilation is checked).
"""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from planting import planted

from pallas_kernels import backends, operations
from pallas_kernels.quantized_matmul import cases, quantized_matmul

MOSAIC, XLA, FORMATS = (f"pallas_kernels.quantized_matmul.{name}" for name in ("mosaic", "xla", "formats"))
RING = cases.Case(16, 4096, 32, "int8", has_outliers=True)
UNEVEN = cases.Case(3, 576, 96, "int8", dtype="float16")  # nine tiles for four slices
GROUPED = cases.Case(3, 1024, 96, "int4", group=128, dtype="float16", has_zeros=True)
TURNS = cases.Case(16, 576, 64, "int4", group=32, has_zeros=True, has_outliers=True)  # a slice takes several tiles
SMALL = cases.Case(1, 512, 64, "int4", group=64)
FLOATS = cases.Case(3, 90, 7, "int8", group=30, dtype="float32")
ZEROS = cases.Case(3, 256, 64, "int4", group=64, dtype="float32", has_zeros=True)

# name, module, old text, new text, case, backend, the rung that catches it
BUGS = [
    ("refilled before it was read", MOSAIC, "_compat.fence_async_shared_cta()", "pass", RING, "interpret", "race"),
    (
        "read before it came",
        MOSAIC,
        "plgpu.barrier_wait(barriers[0].at[piece, slot])",
        "pass",
        RING,
        "interpret",
        "race",
    ),
    ("added up before all sums are there", MOSAIC, "plgpu.barrier_wait(barriers[-1])", "pass", RING, "interpret", "race"),
    ("slices that are one tile longer", MOSAIC, "- piece + (tiles.slices - 1)", "- piece", UNEVEN, "interpret", "definition"),
    ("scales of the tile before", MOSAIC, "constants(turn + 1)", "constants(turn)", TURNS, "interpret", "definition"),
    (
        "a group's scale on what came before it",
        MOSAIC,
        "return total + sums * _across(group[0], sums, 1)",
        "return (total + sums) * _across(group[0], sums, 1)",
        SMALL,
        "interpret",
        "definition",
    ),
    (
        "the high four bits first",
        MOSAIC,
        "(pairs & jnp.int16(15), lax.shift_right_logical(pairs, jnp.int16(4)))",
        "(lax.shift_right_logical(pairs, jnp.int16(4)), pairs & jnp.int16(15))",
        SMALL,
        "interpret",
        "definition",
    ),
    (
        "4-bit numbers without their zero",
        MOSAIC,
        "jnp.asarray(base + ZERO, rows)",
        "jnp.asarray(base, rows)",
        SMALL,
        "interpret",
        "definition",
    ),
    ("zero points of nothing", MOSAIC, "reduce(0)) - float(ZERO),)", "reduce(0)),)", GROUPED, "interpret", "definition"),
    ("rows without their scales", MOSAIC, 'if "x_scales" in names:', "if False:", cases.CHECK[15], "interpret", "definition"),
    ("the second digit too large", XLA, "_BASE**-i", "_BASE ** (1 - i)", FLOATS, "xla", "definition"),
    (
        "digits that lose their remainder",
        XLA,
        "digits[-1].astype(jnp.float32)) * _BASE",
        "digits[-1].astype(jnp.float32))",
        FLOATS,
        "xla",
        "definition",
    ),
    ("zero points twice", XLA, "(zeros[index] - ZERO)", "zeros[index]", ZEROS, "xla", "definition"),
    ("NaN weights become 480", FORMATS, "jnp.where(magnitude == 127, jnp.nan,", "jnp.where(False, jnp.nan,", None, "xla", "bits"),
]


def seen(case: cases.Case | None, backend: str) -> str:
    """The first rung that a call falls off: "race", "definition", "bits", or "" when all is well."""
    if case is None:
        from pallas_kernels.quantized_matmul import formats

        every = np.arange(256, dtype=np.uint8).view(cases.DTYPES["float8_e4m3fn"])
        same = np.array_equal(np.asarray(formats.floats(jax.numpy.asarray(every))), every.astype(np.float32), equal_nan=True)
        return "" if same else "bits"
    call = cases.make(case)
    try:
        # A jit of its own: the healthy kernel's trace is not to be found again.
        out = np.asarray(jax.jit(functools.partial(quantized_matmul, backend=backend, **call.options))(**call.arrays))
        if backend == "interpret":
            from pallas_kernels import _compat

            _compat.check_races()
    except Exception as error:
        if "race" in str(error):
            return "race"
        raise
    verdict = operations.judge("out", out, cases.define(call)[0], cases.plain(call)[0])
    return "" if verdict.is_right else "definition"


@pytest.mark.parametrize(("name", "module", "old", "new", "case", "backend", "rung"), BUGS, ids=[bug[0] for bug in BUGS])
def test_the_ladder_sees_the_bug(name: str, module: str, old: str, new: str, case, backend: str, rung: str) -> None:
    if backend == "interpret" and jax.__version_info__[:3] < backends.MOSAIC_JAX:
        pytest.skip("the interpreter needs a newer jax")
    assert seen(case, backend) == ""
    with planted(module, old, new):
        found = seen(case, backend)
    if backend == "interpret":
        from pallas_kernels import _compat

        _compat.reset_interpreter()
    assert found == rung, name
