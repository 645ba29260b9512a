"""Compile a jitted function for a GPU that is not there, down to machine code, and read what came out.

Needs jax 0.11.2 or newer with its CUDA plugin (the cuda13 extra; no driver and no GPU), JAX_PLATFORMS=cpu and MOSAIC_GPU_DUMP_TO
set to an empty folder before jax starts, and one process for each GPU: jax cannot change the target within one. `compile_check`
sets all of that up; `program` and `Kernel` are for those who write kernels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

# name -> (what the driver calls it, compute capability, multiprocessors, shared memory of one in KiB)
GPUS = {
    "sm_80": ("NVIDIA A100-SXM4-80GB", (8, 0), 108, 164),
    "sm_89": ("NVIDIA L40S", (8, 9), 142, 100),
    "sm_90a": ("NVIDIA H200", (9, 0), 132, 228),
    "sm_100a": ("NVIDIA B200", (10, 0), 148, 228),
}
# Of the files that Mosaic dumps for each kernel, the one that is always there and holds all of it.
_LOWERED = ".after_layout_inference.txt"


class _CudaDevice(AbstractDevice):
    """An abstract device that knows its compute capability, which is what Mosaic reads; without it Mosaic assumes 9.0."""

    @property
    def compute_capability(self) -> str:
        return next(".".join(map(str, capability)) for kind, capability, *_ in GPUS.values() if kind == self.device_kind)


@dataclass(frozen=True, eq=False)
class Kernel:
    """What the assembler made of one Mosaic kernel."""

    name: str
    num_registers: int  # of each thread
    spill_bytes: int  # stores and loads of registers that did not fit
    stack_bytes: int
    shared_bytes: int  # shared memory of one block
    num_threads: int  # of one block
    instructions: dict[str, int]  # SASS mnemonic without its suffixes -> how often


@dataclass(frozen=True)
class Program:
    """A compiled function: its Mosaic kernels, and the memory it needs beside its arguments and results."""

    kernels: tuple[Kernel, ...]  # each once, however often it is called
    temporary_bytes: int
    alias_bytes: int
    hlo: str = field(default="", repr=False)  # what XLA made of it


def program(
    function: Callable[..., Any], arguments: dict[str, Any], gpu: str, dump: Path, *, donate: tuple[str, ...] = ()
) -> Program:
    """Compile `function(**arguments)` for a GPU of `GPUS`; the arguments are arrays or jax.ShapeDtypeStructs.

    Args:
      dump: the folder that MOSAIC_GPU_DUMP_TO names.
      donate: arguments whose memory the results may take.

    Raises:
      Exception: whatever jax, Mosaic or the assembler say is wrong.
    """
    kind, _, num_sms, _ = GPUS[gpu]
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=_configuration(gpu), topology="1x1x1", topology_name=gpu
    )
    sharding = SingleDeviceSharding(topology.devices[0])
    device = _CudaDevice(device_kind=kind, num_cores=num_sms, platform="gpu")
    shapes = {
        name: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), x)
        for name, x in arguments.items()
    }
    before = set(dump.iterdir())
    try:
        with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
            jitted = jax.jit(lambda **given: function(**given), out_shardings=sharding, donate_argnames=donate)
            compiled = jitted.trace(**shapes).lower(lowering_platforms=("cuda",)).compile()
    finally:
        new = set(dump.iterdir()) - before
        kernels = _kernels(new)  # also those of a program that failed: they are not compiled again
        for path in new:
            if path.suffix == ".log":  # every pass of the compiler: tens of megabytes
                path.unlink()
    analysis = compiled.memory_analysis()
    return Program(kernels, analysis.temp_size_in_bytes, analysis.alias_size_in_bytes, compiled.as_text())  # type: ignore[union-attr]


def _configuration(gpu: str) -> str:
    """XLA's description of a GPU, as a text protocol buffer. Speeds are those of none."""
    kind, (major, minor), num_sms, shared_kib = GPUS[gpu]
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: {num_sms} fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: {shared_kib * 1024}
  shared_memory_per_block_optin: {(shared_kib - 1) * 1024}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98 device_memory_size: 150000000000
  cuda_compute_capability {{ major: {major} minor: {minor} }} registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
device_description_str: "{kind}"
"""


# Kernels that this process has compiled, by name and body: a second time they are not compiled, and nothing is dumped.
_SEEN: dict[tuple[str, str], Kernel] = {}


def _kernels(dumped: set[Path]) -> tuple[Kernel, ...]:
    """The kernels of the program that these files were dumped for, each once.

    A kernel's files from before the assembler and those from after it have the same name and different numbers.
    """
    bodies: dict[str, dict[tuple[str, str], int]] = {}  # name -> body -> bytes of shared memory
    for path in sorted(dumped):
        if path.name.endswith(_LOWERED):
            stem = path.name.removesuffix(_LOWERED)
            resources = path.with_name(f"{stem}.resources.txt")
            shared = _number(r"smem_scratch_bytes=(\d+)", resources.read_text()) if resources.exists() else 0
            bodies.setdefault(_name(stem), {})[_name(stem), path.read_text().replace(f'"{stem}"', "")] = shared
    stems = sorted(path.with_suffix("") for path in dumped if path.suffix == ".ptxas")
    found: list[Kernel] = []
    for name, shared in bodies.items():
        found += [_SEEN[body] for body in shared if body in _SEEN]
        unseen = [body for body in shared if body not in _SEEN]
        # Which of several kernels of one name is which cannot be told: the largest shared memory stands for all of them.
        largest = max((shared[body] for body in unseen), default=0)
        compiled = [_read(stem, largest) for stem in stems if _name(stem.name) == name]
        found += compiled
        _SEEN.update(zip(unseen, compiled, strict=False))
    return tuple(dict.fromkeys(found))


def _name(stem: str) -> str:
    return re.sub(r"_\d+$", "", stem)


def _read(stem: Path, shared_bytes: int) -> Kernel:
    """What the assembler's files `stem` with several suffixes say of a kernel."""
    log, sass = stem.with_suffix(".ptxas").read_text(), stem.with_suffix(".sass_ctrl")
    instructions: dict[str, int] = {}
    if sass.exists():
        for mnemonic in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", sass.read_text()):
            instructions[mnemonic] = instructions.get(mnemonic, 0) + 1
    return Kernel(
        name=_name(stem.name),
        num_registers=_number(r"Used (\d+) registers", log),
        spill_bytes=_number(r"(\d+) bytes spill", log),
        stack_bytes=_number(r"(\d+) bytes stack", log),
        shared_bytes=shared_bytes,
        num_threads=_threads(stem.with_suffix(".ptx").read_text()),
        instructions=instructions,
    )


def _number(pattern: str, text: str) -> int:
    return sum(int(found) for found in re.findall(pattern, text))


def _threads(ptx: str) -> int:
    found = re.search(r"\.(?:maxntid|reqntid)\s+(\d+)(?:,\s*(\d+))?(?:,\s*(\d+))?", ptx)
    return math.prod(int(size or 1) for size in found.groups()) if found else 0
