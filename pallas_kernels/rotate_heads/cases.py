"""The cases of rotate_heads: shapes, arrays, and the heads by their definition. See `pallas_kernels.operations`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from pallas_kernels.operations import Call, Cost

OUTPUTS = ("q", "k", "v", "is_finite")
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
EPS = 1e-6


@dataclass(frozen=True)
class Case:
    """X tokens of K groups of G queries, a key and a value, heads of H."""

    X: int
    K: int
    G: int
    H: int
    dtype: str = "bfloat16"
    has_norms: bool = False
    has_holes: bool = False  # NaN and infinite numbers in some tokens

    def __str__(self) -> str:
        parts = [f"X{self.X}-K{self.K}-G{self.G}-H{self.H}", self.dtype, "norms" * self.has_norms, "holes" * self.has_holes]
        return "-".join(filter(None, parts))


CHECK = (
    Case(1, 3, 3, 64),
    Case(1, 3, 3, 64, "float32"),
    Case(7, 8, 2, 128, has_norms=True),
    Case(7, 8, 2, 128, "float32", has_norms=True),
    Case(9, 1, 1, 2, "float32", has_norms=True),
    Case(5, 2, 4, 40, "float16", has_norms=True),  # halves that no vector divides
    Case(5, 2, 4, 40, has_holes=True),
    Case(30, 2, 1, 96, "float32", has_norms=True, has_holes=True),
    Case(300, 3, 3, 64, has_holes=True),  # tokens in several tasks
    Case(40, 2, 7, 80, "float16", has_holes=True),
)
BENCH = tuple(
    Case(X, *shape, dtype, has_norms)  # type: ignore[misc]
    for shape, has_norms in (((3, 3, 64), False), ((8, 2, 128), True))
    for X in (1, 16, 544)
    for dtype in ("bfloat16", "float32")
)


def make(case: Case) -> Call:
    """Random arrays of about 1, at positions up to 10,000. A token in three has a hole, where there are any."""
    rng = np.random.default_rng(list(str(case).encode()))
    dtype = DTYPES[case.dtype]
    qkv = rng.standard_normal((case.X, case.K, case.G + 2, case.H)).astype(dtype)
    if case.has_holes:
        # The norm of an infinite number is not one, but those beside it become 0 or NaN by the order of sums: holes are NaN.
        kinds = (np.nan,) if case.has_norms else (np.nan, np.inf, -np.inf)
        for token in range(0, case.X, 3):
            place = tuple(rng.integers(0, size) for size in qkv.shape[1:])
            qkv[(token, *place)] = rng.choice(kinds)
    angles = rng.integers(0, 10_000, (case.X, 1)) * 10_000.0 ** -(np.arange(case.H // 2) / (case.H // 2))
    arrays = {"qkv": qkv, "cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
    if not case.has_norms:
        return Call(arrays, {})
    norms = {name: rng.uniform(0.5, 1.5, case.H).astype(dtype) for name in ("q_norm", "k_norm")}
    return Call(arrays | norms, {"eps": EPS})


def define(call: Call) -> tuple[Any, ...]:
    """Each formula in float64, nothing rounded."""
    return _compute(call, np.float64)


def plain(call: Call) -> tuple[Any, ...]:
    """The same in float32, each part rounded to the arrays' dtype; values are only moved."""
    q, k, _, _ = _compute(call, np.float32)
    return q, k, None, None


def _compute(call: Call, wide: type) -> tuple[Any, ...]:
    a = call.arrays
    dtype, half = a["qkv"].dtype, a["qkv"].shape[-1] // 2

    def rounded(x: np.ndarray) -> np.ndarray:
        return x.astype(dtype).astype(wide) if wide is np.float32 else x

    def turned(x: np.ndarray, norm: str) -> np.ndarray:
        if norm in a:
            x = rounded(x / np.sqrt((x**2).mean(-1, keepdims=True) + wide(call.options["eps"])))
            x = rounded(x * a[norm].astype(wide))
        first, second = x[..., :half], x[..., half:]
        cos, sin = (a[name].astype(wide)[:, None, None] for name in ("cos", "sin"))
        return rounded(np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1))

    with np.errstate(invalid="ignore"):
        qkv = a["qkv"].astype(wide)
        q, k, v = turned(qkv[:, :, :-2], "q_norm"), turned(qkv[:, :, -2:-1], "k_norm")[:, :, 0], qkv[:, :, -1]
    is_finite = np.isfinite(q).all((1, 2, 3)) & np.isfinite(k).all((1, 2)) & np.isfinite(v).all((1, 2))
    q, k, v = (np.where(np.isfinite(x), x, 0) for x in (q, k, v))
    q, v = q.reshape(len(q), -1, 2 * half), v.astype(dtype)
    return (q.astype(dtype), k.astype(dtype), v, is_finite) if wide is np.float32 else (q, k, v, is_finite)


def cost(case: Case) -> Cost:
    """Everything once in and once out."""
    size = np.dtype(DTYPES[case.dtype]).itemsize
    return Cost(case.X * (2 * case.K * (case.G + 2) * case.H * size + case.H * 4), 6 * case.X * case.K * (case.G + 1) * case.H)
