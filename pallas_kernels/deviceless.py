"""Compile a jitted function for a GPU that is not there, down to machine code, and read what came out.

Needs jax 0.11.2 or newer with its CUDA plugin (the cuda13 extra; no driver and no GPU), JAX_PLATFORMS=cpu and MOSAIC_GPU_DUMP_TO
set to an empty folder before jax starts, and one process for each GPU: jax cannot change the target within one. `compile_check`
sets all of that up; `program` and `Kernel` are for those who write kernels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True)
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
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        jitted = jax.jit(lambda **given: function(**given), out_shardings=sharding, donate_argnames=donate)
        compiled = jitted.trace(**shapes).lower(lowering_platforms=("cuda",)).compile()
    analysis = compiled.memory_analysis()
    stems = sorted(_stem(path) for path in set(dump.iterdir()) - before if path.name.endswith(_LOWERED))
    kernels = tuple(map(_read, dict.fromkeys(map(_compiled, stems))))
    for path in set(dump.iterdir()) - before:
        if path.suffix == ".log":  # every pass of the compiler: tens of megabytes
            path.unlink()
    return Program(kernels, analysis.temp_size_in_bytes, analysis.alias_size_in_bytes)  # type: ignore[union-attr]


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


def _stem(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(_LOWERED))


def _compiled(stem: Path) -> Path:
    """The dumped files of that kernel, or of its twin: a kernel that this process has compiled before is not compiled again."""
    if stem.with_suffix(".ptxas").exists():
        return stem

    def body(of: Path) -> str:
        return Path(f"{of}{_LOWERED}").read_text().replace(f'"{of.name}"', "")

    for twin in map(_stem, stem.parent.glob(f"*{_LOWERED}")):
        if twin.with_suffix(".ptxas").exists() and body(twin) == body(stem):
            return twin
    raise RuntimeError(f"{stem.name}: the assembler has said nothing about this kernel")


def _read(stem: Path) -> Kernel:
    """The kernel whose dumped files are `stem` with several suffixes."""
    log = stem.with_suffix(".ptxas").read_text()
    resources = stem.with_suffix(".resources.txt").read_text()
    sass = stem.with_suffix(".sass_ctrl")

    def number(pattern: str, text: str) -> int:
        return sum(int(found) for found in re.findall(pattern, text))

    instructions: dict[str, int] = {}
    if sass.exists():
        for mnemonic in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", sass.read_text()):
            instructions[mnemonic] = instructions.get(mnemonic, 0) + 1
    return Kernel(
        name=stem.name,
        num_registers=number(r"Used (\d+) registers", log),
        spill_bytes=number(r"(\d+) bytes spill", log),
        stack_bytes=number(r"(\d+) bytes stack", log),
        shared_bytes=number(r"smem_scratch_bytes=(\d+)", resources),
        num_threads=_threads(stem.with_suffix(".ptx").read_text()),
        instructions=instructions,
    )


def _threads(ptx: str) -> int:
    found = re.search(r"\.(?:maxntid|reqntid)\s+(\d+)(?:,\s*(\d+))?(?:,\s*(\d+))?", ptx)
    return math.prod(int(size or 1) for size in found.groups()) if found else 0
