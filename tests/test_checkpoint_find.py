"""Where a model is: paths, the hub's cache without a network, and the links in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import write_model

from jaxpaged.checkpoint import CheckpointError, load, open_checkpoint, resolve

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("name", "needle"),
    [
        ("no/such/place", "no such directory"),
        ("./missing", "no such directory"),
        ("", "not a usable path"),
        ("a\nb", "not a usable path"),
        ("x" * 5000, "not a usable path"),
        ("a\0b", "not a usable path"),
    ],
)
def test_no_such_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, needle: str):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=needle):
        open_checkpoint(name)


def test_a_file_is_not_a_model(tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file, expected the directory"):
        resolve(tmp_path / "model.safetensors")


def fake_hub(cache: Path, *, revision: str = "0123456789abcdef0123456789abcdef01234567") -> Path:
    """A model in the hub's cache, as a download leaves it: refs, blobs, and snapshots of links."""
    home = cache / "hub" / "models--acme--tiny"
    write_model(home / "source")
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(revision)
    (home / "blobs").mkdir()
    snapshot = home / "snapshots" / revision
    snapshot.mkdir(parents=True)
    for index, path in enumerate(sorted((home / "source").iterdir())):
        path.rename(home / "blobs" / f"blob{index}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob{index}")
    (home / "source").rmdir()
    return snapshot


OFFLINE_SCRIPT = """
import sys
# Nothing that a checkpoint holds may be executed, and an offline run may not even try the network.
def forbid(event, arguments):
    if event in ("pickle.find_class", "subprocess.Popen", "os.system", "socket.connect", "socket.getaddrinfo"):
        raise SystemExit(f"{event} {arguments}")
sys.addaudithook(forbid)
from jaxpaged.checkpoint import CheckpointError, load, open_checkpoint
try:
    checkpoint = open_checkpoint(sys.argv[1])
except CheckpointError as error:
    print("refused:", error)
else:
    load(checkpoint, "bfloat16")
    assert not {"torch", "transformers"} & set(sys.modules)
    print("loaded:", checkpoint.directory)
"""


def test_hub_cache_offline(tmp_path: Path):
    """In processes of their own: huggingface_hub reads its environment when it is imported."""
    snapshot = fake_hub(tmp_path)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("HF_HUB_CACHE", None)
    runs = [
        subprocess.Popen([sys.executable, "-c", OFFLINE_SCRIPT, name], env=environment, stdout=subprocess.PIPE, text=True)
        for name in ("acme/tiny", "acme/unknown")
    ]
    found, unknown = (run.communicate(timeout=120)[0] for run in runs)
    assert found == f"loaded: {snapshot}\n"
    assert unknown.startswith("refused: acme/unknown: no such directory, not in the hub's cache")
    assert "pass the path of a local directory" in unknown


def test_links_of_the_hub_cache_may_lead_to_its_blobs_only(tmp_path: Path):
    snapshot = fake_hub(tmp_path)
    load(open_checkpoint(snapshot), "bfloat16")
    shutil.copy(snapshot / SINGLE, tmp_path / "elsewhere")
    (snapshot / SINGLE).unlink()
    (snapshot / SINGLE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="symbolic link out of the directory"):
        load(open_checkpoint(snapshot), "bfloat16")


def test_a_revision_is_for_the_hub(tmp_path: Path):
    with pytest.raises(CheckpointError, match="is a local directory; a revision"):
        resolve(tmp_path, revision="main")


def test_a_directory_wins_over_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_model(tmp_path / "acme" / "tiny")
    monkeypatch.chdir(tmp_path)
    assert resolve("acme/tiny") == Path("acme/tiny")
