"""A conversion that is killed at any moment: the target is what it was or the complete result, and the next run ends the work."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_model
from crash_driver import KillingDisk

from convert.disk import Disk
from convert.job import convert, verify
from jaxpaged.checkpoint import CheckpointError

# Changes of the disk in each scenario, all of them killed at in the slow test: about 186, 223, 225 and 82.
POINTS = {"fresh": 60, "replace": 70, "replace-in-two-steps": 60, "back": 30}


def drive(work: Path, scenario: str, points: int) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    write_model(work / "source", num_hidden_layers=1, shards=2)
    write_model(work / "hf-old", num_hidden_layers=1, seed=1)
    convert(work / "hf-old", work / "old")
    driver = str(Path(__file__).with_name("crash_driver.py"))
    command = [sys.executable, driver, scenario, str(work), str(points)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("scenario", POINTS)
def test_kill_at_220_points(tmp_path: Path, scenario: str):
    report = drive(tmp_path, scenario, POINTS[scenario])
    print(report)
    assert report["problems"] == []
    assert report["kills"] >= POINTS[scenario] - 2 and sum(report["seen"].values()) == report["kills"]
    # The kills fall on both sides of the moment at which the result appears.
    assert report["seen"]["new"] and report["seen"]["old" if scenario.startswith("replace") else "absent"]


@pytest.mark.slow
@pytest.mark.parametrize("scenario", POINTS)
def test_kill_at_every_point(tmp_path: Path, scenario: str):
    report = drive(tmp_path, scenario, 1000)
    assert report["problems"] == [] and report["kills"] == report["changes"]


class StopsBeforeRename(Disk):
    """No exchange, and the process is gone ahead of the n-th rename."""

    def __init__(self, at: int):
        self._left = at

    def exchange(self, a: Path, b: Path) -> None:
        raise OSError(errno.EINVAL, "no exchange")

    def rename(self, source: Path, target: Path) -> None:
        self._left -= 1
        if not self._left:
            os.kill(os.getpid(), signal.SIGKILL)
        super().rename(source, target)


def test_kill_between_the_two_renames_is_rolled_back(tmp_path: Path):
    """The one moment without a target, where the system cannot exchange: any next run, even one that fails, brings it back."""
    write_model(tmp_path / "new")
    write_model(tmp_path / "hf-old", seed=1)
    convert(tmp_path / "hf-old", tmp_path / "out")
    old = verify(tmp_path / "out")[0].job
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[3]); from test_convert_crash import StopsBeforeRename;"
        "from convert.job import convert; convert(sys.argv[1], sys.argv[2], overwrite=True, disk=StopsBeforeRename(3))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(tmp_path / "new"), str(tmp_path / "out"), str(Path(__file__).parent)]
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists() and len(list(tmp_path.glob("out.converting-*/replaced"))) == 1

    with pytest.raises(CheckpointError, match="no such directory"):
        convert(tmp_path / "nowhere", tmp_path / "out")
    manifest, problems = verify(tmp_path / "out")
    assert manifest.job == old and not problems
    convert(tmp_path / "new", tmp_path / "out", overwrite=True)
    assert verify(tmp_path / "out")[1] == [] and verify(tmp_path / "out")[0].job != old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf-old", "new", "out"]


def test_a_rename_that_fails_after_the_old_one_is_aside(tmp_path: Path):
    """Not a kill but an error between the two renames: the old checkpoint is back at once."""
    write_model(tmp_path / "new")
    write_model(tmp_path / "hf-old", seed=1)
    convert(tmp_path / "hf-old", tmp_path / "out")
    old = verify(tmp_path / "out")[0].job

    class Fails(KillingDisk):
        def rename(self, source: Path, target: Path) -> None:
            if source.name == "checkpoint":
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(source))
            super().rename(source, target)

    with pytest.raises(OSError, match="Input/output"):
        convert(tmp_path / "new", tmp_path / "out", overwrite=True, disk=Fails(can_exchange=False))
    assert verify(tmp_path / "out")[0].job == old
