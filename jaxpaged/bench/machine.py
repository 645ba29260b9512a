"""What this machine can do at best, measured on the spot: bytes a second from memory, operations a second in products.

Knows arrays. Refuses to know models.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

READ_BYTES = 256 << 20  # more than a cache holds
SIDE = 1024  # of the square matrices on a CPU
SIDE_ELSEWHERE = 8192


class Limits(NamedTuple):
    """The best of a few tries: a busy machine gives less."""

    bytes_per_s: float
    flops: float


def measure(dtype: str, *, turns: int = 7, num_bytes: int = READ_BYTES, side: int | None = None) -> Limits:
    """Of jax's default device. Products of `dtype`, or of float32 where those are quicker.

    Args:
      side: of the square matrices; None is what keeps the device busy.
    """
    is_cpu = jax.default_backend() == "cpu"
    side = side or (SIDE if is_cpu else SIDE_ELSEWHERE)
    read = _reader_on_cpu(num_bytes) if is_cpu else _reader(num_bytes)
    products = [_product(side, kind) for kind in dict.fromkeys((dtype, "float32"))]
    if is_cpu:
        left = np.ones((side, side), np.float32)
        products.append(lambda: left @ left)
    return Limits(num_bytes / _lowest(read, turns), 2 * side**3 / min(_lowest(product, turns) for product in products))


def _reader_on_cpu(num_bytes: int) -> Callable[[], object]:
    """A thread for each processor, each with its part; BLAS lets go of the interpreter meanwhile."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts = np.array_split(np.ones(num_bytes // 4, np.float32), count)
    pool = ThreadPoolExecutor(count)
    return lambda: list(pool.map(lambda part: np.dot(part, part), parts))


def _reader(num_bytes: int) -> Callable[[], object]:
    array, total = jnp.ones(num_bytes // 4, jnp.float32), jax.jit(jnp.sum)
    return lambda: jax.block_until_ready(total(array))


def _product(side: int, dtype: str) -> Callable[[], object]:
    left, multiply = jnp.ones((side, side), dtype), jax.jit(jnp.matmul)
    return lambda: jax.block_until_ready(multiply(left, left))


def _lowest(call: Callable[[], object], turns: int) -> float:
    """Seconds, after one that does not count."""
    call()
    found = []
    for _ in range(turns):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return min(found)
