"""Every change that a conversion makes to the disk, one method each: the one place where a test can fail or stop any of them.

Knows calls of the operating system. Refuses to know what the bytes mean.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from jaxpaged.checkpoint.manifest import File

_PIECE = 2**22  # hashed while it is in the cache, then written
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)


class Disk:
    """The real disk. A test's subclass overrides `before`, or `write`, which may write a part and then stop."""

    def before(self, operation: str, path: Path) -> None:
        """Called ahead of every change."""

    def write(self, descriptor: int, content: memoryview, path: Path) -> int:
        """Write some of the content; the number of bytes that were."""
        self.before("write", path)
        return os.write(descriptor, content)

    def sync(self, descriptor: int, path: Path) -> None:
        """Force what was written to the medium."""
        self.before("sync", path)
        os.fsync(descriptor)

    def make_folder(self, path: Path) -> None:
        self.before("mkdir", path)
        os.mkdir(path)

    def rename(self, source: Path, target: Path) -> None:
        self.before("rename", source)
        os.rename(source, target)

    def exchange(self, a: Path, b: Path) -> None:
        """Swap two directories in one step: no moment at which either name is missing.

        Raises:
          OSError: EINVAL or ENOSYS where the system or file system cannot.
        """
        self.before("exchange", a)
        renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if renameat2 is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(a))
        here = ctypes.c_int(-100)  # AT_FDCWD
        if renameat2(here, os.fsencode(a), here, os.fsencode(b), ctypes.c_uint(_EXCHANGE)):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(a))

    def remove_file(self, path: Path) -> None:
        self.before("unlink", path)
        os.unlink(path)

    def remove_folder(self, path: Path) -> None:
        self.before("rmdir", path)
        os.rmdir(path)

    def create(self, path: Path, flags: int = os.O_TRUNC) -> int:
        """Open for writing, made if it is not there."""
        self.before("create", path)
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o644)

    # --- from the steps above ---

    def write_file(self, path: Path, contents: Iterable[bytes | memoryview], *, append: bool = False) -> File:
        """Write a file to the medium; size and digest of what was written."""
        descriptor = self.create(path, os.O_APPEND if append else os.O_TRUNC)
        size, digest = 0, hashlib.sha256()
        try:
            for content in contents:
                view = memoryview(content).cast("B")
                size += len(view)
                for start in range(0, len(view), _PIECE):
                    piece = view[start : start + _PIECE]
                    digest.update(piece)
                    while piece:
                        piece = piece[self.write(descriptor, piece, path) :]
            self.sync(descriptor, path)
        except OSError as error:
            error.filename = error.filename or str(path)
            raise
        finally:
            os.close(descriptor)
        return File(size, digest.hexdigest())

    def sync_folder(self, path: Path) -> None:
        """Force a folder's names to the medium."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.sync(descriptor, path)
        finally:
            os.close(descriptor)

    def sync_tree(self, path: Path) -> None:
        """Force the names in a folder and all below to the medium."""
        for folder, _, _ in os.walk(path, topdown=False):
            self.sync_folder(Path(folder))

    def remove_tree(self, path: Path) -> None:
        """Remove a folder and all below, links themselves and not what they lead to."""
        for folder, folders, names in os.walk(path, topdown=False):
            for name in folders:
                child = Path(folder) / name
                self.remove_file(child) if child.is_symlink() else self.remove_folder(child)
            for name in names:
                self.remove_file(Path(folder) / name)
        self.remove_folder(path)
