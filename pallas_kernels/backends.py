"""Which implementation of an operation runs: chosen by name, never in silence."""

from __future__ import annotations

from typing import Literal

Backend = Literal["auto", "reference", "xla"]
BACKENDS = ("auto", "reference", "xla")


def resolve(backend: str) -> str:
    """The name of the implementation that `backend` stands for on this machine.

    Raises:
      ValueError: the name is not one of BACKENDS.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, expected one of {', '.join(BACKENDS)}")
    # The portable path is the only fast one so far, on every platform.
    return "xla" if backend == "auto" else backend
