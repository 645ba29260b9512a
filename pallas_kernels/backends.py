"""Which implementation of an operation runs: chosen by name, never in silence."""

from __future__ import annotations

import functools
import logging
from typing import Literal

from pallas_kernels import native

logger = logging.getLogger("pallas_kernels")

Backend = Literal["auto", "reference", "xla", "native"]
BACKENDS = ("auto", "reference", "xla", "native")


def resolve(backend: str, head_dim: int) -> Backend:
    """The implementation that `backend` stands for on this machine, for heads of this size. `auto` logs its choice once.

    Raises:
      ValueError: the name is not one of BACKENDS.
      NotImplementedError: the named backend cannot run here; the message says why.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, expected one of {', '.join(BACKENDS)}")
    if backend == "auto":
        return _choose(head_dim)
    if backend == "native" and native.unavailable(head_dim):
        raise NotImplementedError(f"backend 'native' cannot run here: {native.unavailable(head_dim)}; 'xla' and 'reference' can")
    return backend  # type: ignore[return-value]


@functools.cache
def _choose(head_dim: int) -> Backend:
    reason = native.unavailable(head_dim)
    if reason is None:
        logger.info("Using native attention backend out of potential backends: native, xla, reference.")
        return "native"
    logger.info("Using xla attention backend: native cannot run here (%s).", reason)
    return "xla"
