"""Which implementation of an operation runs: chosen by name, never in silence.

| name | what it is |
|---|---|
| reference | the plain definition |
| xla | fast portable JAX; never reads what a row may not see |
| native | C++ on a CPU, built at first use |
| mosaic | Pallas kernels for NVIDIA GPUs, Ampere and newer |
| interpret | the Mosaic kernel on jax's GPU interpreter with its race detector, on any machine: for checking, seconds a call |
| auto | the best of mosaic, native and xla that can run here |
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax

from pallas_kernels import target as targets
from pallas_kernels.target import Target

logger = logging.getLogger("pallas_kernels")

Backend = Literal["auto", "reference", "xla", "native", "mosaic", "interpret"]
BACKENDS = ("auto", "reference", "xla", "native", "mosaic", "interpret")
MOSAIC_JAX = (0, 11, 2)


@dataclass(frozen=True)
class Choice:
    """The implementation to call, "reference", "xla", "native" or "mosaic", and the GPU that a Mosaic kernel is written for."""

    name: str
    target: Target | None = None


def choose(
    operation: str,
    backend: str,
    *,
    native: Callable[[], str | None] | None = None,
    mosaic: Callable[[Target], str | None] | None = None,
) -> Choice:
    """The implementation that `backend` stands for on this machine. `auto` logs its choice once for each operation.

    Args:
      operation: its name, for messages.
      native, mosaic: why that implementation cannot take these arguments, or None when it can; left out by an operation that has
        none. The reason for everything that is the same for all operations is found here.

    Raises:
      ValueError: the name is not one of BACKENDS.
      NotImplementedError: the named backend cannot run here; the message says why.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, expected one of {', '.join(BACKENDS)}")
    if backend in ("reference", "xla"):
        return Choice(backend)
    gpu = targets.INTERPRETED if backend == "interpret" else targets.current()

    def why_not(name: str) -> str | None:
        if name == "native":
            return "this operation has no native implementation" if native is None else native()
        return _without_mosaic(gpu) or ("this operation has no Mosaic kernel" if mosaic is None else mosaic(gpu))  # type: ignore[arg-type]

    if backend == "auto":
        return _automatic(operation, gpu, why_not)
    name = "mosaic" if backend == "interpret" else backend
    reason = why_not(name)
    if reason is not None:
        raise NotImplementedError(f"{operation}: backend {backend!r} cannot run here: {reason}; 'xla' and 'reference' can")
    return Choice(name, gpu if name == "mosaic" else None)


def _without_mosaic(gpu: Target | None) -> str | None:
    """Why no Mosaic kernel at all can run, or None."""
    if jax.__version_info__[:3] < MOSAIC_JAX:
        return f"Mosaic GPU kernels need jax {'.'.join(map(str, MOSAIC_JAX))} or newer, this is {jax.__version__}"
    if gpu is None:
        return f"it needs an NVIDIA GPU, the default backend is {jax.default_backend()}"
    if gpu.compute_capability < (8, 0):
        return f"it needs compute capability 8.0 or higher, this GPU has {'.'.join(map(str, gpu.compute_capability))}"
    return None


def _automatic(operation: str, gpu: Target | None, why_not: Callable[[str], str | None]) -> Choice:
    best = "native" if gpu is None else "mosaic"
    reason = why_not(best)
    if reason is None:
        _say(f"{operation}: using the {best} backend.")
        return Choice(best, gpu)
    _say(f"{operation}: using the xla backend; {best} cannot run here ({reason}).")
    return Choice("xla")


@functools.cache
def _say(line: str) -> None:
    logger.info("%s", line)
