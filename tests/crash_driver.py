"""Kill a conversion at many points, each in a process of its own, and look at what is left.

    python crash_driver.py SCENARIO WORK POINTS

A process that has imported everything forks one child per point; it has no threads, so a fork is safe. The child converts on
a disk that kills it at its n-th change. Prints one JSON object: what was seen, and a line for everything that must not be.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from convert.disk import Disk
from convert.job import Result, convert, verify
from jaxpaged.checkpoint.files import CheckpointError


class KillingDisk(Disk):
    """Kills the process at its n-th change. A write that is hit gets half of its bytes out first."""

    def __init__(self, kill_at: int | None = None, *, can_exchange: bool = True):
        self.count, self._kill_at, self._can_exchange = 0, kill_at, can_exchange

    def before(self, operation: str, path: Path) -> None:
        self.count += 1
        if self.count == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def write(self, descriptor: int, content: memoryview, path: Path) -> int:
        if self.count + 1 == self._kill_at:
            os.write(descriptor, content[: len(content) // 2])
        return super().write(descriptor, content, path)

    def sync(self, descriptor: int, path: Path) -> None:
        self.before("sync", path)  # a killed process loses nothing that it wrote: the medium need not be waited for

    def exchange(self, a: Path, b: Path) -> None:
        if not self._can_exchange:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(a))
        super().exchange(a, b)


def scenario(name: str, work: Path) -> tuple[Callable[[Path, Disk], Result], Callable[[Path], None], bool]:
    """(convert into a target, put what was there before, may the target be absent?)"""
    source, old = work / "source", work / "old"

    def prepare(target: Path) -> None:
        if name.startswith("replace"):
            shutil.copytree(old, target)

    if name == "back":
        return lambda target, disk: convert(old, target, layout="hf", max_shard_bytes=4000, disk=disk), prepare, True
    return lambda target, disk: convert(source, target, overwrite=True, disk=disk), prepare, name != "replace"


def main(name: str, work: Path, points: int) -> None:
    run, prepare, may_be_absent = scenario(name, work)
    can_exchange = name != "replace-in-two-steps"
    parent = work / name
    parent.mkdir()
    target = parent / "model"

    counting = KillingDisk(can_exchange=can_exchange)
    prepare(target)
    before = verify(target)[0].job if target.exists() else None
    run(target, counting)
    after = verify(target)[0].job
    shutil.rmtree(target)

    # Neither folder is ours: one has no mark, the other a name that we never give.
    for stranger in ("model.converting-0123456789ab", "model.converting-mine"):
        (parent / stranger).mkdir()
        (parent / stranger / "precious").write_text("mine")
    strangers = sorted(path.name for path in parent.iterdir())

    problems: list[str] = []
    seen = {"old": 0, "new": 0, "absent": 0}

    def look(at: int) -> None:
        if not target.exists():
            seen["absent"] += 1
            if not may_be_absent:
                problems.append(f"{at}: target is absent")
            return
        try:
            manifest, found = verify(target)
        except CheckpointError as error:
            problems.append(f"{at}: {error}")
            return
        problems.extend(f"{at}: {problem}" for problem in found)
        if manifest.job not in (before, after):
            problems.append(f"{at}: target is neither old nor new")
        seen["new" if manifest.job == after else "old"] += 1

    kills = sorted({round(1 + index * (counting.count - 1) / (points - 1)) for index in range(points)})
    assert threading.active_count() == 1 == len(os.listdir("/proc/self/task"))
    for at in kills:
        prepare(target)
        child = os.fork()
        if child == 0:
            run(target, KillingDisk(at, can_exchange=can_exchange))
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(status):
            problems.append(f"{at}: was not killed ({status})")
        look(at)
        # The next run ends the work and leaves nothing else of it.
        run(target, KillingDisk(can_exchange=can_exchange))
        manifest, found = verify(target)
        if found or manifest.job != after:
            problems.append(f"{at}: the next run did not repair the target")
        if sorted(path.name for path in parent.iterdir()) != sorted([*strangers, "model"]):
            problems.append(f"{at}: left behind: {sorted(path.name for path in parent.iterdir())}")
        if any((parent / stranger / "precious").read_text() != "mine" for stranger in strangers):
            problems.append(f"{at}: touched what is not its own")
        shutil.rmtree(target)
    print(json.dumps({"changes": counting.count, "kills": len(kills), "seen": seen, "problems": problems[:20]}))


if __name__ == "__main__":
    tqdm.monitor_interval = 0  # no thread of its own
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
