"""Pages on a disk: nothing that can go wrong with a file gives wrong bytes, an error, or a page that is never answered."""

from __future__ import annotations

import logging
import os
import random
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faulty_files import ERRORS, FaultyFiles
from pages_on_disk import SIZE, fetch, folders, key, payload, spill

from jaxpaged.config import ConfigError
from jaxpaged.offload import disk_pages as disk_pages_module
from jaxpaged.offload import page_file
from jaxpaged.offload.disk_pages import DiskPages
from jaxpaged.offload.files import Files
from jaxpaged.offload.trouble import CALM

FIRST_CALLS = 200
FAULTS = (*ERRORS, "short", "nothing", "torn", "flip")


@pytest.fixture
def quick_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where the machine has one: tens of thousands of files are made here."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[DiskPages]:
    disk = DiskPages(str(tmp_path), num_threads=2)
    yield disk
    disk.close()
    assert folders(tmp_path) == []


def page_path(tmp_path: Path, number: int) -> Path:
    (folder,) = tmp_path.glob("jaxpaged-offload-*")
    return folder / page_file.file_name(key(number))


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "jaxpaged"]


# --- faults of the system ---------------------------------------------------------------------------------------------------


def life(files: FaultyFiles, path: Path) -> tuple[list[int], int]:
    """A disk tier from its start to its end: pages that were not there when they were asked for, and calls before the close.

    A page that is there has all of its bytes; every fetch is answered; what was lost is not asked for.
    """
    disk = DiskPages(str(path), num_threads=1, files=files)
    missing: list[int] = []
    told: set[bytes] = set()
    try:
        for number in range(14):
            spill(disk, number)
        disk.flush()
        told |= set(disk.lost())
        for number in range(14):
            if number % 4 == 3:
                spill(disk, number, version=1)
                disk.flush()
                told |= set(disk.lost())
            content = None if key(number) in told else fetch(disk, number)
            if content is None:
                missing.append(number)
            else:
                assert content == payload(number, version=int(number % 4 == 3)), f"page {number} holds other bytes"
        for number in range(4):
            assert fetch(disk, 100 + number) is None, "a page that was never written is there"
            spill(disk, 100 + number)
            disk.flush()
            told |= set(disk.lost())
            if key(100 + number) not in told and fetch(disk, 100 + number) != payload(100 + number):
                missing.append(100 + number)
        assert disk.num_waiting == 0
    finally:
        num_calls = len(files.calls)
        disk.close()
    return missing, num_calls


@pytest.mark.parametrize("fault", FAULTS)
def test_one_failed_call_is_one_missing_page(fault: str, quick_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Call 0, 1, 2, ... of the first 200 fails in turn, those of the start too, which are a ConfigError or make no difference."""
    caplog.set_level(logging.WARNING)
    missing, num_calls = life(FaultyFiles(), quick_path)
    assert not missing and num_calls >= FIRST_CALLS and folders(quick_path) == []
    num_struck = 0
    for number in range(FIRST_CALLS):
        files, path = FaultyFiles(fault, number), quick_path / str(number)
        caplog.clear()
        try:
            missing, _ = life(files, path)
        except ConfigError as error:
            assert str(error).startswith(f"offload_dir: no folder can be made and locked in {path}: ") and "\n" not in str(error)
            assert files.calls[number][0] not in ("read", "write", "rename")
        else:
            # A page that is spilled anew over a damaged one is whole again: a fault may cost nothing, and never two pages.
            assert len(missing) <= 1
            # That four pages were never written is one line; what was struck before them may be another, of another kind.
            kinds = [line.partition(" to ")[0].partition(" from ")[0] for line in warnings_of(caplog)]
            assert "[Offload] A page was not read" in kinds
            assert sorted(kinds) in (sorted(set(kinds)), ["[Offload] A page was not read", "[Offload] A page was not written"])
            num_struck += len(missing)
        assert files.num_failed == 1
        assert not path.exists() or folders(path) == [], "a folder is left over"
    if fault in ("short",):
        assert num_struck == 0
    else:
        assert num_struck >= 15, "the faults were not felt, so this test proves nothing"


@pytest.mark.parametrize("fault", [*ERRORS, "torn"])
def test_a_disk_that_fails_for_good_loses_all_and_harms_nobody(fault: str, quick_path: Path) -> None:
    for number in range(8, FIRST_CALLS, 9):
        files = FaultyFiles(fault, number, for_good=True)
        life(files, quick_path / str(number))  # checks the bytes of what is there
        assert files.num_failed > 1


def test_trouble_is_said_once_and_again_after_it_was_over(
    tmp_path: Path, disk: DiskPages, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    for _ in range(3):
        assert fetch(disk, 1) is None
    assert len(warnings_of(caplog)) == 1
    assert str(tmp_path) in warnings_of(caplog)[0]
    spill(disk, 2)
    for _ in range(CALM - 1):
        assert fetch(disk, 2) == payload(2)
    assert fetch(disk, 1) is None
    assert len(warnings_of(caplog)) == 1
    for _ in range(CALM):
        assert fetch(disk, 2) == payload(2)
    assert fetch(disk, 1) is None
    assert len(warnings_of(caplog)) == 2


def test_a_healthy_disk_says_nothing(disk: DiskPages, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="jaxpaged")
    for number in range(50):
        spill(disk, number)
    disk.flush()
    assert [fetch(disk, number) for number in range(50)] == [payload(number) for number in range(50)]
    assert disk.finished() == [] and disk.lost() == [] and warnings_of(caplog) == []
    assert (disk.num_spilled, disk.num_fetched, disk.num_lost, disk.num_missed) == (50, 50, 0, 0)
    assert disk.num_spilled_bytes == disk.num_fetched_bytes == 50 * SIZE
    assert disk.latency_s() > 0


# --- damage of files --------------------------------------------------------------------------------------------------------


def test_any_flipped_bit_is_a_miss(quick_path: Path) -> None:
    folder, into = os.open(quick_path, os.O_RDONLY), memoryview(bytearray(SIZE))
    page_file.write(Files(), folder, key(1), payload(1))
    path = quick_path / page_file.file_name(key(1))
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(page_file.Damaged):
            page_file.read(Files(), folder, key(1), into)
    path.write_bytes(whole)
    page_file.read(Files(), folder, key(1), into)
    assert into == payload(1)
    os.close(folder)


def exchange(path: Path, other: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def link_to(path: Path, other: Path) -> None:
    path.unlink()
    path.symlink_to(other)


DAMAGE: dict[str, Callable[[Path, Path], object]] = {
    "removed": lambda path, other: path.unlink(),
    "empty": lambda path, other: path.write_bytes(b""),
    "only its head": lambda path, other: path.write_bytes(path.read_bytes()[:56]),
    "a byte short": lambda path, other: path.write_bytes(path.read_bytes()[:-1]),
    "a byte long": lambda path, other: path.write_bytes(path.read_bytes() + b"\0"),
    "zeros": lambda path, other: path.write_bytes(bytes(path.stat().st_size)),
    "swapped with another page's": exchange,
    "another page's": lambda path, other: path.write_bytes(other.read_bytes()),
    "another page's under this name and key": lambda path, other: path.write_bytes(
        path.read_bytes()[:72] + other.read_bytes()[72:]
    ),
    "a link": link_to,
    "a folder": lambda path, other: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_a_miss_and_can_be_spilled_anew(damage: Callable, tmp_path: Path, disk: DiskPages) -> None:
    spill(disk, 1)
    spill(disk, 2)
    disk.flush()
    path = page_path(tmp_path, 1)
    damage(path, page_path(tmp_path, 2))
    assert fetch(disk, 1) is None
    if path.is_dir():
        path.rmdir()
    assert not path.exists(), "what is of no use takes up the disk"
    spill(disk, 1)
    disk.flush()
    assert fetch(disk, 1) == payload(1)


def test_a_page_of_another_size_is_a_miss(disk: DiskPages) -> None:
    for is_flushed in (False, True):
        disk.spill(key(1), memoryview(b"short"))
        if is_flushed:
            disk.flush()
        assert fetch(disk, 1) is None


def test_the_files_are_for_nobody_else(tmp_path: Path, disk: DiskPages) -> None:
    spill(disk, 1)
    disk.flush()
    path = page_path(tmp_path, 1)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


# --- threads ----------------------------------------------------------------------------------------------------------------


class Gate:
    """A hook that holds up calls of one kind until it is opened."""

    def __init__(self, operation: str):
        self.operation = operation
        self.is_open, self.is_reached = threading.Event(), threading.Event()

    def __call__(self, operation: str, name: str) -> None:
        if operation == self.operation:
            self.is_reached.set()
            assert self.is_open.wait(10)


@pytest.fixture
def held(tmp_path: Path) -> Iterator[tuple[DiskPages, Gate]]:
    """A disk tier whose writes wait at their rename, with a thread for each of the three that it holds and one to read."""
    files, gate = FaultyFiles(), Gate("rename")
    disk = DiskPages(str(tmp_path), num_threads=4, files=files, max_queued_bytes=3 * SIZE)
    files.hook = gate
    yield disk, gate
    gate.is_open.set()
    disk.close()
    assert folders(tmp_path) == []


def test_a_spill_is_fetched_before_it_is_written(held: tuple[DiskPages, Gate]) -> None:
    disk, gate = held
    content = bytearray(payload(1))
    disk.spill(key(1), memoryview(content))
    content[:] = bytes(SIZE)  # the slot is used again at once
    assert gate.is_reached.wait(10)
    assert fetch(disk, 1) == payload(1)
    gate.is_open.set()
    disk.flush()
    assert fetch(disk, 1) == payload(1)


def test_the_newest_of_two_spills_stays_when_the_older_is_being_written(held: tuple[DiskPages, Gate]) -> None:
    disk, gate = held
    spill(disk, 1)
    assert gate.is_reached.wait(10)
    spill(disk, 1, version=1)
    assert fetch(disk, 1) == payload(1, 1)
    gate.is_open.set()
    disk.flush()
    assert fetch(disk, 1) == payload(1, 1)
    assert disk._queued_bytes == 0


def test_a_spill_too_many_is_lost_and_told(held: tuple[DiskPages, Gate], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    disk, gate = held
    for number in range(5):
        spill(disk, number)
    assert disk.finished() == []
    assert disk.lost() == [key(3), key(4)]
    assert disk.lost() == []
    (line,) = warnings_of(caplog)
    assert line.startswith(f"[Offload] The disk is too slow: a page was dropped with {3 * SIZE} bytes waiting for ")
    gate.is_open.set()
    disk.flush()
    assert [fetch(disk, number) for number in range(3)] == [payload(number) for number in range(3)]
    spill(disk, 3)
    disk.flush()
    assert fetch(disk, 3) == payload(3)


def test_a_lost_spill_is_told_once_also_when_its_page_is_asked_for_before(held: tuple[DiskPages, Gate]) -> None:
    disk, gate = held
    gate.is_open.set()
    spill(disk, 3)
    disk.flush()
    gate.is_open.clear()
    for number in range(3):
        spill(disk, number)
    spill(disk, 3, version=1)  # lost; what an older spill has left is not what its key means now
    into = memoryview(bytearray(SIZE))
    disk.fetch(key(3), into)
    assert disk.lost() == [], "its fetch will be told, and must find out"
    assert disk.finished(wait=True) == [(key(3), False)]
    assert disk.finished() == [] and disk.lost() == []


def test_a_spill_that_is_lost_after_it_was_fetched_is_told_after_it(tmp_path: Path) -> None:
    files, gate = FaultyFiles(), Gate("rename")
    disk = DiskPages(str(tmp_path), num_threads=2, files=files)
    files.hook = gate
    spill(disk, 1)
    assert gate.is_reached.wait(10)
    assert fetch(disk, 1) == payload(1)
    files.fault, files.fail_at, files.for_good = "ENOSPC", len(files.calls), True
    gate.is_open.set()
    disk.flush()
    lost = disk.lost()
    assert lost in ([], [key(1)])  # the rename may have been counted before it was to fail
    assert len(lost) == disk.num_lost
    files.fault = ""
    disk.close()


def test_reads_go_before_writes(tmp_path: Path) -> None:
    files, gate = FaultyFiles(), Gate("create")
    disk = DiskPages(str(tmp_path), num_threads=1, files=files)
    spill(disk, 0)
    disk.flush()
    files.hook = gate
    for number in range(1, 5):
        spill(disk, number)
    assert gate.is_reached.wait(10)
    disk.fetch(key(0), memoryview(bytearray(SIZE)))
    files.calls.clear()
    gate.is_open.set()
    assert disk.finished(wait=True) == [(key(0), True)]
    disk.flush()
    names = [name.partition(".")[0] for operation, name in files.calls if operation in ("rename", "open")]
    assert names.index(key(0).hex()) == 1, "behind the page that was being written and before the others"
    disk.close()


def test_waiting_is_only_for_what_was_asked_for(disk: DiskPages) -> None:
    assert disk.finished(wait=True) == []
    spill(disk, 1)
    assert disk.finished(wait=True) == []


class Directory:
    """Believes what it is told, as the scheduler's: what it finds is the newest, or was spilled since it asked."""

    def __init__(self, disk: DiskPages, num_keys: int):
        self.disk = disk
        self.versions = [0] * num_keys
        self.known: set[int] = set()
        self.asked: dict[int, tuple[bytearray, int]] = {}
        self.num_found = 0

    def spill(self, number: int) -> None:
        self.versions[number] += 1
        spill(self.disk, number, self.versions[number])
        self.known.add(number)

    def fetch(self, number: int) -> None:
        if number in self.known and number not in self.asked:
            self.asked[number] = bytearray(SIZE), self.versions[number]
            self.disk.fetch(key(number), memoryview(self.asked[number][0]))

    def hear(self, *, wait: bool) -> None:
        for answered, ok in self.disk.finished(wait):
            number = int.from_bytes(answered, "little")
            into, version = self.asked.pop(number)
            if ok:
                newer = range(version, self.versions[number] + 1)
                assert any(into == payload(number, version) for version in newer), "other bytes"
                self.num_found += 1
            else:
                self.known.discard(number)
        self.known -= {int.from_bytes(lost, "little") for lost in self.disk.lost()}


@pytest.mark.parametrize("num_threads", [1, 4])
@pytest.mark.parametrize("fault", ["", "EIO", "flip"])
def test_random_lives_against_a_model(fault: str, num_threads: int, tmp_path: Path) -> None:
    found = []  # a life with room for four pages finds few where the disk is slow
    for seed in range(6):
        rng = random.Random(seed)
        files = FaultyFiles(fault)
        disk = DiskPages(str(tmp_path), num_threads=num_threads, files=files, max_queued_bytes=(4 if seed % 2 else 400) * SIZE)
        files.fail_at_random = random.Random(seed) if fault else None
        directory = Directory(disk, num_keys=12)
        for _ in range(250):
            action, number = rng.random(), rng.randrange(12)
            if action < 0.4:
                directory.spill(number)
            elif action < 0.8:
                directory.fetch(number)
            else:
                directory.hear(wait=rng.random() < 0.2)
        while directory.asked:
            directory.hear(wait=True)
        disk.flush()
        directory.hear(wait=False)
        assert disk.num_waiting == 0 and disk._queued_bytes == 0 and not disk._spills
        found.append(directory.num_found)
        files.fail_at_random = None
        if not fault:
            assert seed % 2 or (disk.num_missed, disk.num_lost) == (0, 0)
            for number in directory.known:
                assert fetch(disk, number) == payload(number, directory.versions[number]), "it was not reported as lost"
        disk.close()
        assert folders(tmp_path) == []
    assert min(found) > 0 and sum(found) > 60


# --- the end ----------------------------------------------------------------------------------------------------------------


def test_close_in_the_middle_answers_all_and_leaves_nothing(tmp_path: Path) -> None:
    for num_ready in range(12):
        disk = DiskPages(str(tmp_path), num_threads=3)
        for number in range(20):
            spill(disk, number)
        intos = [bytearray(SIZE) for _ in range(20)]
        for number, into in enumerate(intos):
            disk.fetch(key(number), memoryview(into))
        answers: list[tuple[bytes, bool]] = []
        while len(answers) < num_ready:
            answers += disk.finished(wait=True)
        disk.close()
        answers += disk.finished(wait=True)
        assert sorted(answered for answered, _ in answers) == sorted(key(number) for number in range(20))
        for answered, ok in answers:
            number = int.from_bytes(answered, "little")
            assert not ok or intos[number] == payload(number)
        assert folders(tmp_path) == [] and disk.num_waiting == 0
        spill(disk, 1)
        assert fetch(disk, 1) is None
        disk.close()


def test_a_thread_that_hangs_does_not_hold_up_the_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder is left to the next engine: what the thread has open must not become something else under its hands."""
    monkeypatch.setattr(disk_pages_module, "CLOSE_S", 0.05)
    files, gate = FaultyFiles(), Gate("write")
    disk = DiskPages(str(tmp_path), num_threads=1, files=files)
    files.hook = gate
    spill(disk, 1)
    assert gate.is_reached.wait(10)
    disk.close()
    assert len(folders(tmp_path)) == 1
    gate.is_open.set()
    disk._threads[0].join(10)
    disk._folder.close()
    assert folders(tmp_path) == []


def test_no_thread_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(ConfigError, match=r"^offload_num_threads: got 3, and not so many threads can be had: can't start"):
        DiskPages(str(tmp_path), num_threads=3)
    assert folders(tmp_path) == [] and not started[0].is_alive()


def test_no_descriptor_is_left_open(quick_path: Path) -> None:
    if not Path("/proc/self/fd").exists():
        pytest.skip("this system does not list a process's open files")
    life(FaultyFiles(), quick_path)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(0, FIRST_CALLS, 3):
        try:
            life(FaultyFiles("EIO", number), quick_path / str(number))
        except ConfigError:
            continue
    assert len(os.listdir("/proc/self/fd")) == before
