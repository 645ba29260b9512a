"""What is in the way of a conversion: old results, strangers, other converters, a disk that fails."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import listing, write_model

from convert.cli import main
from convert.disk import Disk
from convert.job import convert, verify
from convert.staging import ResourceError, UsageError, locked


def test_a_second_run_finds_the_work_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_model(tmp_path / "hf")
    arguments = [str(tmp_path / "hf"), str(tmp_path / "out"), "--quiet"]
    assert main(arguments) == 0 and "converted in" in capsys.readouterr().out
    before = listing(tmp_path / "out")
    assert main(arguments) == 0 and "already converted" in capsys.readouterr().out
    assert listing(tmp_path / "out") == before and sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]


def test_a_stopped_run_is_taken_up(tmp_path: Path):
    """What was finished is not written again; what was finished and then damaged is."""
    write_model(tmp_path / "hf")

    class Stopping(Disk):
        def __init__(self, stop: bool):
            self.stop, self.written = stop, []

        def before(self, operation: str, path: Path) -> None:
            if operation == "create":
                self.written.append(path.parent.name)
            if self.stop and operation == "create" and path.parent.name == "norm":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "hf", tmp_path / "out", disk=Stopping(True))
    assert not (tmp_path / "out").exists()
    (staging,) = tmp_path.glob("out.converting-*")
    chunk = staging / "checkpoint" / "weights" / "layers.0.down" / "0.0"
    content = bytearray(chunk.read_bytes())
    content[7] ^= 1
    chunk.write_bytes(content)
    (staging / "done.jsonl").write_bytes((staging / "done.jsonl").read_bytes() + b'["config.js')

    disk = Stopping(False)
    convert(tmp_path / "hf", tmp_path / "out", disk=disk)
    assert "norm" in disk.written and "embed" not in disk.written and disk.written.count("layers.0.down") == 1
    assert verify(tmp_path / "out")[1] == [] and not list(tmp_path.glob("out.converting*"))


def test_an_existing_target_is_replaced_only_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_model(tmp_path / "one")
    write_model(tmp_path / "two", seed=1)
    convert(tmp_path / "one", tmp_path / "out")
    arguments = [str(tmp_path / "two"), str(tmp_path / "out"), "--quiet"]
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"jaxpaged: error: {tmp_path / 'out'}: exists; --overwrite replaces it\n"
    old = verify(tmp_path / "out")[0].job
    assert main([*arguments, "--overwrite"]) == 0
    manifest, problems = verify(tmp_path / "out")
    assert not problems and manifest.job != old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "out", "two"]


def test_a_damaged_target_is_repaired_when_asked(tmp_path: Path):
    write_model(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "out")
    sound = listing(tmp_path / "out")
    chunk = tmp_path / "out" / "weights" / "norm" / "0"
    chunk.write_bytes(b"\0" * len(chunk.read_bytes()))
    with pytest.raises(UsageError, match="exists; --overwrite replaces it"):
        convert(tmp_path / "hf", tmp_path / "out")
    convert(tmp_path / "hf", tmp_path / "out", overwrite=True)
    assert listing(tmp_path / "out") == sound


@pytest.mark.parametrize("kind", ["foreign", "hf", "extra file", "extra file inside", "file", "link"])
def test_never_replaces_what_it_did_not_make(tmp_path: Path, kind: str):
    write_model(tmp_path / "hf")
    target = tmp_path / "out"
    if kind == "foreign":
        target.mkdir()
        (target / "thesis.txt").write_text("years")
    elif kind == "hf":
        write_model(target, seed=1)
    elif kind.startswith("extra"):
        write_model(tmp_path / "other", seed=1)
        convert(tmp_path / "other", target)
        (target / ("weights/norm/notes" if "inside" in kind else "notes")).write_text("mine")
    elif kind == "file":
        target.write_text("years")
    else:
        write_model(tmp_path / "other", seed=1)
        convert(tmp_path / "other", tmp_path / "real")
        target.symlink_to("real")
    before = listing(tmp_path)
    with pytest.raises(UsageError):
        convert(tmp_path / "hf", target, overwrite=True)
    assert listing(tmp_path) == before


def test_an_empty_folder_is_a_fine_target(tmp_path: Path):
    write_model(tmp_path / "hf")
    (tmp_path / "out").mkdir()
    convert(tmp_path / "hf", tmp_path / "out")
    assert verify(tmp_path / "out")[1] == [] and sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]


def test_a_foreign_folder_in_the_place_of_ours(tmp_path: Path):
    """A folder that has the very name of our working folder, and no mark of ours."""
    write_model(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "out")
    staging = tmp_path / f"again.converting-{verify(tmp_path / 'out')[0].job[:12]}"
    staging.mkdir()
    (staging / "thesis.txt").write_text("years")
    with pytest.raises(UsageError, match="was not made by convert"):
        convert(tmp_path / "hf", tmp_path / "again")
    assert [path.name for path in staging.iterdir()] == ["thesis.txt"]


def test_the_working_folder_of_another_job_is_left_and_named(tmp_path: Path):
    write_model(tmp_path / "one")
    write_model(tmp_path / "two", seed=1)
    with pytest.raises(OSError, match="No space"):
        convert(tmp_path / "one", tmp_path / "out", disk=FailingDisk(40, errno.ENOSPC))
    result = convert(tmp_path / "two", tmp_path / "out")
    (staging,) = tmp_path.glob("out.converting-*")
    assert len(result.notes) == 1 and str(staging) in result.notes[0]
    convert(tmp_path / "one", tmp_path / "out", overwrite=True)  # which takes it up
    assert not list(tmp_path.glob("out.converting-*"))


def test_two_converters_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_model(tmp_path / "hf")
    with locked(tmp_path / "out", Disk()):
        with pytest.raises(ResourceError, match="another conversion into it is running"):
            convert(tmp_path / "hf", tmp_path / "out")
        assert main([str(tmp_path / "hf"), str(tmp_path / "out"), "--quiet"]) == 4
        convert(tmp_path / "hf", tmp_path / "other")
    convert(tmp_path / "hf", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "other", "out"]


def test_many_converters_at_once(tmp_path: Path):
    """Four processes into one target: each ends well or is told to wait, and the result is whole."""
    write_model(tmp_path / "hf")
    script = "import sys; from convert.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(tmp_path / "hf"), str(tmp_path / "out"), "--quiet"]
    runs = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) for _ in range(4)]
    codes = [(run.communicate(timeout=120), run.returncode)[1] for run in runs]
    assert 0 in codes and set(codes) <= {0, 4}
    assert verify(tmp_path / "out")[1] == [] and sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]


@pytest.mark.parametrize("case", ["same", "inside", "around", "no parent", "root"])
def test_impossible_targets(tmp_path: Path, case: str):
    write_model(tmp_path / "a" / "hf")
    source = tmp_path / "a" / "hf"
    target = {
        "same": source,
        "inside": source / "out",
        "around": tmp_path / "a",
        "no parent": tmp_path / "x" / "y",
        "root": Path("/"),
    }[case]
    before = listing(tmp_path)
    with pytest.raises(UsageError):
        convert(source, target, overwrite=True)
    assert listing(tmp_path) == before


class FailingDisk(Disk):
    """The n-th change fails, and every later one of its kind: a full disk stays full."""

    def __init__(self, at: int, error: int):
        self.count, self._at, self._error = 0, at, error
        self._broken: str | None = None

    def before(self, operation: str, path: Path) -> None:
        self.count += 1
        if self.count == self._at:
            self._broken = operation
        if operation == self._broken:
            raise OSError(self._error, os.strerror(self._error), str(path))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES, errno.EDQUOT], ids=errno.errorcode.get)
def test_a_failing_disk_is_one_line_and_the_next_run_succeeds(tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int):
    write_model(tmp_path / "hf", num_hidden_layers=1)
    write_model(tmp_path / "older", num_hidden_layers=1, seed=1)
    arguments = [str(tmp_path / "hf"), str(tmp_path / "out"), "--quiet", "--overwrite"]
    convert(tmp_path / "older", tmp_path / "out")
    old = listing(tmp_path / "out")
    for at in range(1, 230, 23):
        capsys.readouterr()
        code = main(arguments, disk=FailingDisk(at, number))
        output = capsys.readouterr()
        if listing(tmp_path / "out") == old:
            assert code == 4 and output.err.startswith("jaxpaged: error: ") and os.strerror(number) in output.err
            assert output.err.count("\n") == 1
        else:
            assert verify(tmp_path / "out")[1] == []
            assert main([str(tmp_path / "older"), str(tmp_path / "out"), "--quiet", "--overwrite"]) == 0
            old = listing(tmp_path / "out")
    assert main(arguments) == 0 and verify(tmp_path / "out")[1] == []


def test_a_real_limit_on_file_size(tmp_path: Path):
    """The kernel itself stops the write in the middle of a tensor."""
    write_model(tmp_path / "hf", vocab_size=4096)
    script = (
        "import resource, sys; from convert.cli import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); sys.exit(main(sys.argv[1:]))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(tmp_path / "hf"), str(tmp_path / "out"), "--quiet"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 4 and run.stderr.count("\n") == 1 and "embed" in run.stderr and "File too large" in run.stderr
    convert(tmp_path / "hf", tmp_path / "out")
    assert verify(tmp_path / "out")[1] == []


def test_not_enough_space_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import shutil

    write_model(tmp_path / "hf")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ResourceError, match=r"needs [\d,]+ bytes, has 1,000"):
        convert(tmp_path / "hf", tmp_path / "out")
