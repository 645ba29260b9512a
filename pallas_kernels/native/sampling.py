"""Tokens from logits on a CPU, in C++, called by XLA on its own threads.

XLA's CPU backend draws noise for every token of a vocabulary, at a tenth of what the processor gives, and reads a row again for
each bit of a filter's threshold.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from pallas_kernels.native import building

if TYPE_CHECKING:
    from pallas_kernels.sample_logits.rows import Rows

_SOURCE = Path(__file__).with_name("sampling.cc")


@functools.cache
def unavailable() -> str | None:
    """Why this backend cannot run here, or None when it can. Builds and registers it at the first call."""
    return building.register(_SOURCE, {"SampleLogits": _target("SampleLogits")}, building.MATH, "sampling")


def _target(name: str) -> str:
    return f"pallas_kernels.{name}"


def sample(logits: jax.Array, rows: Rows) -> jax.Array:
    """See the contract in `pallas_kernels.sample_logits`."""
    call = jax.ffi.ffi_call(_target("SampleLogits"), jax.ShapeDtypeStruct((logits.shape[0],), jnp.int32))
    return call(logits, *rows)
