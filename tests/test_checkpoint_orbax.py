"""Orbax directories that are not whole (table B4)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoints import listing, write_model

from convert.cli import main
from convert.job import convert
from jaxpaged.checkpoint import CheckpointError, load, open_checkpoint


def rewrite_manifest(directory: Path, old: str, new: str) -> None:
    """An edit that also renews the digest: what is left to find it are the checks of the content."""
    import hashlib

    text = (directory / "manifest.json").read_text()
    assert old in text
    (directory / "manifest.json").write_text(text.replace(old, new, 1))
    digest = hashlib.sha256((directory / "manifest.json").read_bytes()).hexdigest()
    (directory / "manifest.sha256").write_text(f"{digest}  manifest.json\n")


DAMAGES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "no commit marker": (lambda d: (d / "manifest.sha256").unlink(), ("checkpoint is incomplete (no manifest.sha256)", "rerun")),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), ("checkpoint is incomplete (no manifest.json)", "rerun")),
    "edited manifest": (lambda d: (d / "manifest.json").write_text("{}"), ("manifest.json", "digest in manifest.sha256")),
    "no orbax metadata": (lambda d: (d / "weights" / "_METADATA").unlink(), ("_METADATA: missing",)),
    "no orbax commit": (lambda d: (d / "weights" / "_CHECKPOINT_METADATA").unlink(), ("_CHECKPOINT_METADATA: missing",)),
    "missing array": (lambda d: (d / "weights" / "norm" / "0").unlink(), ("norm/0: missing",)),
    "extra array": (lambda d: (d / "weights" / "norm" / "1").write_bytes(b"0"), ("norm/1: not in manifest.json",)),
    "temporary of orbax": (
        lambda d: (d / "weights" / "x.orbax-checkpoint-tmp-1").write_bytes(b"0"),
        ("x.orbax-checkpoint-tmp-1: not in manifest.json",),
    ),
    "truncated chunk": (
        lambda d: os.truncate(d / "weights" / "embed" / "0.0", 100),
        ("embed/0.0: 100 bytes, manifest.json says 3,072",),
    ),
    "chunk is a link": (
        lambda d: (
            (d / "weights" / "norm" / "0").rename(d.parent / "x"),
            (d / "weights" / "norm" / "0").symlink_to(d.parent / "x"),
        ),
        ("norm/0: not a regular file",),
    ),
    "other version": (
        lambda d: rewrite_manifest(d, '"format_version": 1', '"format_version": 2'),
        ("format", "version 2", "convert again"),
    ),
    "other shape": (
        lambda d: rewrite_manifest(d, "96,\n    16", "16,\n    96"),
        ("embed", "[16, 96]", "the model needs [96, 16]"),
    ),
    "other dtype": (lambda d: rewrite_manifest(d, '"dtype": "bfloat16"', '"dtype": "float32"'), ("embed", "float32")),
    "unknown dtype": (lambda d: rewrite_manifest(d, '"dtype": "bfloat16"', '"dtype": "int8"'), ("embed", "int8")),
    "path out of the directory": (
        lambda d: rewrite_manifest(d, '"file": "weights/embed/0.0"', '"file": "../weights/embed/0.0"'),
        ("manifest.json", "../weights/embed/0.0"),
    ),
    "list of files is a list": (lambda d: rewrite_manifest(d, '"files": {', '"files": [], "x": {'), ("manifest.json",)),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_orbax_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str):
    apply, needles = DAMAGES[case]
    write_model(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "m")
    apply(tmp_path / "m")
    before = listing(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load(open_checkpoint(tmp_path / "m"), "bfloat16")
    assert main([str(tmp_path / "m"), str(tmp_path / "out"), "--to-hf", "--quiet"]) == 3
    assert capsys.readouterr().err == f"jaxpaged: error: {caught.value}\n"
    assert all(needle in str(caught.value) for needle in needles) and "\n" not in str(caught.value)
    assert listing(tmp_path) == before


def test_weights_of_another_kind_beside_an_orbax_checkpoint(tmp_path: Path):
    write_model(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "m")
    shutil.copy(tmp_path / "hf" / "model.safetensors", tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not in manifest\.json"):
        open_checkpoint(tmp_path / "m")
    # A folder of the name that orbax gets says nothing by itself.
    (tmp_path / "hf" / "weights").mkdir()
    assert open_checkpoint(tmp_path / "hf").kind == "hf"


def test_digests_are_read_unless_told_otherwise(tmp_path: Path):
    write_model(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "m")
    chunk = tmp_path / "m" / "weights" / "embed" / "0.0"
    content = bytearray(chunk.read_bytes())
    content[0] ^= 1
    chunk.write_bytes(content)
    checkpoint = open_checkpoint(tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"embed/0\.0: content differs from its digest"):
        load(checkpoint, "bfloat16")
    load(checkpoint, "bfloat16", verify=False)


def test_a_moved_checkpoint_loads(tmp_path: Path):
    write_model(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "m")
    shutil.copytree(tmp_path / "m", tmp_path / "ein Ort ü")
    load(open_checkpoint(tmp_path / "ein Ort ü"), "bfloat16")
