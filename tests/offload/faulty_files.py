"""A disk that fails when it is told to: the N-th call, or every call from the N-th on, in one of many ways."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable

from jaxpaged.offload.files import Files

ERRORS = {name: getattr(errno, name) for name in ("ENOSPC", "EIO", "EACCES", "EINTR")}


class FaultyFiles(Files):
    """Counts its calls. Call number `fail_at` goes wrong as `fault` says; with `for_good` so do all after it.

    Faults: a name of `ERRORS`; "short", a read or write of one byte; "nothing", one of no byte; "torn", a write of a half and
    then EIO; "flip", a read or write with one bit changed. Those that mean nothing for a call do nothing to it.
    """

    def __init__(self, fault: str = "", fail_at: int = -1, *, for_good: bool = False):
        self.fault, self.fail_at, self.for_good = fault, fail_at, for_good
        self.calls: list[tuple[str, str]] = []
        self.num_failed = 0
        self.fail_at_random: random.Random | None = None  # one call in twenty
        self.hook: Callable[[str, str], None] | None = None
        self._lock = threading.Lock()

    def before(self, operation: str, name: str) -> None:
        if self._is_struck(operation, name) and self.fault in ERRORS:
            raise OSError(ERRORS[self.fault], os.strerror(ERRORS[self.fault]), name)

    def read(self, descriptor: int, into: memoryview, name: str) -> int:
        if not self._is_struck("read", name):
            return os.readv(descriptor, [into])
        if self.fault in ERRORS:
            raise OSError(ERRORS[self.fault], os.strerror(ERRORS[self.fault]), name)
        if self.fault == "nothing":
            return 0
        if self.fault == "short":
            return os.readv(descriptor, [into[:1]])
        count = os.readv(descriptor, [into])
        if self.fault == "flip":
            into[count // 2] ^= 4
        return count

    def write(self, descriptor: int, content: memoryview, name: str) -> int:
        if not self._is_struck("write", name):
            return os.write(descriptor, content)
        if self.fault in ERRORS:
            raise OSError(ERRORS[self.fault], os.strerror(ERRORS[self.fault]), name)
        if self.fault == "nothing":
            return 0
        if self.fault == "short":
            return os.write(descriptor, content[:1])
        if self.fault == "torn":
            os.write(descriptor, content[: len(content) // 2])
            raise OSError(errno.EIO, os.strerror(errno.EIO), name)
        changed = bytearray(content)
        changed[len(changed) // 2] ^= 4
        return os.write(descriptor, changed)

    def _is_struck(self, operation: str, name: str) -> bool:
        if self.hook is not None:
            self.hook(operation, name)
        with self._lock:
            number = len(self.calls)
            self.calls.append((operation, name))
            is_struck = number == self.fail_at or (self.for_good and number > self.fail_at >= 0)
            is_struck |= self.fail_at_random is not None and self.fail_at_random.random() < 0.05
            self.num_failed += is_struck
            return is_struck
