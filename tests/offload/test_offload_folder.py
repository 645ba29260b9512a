"""The folder of one engine: its own, locked, gone at the end; and of those that others have left only what is ours to remove."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from faulty_files import ERRORS, FaultyFiles
from pages_on_disk import fetch, folders, payload, spill

from jaxpaged.config import ConfigError
from jaxpaged.offload.disk_pages import DiskPages
from jaxpaged.offload.folder import Folder


def test_two_engines_in_one_folder_keep_apart(tmp_path: Path) -> None:
    first, second = DiskPages(str(tmp_path)), DiskPages(str(tmp_path))
    assert len(folders(tmp_path)) == 2
    spill(first, 1)
    spill(second, 1, version=1)
    first.flush(), second.flush()
    assert (fetch(first, 1), fetch(second, 1)) == (payload(1), payload(1, 1))
    third = DiskPages(str(tmp_path))
    assert len(folders(tmp_path)) == 3
    first.close()
    assert fetch(second, 1) == payload(1, 1)
    second.close(), third.close()
    assert folders(tmp_path) == []


CHILD = """
import sys, time
from jaxpaged.offload.disk_pages import DiskPages
disk = DiskPages(sys.argv[1])
for number in range(5):
    disk.spill(bytes([number]) * 16, memoryview(bytes(1000)))
disk.flush()
assert "jax" not in sys.modules, "the disk tier needs no jax"
print("ready", flush=True)
time.sleep(60)
"""


def test_what_a_killed_engine_has_left_is_removed_by_the_next(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    (left,) = folders(tmp_path)
    alive = DiskPages(str(tmp_path))
    assert left in folders(tmp_path), "it was alive"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    alive.close()
    assert folders(tmp_path) == [left] and len(folders(tmp_path / left)) == 6
    DiskPages(str(tmp_path)).close()
    assert folders(tmp_path) == []


def left_over(tmp_path: Path, name: str = "jaxpaged-offload-1-0") -> Path:
    """A folder as a dead engine leaves it."""
    folder = tmp_path / name
    folder.mkdir()
    for file in ("lock", "00ff.page", "00ff.page.new"):
        (folder / file).touch()
    return folder


def test_only_left_overs_are_removed(tmp_path: Path) -> None:
    left_over(tmp_path)
    precious = tmp_path / "precious"
    left_over(tmp_path, "precious")
    left_over(tmp_path, "jaxpaged-offload-x-0")
    (tmp_path / "jaxpaged-offload-2-0").symlink_to(precious)
    (tmp_path / "jaxpaged-offload-3-0").write_text("a file")
    unlocked = left_over(tmp_path, "jaxpaged-offload-4-0")
    (unlocked / "lock").unlink()
    shared = left_over(tmp_path, "jaxpaged-offload-5-0")
    (shared / "somebody's").write_text("x")
    linked = left_over(tmp_path, "jaxpaged-offload-6-0")
    (linked / "00ff.page").unlink()
    (linked / "00ff.page").symlink_to(precious / "00ff.page")
    outside = left_over(tmp_path, "jaxpaged-offload-7-0")
    (outside / "lock").unlink()
    (outside / "lock").symlink_to(precious / "lock")
    held = left_over(tmp_path, "jaxpaged-offload-8-0")
    with open(held / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        DiskPages(str(tmp_path)).close()
    numbers = (2, 3, 4, 5, 7, 8)
    assert folders(tmp_path) == sorted([*(f"jaxpaged-offload-{n}-0" for n in numbers), "jaxpaged-offload-x-0", "precious"])
    assert folders(precious) == ["00ff.page", "00ff.page.new", "lock"]
    assert folders(shared) == ["lock", "somebody's"], "its lock stays, so that somebody can remove it later"
    assert folders(unlocked) == ["00ff.page", "00ff.page.new"]


def test_another_users_left_over_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = left_over(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    DiskPages(str(tmp_path)).close()
    assert folder.exists()
    monkeypatch.undo()
    DiskPages(str(tmp_path)).close()
    assert not folder.exists()


@pytest.mark.parametrize("fault", ERRORS)
def test_left_overs_that_cannot_be_removed_are_nobodys_trouble(fault: str, tmp_path: Path) -> None:
    for number in range(40):
        path = tmp_path / str(number)
        path.mkdir()
        left_over(path)
        files = FaultyFiles(fault, number)
        try:
            disk = DiskPages(str(path), files=files)
        except ConfigError:
            pass
        else:
            spill(disk, 1)
            disk.flush()
            assert fetch(disk, 1) == payload(1) or files.num_failed
            disk.close()
        DiskPages(str(path)).close()
        left = folders(path)
        # One that has lost its files but for the lock's, which failed: it has no lock any more, so it is nobody's to remove.
        assert left == [] or all(not folders(path / name) for name in left)


def test_a_folder_that_was_taken_for_a_left_over_is_not_used(tmp_path: Path) -> None:
    """Another engine looks between the making of the lock's file and its locking, and is done before, or is still looking."""
    for is_done in (True, False):
        others: list[int] = []

        class Files(FaultyFiles):
            def lock(self, descriptor: int, name: str, others: list[int] = others, is_done: bool = is_done) -> bool:
                if not others:
                    (folder,) = tmp_path.iterdir()
                    others.append(os.open(folder / "lock", os.O_RDWR))
                    fcntl.flock(others[0], fcntl.LOCK_EX)
                    if is_done:
                        (folder / "lock").unlink()
                        folder.rmdir()
                        os.close(others[0])
                return super().lock(descriptor, name)

        folder = Folder(str(tmp_path), Files())
        assert folders(tmp_path / folder.name) == ["lock"]
        if not is_done:
            os.close(others[0])
        folder.close()
        assert folders(tmp_path) == []


@pytest.mark.parametrize("where", ["a file", "below a file", "unwritable"])
def test_a_folder_that_cannot_be_used_is_refused_with_the_reason(where: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    path = tmp_path / {"a file": "file", "below a file": "file/x", "unwritable": "new"}[where]
    # As root nothing is unwritable, so that one is played.
    files = FaultyFiles("EACCES", 0) if where == "unwritable" else FaultyFiles()
    with pytest.raises(ConfigError, match=f"^offload_dir: no folder can be made and locked in {path}: [A-Z][a-z ]+$"):
        DiskPages(str(path), files=files)


def test_a_folder_that_is_not_there_is_made(tmp_path: Path) -> None:
    disk = DiskPages(str(tmp_path / "a" / "b"))
    spill(disk, 1)
    assert fetch(disk, 1) == payload(1)
    disk.close()
    assert folders(tmp_path / "a" / "b") == []
