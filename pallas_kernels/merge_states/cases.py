"""The cases of merge_states: parts of attention with LSEs far apart, empty parts, empty rows. See `pallas_kernels.operations`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from pallas_kernels.operations import Call, Cost

OUTPUTS = ("out", "lse")
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


@dataclass(frozen=True)
class Case:
    """`num_parts` results for rows of those axes, with heads of H; `spread` is the standard deviation of the LSEs."""

    num_parts: int
    axes: tuple[int, ...]
    H: int
    dtype: str = "float32"
    spread: float = 1.0

    def __str__(self) -> str:
        return f"I{self.num_parts}-{'x'.join(map(str, self.axes))}-H{self.H}-{self.dtype}" + f"-spread{self.spread:g}" * (
            self.spread != 1
        )


CHECK = (
    Case(1, (2, 4), 64),
    Case(2, (2, 1, 4), 64),
    Case(3, (5, 3), 80),  # rows are padded
    Case(9, (8,), 128, "bfloat16"),  # more parts than are loaded at once
    Case(17, (2, 8), 32, "float16", spread=20.0),
    Case(4, (1,), 96, spread=100.0),
)
# A shared prefix and the rest, and what a decode step of few long rows merges.
BENCH = (Case(2, (128, 32), 128, "bfloat16"), Case(64, (4, 32), 128))


def make(case: Case) -> Call:
    """Random parts; one in four is empty, as is the whole first row, and holds NaN."""
    rng = np.random.default_rng(list(str(case).encode()))
    outs = rng.standard_normal((case.num_parts, *case.axes, case.H), np.float32).astype(DTYPES[case.dtype])
    lses = (rng.standard_normal((case.num_parts, *case.axes)) * case.spread).astype(np.float32)
    is_empty = rng.random(lses.shape) < 0.25
    is_empty.reshape(case.num_parts, -1)[:, 0] |= math.prod(case.axes) > 1
    lses[is_empty], outs[is_empty] = -np.inf, np.nan
    return Call({"outs": outs, "lses": lses}, {})


def define(call: Call) -> tuple[np.ndarray, np.ndarray]:
    """In float64."""
    return _merge(call, np.float64)


def plain(call: Call) -> tuple[np.ndarray, np.ndarray]:
    """In float32."""
    out, lse = _merge(call, np.float32)
    return out.astype(call.arrays["outs"].dtype), lse


def _merge(call: Call, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    outs, lses = call.arrays["outs"].astype(dtype), call.arrays["lses"].astype(dtype)
    peak = lses.max(axis=0)
    is_nothing = np.isneginf(peak)
    weights = np.exp(lses - np.where(is_nothing, dtype(0), peak))
    total = weights.sum(axis=0)
    out = (weights[..., None] * np.where(np.isneginf(lses)[..., None], dtype(0), outs)).sum(axis=0)
    with np.errstate(divide="ignore"):
        lse = np.where(is_nothing, dtype(0), peak) + np.log(total)
    return out / np.where(is_nothing, dtype(1), total)[..., None], lse


def cost(case: Case) -> Cost:
    """Every part once, the result once; a multiplication and an addition a number."""
    rows, size = math.prod(case.axes), np.dtype(DTYPES[case.dtype]).itemsize
    return Cost(num_bytes=(case.num_parts + 1) * rows * (case.H * size + 4), num_flops=2 * case.num_parts * rows * case.H)
