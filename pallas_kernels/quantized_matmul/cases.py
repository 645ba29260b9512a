"""The cases of quantized_matmul: shapes, arrays, and the product by its definition. See `pallas_kernels.operations`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels.matmul.panels import to_panels
from pallas_kernels.operations import Call, Cost

OUTPUTS = ("out",)
DTYPES = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
}


@dataclass(frozen=True)
class Case:
    """X rows of D numbers times a weight of F outputs in the format `weight`; `group` 0 is one scale for each output."""

    X: int
    D: int
    F: int
    weight: str  # "int8", "int4" or "float8_e4m3fn"
    group: int = 0
    dtype: str = "bfloat16"
    has_zeros: bool = False
    has_outliers: bool = False  # two columns of x a hundred times larger
    activations: str | None = None
    has_panels: bool = False
    has_around: bool = False  # a norm, a bias and a residual, and rows that do not count; F is of the weight
    is_gated: bool = False

    def __str__(self) -> str:
        parts = [f"X{self.X}-D{self.D}-F{self.F}", self.weight, self.dtype]
        parts += [f"group{self.group}"] * bool(self.group) + ["zeros"] * self.has_zeros + ["outliers"] * self.has_outliers
        parts += ["int8_rows"] * bool(self.activations) + ["panels"] * self.has_panels + ["around"] * self.has_around
        return "-".join(parts + ["gated"] * self.is_gated)


_FP8 = "float8_e4m3fn"
CHECK = (
    Case(1, 256, 64, "int8"),
    Case(3, 576, 96, "int8", dtype="float16"),
    Case(16, 4096, 32, "int8", has_outliers=True),  # every slot of the ring is filled more than once
    Case(17, 512, 64, "int8", group=128),
    Case(64, 256, 64, "int8", group=32, has_outliers=True),
    Case(100, 128, 160, "int8", group=64),
    Case(1, 512, 64, "int4", group=64),
    Case(3, 1024, 96, "int4", group=128, dtype="float16", has_zeros=True),
    Case(16, 576, 64, "int4", group=32, has_zeros=True, has_outliers=True),
    Case(17, 256, 32, "int4"),
    Case(64, 512, 64, "int4", group=128, has_outliers=True),
    Case(100, 256, 64, "int4", group=64, has_zeros=True),
    Case(1, 256, 64, _FP8),
    Case(3, 576, 32, _FP8, dtype="float16", has_outliers=True),
    Case(17, 512, 64, _FP8, group=128),
    Case(1, 256, 64, _FP8, dtype=_FP8),
    Case(16, 512, 96, _FP8, dtype=_FP8, has_outliers=True),
    Case(64, 128, 64, "int8", dtype=_FP8),
    Case(1, 256, 48, "int8", dtype="float32", has_outliers=True),
    Case(3, 90, 7, "int8", group=30, dtype="float32"),  # sizes that no tile divides
    Case(17, 130, 1031, "int4", dtype="float32", has_zeros=True),
    Case(2, 72, 33, _FP8, group=8, dtype="float32"),
    Case(1, 256, 64, "int8", dtype="float32", activations="int8"),
    Case(17, 256, 64, "int8", group=32, activations="int8", has_outliers=True),
    Case(3, 256, 64, "int4", group=64, activations="int8", has_zeros=True),
    Case(1, 64, 48, "int8", activations="int8", has_panels=True),
    Case(40, 100, 160, "int8", dtype="float32", activations="int8", has_panels=True, has_outliers=True),
    Case(37, 72, 96, "int8", dtype="float32", activations="int8", has_around=True, is_gated=True),
    Case(64, 132, 224, "int8", dtype="float32", activations="int8", has_panels=True, has_around=True, is_gated=True),
    Case(3, 90, 33, "int8", dtype="float32", activations="int8", has_around=True),
)
# Every format, both counts of rows' tiles, every way through the kernel; the interpreter takes seconds for each.
INTERPRET = tuple(case for case in CHECK if case.dtype != "float32" and not case.activations)
# A model of 8B parameters on a GPU; then one layer of it and one of 135M parameters on a CPU.
BENCH = (
    *(
        Case(X, 4096, F, weight, group=128 if weight == "int4" else 0)
        for F in (4096, 14336)
        for X in (1, 16)
        for weight in ("int8", "int4", _FP8)
    ),
    *(
        Case(X, D, F, weight, group=group, dtype="float32", activations=activations)
        for D, F in ((2048, 8192), (576, 1536))
        for X in (1, 8, 16, 128)
        for weight, group, activations in (("int8", 0, None), ("int8", 0, "int8"), ("int4", 64, None))
    ),
)
COMPILE = (
    Case(1, 4096, 4096, "int8"),
    Case(16, 4096, 14336, "int8"),
    Case(64, 4096, 4096, "int8", group=128),
    Case(1, 4096, 4096, "int4", group=128),
    Case(16, 4096, 14336, "int4", group=128, has_zeros=True),
    Case(64, 4096, 4096, "int4", group=32),
    Case(16, 4096, 4096, _FP8),
    Case(16, 4096, 14336, _FP8, dtype=_FP8),
    Case(256, 4096, 4096, "int8"),
    Case(3, 576, 1536, "int8", dtype="float16"),
    Case(3, 576, 1536, "int4", group=32, dtype="float16"),
)
# Tensor core products of loaded registers, and how the weight comes: by the copy engine, or by asynchronous copies.
INSTRUCTIONS = {
    "sm_80": ("HMMA", "LDGSTS"),
    "sm_89": ("HMMA", "LDGSTS"),
    "sm_90a": ("HMMA", "UTMALDG"),
    "sm_100a": ("HMMA", "UTMALDG"),
}


def make(case: Case) -> Call:
    """Random arrays: every number that the format has, scales that differ from group to group, outputs of about 1."""
    rng = np.random.default_rng(list(str(case).encode()))
    groups = case.D // (case.group or case.D)
    shape = (groups, case.F) if case.group else (case.F,)
    spread = {"int8": 73.0, "int4": 4.6, _FP8: 1.0}[case.weight]
    scales = rng.uniform(0.5, 1.5, shape) / (spread * case.D**0.5)
    x = rng.standard_normal((case.X, case.D))
    if case.has_outliers:
        x[:, rng.integers(0, case.D, 2)] *= 100
    arrays = {"x": x.astype(DTYPES[case.dtype])}
    if case.weight == _FP8:
        arrays["weight"] = (rng.standard_normal((case.F, case.D)) * rng.choice([1.0, 0.01], case.D)).astype(DTYPES[_FP8])
    elif case.weight == "int8":
        arrays["weight"] = rng.integers(-128, 128, (case.F, case.D), np.int8)
    else:
        arrays["weight"] = rng.integers(0, 256, (case.F, case.D // 2), np.uint8)
    arrays["scales"] = scales.astype(np.float32)
    if case.has_zeros:
        arrays["zeros"] = rng.integers(0, 16, shape).astype(np.float32)
    options: dict[str, Any] = {}
    if case.dtype == _FP8:
        arrays["x_scales"] = rng.uniform(0.5, 2.0, case.X).astype(np.float32)
        options["out_dtype"] = "bfloat16"
    if case.activations:
        options["activations"] = case.activations
    if case.has_panels:
        arrays["weight"] = np.asarray(to_panels(jnp.asarray(arrays["weight"])))
    if case.is_gated:
        options["is_gated"] = True
    if case.has_around:
        # Numbers that are whole steps of their row behind the norm: whatever its last bits, each is rounded to the same one.
        steps = rng.integers(-127, 128, x.shape)
        steps[np.arange(case.X), rng.integers(0, case.D, case.X)] = 127
        arrays["norm"] = rng.choice([0.5, 1.0, 2.0], case.D).astype(arrays["x"].dtype)
        arrays["x"] = (steps * rng.uniform(0.01, 10, (case.X, 1)).astype(np.float16) / arrays["norm"]).astype(arrays["x"].dtype)
        arrays["bias"] = rng.standard_normal(case.F).astype(np.float32)
        arrays["residual"] = rng.standard_normal((case.X, case.F // (1 + case.is_gated))).astype(arrays["x"].dtype)
        arrays["is_real"] = rng.random(case.X) < 0.7
        options["eps"] = 1e-5
    return Call(arrays, options)


def define(call: Call) -> tuple[np.ndarray]:
    """The product with the numbers that the weight stands for, in float64; rows rounded to int8 where that is asked for."""
    return (_product(call, np.float64),)


def plain(call: Call) -> tuple[np.ndarray]:
    """The same in float32 with a weight of float32, in the result's dtype."""
    return (_product(call, np.float32).astype(DTYPES[call.options.get("out_dtype", call.arrays["x"].dtype.name)]),)


def _product(call: Call, dtype: type) -> np.ndarray:
    a = call.arrays
    x, weight, scales = a["x"], a["weight"], np.atleast_2d(a["scales"])
    if weight.ndim == 4:
        weight = weight[:, 1:].transpose(0, 2, 1, 3).reshape(-1, x.shape[1])
    if "norm" in a:
        x = x.astype(dtype)
        x = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + dtype(call.options["eps"])) * a["norm"].astype(dtype)
    if call.options.get("activations"):
        wide = x.astype(np.float32)
        row_scales = np.abs(wide).max(-1, keepdims=True) * np.float32(1 / 127)
        x = np.round(wide / row_scales).astype(dtype) * row_scales.astype(dtype)
    if weight.dtype == np.uint8:
        zeros = np.atleast_2d(a["zeros"]) if "zeros" in a else np.full_like(scales, 8)
        numbers = np.empty((len(weight), weight.shape[1] * 2), dtype)
        numbers[:, ::2], numbers[:, 1::2] = weight & 15, weight >> 4
        numbers -= np.repeat(zeros, numbers.shape[1] // len(scales), axis=0).T.astype(dtype)
    else:
        numbers = weight.astype(dtype)
    numbers *= np.repeat(scales, numbers.shape[1] // len(scales), axis=0).T.astype(dtype)
    out = x.astype(dtype) @ numbers.T
    if "x_scales" in a:
        out = out * a["x_scales"][:, None].astype(dtype)
    if "bias" in a:
        out = out + a["bias"].astype(dtype)
    if call.options.get("is_gated"):
        gate, up = np.split(out, 2, axis=1)
        out = gate / (1 + np.exp(-gate)) * up
    return np.where(a["is_real"][:, None], out + a["residual"].astype(dtype), 0) if "residual" in a else out


def cost(case: Case) -> Cost:
    """The weight, its scales and zeros, the rows and the result once; one product of every row with every output."""
    groups = case.D // (case.group or case.D)
    weight = case.F * case.D // (2 if case.weight == "int4" else 1)
    scales = groups * case.F * 4 * (1 + case.has_zeros)
    size = np.dtype(DTYPES[case.dtype]).itemsize
    out_size = 2 if case.dtype == _FP8 else size
    return Cost(weight + scales + case.X * (case.D * size + case.F * out_size), 2 * case.X * case.D * case.F)
