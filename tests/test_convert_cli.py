"""The command: exit codes, one line for an error, a quick --help."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import write_model

from convert.cli import main
from convert.disk import Disk


def test_verify_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_model(tmp_path / "hf")
    assert main([str(tmp_path / "hf"), str(tmp_path / "out"), "--quiet", "--verify"]) == 0
    assert "all as converted" in capsys.readouterr().out
    assert main(["--verify", str(tmp_path / "out")]) == 0
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    (tmp_path / "out" / "weights" / "norm" / "0").unlink()
    capsys.readouterr()
    assert main(["--verify", str(tmp_path / "out")]) == 3
    output = capsys.readouterr()
    assert output.err.count("\n") == 1 and "(and 1 more, listed above)" in output.err
    assert "tokenizer.json: 2 bytes, manifest.json says" in output.out and "norm/0: missing" in output.out
    assert main(["--verify", str(tmp_path / "hf")]) == 3
    assert "not made by convert" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "needle"),
    [
        ([], 2, "SRC"),
        (["here"], 2, "DST: missing"),
        (["here", "there", "--dtype", "float8"], 2, "float8"),
        (["here", "there", "--ovrwrite"], 2, "--ovrwrite"),
        (["a b/c d", "there"], 3, "no such directory"),
        (["--verify", "nowhere"], 3, "no such directory"),
    ],
)
def test_usage(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    needle: str,
):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == code
    output = capsys.readouterr()
    assert needle in output.err and "Traceback" not in output.err and not list(tmp_path.iterdir())


def test_interrupt_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_model(tmp_path / "hf")

    class Interrupted(Disk):
        def before(self, operation: str, path: Path) -> None:
            if path.name == "0":
                raise KeyboardInterrupt

    assert main([str(tmp_path / "hf"), str(tmp_path / "out"), "--quiet"], disk=Interrupted()) == 130
    assert capsys.readouterr().err == "jaxpaged: error: interrupted; run the same command again to go on\n"


def test_help_is_quick_and_needs_no_jax():
    script = "import sys; from convert.cli import main; main(['--help']); print('jax' in sys.modules, 'numpy' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.endswith("False False\n") and "examples:" in run.stdout and "exit codes:" in run.stdout
    module = subprocess.run(
        [sys.executable, "-m", "convert", "--help"], env=environment, capture_output=True, text=True, check=True
    )
    assert module.stdout == run.stdout.removesuffix("False False\n")
