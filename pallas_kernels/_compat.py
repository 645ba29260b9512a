"""Every difference between the jax versions that the Mosaic kernels run on, so that no kernel's body asks for a version.

Also the seam between a chip and jax's GPU interpreter. Refuses to know any kernel. Import it only where a kernel is built: it
imports Mosaic.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.target import Target

# As Any: what a type checker sees depends on the jax it finds, and this file is where versions differ.
plgpu: Any = importlib.import_module("jax.experimental.pallas.mosaic_gpu")

_VERSION = jax.__version_info__[:3]


def kernel(
    body: Callable[..., None],
    *,
    target: Target,
    out_type: Any = (),
    scratch_types: Any = (),
    grid: Sequence[int] = (),
    grid_names: Sequence[str] = (),
    num_threads: int | None = None,
    thread_name: str | None = None,
    approx_math: bool = True,
    name: str | None = None,
) -> Callable[..., Any]:
    """`plgpu.kernel` for a chip, or on the interpreter with its race detector on.

    Raises:
      RuntimeError: (at the call, interpreted) two threads touched the same memory in no order.
    """
    if target.is_interpreted:
        _register_interpretation()
        _watch_races()
    if name is not None:
        body.__name__ = name  # what ptxas and profilers call the kernel
    threads = {} if num_threads is None else {"num_threads": num_threads, "thread_name": thread_name}
    call = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch_types,
        grid=tuple(grid),
        grid_names=tuple(grid_names),
        compiler_params=plgpu.CompilerParams(approx_math=approx_math),
        interpret=_interpret_params() if target.is_interpreted else None,
        **threads,
    )
    return call


def store(ref: Any, value: jax.Array) -> None:
    """`ref[...] = value` for a value in any layout, GMEM included (jax 0.12 wants to be told that the store is not optimal)."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def fence_async_shared_cta() -> None:
    """Order this thread's generic reads of shared memory before a later copy engine write to it.

    Without it, refilling a slot that registers were loaded from is a race (the interpreter sees it).
    """
    plgpu.commit_smem()


def wgmma_onto(acc: jax.Array, a: jax.Array, b: Any, *, target: Target, meanwhile: Callable[[], None]) -> jax.Array:
    """acc + a @ b by the warpgroup's tensor cores: acc and a in registers, b in shared memory.

    The interpreter has neither `run_state` nor products of registers. There b is read into registers, with the fence that a
    refill of b then needs: an order of reads and refills that is wrong is still a race.

    Args:
      meanwhile: what is done while the product runs.
    """
    if target.is_interpreted:
        acc = acc + jnp.dot(a, b[...], preferred_element_type=acc.dtype)
        fence_async_shared_cta()
        meanwhile()
        return acc

    def product(ref: Any) -> None:
        plgpu.wgmma(ref, a, b)
        meanwhile()

    return pl.run_state(product)(plgpu.ACC.init(acc))


def _interpret_params() -> Any:
    if _VERSION >= (0, 12, 0):
        return plgpu.InterpretGPUParams(detect_races=True, on_race="raise")
    return plgpu.InterpretGPUParams(detect_races=True)


def check_races() -> None:
    """Raise when a kernel interpreted since the last `reset_interpreter` raced. jax 0.11 only prints; 0.12 has raised already.

    Raises:
      RuntimeError: two threads touched the same memory in no order.
    """
    if has_raced():
        raise RuntimeError("a kernel has a data race (printed above)")


def has_raced() -> bool:
    """Whether a kernel interpreted since the last `reset_interpreter` raced."""
    return any(state.races_found for state in _race_states)


def reset_interpreter() -> None:
    """Forget the interpreter's state, which an exception inside a kernel leaves behind."""
    _race_states.clear()
    _callbacks().reset_gpu_interpret_mode_state()


def _callbacks() -> Any:
    return importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks")


# What the detector found in each kernel: a call may be several kernels, and jax 0.11 forgets the one before with each.
_race_states: list[Any] = []


@functools.cache
def _watch_races() -> None:
    callbacks = _callbacks()
    make = callbacks.GPURaceDetectionState

    def watched(**options: Any) -> Any:
        _race_states.append(make(**options))
        return _race_states[-1]

    callbacks.GPURaceDetectionState = watched


@functools.cache
def _register_interpretation() -> None:
    """Give `mma` a meaning on a CPU: the interpreter runs what is plain arithmetic natively, and has no rule for this one."""
    from jax._src.interpreters import mlir

    primitives: Any = importlib.import_module("jax._src.pallas.mosaic_gpu.primitives")

    def product(acc: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return acc + jnp.dot(a, b, preferred_element_type=acc.dtype)

    mlir.register_lowering(primitives.mma_p, mlir.lower_fun(product, multiple_results=False), platform="cpu")
