"""Plain files of a checkpoint directory, read with suspicion: regular, inside the directory, strict JSON, unchanged.

Knows bytes and names. Refuses to know tensors and models: no numpy, no jax.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

MAX_CONFIG_BYTES = 2**20  # real ones are under 10 kB
BLOCK_BYTES = 2**22  # read and hashed at once


class CheckpointError(ValueError):
    """A file of a checkpoint is not what it must be. One line: file, tensor or field, got, allowed."""


def shown(value: object, limit: int = 64) -> str:
    """A value for a message: its repr, printable and short."""
    text = ascii(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def listed(names: list[str], limit: int = 10) -> str:
    """At most ten names, each printable, and how many there are more."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(name if name.isprintable() and len(name) < 200 else shown(name) for name in names[:limit]) + more


def regular_file(directory: Path, name: str) -> Path:
    """The path of a regular file directly in `directory`.

    Raises:
      CheckpointError: the name leads elsewhere, or the file is missing, a directory, a FIFO or a device.
    """
    if not name or name in (".", "..") or any(letter in name for letter in "/\\\0"):
        raise CheckpointError(f"{directory.name}: {shown(name)}: not a plain file name inside the directory")
    path = directory / name
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        problem = "is a symbolic link to nothing" if path.is_symlink() else "missing"
        raise CheckpointError(f"{path}: {problem}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: not a regular file")
    if path.is_symlink() and not _may_point_to(directory.resolve(), path.resolve()):
        raise CheckpointError(f"{path}: symbolic link out of the directory")
    return path


def _may_point_to(directory: Path, target: Path) -> bool:
    # The hub's cache keeps models--org--name/snapshots/<revision>/<file> as links into models--org--name/blobs.
    in_hub_cache = directory.parent.name == "snapshots" and target.parent == directory.parent.parent / "blobs"
    return in_hub_cache or target.is_relative_to(directory)


class Reader:
    """One open file, read at positions. Its size, time and inode must not change while it is open."""

    def __init__(self, path: Path):
        self.path = path
        try:
            # Not memory-mapped: a mapped file that shrinks kills the process with SIGBUS, a read comes back short.
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115  (closed by close)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
        status = os.fstat(self._file.fileno())
        self.size, self.mtime_ns = status.st_size, status.st_mtime_ns
        self._state = self._fingerprint(status)

    @staticmethod
    def _fingerprint(status: os.stat_result) -> tuple[int, int, int, int]:
        return status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino

    def fill(self, buffer: memoryview, start: int) -> None:
        """Read exactly len(buffer) bytes at `start`."""
        done = 0
        while done < len(buffer):
            try:
                self._file.seek(start + done)
                count = self._file.readinto(buffer[done : done + 2**26])
            except OSError as error:
                raise CheckpointError(f"{self.path}: cannot be read ({error.strerror})") from None
            if not count:
                raise CheckpointError(f"{self.path}: changed during load (ends at byte {start + done:,})")
            done += count

    def read(self, start: int, count: int) -> bytes:
        buffer = bytearray(count)
        self.fill(memoryview(buffer), start)
        return bytes(buffer)

    def check_unchanged(self) -> None:
        """Raise if the file, or what its path leads to, is another than when it was opened."""
        try:
            states = self._fingerprint(os.fstat(self._file.fileno())), self._fingerprint(os.stat(self.path))
        except OSError:
            states = ()
        if states != (self._state, self._state):
            raise CheckpointError(f"{self.path}: changed during load")

    def close(self) -> None:
        self._file.close()


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(BLOCK_BYTES))
    try:
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def parse_json(content: bytes, where: str) -> dict[str, Any]:
    """One JSON object, strictly: UTF-8 without a byte-order mark, no key twice, no NaN.

    Raises:
      CheckpointError: anything else; `where` begins the message.
    """
    if content.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise CheckpointError(f"{where}: starts with a byte-order mark (expected UTF-8 without one)")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in items:
            if key in result:
                raise CheckpointError(f"{where}: {shown(key)} listed twice")
            result[key] = value
        return result

    def constant(name: str) -> Any:
        raise CheckpointError(f"{where}: {name} is not JSON")

    try:
        value = json.loads(content.decode(), object_pairs_hook=pairs, parse_constant=constant)
    except CheckpointError:
        raise
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise CheckpointError(f"{where}: nested too deeply") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{where}: not JSON (line {error.lineno}, column {error.colno}: {error.msg})") from None
    except ValueError as error:  # a number of more digits than Python converts
        raise CheckpointError(f"{where}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def read_json(directory: Path, name: str, *, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The object in one JSON file of the directory."""
    path = regular_file(directory, name)
    reader = Reader(path)
    try:
        if reader.size > max_bytes:
            raise CheckpointError(f"{path}: {reader.size:,} bytes, at most {max_bytes:,} are allowed")
        content = reader.read(0, reader.size)
        reader.check_unchanged()
    finally:
        reader.close()
    return parse_json(content, str(path))
