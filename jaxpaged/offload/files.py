"""Every call of the operating system that the disk tier makes, one method each: the one place where a test can fail any of them.

Names are relative to an open folder, so that nothing is reached through a link that somebody puts in the way. Knows system calls.
Refuses to know what the bytes mean.
"""

from __future__ import annotations

import errno
import fcntl
import os

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


class Files:
    """The real calls. A test's subclass overrides `before`, or `read` and `write`, which may move a part and then stop."""

    def before(self, operation: str, name: str) -> None:
        """Called ahead of every call."""

    def open_parent(self, path: str) -> int:
        """The folder that a user has named, made when it is not there; links on the way to it are the user's own."""
        self.before("make_parent", path)
        os.makedirs(path, mode=0o700, exist_ok=True)
        self.before("open_parent", path)
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def make_folder(self, name: str, parent: int) -> None:
        self.before("make_folder", name)
        os.mkdir(name, 0o700, dir_fd=parent)

    def open_folder(self, name: str, parent: int) -> int:
        self.before("open_folder", name)
        return os.open(name, _READ | os.O_DIRECTORY, dir_fd=parent)

    def names(self, folder: int) -> list[str]:
        self.before("names", "")
        return os.listdir(folder)

    def create(self, name: str, folder: int, flags: int = os.O_TRUNC) -> int:
        """Open for reading and writing, made if it is not there."""
        self.before("create", name)
        return os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o600, dir_fd=folder)

    def open(self, name: str, folder: int, flags: int = _READ) -> int:
        self.before("open", name)
        return os.open(name, flags, dir_fd=folder)

    def open_lock(self, name: str, folder: int) -> int:
        """An existing file, open for writing: what a lock needs on a network's disk."""
        return self.open(name, folder, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)

    def stat(self, descriptor: int, name: str) -> os.stat_result:
        self.before("stat", name)
        return os.fstat(descriptor)

    def is_at(self, descriptor: int, name: str, folder: int) -> bool:
        """Whether this open file is the one of that name."""
        self.before("is_at", name)
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(name, dir_fd=folder, follow_symlinks=False))
        except FileNotFoundError:
            return False

    def lock(self, descriptor: int, name: str) -> bool:
        """Lock an open file until it is closed; False when somebody else holds it."""
        self.before("lock", name)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def read(self, descriptor: int, into: memoryview, name: str) -> int:
        """Read some of what is left; the number of bytes, 0 at the end."""
        self.before("read", name)
        return os.readv(descriptor, [into])

    def write(self, descriptor: int, content: memoryview, name: str) -> int:
        """Write some of the content; the number of bytes that were."""
        self.before("write", name)
        return os.write(descriptor, content)

    def close(self, descriptor: int, name: str) -> None:
        try:
            self.before("close", name)
        finally:
            os.close(descriptor)

    def rename(self, source: str, target: str, folder: int) -> None:
        self.before("rename", source)
        os.replace(source, target, src_dir_fd=folder, dst_dir_fd=folder)

    def remove_file(self, name: str, folder: int) -> None:
        self.before("remove_file", name)
        os.unlink(name, dir_fd=folder)

    def remove_folder(self, name: str, parent: int) -> None:
        self.before("remove_folder", name)
        os.rmdir(name, dir_fd=parent)

    # --- from the calls above ---

    def read_all(self, descriptor: int, into: memoryview, name: str) -> int:
        """Read until `into` is full or the file ends; the number of bytes."""
        num_read = 0
        while num_read < len(into):
            count = self.read(descriptor, into[num_read:], name)
            if not count:
                break
            num_read += count
        return num_read

    def write_all(self, descriptor: int, content: memoryview, name: str) -> None:
        """Write all of the content."""
        while content:
            count = self.write(descriptor, content, name)
            if not count:
                raise OSError(errno.EIO, "nothing more can be written", name)
            content = content[count:]
