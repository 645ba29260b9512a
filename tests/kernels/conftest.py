"""What the kernels' tests share: the interpreter's races are failures, and no test sees what another left behind in it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import jax
import pytest

from pallas_kernels.backends import MOSAIC_JAX

# Threads of XLA's CPU client, which reads this once. The interpreter gives each warpgroup that waits at a barrier one of them: on
# a machine of two cores a kernel of three warpgroups would wait forever.
os.environ.setdefault("NPROC", "8")


@pytest.fixture(autouse=True)
def races_are_failures() -> Iterator[None]:
    """Forget the interpreter's state before each test, and fail one in which any kernel raced (jax 0.11 only prints it)."""
    if jax.__version_info__[:3] < MOSAIC_JAX:
        yield
        return
    from pallas_kernels import _compat  # imports Mosaic, which an older jax does not have

    _compat.reset_interpreter()
    yield
    _compat.check_races()
