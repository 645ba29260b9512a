"""The cases of matmul: shapes, arrays, and the product by its definition. See `pallas_kernels.operations`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels.matmul.panels import to_panels
from pallas_kernels.operations import Call, Cost

OUTPUTS = ("out",)
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """X rows of D numbers times a weight of F outputs, with what may come before and after the product."""

    X: int
    D: int
    F: int
    dtype: str = "bfloat16"
    weight: str = ""  # its dtype, when it is not x's
    out: str = ""  # the result's, when it is not x's
    has_bias: bool = False
    has_norm: bool = False
    has_residual: bool = False
    is_gated: bool = False
    has_outliers: bool = False  # two columns of x a hundred times larger
    has_panels: bool = False  # of the weight, in place of what the checkpoint has
    holes: float = 0.0  # the share of rows that do not count, of which some are not finite

    def __str__(self) -> str:
        parts = [f"X{self.X}-D{self.D}-F{self.F}", self.dtype, f"by-{self.weight}" * bool(self.weight)]
        parts += [f"to-{self.out}" * bool(self.out)]
        parts += [name for name in ("bias", "norm", "residual", "outliers", "panels") if getattr(self, f"has_{name}")]
        return "-".join(filter(None, [*parts, "gated" * self.is_gated, f"holes{self.holes}" * bool(self.holes)]))


_ALL: dict[str, Any] = {"has_bias": True, "has_norm": True, "has_residual": True}
CHECK = (
    Case(1, 576, 96),
    Case(1, 576, 96, "float32"),
    Case(2, 64, 4, "float32", has_bias=True),
    Case(7, 1536, 40, has_residual=True),
    Case(13, 100, 33, has_outliers=True, **_ALL),  # sizes that no step, tile or block divides
    Case(5, 31, 7, "float32", **_ALL),
    Case(3, 15, 1, "float32"),
    Case(6, 1, 2, has_bias=True),
    Case(33, 576, 130, "float32", is_gated=True, has_outliers=True, **_ALL),
    Case(40, 72, 1030, is_gated=True, **_ALL),
    Case(1, 576, 512, has_norm=True, is_gated=True),
    Case(100, 256, 140, out="float32", has_norm=True),
    Case(200, 8192, 9, "float32", has_residual=True),  # rows in several tasks, blocks of four outputs
    Case(17, 96, 20, "float16", **_ALL),
    Case(1, 130, 18, "float16", has_outliers=True),
    Case(9, 96, 20, "float32", weight="bfloat16", has_bias=True),
    Case(4, 50, 20, weight="float32", is_gated=True, has_norm=True),
    Case(70, 64, 12, "float32", weight="float16"),
    Case(1, 576, 96, has_panels=True),
    Case(2, 30, 16, "float32", has_panels=True),
    Case(13, 100, 48, "float32", has_outliers=True, has_panels=True, **_ALL),
    Case(40, 72, 1040, is_gated=True, has_panels=True, **_ALL),
    Case(9, 98, 80, "float32", weight="bfloat16", has_panels=True, has_bias=True),
    Case(4, 50, 32, weight="float32", is_gated=True, has_norm=True, has_panels=True),
    Case(64, 72, 40, holes=0.3, **_ALL),
    Case(100, 96, 48, "float32", holes=0.1, is_gated=True, has_panels=True, **_ALL),
    Case(64, 576, 96, has_panels=True, has_norm=True, holes=0.5),
    Case(9, 64, 20, holes=1.0, has_residual=True),
)
# The products of a layer of 135M parameters and its head; those of a layer of 600M.
BENCH = (
    *(
        Case(X, D, F, dtype)
        for D, F in ((576, 960), (576, 3072), (1536, 576), (576, 49152))
        for X in (1, 16, 64, 512)
        for dtype in ("bfloat16", "float32")
        if X < 512 or F < 49152
    ),
    *(Case(X, 576, 3072, dtype, has_norm=True, is_gated=True) for X in (1, 16) for dtype in ("bfloat16", "float32")),
    *(Case(X, 1024, 6144) for X in (1, 16, 512)),
    *(
        Case(X, D, F, dtype, has_panels=True)
        for D, F in ((576, 3072), (1024, 6144))
        for X in (1, 8, 16, 512)
        for dtype in DTYPES
        if dtype != "float16"
    ),
)


def make(case: Case) -> Call:
    """Random arrays, outputs of about 1."""
    rng = np.random.default_rng(list(str(case).encode()))
    dtype = DTYPES[case.dtype]
    num_outputs = case.F * (2 if case.is_gated else 1)
    x = rng.standard_normal((case.X, case.D))
    if case.has_outliers:
        x[:, rng.integers(0, case.D, 2)] *= 100
    weight = rng.standard_normal((num_outputs, case.D)) * case.D**-0.5
    arrays = {"x": x.astype(dtype), "weight": weight.astype(DTYPES[case.weight or case.dtype])}
    if case.has_panels:
        arrays["weight"] = np.asarray(to_panels(jnp.asarray(arrays["weight"])))
    options: dict[str, object] = {"is_gated": case.is_gated}
    if case.out:
        options["out_dtype"] = case.out
    if case.has_bias:
        arrays["bias"] = rng.standard_normal(num_outputs).astype(dtype)
    if case.has_norm:
        arrays["norm"] = rng.uniform(0.5, 1.5, case.D).astype(dtype)
        options["eps"] = EPS
    if case.has_residual:
        arrays["residual"] = rng.standard_normal((case.X, case.F)).astype(DTYPES[case.out or case.dtype])
    if case.holes:
        # Stretches of both kinds, some of them of a single row.
        arrays["is_real"] = np.repeat(rng.random(case.X) >= case.holes, rng.integers(1, 20, case.X))[: case.X]
        arrays["x"][~arrays["is_real"]] = np.nan
    return Call(arrays, options)


def define(call: Call) -> tuple[np.ndarray]:
    """Each formula in float64, nothing rounded."""
    return (_compute(call, np.float64, lambda out: out),)


def plain(call: Call) -> tuple[np.ndarray]:
    """The same in float32, each part rounded to the result's dtype."""
    dtype = DTYPES[call.options.get("out_dtype", call.arrays["x"].dtype.name)]
    return (_compute(call, np.float32, lambda out: out.astype(dtype)),)


def _compute(call: Call, wide: type, rounded) -> np.ndarray:
    a = call.arrays
    x = a["x"].astype(wide)
    if "is_real" in a:
        x = np.where(a["is_real"][:, None], x, wide(0))
    if "norm" in a:
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + wide(call.options["eps"]))
        if wide is np.float32:
            x = x.astype(a["x"].dtype)
        x = (x * a["norm"].astype(x.dtype)).astype(wide)
    weight = a["weight"]
    if weight.ndim == 4:  # panels: of sixteen outputs a step, then the next
        weight = np.concatenate([np.concatenate(list(panel), axis=1) for panel in weight])
    out = x @ weight.astype(wide).T
    if "bias" in a:
        out = out + a["bias"].astype(wide)
    out = rounded(out)
    if call.options["is_gated"]:
        gate, up = np.split(out, 2, axis=-1)
        out = rounded(rounded(gate.astype(wide) / (1 + np.exp(-gate.astype(wide)))).astype(wide) * up.astype(wide))
    if "residual" in a:
        out = rounded(out.astype(wide) + a["residual"].astype(wide))
    return np.where(a["is_real"][:, None], out, out.dtype.type(0)) if "is_real" in a else out


def cost(case: Case) -> Cost:
    """The weight, the rows and the result once; one product of every row with every output."""
    num_outputs = case.F * (2 if case.is_gated else 1)
    sizes = [np.dtype(DTYPES[name]).itemsize for name in (case.dtype, case.weight or case.dtype, case.out or case.dtype)]
    num_bytes = (
        case.X * case.D * sizes[0] + num_outputs * case.D * sizes[1] + case.X * case.F * sizes[2] * (1 + case.has_residual)
    )
    return Cost(num_bytes, 2 * case.X * case.D * num_outputs)
