"""CPU topology, read from trees like the kernel's, and the command that follows from it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jaxpaged.cli import topology


def machine(root: Path, *, nodes: dict[int, str], cores: dict[int, tuple[int, int]], files: dict[str, str] | None = None) -> Path:
    """A tree of a machine: `nodes` are lists of CPUs, `cores` are CPU -> (socket, core)."""
    written = {f"sys/devices/system/node/node{node}/cpulist": cpus + "\n" for node, cpus in nodes.items()}
    for node in nodes:
        written[f"sys/devices/system/node/node{node}/meminfo"] = f"Node {node} MemTotal:       {node + 1 << 20} kB\n"
    for cpu, (socket, core) in cores.items():
        written[f"sys/devices/system/cpu/cpu{cpu}/topology/physical_package_id"] = f"{socket}\n"
        written[f"sys/devices/system/cpu/cpu{cpu}/topology/core_id"] = f"{core}\n"
    for name, text in (written | (files or {})).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def numactl(name: str) -> str | None:
    return name


def test_two_sockets_with_hyperthreads(tmp_path: Path) -> None:
    """CPUs 0-3 and 8-11 on node 0, two of a core; the rest on node 1, of which this process has a part."""
    cores = {cpu: (cpu % 8 // 4, cpu % 4) for cpu in range(16)}
    root = machine(tmp_path, nodes={0: "0-3,8-11", 1: "4-7,12-15"}, cores=cores)
    found = topology.read(root, cpus=range(14))
    assert found.nodes == {0: (0, 1, 2, 3, 8, 9, 10, 11), 1: (4, 5, 6, 7, 12, 13)} and found.node_bytes == {0: 2**30, 1: 2**31}
    command, why = topology.advice(found, numactl)
    assert command == "numactl --physcpubind=0-3 --membind=0 jaxpaged serve"
    assert "NUMA node 0 of 2" in why and "one CPU of each core" in why
    assert topology.advice(found, lambda _: None)[0] == "taskset -c 0-3 jaxpaged serve"
    told = topology.section(found)
    assert told["sockets"] == 2 and told["cores"] == 8 and told["NUMA node 1"] == "CPUs 4-7,12-13, 2.0 GiB"


@pytest.mark.parametrize(
    "files, quota, memory",
    [
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "250000 100000\n"}, 2.5, None),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, None, None),
        # The least of all levels counts.
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/a/cpu.max": "200000 100000\n",
                "sys/fs/cgroup/a/b/memory.max": "1073741824\n",
                "sys/fs/cgroup/memory.max": "max\n",
            },
            2.0,
            2**30,
        ),
        # In a container: its own path is not mounted, the root is its own cgroup.
        ({"proc/self/cgroup": "0::/../x\n", "sys/fs/cgroup/cpu.max": "100000 100000\n"}, 1.0, None),
        (
            {
                "proc/self/cgroup": "4:memory:/m\n3:cpu,cpuacct:/c\n",
                "sys/fs/cgroup/cpu/c/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu/c/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/memory/m/memory.limit_in_bytes": "9223372036854771712\n",
            },
            3.0,
            None,
        ),
        ({}, None, None),
    ],
)
def test_limits_of_cgroups(tmp_path: Path, files: dict[str, str], quota: float | None, memory: int | None) -> None:
    root = machine(tmp_path, nodes={0: "0-7"}, cores={cpu: (0, cpu) for cpu in range(8)}, files=files)
    found = topology.read(root, cpus=range(8))
    assert (found.quota_cpus, found.memory_bytes) == (quota, memory)
    command, why = topology.advice(found, numactl)
    if quota is None:
        assert command == "jaxpaged serve" and "nothing to pin" in why
    else:
        assert command == f"taskset -c {topology.as_list(range(int(quota)))} jaxpaged serve" and "cgroup" in why


def test_a_machine_that_says_nothing(tmp_path: Path) -> None:
    found = topology.read(tmp_path, cpus=[3, 5])
    assert found.nodes == {} and topology.advice(found)[0] == "jaxpaged serve"
    assert topology.section(found)["sockets"] == "unknown"


@pytest.mark.parametrize("text", ["0", "0-3", "0-3,8,10-11", ""])
def test_lists_of_cpus(text: str) -> None:
    assert topology.as_list(topology.parse_list(text)) == text


def test_this_machine() -> None:
    found = topology.read()
    assert len(found.cpus) == len(os.sched_getaffinity(0)) and topology.section(found)["serve with"].endswith("jaxpaged serve")
