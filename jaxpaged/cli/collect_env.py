"""`jaxpaged collect-env`: what one needs to know about a machine to understand a bug report, without names of people."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxpaged.cli import topology
from jaxpaged.cli.options import Parser
from jaxpaged.version import __version__

DESCRIPTION = """\
Print one block of text about this machine, to paste into an issue; it holds no names and no secrets. Under 'cpu topology' stands
the command that keeps a server on CPUs of one NUMA node, and on no more of them than the machine lets it have."""
EPILOG = """\
examples:
  jaxpaged collect-env
  jaxpaged collect-env --json | jq .devices"""

# Only versions are read: importing torch would take seconds and tell nothing more.
_PACKAGES = (
    *("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "optax", "orbax-checkpoint", "numpy", "ml_dtypes"),
    *("safetensors", "tokenizers", "transformers", "huggingface-hub", "jinja2", "psutil", "torch"),
)
_CPU_FLAGS = ("avx", "avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "neon", "asimd", "bf16", "sve")
_JAX_OPTIONS = (
    *("jax_platforms", "jax_enable_x64", "jax_default_matmul_precision", "jax_debug_nans", "jax_disable_jit"),
    *("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_numpy_dtype_promotion"),
)
_VARIABLES = ("JAX_", "XLA_", "LIBTPU_", "CUDA_", "NVIDIA_", "TF_CPP_", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "PYTHONOPTIMIZE")


def add_arguments(parser: Parser) -> None:
    """The flags of this command."""
    parser.add_argument("--json", action="store_true", help="as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Print; the exit code."""
    found = collect()
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    for section, entries in found.items():
        print(section)
        for name, value in entries.items():
            print(f"  {name:42} {value}")
    return 0


def collect() -> dict[str, dict[str, Any]]:
    """Everything, in sections."""
    return {
        "system": _system(),
        "cpu topology": topology.section(topology.read()),
        "packages": {"jaxpaged": __version__, **{name: _version(name) for name in _PACKAGES}},
        "devices": _devices(),
        "jax options": _jax_options(),
        "compiled steps": _cache(),
        "environment": {k: _without_home(v) for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)},
    }


def _system() -> dict[str, Any]:
    import psutil

    memory = psutil.virtual_memory()
    model, flags = _cpu()
    return {
        "os": platform.platform(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "cpu": model,
        "cpu flags": " ".join(flags),
        "cores": f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} of {os.cpu_count()}",
        "memory": f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB available",
    }


def _cpu() -> tuple[str, list[str]]:
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    except OSError:  # not Linux
        return platform.processor() or platform.machine(), []
    has = set((fields.get("flags") or fields.get("Features") or "").split())
    return fields.get("model name", platform.machine()), [flag for flag in _CPU_FLAGS if flag in has]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> dict[str, Any]:
    try:
        import jax

        devices: dict[str, Any] = {"backend": jax.default_backend()}
        for device in jax.devices():
            stats = device.memory_stats() or {}
            limit = f", {stats['bytes_limit'] / 2**30:.1f} GiB" if "bytes_limit" in stats else ""
            devices[str(device)] = f"{device.device_kind}{limit}"
        return devices
    except Exception as error:  # a broken driver is just what such a report is for
        return {"error": " ".join(str(error).split())[:300]}


def _jax_options() -> dict[str, Any]:
    if "jax" not in sys.modules:
        return {}
    import jax

    values = {name: getattr(jax.config, name, "unknown") for name in _JAX_OPTIONS}
    return {name: _without_home(value) if isinstance(value, str) else value for name, value in values.items()}


def _cache() -> dict[str, Any]:
    try:
        from jaxpaged.runner import user_cache_dir
    except Exception as error:
        return {"error": " ".join(str(error).split())[:300]}
    folder = user_cache_dir() / "xla"
    sizes = [path.stat().st_size for path in folder.glob("*") if path.is_file()] if folder.is_dir() else []
    return {"folder": _without_home(str(folder)), "size": f"{sum(sizes) / 2**20:.1f} MiB in {len(sizes)} files"}


def _without_home(text: str) -> str:
    return text.replace(str(Path.home()), "~") if len(str(Path.home())) > 1 else text
