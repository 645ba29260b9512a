"""Bugs planted in quantized_matmul, each seen by the stated rung of the ladder.

Not seen without a GPU: anything in the cp.async form that runs below sm_90 (the interpreter has no such copy; it shares all but
the copies and their waits with the form that is interpreted, and its compilation is checked).
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from planting import Bug, check, planted

from pallas_kernels.quantized_matmul import cases

MATMUL = "quantized_matmul"
MOSAIC, XLA, FORMATS = (f"pallas_kernels.quantized_matmul.{name}" for name in ("mosaic", "xla", "formats"))
RING = cases.Case(16, 4096, 32, "int8", has_outliers=True)
UNEVEN = cases.Case(3, 576, 96, "int8", dtype="float16")  # nine tiles for four slices
GROUPED = cases.Case(3, 1024, 96, "int4", group=128, dtype="float16", has_zeros=True)
TURNS = cases.Case(16, 576, 64, "int4", group=32, has_zeros=True, has_outliers=True)  # a slice takes several tiles
SMALL = cases.Case(1, 512, 64, "int4", group=64)
FLOATS = cases.Case(3, 90, 7, "int8", group=30, dtype="float32")
ZEROS = cases.Case(3, 256, 64, "int4", group=64, dtype="float32", has_zeros=True)

BUGS = (
    Bug("refilled before it was read", MOSAIC, "_compat.fence_async_shared_cta()", "pass", "race", MATMUL, RING),
    Bug("read before it came", MOSAIC, "plgpu.barrier_wait(barriers[0].at[piece, slot])", "pass", "race", MATMUL, RING),
    Bug("added up before all sums are there", MOSAIC, "plgpu.barrier_wait(barriers[-1])", "pass", "race", MATMUL, RING),
    Bug("slices that are one tile longer", MOSAIC, "- piece + (tiles.slices - 1)", "- piece", "definition", MATMUL, UNEVEN),
    Bug("scales of the tile before", MOSAIC, "constants(turn + 1)", "constants(turn)", "definition", MATMUL, TURNS),
    Bug(
        "a group's scale on what came before it",
        MOSAIC,
        "return total + sums * _across(group[0], sums, 1)",
        "return (total + sums) * _across(group[0], sums, 1)",
        "definition",
        MATMUL,
        SMALL,
    ),
    Bug(
        "the high four bits first",
        MOSAIC,
        "(pairs & jnp.int16(15), lax.shift_right_logical(pairs, jnp.int16(4)))",
        "(lax.shift_right_logical(pairs, jnp.int16(4)), pairs & jnp.int16(15))",
        "definition",
        MATMUL,
        SMALL,
    ),
    Bug(
        "4-bit numbers without their zero",
        MOSAIC,
        "jnp.asarray(base + ZERO, rows)",
        "jnp.asarray(base, rows)",
        "definition",
        MATMUL,
        SMALL,
    ),
    Bug("zero points of nothing", MOSAIC, "reduce(0)) - float(ZERO),)", "reduce(0)),)", "definition", MATMUL, GROUPED),
    Bug("rows without their scales", MOSAIC, 'if "x_scales" in names:', "if False:", "definition", MATMUL, cases.CHECK[15]),
    Bug("the second digit too large", XLA, "_BASE**-i", "_BASE ** (1 - i)", "definition", MATMUL, FLOATS, "xla"),
    Bug(
        "digits that lose their remainder",
        XLA,
        "digits[-1].astype(jnp.float32)) * _BASE",
        "digits[-1].astype(jnp.float32))",
        "definition",
        MATMUL,
        FLOATS,
        "xla",
    ),
    Bug("zero points twice", XLA, "(zeros[index] - ZERO)", "zeros[index]", "definition", MATMUL, ZEROS, "xla"),
)


@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_a_planted_bug_is_seen(bug: Bug) -> None:
    check(bug)


def test_nan_weights_that_become_480_are_seen() -> None:
    """Weights are never NaN in a case: every pattern of bits is looked at instead."""
    assert is_every_float8_right()
    with planted(FORMATS, "jnp.where(magnitude == 127, jnp.nan,", "jnp.where(False, jnp.nan,"):
        assert not is_every_float8_right()


def is_every_float8_right() -> bool:
    from pallas_kernels.quantized_matmul import formats

    every = np.arange(256, dtype=np.uint8).view(cases.DTYPES["float8_e4m3fn"])
    return np.array_equal(np.asarray(formats.floats(jnp.asarray(every))), every.astype(np.float32), equal_nan=True)
