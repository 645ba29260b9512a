"""The GPU that a Mosaic kernel is written for. Knows chips and their limits; refuses to know any kernel."""

from __future__ import annotations

from dataclasses import dataclass

import jax

# Shared memory one block may ask for, in KiB. Without a device at hand Mosaic takes 227 for every chip, so kernels ask here.
# Source: CUDA C++ programming guide, technical specifications per compute capability.
_SHARED_KIB = {
    (8, 0): 163,
    (8, 6): 99,
    (8, 7): 163,
    (8, 9): 99,
    (9, 0): 227,
    (10, 0): 227,
    (10, 3): 227,
    (12, 0): 99,
    (12, 1): 99,
}


@dataclass(frozen=True)
class Target:
    """A compute capability, the number of multiprocessors, and whether jax's GPU interpreter stands in for the chip."""

    compute_capability: tuple[int, int]
    num_sms: int
    is_interpreted: bool = False

    def __str__(self) -> str:
        major, minor = self.compute_capability
        return f"sm_{major}{minor}{'a' if major >= 9 else ''}"

    @property
    def has_tma(self) -> bool:
        """Whether the bulk copy engine is there. Without it pages come by cp.async and results are stored from registers."""
        return self.compute_capability >= (9, 0)

    @property
    def has_wgmma(self) -> bool:
        """Whether warpgroup products are there: on Hopper alone. Lowering one for another chip aborts the process (jax 0.12)."""
        return self.compute_capability[0] == 9

    @property
    def has_fp8_conversion(self) -> bool:
        """Whether registers can turn fp8 into wider floats."""
        return self.compute_capability >= (8, 9)

    @property
    def shared_memory_bytes(self) -> int:
        """Shared memory one block may ask for."""
        return _SHARED_KIB.get(self.compute_capability, 99) * 1024


# Hopper is what the interpreter models: copies by TMA, barriers. Few multiprocessors, so that tiny cases are split too.
INTERPRETED = Target((9, 0), num_sms=8, is_interpreted=True)


def current() -> Target | None:
    """The GPU that the surrounding jit is compiled for, None without one.

    The abstract mesh's device comes first, because Mosaic asks it first: that is how a program is compiled for a GPU that is not
    there (see deviceless.py).
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    capability = getattr(device, "compute_capability", None)
    if capability is not None:
        return Target(_numbers(capability), device.num_cores)  # type: ignore[union-attr]
    if jax.default_backend() != "gpu":
        return None
    device = jax.local_devices()[0]
    return Target(_numbers(device.compute_capability), device.core_count)


def _numbers(capability: str) -> tuple[int, int]:
    major, minor = capability.split(".")
    return int(major), int(minor)
