"""Pages of random bytes for tests of the disk tier, and what comes of asking for one."""

from __future__ import annotations

import os
import random
from pathlib import Path

from jaxpaged.offload.disk_pages import DiskPages

SIZE = 96  # bytes of a page


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def payload(number: int, version: int = 0) -> bytes:
    return random.Random(f"{number} {version}").randbytes(SIZE)


def fetch(disk: DiskPages, number: int) -> bytes | None:
    """What comes of one fetch that nothing else is in flight beside."""
    into = bytearray(SIZE)
    disk.fetch(key(number), memoryview(into))
    ((answered, is_there),) = disk.finished(wait=True)
    assert answered == key(number)
    return bytes(into) if is_there else None


def spill(disk: DiskPages, number: int, version: int = 0) -> None:
    disk.spill(key(number), memoryview(payload(number, version)))


def folders(path: Path) -> list[str]:
    return sorted(os.listdir(path))
