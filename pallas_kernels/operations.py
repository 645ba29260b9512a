"""Every operation with its cases, and what it means to be right: the one list that tests, `check`, `bench` and `gpu_check` read.

Each operation's folder has a `cases.py` with
  CHECK, BENCH   small adversarial cases for every backend, and the shapes that are timed; a case's `str` is its name
  OUTPUTS        a name for each array that the operation returns
  make(case)     the Call of a case, the same every time
  define(call)   the outputs in float64, written from the definition in numpy; NaN where any finite number will do
  plain(call)    the outputs of the plainest implementation in the call's own dtypes; None for what must be bit-exact
  cost(case)     the Cost of a timed case
and where they make sense
  INTERPRET      the cases that the interpreter takes, when all of CHECK are too many
  COMPILE        the cases that `compile_check` compiles, when it is not BENCH
  INSTRUCTIONS   machine instructions that the compiled kernels must have, by GPU: {"sm_90a": ("HGMMA",)}
  DONATE         arguments whose memory the results take; they are the first results, in this order
  PEERS          other formulations to time beside: name -> function of a Call that returns what the operation returns
  counts(call)   for each output which of its numbers mean something
  poison(call)   the call with NaN wherever nobody may look
"""

from __future__ import annotations

import functools
import importlib
import json
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import ml_dtypes
import numpy as np

NAMES = (
    "paged_decode_attention",
    "paged_prefill_attention",
    "merge_states",
    "sample_logits",
    "matmul",
    "quantized_matmul",
    "rotate_heads",
    "write_kv_pages",
    "copy_pages",
    "gather_pages",
    "scatter_pages",
)


@dataclass(frozen=True)
class Call:
    """Arguments of one call by name: arrays, and options that are known when it is compiled."""

    arrays: Mapping[str, np.ndarray]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Cost:
    """What a call cannot do without: bytes read and written, and multiplications and additions."""

    num_bytes: int
    num_flops: int


@dataclass(frozen=True)
class Operation:
    """One operation of the library: its function and its module of cases."""

    name: str
    function: Callable[..., Any]
    cases: ModuleType

    def run(self, call: Call, backend: str) -> tuple[np.ndarray, ...]:
        """The outputs of a call on a backend, compiled; in the order of `cases.OUTPUTS`. Raises as the operation does."""
        outputs = self.compiled(tuple(sorted(call.options.items())), backend)(**call.arrays)
        return tuple(np.asarray(x) for x in (outputs if isinstance(outputs, tuple) else (outputs,)))

    @functools.cache  # noqa: B019 (there is one Operation of each name)
    def compiled(self, options: tuple[tuple[str, Any], ...], backend: str) -> Callable[..., Any]:
        """The jitted function of a call's arrays, by name."""
        return jax.jit(functools.partial(self.function, **dict(options), backend=backend))


@functools.cache
def operation(name: str) -> Operation:
    """The operation of that name.

    Raises:
      ValueError: there is none.
    """
    if name not in NAMES:
        raise ValueError(f"operation: got {name!r}, expected one of {', '.join(NAMES)}")
    function = getattr(importlib.import_module("pallas_kernels"), name)
    return Operation(name, function, importlib.import_module(f"pallas_kernels.{name}.cases"))


# --- being right ---


@dataclass(frozen=True)
class Verdict:
    """How far one output is from the definition, and how far it may be."""

    output: str
    max_error: float  # largest distance from float64
    allowed: float
    first_bad: tuple[int, ...] | None  # index of the first number that is too far, or is not finite where it must be
    relative_error: float  # |got - exact| / |exact|, Frobenius

    @property
    def is_right(self) -> bool:
        """Whether every number is close enough."""
        return self.first_bad is None


def judge(name: str, got: np.ndarray, exact: np.ndarray, plain: np.ndarray | None) -> Verdict:
    """Hold one output to the definition.

    The rule: the largest error against float64 is at most twice that of the plainest implementation in the same dtypes, plus
    1e-5; with `plain` None, bits are equal. Where the definition is infinite so is the output; where it is NaN, any number is
    right that is not NaN. Source: FlashAttention-3's tests.

    Raises:
      ValueError: shapes or dtypes differ from the definition's.
    """
    if got.shape != exact.shape:
        raise ValueError(f"{name}: got shape {list(got.shape)}, the definition has {list(exact.shape)}")
    if plain is None:
        if got.dtype != exact.dtype:
            raise ValueError(f"{name}: got {got.dtype}, the definition has {exact.dtype}")
        size = got.dtype.itemsize
        bits = np.dtype(f"u{size}")
        same = np.ascontiguousarray(got).view(bits) == np.ascontiguousarray(exact).view(bits)
        return Verdict(name, float(not same.all()), 0.0, _first(~same), float(1 - same.mean()) if same.size else 0.0)
    with np.errstate(invalid="ignore"):  # what was never written may be a signalling NaN
        values, near = got.astype(np.float64), plain.astype(np.float64)
    is_any, is_infinite = np.isnan(exact), np.isinf(exact)
    counts = ~is_any & ~is_infinite
    with np.errstate(invalid="ignore"):  # infinity minus itself, where it does not count
        allowed = 2 * float(np.where(counts, np.abs(near - exact), 0.0).max(initial=0.0)) + 1e-5
        errors = np.where(counts, np.abs(values - exact), 0.0)
    wrong = np.isnan(values) | (errors > allowed) | (is_infinite & (values != exact))
    scale = float(np.linalg.norm(np.where(counts, exact, 0.0)))
    errors = np.nan_to_num(errors, nan=np.inf, posinf=np.inf)
    with np.errstate(over="ignore"):
        relative = float(np.linalg.norm(errors)) / scale if scale else 0.0
    return Verdict(name, float(errors.max(initial=0.0)), allowed, _first(wrong), relative)


def check(operation: Operation, call: Call, backend: str) -> list[Verdict]:
    """Run a call on a backend and hold every output that it has to the definition. Raises as the operation does."""
    got, exact, plain = operation.run(call, backend), operation.cases.define(call), operation.cases.plain(call)
    names = operation.cases.OUTPUTS[: len(exact)]
    return [judge(name, got[i], exact[i], None if plain is None else plain[i]) for i, name in enumerate(names)]


def _first(wrong: np.ndarray) -> tuple[int, ...] | None:
    return tuple(int(i) for i in np.argwhere(wrong)[0]) if wrong.any() else None


# --- calls as files ---


def save(path: Path, name: str, call: Call) -> None:
    """Write a call as a self-contained .npz: every array, and in `call` what it is for, as JSON."""
    about = {
        "operation": name,
        "options": dict(call.options),
        "dtypes": {key: x.dtype.name for key, x in call.arrays.items()},
    }
    arrays = {key: _savable(x) for key, x in call.arrays.items()}
    np.savez_compressed(path, call=np.array(json.dumps(about)), **arrays)  # type: ignore[arg-type]


def load(path: Path) -> tuple[Operation, Call]:
    """Read what `save` wrote.

    Raises:
      ValueError: the file is not such a file.
    """
    try:
        # Opened here: numpy leaves a damaged file that it opened itself open.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            about = json.loads(str(file["call"]))
            arrays = {key: file[key].view(_dtype(dtype)) for key, dtype in about["dtypes"].items()}
        return operation(about["operation"]), Call(arrays, about["options"])
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (*_FOREIGN, ValueError) as error:
        raise ValueError(f"{path}: not a case of pallas_kernels ({error})") from None


# What numpy, zipfile and this module raise on a file that is damaged or something else.
_FOREIGN = (KeyError, OSError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error)


def _savable(x: np.ndarray) -> np.ndarray:
    """numpy writes the dtypes that it does not know as raw bytes that it cannot read again: their bits go instead."""
    return x.view(f"u{x.dtype.itemsize}") if hasattr(ml_dtypes, x.dtype.name) else x


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))
