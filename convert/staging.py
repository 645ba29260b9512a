"""Where a conversion works until it is complete, and the one step in which its result takes the target's place.

Beside the target DST lies DST.converting-<job>:

    job.json      names the job; a folder without it was not made here and is left alone
    done.jsonl    one line per finished file: name, size, digest; what a later run may keep
    checkpoint/   the result as it grows; the old checkpoint after the exchange
    replaced/     the old checkpoint, where the file system cannot exchange two folders

Knows names and moves. Refuses to know what is in a checkpoint beyond its manifest.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from convert.disk import Disk
from jaxpaged.checkpoint.files import CheckpointError, sha256
from jaxpaged.checkpoint.manifest import File, Manifest, problems, read_manifest, unknown_files

_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY, errno.EPERM)


class UsageError(ValueError):
    """The target cannot be what was asked for. One line."""


class ResourceError(RuntimeError):
    """Something outside lacks: space, permission, the lock. One line."""


@contextlib.contextmanager
def locked(target: Path, disk: Disk) -> Iterator[None]:
    """Hold the target against other converters. The lock ends with the process, however it ends."""
    path = target.with_name(f"{target.name}.converting-lock")
    while True:
        descriptor = disk.create(path, 0)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise ResourceError(f"{target}: another conversion into it is running") from None
            raise
        # The holder removes the file when it ends: what was opened may be a file that no longer has the name.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        os.close(descriptor)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # a file that stays behind does no harm: the next run takes it over
            if os.fstat(descriptor).st_size == 0:
                disk.remove_file(path)
        os.close(descriptor)


def recover(target: Path, disk: Disk) -> list[str]:
    """Finish or roll back what a stopped run left beside the target; a line for what is left alone."""
    notes = []
    pattern = re.compile(re.escape(target.name) + r"\.converting-[0-9a-f]{12}")
    for path in sorted(path for path in target.parent.iterdir() if pattern.fullmatch(path.name)):
        job = _job_of(path)
        if job is None:
            if not path.is_symlink() and path.is_dir() and not any(path.iterdir()):
                disk.remove_folder(path)
            continue
        replaced = path / "replaced"
        if replaced.exists() and not os.path.lexists(target):
            disk.rename(replaced, target)
            disk.sync_folder(target.parent)
        elif _is_job(target, job):
            Staging(target, job, disk).remove()
        else:
            notes.append(f"{path} is left from another conversion that did not finish; remove it if it is not wanted")
    return notes


def _job_of(path: Path) -> str | None:
    try:
        job = json.loads((path / "job.json").read_bytes())["job"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return job if isinstance(job, str) and path.name.endswith(f".converting-{job[:12]}") else None


def _is_job(target: Path, job: str) -> bool:
    try:
        return read_manifest(target).job == job
    except CheckpointError:
        return False


def is_done(target: Path, job: str) -> bool:
    """The target already is the result of this job: every file has its digest."""
    if not _is_job(target, job):
        return False
    manifest = read_manifest(target)
    return next(iter(problems(target, manifest, digests=manifest.files)), None) is None


def check_replaceable(target: Path, *, overwrite: bool) -> None:
    """Raise unless the target is absent, an empty folder, or a converted checkpoint that may be replaced.

    Raises:
      UsageError: it holds something that `convert` did not write, or `overwrite` is false.
    """
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_dir():
        raise UsageError(f"{target}: exists and is not a directory")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise UsageError(f"{target}: exists; --overwrite replaces it")
    try:
        manifest = read_manifest(target)
    except CheckpointError as error:
        raise UsageError(f"{target}: was not made by convert, or is damaged; remove it yourself ({error})") from None
    if strange := unknown_files(target, manifest):
        raise UsageError(f"{target / strange[0]}: not written by convert; move it out of the directory that is to be replaced")


class Staging:
    """The working folder of one job. Files that an earlier run finished, and that still have their digest, are kept."""

    def __init__(self, target: Path, job: str, disk: Disk):
        self.path = target.with_name(f"{target.name}.converting-{job[:12]}")
        self.checkpoint = self.path / "checkpoint"
        self.files: dict[str, File] = {}
        self._target, self._job, self._disk = target, job, disk
        self._journal = self.path / "done.jsonl"

    def open(self) -> None:
        """Make the folder, or take up the one an earlier run of the same job left.

        Raises:
          UsageError: a folder of that name was made by someone else.
        """
        mark, unfinished = self.path / "job.json", self.path / "job.json.part"
        if not self.path.is_dir() or self.path.is_symlink():
            self._disk.make_folder(self.path)
        if not mark.exists():
            if {path.name for path in self.path.iterdir()} - {unfinished.name}:
                raise UsageError(f"{self.path}: exists and was not made by convert; remove it yourself")
            self._disk.write_file(unfinished, [json.dumps({"job": self._job}).encode()])
            self._disk.rename(unfinished, mark)
        if _job_of(self.path) != self._job:
            raise UsageError(f"{self.path}: belongs to another job; remove it yourself")
        self._make(self.checkpoint)
        self._read_journal()

    def _read_journal(self) -> None:
        if not self._journal.exists():
            return
        for line in self._journal.read_bytes().splitlines():
            try:
                name, size, digest = json.loads(line)
                file = File(int(size), str(digest))
                path = self.checkpoint / str(name)
                if path.stat().st_size == file.bytes and sha256(path) == file.sha256:
                    self.files[name] = file
            except (ValueError, TypeError, OSError):
                continue  # a line that was cut short, or a file that did not reach the medium: written again

    def _make(self, folder: Path) -> None:
        if not folder.is_dir():
            self._make(folder.parent)
            self._disk.make_folder(folder)

    def write(self, name: str, contents: Iterable[bytes | memoryview]) -> None:
        """Write one file of the checkpoint and note that it is done; `name` may hold folders."""
        path = self.checkpoint / name
        self._make(path.parent)
        self.files[name] = self._disk.write_file(path, contents)
        # The leading line break ends a line that a stopped run left unfinished.
        line = "\n" + json.dumps([name, self.files[name].bytes, self.files[name].sha256]) + "\n"
        self._disk.write_file(self._journal, [line.encode()], append=True)

    def seal(self, manifest: Manifest) -> None:
        """Write the manifest, last of all its digest, and force everything to the medium."""
        self._disk.sync_tree(self.checkpoint)
        self._disk.write_file(self.checkpoint / "manifest.json", [manifest.text()])
        self._disk.write_file(self.checkpoint / "manifest.sha256", [manifest.digest_text()])
        self._disk.sync_folder(self.checkpoint)
        for problem in problems(self.checkpoint, manifest, digests=()):
            raise CheckpointError(problem)

    def publish(self) -> None:
        """Put the sealed checkpoint in the target's place."""
        target, parent = self._target, self._target.parent
        if os.path.lexists(target):
            try:
                self._disk.exchange(self.checkpoint, target)
            except OSError as error:
                if error.errno not in _NO_EXCHANGE:
                    raise
                # Two steps. A run that stops between them is rolled back by `recover`.
                replaced = self.path / "replaced"
                self._disk.rename(target, replaced)
                self._disk.sync_folder(self.path)
                try:
                    self._disk.rename(self.checkpoint, target)
                except OSError:
                    self._disk.rename(replaced, target)
                    raise
        else:
            self._disk.rename(self.checkpoint, target)
        self._disk.sync_folder(self.path)
        self._disk.sync_folder(parent)

    def remove(self) -> None:
        """Remove the folder, its mark last, so that a run that is stopped here is recognised."""
        for name in ("checkpoint", "replaced"):
            if (self.path / name).exists():
                self._disk.remove_tree(self.path / name)
        for name in ("done.jsonl", "job.json.part", "job.json"):
            if (self.path / name).exists():
                self._disk.remove_file(self.path / name)
        self._disk.remove_folder(self.path)
