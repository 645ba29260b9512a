"""How a call is timed, and the floors that its time is held to, both measured in the same run.

Candidates are timed in turn (A B A B), so that a machine that slows down slows all of them. One pass is several calls, each over
its own copy of the arrays, which together outgrow the caches; on a GPU it is one program, so that the host is not in the way.
Operations that work in place (DONATE in their cases) are given their own results back, or else a copy of the pool would be timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import command
from pallas_kernels.operations import Call, Cost, Operation

# Copies of a call's arrays reach this: twice the last cache of any GPU (50 MB on a Hopper, 126 MB on a Blackwell).
COLD_BYTES = 256 << 20
MAX_COPIES = 16
SAMPLE_S = 0.01  # one sample repeats passes for at least this long


class Runner(Protocol):
    """Something to time."""

    name: str
    num_calls: int  # calls of one pass

    def start(self) -> None:
        """Enqueue one pass."""

    def finish(self) -> None:
        """Wait for all that was enqueued."""


@dataclass(frozen=True)
class Times:
    """Microseconds of one call."""

    median: float
    lowest: float
    highest: float


def in_turn(runners: Sequence[Runner], repeats: int, sample_s: float = SAMPLE_S) -> dict[str, Times]:
    """Time warmed-up runners in turn: `repeats` samples of each."""
    passes = {}
    for runner in runners:
        took = _sample(runner, 1)
        passes[runner.name] = max(1, min(1000, int(sample_s / max(took, 1e-7))))
    samples: dict[str, list[float]] = {runner.name: [] for runner in runners}
    for _ in range(repeats):
        for runner in runners:
            num_passes = passes[runner.name]
            samples[runner.name].append(_sample(runner, num_passes) / num_passes / runner.num_calls * 1e6)
    return {name: Times(statistics.median(each), min(each), max(each)) for name, each in samples.items()}


def _sample(runner: Runner, num_passes: int) -> float:
    begin = time.perf_counter()
    for _ in range(num_passes):
        runner.start()
    runner.finish()
    return time.perf_counter() - begin


class Copies:
    """A call's arrays on the device, as often as it takes to find the caches cold; shared by the candidates of a case."""

    def __init__(self, call: Call, donate: Sequence[str], num_copies: int | None = None):
        total = sum(x.nbytes for x in call.arrays.values())
        if num_copies is None:
            num_copies = max(1, min(MAX_COPIES, -(-COLD_BYTES // max(total, 1))))
        self.call, self.donate, self.num_copies = call, tuple(donate), num_copies
        self.kept = [self._put(name for name in call.arrays if name not in donate) for _ in range(num_copies)]

    def fresh(self) -> list[dict[str, jax.Array]]:
        """New copies of the arrays that are given away."""
        return [self._put(self.donate) for _ in range(self.num_copies)]

    def _put(self, names: Any) -> dict[str, jax.Array]:
        # A CPU device may take a numpy array's memory as its own, and a donated one would then be written to.
        return {name: jnp.array(self.call.arrays[name], copy=True) for name in names}


class Candidate:
    """A function of a call's arrays by name, compiled, with its copies. The first results are kept in `outputs`.

    The functions of operations that work in place return the donated arrays first, in the order of DONATE.
    """

    def __init__(self, name: str, function: Callable[..., Any], copies: Copies):
        self.name, self.num_calls = name, copies.num_copies
        self._kept, self._given, self._donate = copies.kept, copies.fresh(), copies.donate
        if jax.default_backend() == "gpu":
            self._pass = _one_program(function)
        else:
            # Dispatch costs little beside a call on a CPU; as one program the calls would be compiled one by one.
            jitted = jax.jit(function, donate_argnames=copies.donate)
            self._pass = lambda given, kept: [
                _as_tuple(jitted(**mine, **others)) for mine, others in zip(given, kept, strict=True)
            ]
        self.start()
        self.outputs = tuple(np.array(x) for x in self._results[0])

    def start(self) -> None:
        """Enqueue one pass."""
        self._results = self._pass(self._given, self._kept)
        if self._donate:
            self._given = [dict(zip(self._donate, each, strict=False)) for each in self._results]

    def finish(self) -> None:
        """Wait for all that was enqueued."""
        jax.block_until_ready(self._results)


def _one_program(function: Callable[..., Any]) -> Callable[..., list[tuple[jax.Array, ...]]]:
    """All calls of a pass compiled together, one after the other."""
    inner = jax.jit(function)

    def whole(given: list[dict[str, jax.Array]], kept: list[dict[str, jax.Array]]) -> list[tuple[jax.Array, ...]]:
        results: list[tuple[jax.Array, ...]] = []
        for mine, others in zip(given, kept, strict=True):
            if results and others:
                # Without this order XLA may fuse parts of several calls into one.
                small = min(others, key=lambda name: others[name].size)
                waited, previous = lax.optimization_barrier((others[small], results[-1]))
                others, results[-1] = {**others, small: waited}, previous
            results.append(_as_tuple(inner(**mine, **others)))
        return results

    return jax.jit(whole, donate_argnums=0)


def _as_tuple(outputs: Any) -> tuple[jax.Array, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def difference(got: Sequence[np.ndarray], wanted: Sequence[np.ndarray], counts: Sequence[np.ndarray] | None) -> float:
    """The largest relative error among the outputs of two implementations (Frobenius), where a number of either is finite.

    Of whole numbers, tokens say, it is the share of those that are not the same.

    Args:
      counts: for each output which of its numbers mean something; None for all.
    """
    worst = 0.0
    for i, (a, b) in enumerate(zip(got, wanted, strict=False)):
        if a.shape != b.shape:
            return float("inf")
        if np.issubdtype(b.dtype, np.integer):
            worst = max(worst, float(np.mean(a != b)) if a.size else 0.0)
            continue
        x, y = a.astype(np.float32), b.astype(np.float32)
        where = np.isfinite(x) | np.isfinite(y)
        if counts is not None:
            where &= counts[i]
        x, y = x[where], y[where]
        with np.errstate(invalid="ignore"):
            distance, size = float(np.linalg.norm(x - y)), float(np.linalg.norm(y))
        worst = max(worst, distance / size if size else distance) if np.isfinite(distance) else float("inf")
    return worst


# --- floors ---


@dataclass(frozen=True)
class Floors:
    """What the device does at best: bytes read and written per second by a copy, and operations per second of a product."""

    bytes_per_s: float
    flops_per_s: Mapping[str, float]  # of float32 and bfloat16

    def least_us(self, cost: Cost, dtype: str) -> tuple[float, str]:
        """Microseconds that a call takes at least, and whether it is "memory" or "compute" that binds it."""
        memory, compute = cost.num_bytes / self.bytes_per_s, cost.num_flops / self.flops_per_s[rate(dtype)]
        return max(memory, compute) * 1e6, "memory" if memory >= compute else "compute"

    def __str__(self) -> str:
        rates = ", ".join(f"{value / 1e12:.3g} TFLOP/s {name} products" for name, value in self.flops_per_s.items())
        return f"copy {self.bytes_per_s / 1e9:.4g} GB/s, {rates}"


def rate(dtype: str) -> str:
    """The rate of Floors that arithmetic on a dtype is held to."""
    return "float32" if dtype in ("float32", "float64") else "bfloat16"


def measure_floors(repeats: int = 5, *, is_small: bool = False) -> Floors:
    """Copy a large array and multiply large matrices of random numbers; the best of several samples of each."""
    is_gpu = jax.default_backend() == "gpu"
    num_floats = (1 << 28 if is_gpu else 1 << 25) >> (6 if is_small else 0)
    side = (8192 if is_gpu else 1024) >> (2 if is_small else 0)
    x = jnp.arange(num_floats, dtype=jnp.float32)
    num_bytes = 2 * x.nbytes
    copy = _best_in_place(jax.jit(jnp.negative, donate_argnums=0), x, repeats)
    flops = {}
    for dtype in ("float32", "bfloat16"):
        a, b = jax.random.normal(jax.random.key(0), (2, side, side), dtype)
        flops[dtype] = 2 * side**3 / _best(jax.jit(jnp.dot), (a, b), repeats)
    return Floors(num_bytes / copy, flops)


def _best(function: Callable[..., jax.Array], arguments: tuple[jax.Array, ...], repeats: int) -> float:
    """Seconds of the fastest of several samples of four calls."""
    jax.block_until_ready(function(*arguments))
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready([function(*arguments) for _ in range(4)])
        best = min(best, (time.perf_counter() - begin) / 4)
    return best


def _best_in_place(function: Callable[[jax.Array], jax.Array], x: jax.Array, repeats: int) -> float:
    """The same for a function that writes where it reads: memory that a CPU hands out anew is slow at its first touch."""
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(4):
            x = function(x)
        x.block_until_ready()
        best = min(best, (time.perf_counter() - begin) / 4)
    return best


# --- one case ---


@dataclass(frozen=True)
class Row:
    """One candidate's time on one case."""

    operation: str
    case: str
    name: str
    is_peer: bool
    median_us: float
    lowest_us: float
    highest_us: float
    num_bytes: int
    num_flops: int
    bound: str  # "memory" or "compute"
    least_us: float  # by the floors
    num_copies: int
    difference: float  # relative, from the first candidate's outputs

    @property
    def share(self) -> float:
        """Of the floor: 1 is as fast as the device copies or multiplies."""
        return self.least_us / self.median_us

    @property
    def speed(self) -> str:
        """GB/s of what is bound by memory, TFLOP/s of what is bound by arithmetic."""
        if self.bound == "memory":
            return f"{self.num_bytes / self.median_us / 1e3:.4g} GB/s"
        return f"{self.num_flops / self.median_us / 1e6:.4g} TFLOP/s"


def time_case(
    operation: Operation,
    case: Any,
    call: Call,
    backends: Sequence[str],
    floors: Floors,
    *,
    repeats: int,
    more: Sequence[Callable[[Copies], Runner]] = (),
) -> tuple[list[Row], dict[str, str]]:
    """Time a case on backends, on the comparisons that its cases bring along (PEERS), and on `more`.

    Every candidate's outputs are held to the first one's before anything is timed.

    Args:
      more: what makes a further candidate, with `outputs` to compare, or raises: its function's name is then listed.

    Returns:
      A row for each candidate that ran, and for each that did not the reason.
    """
    cases = operation.cases
    copies = Copies(call, getattr(cases, "DONATE", ()))
    makers: dict[str, Callable[[], Any]] = {}
    for backend in backends:
        function = partial(operation.function, **call.options, backend=backend)
        makers[backend] = partial(Candidate, backend, function, copies)
    for name, peer in getattr(cases, "PEERS", {}).items():
        makers[name] = partial(Candidate, name, _with_options(peer, call.options), copies)
    for maker in more:
        makers[maker.__name__] = partial(maker, copies)

    counts = cases.counts(call) if hasattr(cases, "counts") else None
    most = 2e-2 if rate(_dtype(call)) == "bfloat16" else 1e-3
    runners: list[Any] = []
    differences, reasons = {}, {}
    for name, make in makers.items():
        try:
            runner = make()
        except Exception as error:  # an absent backend or peer is a line, whatever it dies of
            kind = "" if isinstance(error, NotImplementedError) else f"{type(error).__name__}: "
            reasons[name] = f"{kind}{command.first_line(error)}".removeprefix(f"{operation.name}: ")
            continue
        differences[runner.name] = difference(runner.outputs, runners[0].outputs, counts) if runners else 0.0
        if differences[runner.name] > most:
            reasons[name] = f"not timed: its outputs differ from those of {runners[0].name} by {differences[runner.name]:.2g}"
            continue
        runners.append(runner)
    times = in_turn(runners, repeats)
    cost = cases.cost(case)
    least, bound = floors.least_us(cost, _dtype(call))
    rows = [
        Row(
            operation.name,
            str(case),
            runner.name,
            runner.name not in backends,
            times[runner.name].median,
            times[runner.name].lowest,
            times[runner.name].highest,
            cost.num_bytes,
            cost.num_flops,
            bound,
            least,
            runner.num_calls,
            differences[runner.name],
        )
        for runner in runners
    ]
    return rows, reasons


def too_large(operation: Operation, case: Any, floors: Floors, num_mib: int, slowest_ms: float) -> str | None:
    """Why a case is not for this machine, by what it cannot do without, or None."""
    cost = operation.cases.cost(case)
    if cost.num_bytes > num_mib << 20:
        return f"its {cost.num_bytes >> 20} MiB are more than {num_mib}"
    least_ms = floors.least_us(cost, "bfloat16")[0] / 1e3
    if least_ms > slowest_ms:
        return f"it takes {least_ms:.0f} ms at the very least, more than {slowest_ms:g}"
    return None


def _with_options(peer: Callable[[Call], Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    return lambda **arrays: peer(Call(arrays, options))


def _dtype(call: Call) -> str:
    """Of the first array, which is what the arithmetic is done on."""
    return next(iter(call.arrays.values())).dtype.name
