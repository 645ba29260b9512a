"""Which CPUs a process may use and where their memory is, and the command that keeps a server on the right ones. Linux.

XLA makes as many threads as the process is allowed CPUs, and does not know the quota of a container: on jax 0.10.2 `taskset -c 0`
gave 1 thread of its pool, `taskset -c 0,1` gave 2. JAX documents no flag for it, so the mask is what is set here.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Topology:
    """What a process may use.

    Args:
      cpus: allowed to this process.
      cores: allowed CPU -> (socket, core); CPUs of one core share it.
      nodes: NUMA node -> its allowed CPUs.
      node_bytes: NUMA node -> its memory.
      quota_cpus: CPUs' worth of time that the cgroups allow; None is all.
      memory_bytes: likewise of memory.
    """

    cpus: tuple[int, ...]
    cores: dict[int, tuple[int, int]] = field(default_factory=dict)
    nodes: dict[int, tuple[int, ...]] = field(default_factory=dict)
    node_bytes: dict[int, int] = field(default_factory=dict)
    quota_cpus: float | None = None
    memory_bytes: int | None = None

    def one_of_each_core(self, cpus: Collection[int]) -> list[int]:
        """Of some CPUs the first of each core, then the others."""
        seen: set[Any] = set()
        first = []
        for cpu in sorted(cpus):
            core = self.cores.get(cpu, (-1, cpu))
            if core not in seen:
                seen.add(core)
                first.append(cpu)
        return first + [cpu for cpu in sorted(cpus) if cpu not in first]


def read(root: Path = Path("/"), cpus: Collection[int] | None = None) -> Topology:
    """What the kernel says. What cannot be read is left out.

    Args:
      cpus: allowed to the process; None asks the kernel.
    """
    if cpus is None:
        cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    allowed = tuple(sorted(cpus))
    system = root / "sys/devices/system"
    cores, nodes, node_bytes = {}, {}, {}
    for cpu in allowed:
        folder = system / f"cpu/cpu{cpu}/topology"
        socket, core = (_number(folder / name) for name in ("physical_package_id", "core_id"))
        if socket is not None and core is not None:
            cores[cpu] = (socket, core)
    for folder in sorted(system.glob("node/node[0-9]*"), key=lambda path: int(path.name[4:])):
        node, has = int(folder.name[4:]), set(parse_list(_text(folder / "cpulist")))
        if own := tuple(cpu for cpu in allowed if cpu in has):
            nodes[node] = own
            for line in _text(folder / "meminfo").splitlines():
                if "MemTotal:" in line:
                    node_bytes[node] = int(line.split()[-2]) << 10
    quota, memory = _limits(root)
    return Topology(allowed, cores, nodes, node_bytes, quota, memory)


def _limits(root: Path) -> tuple[float | None, int | None]:
    """CPUs' worth of time and bytes that the cgroups of this process allow, the least of all levels; versions 1 and 2."""
    quotas, memories = [], []
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        kinds = names.split(",")
        base = root / "sys/fs/cgroup"
        if number == "0" and not names:
            for folder in _levels(base, path):
                quota, _, period = _text(folder / "cpu.max").strip().partition(" ")
                if quota.isdigit() and period.isdigit():
                    quotas.append(int(quota) / int(period))
                memories.append(_number(folder / "memory.max"))
        elif "cpu" in kinds:
            for folder in _levels(base / "cpu", path):
                quota, period = (_number(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
                if quota and period and quota > 0:
                    quotas.append(quota / period)
        elif "memory" in kinds:
            memories += [_number(folder / "memory.limit_in_bytes") for folder in _levels(base / "memory", path)]
    known = [one for one in memories if one is not None and one < 2**60]  # version 1 writes no limit as a very large one
    return min(quotas, default=None), min(known, default=None)


def _levels(base: Path, path: str) -> list[Path]:
    """A cgroup's folder and those above it. In a container the path may lie outside of what is mounted: then only the root is."""
    parts = [part for part in path.strip("/").split("/") if part and part != ".."]
    return [base.joinpath(*parts[:length]) for length in range(len(parts), -1, -1)]


def parse_list(text: str) -> list[int]:
    """The kernel's lists: 0-3,8."""
    found: list[int] = []
    for part in text.strip().split(","):
        low, _, high = part.partition("-")
        if low.isdigit() and (not high or high.isdigit()):
            found += range(int(low), int(high or low) + 1)
    return found


def as_list(cpus: Collection[int]) -> str:
    """The same, written."""
    parts: list[list[int]] = []
    for cpu in sorted(cpus):
        if parts and parts[-1][1] == cpu - 1:
            parts[-1][1] = cpu
        else:
            parts.append([cpu, cpu])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)


def advice(topology: Topology, has: Callable[[str], object] = shutil.which) -> tuple[str, str]:
    """The command to serve with, and why.

    A step runs on all CPUs that it is given and waits for the slowest: those of one NUMA node, beside its memory, no more of them
    than the quota pays for, and threads that share a core last.
    """
    nodes = topology.nodes or {0: topology.cpus}
    node, own = max(nodes.items(), key=lambda item: (len(item[1]), -item[0]))
    chosen = topology.one_of_each_core(own)
    num_cores = len({topology.cores.get(cpu, (-1, cpu)) for cpu in own})
    reasons = [f"NUMA node {node} of {len(nodes)}, beside its memory"] if len(nodes) > 1 else []
    if num_cores < len(chosen):
        chosen = chosen[:num_cores]
        reasons.append("one CPU of each core")
    if topology.quota_cpus is not None and topology.quota_cpus < len(chosen):
        chosen = chosen[: max(1, math.floor(topology.quota_cpus))]
        reasons.append(f"the cgroup pays for {topology.quota_cpus:g} CPUs, which XLA does not know")
    if set(chosen) == set(topology.cpus):
        return "jaxpaged serve", "nothing to pin: these CPUs are alike and all of them are its own"
    if len(nodes) > 1 and has("numactl"):
        return f"numactl --physcpubind={as_list(chosen)} --membind={node} jaxpaged serve", "; ".join(reasons)
    if len(nodes) > 1:
        reasons.append("with numactl installed, --membind too")
    return f"taskset -c {as_list(chosen)} jaxpaged serve", "; ".join(reasons)


def section(topology: Topology) -> dict[str, Any]:
    """What `collect-env` prints."""
    sockets = {socket for socket, _ in topology.cores.values()}
    command, why = advice(topology)
    found: dict[str, Any] = {
        "CPUs allowed": f"{len(topology.cpus)} ({as_list(topology.cpus)})",
        "sockets": len(sockets) or "unknown",
        "cores": len(set(topology.cores.values())) or "unknown",
    }
    for node, cpus in topology.nodes.items():
        memory = f", {topology.node_bytes[node] / 2**30:.1f} GiB" if node in topology.node_bytes else ""
        found[f"NUMA node {node}"] = f"CPUs {as_list(cpus)}{memory}"
    found["cgroup CPU limit"] = "none" if topology.quota_cpus is None else f"{topology.quota_cpus:g} CPUs"
    found["cgroup memory limit"] = "none" if topology.memory_bytes is None else f"{topology.memory_bytes / 2**30:.1f} GiB"
    return found | {"serve with": command, "because": why}


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.removeprefix("-").isdigit() else None
