"""An index that does not fit its shards, and shards that are not plain files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import refused, write_model

from jaxpaged.checkpoint import load, open_checkpoint, safetensors

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DOWN = "model.layers.0.mlp.down_proj.weight"


SHARD_1, SHARD_2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def edit_index(directory: Path, function: Callable[[dict[str, str]], Any]) -> None:
    values = json.loads((directory / INDEX).read_text())
    function(values["weight_map"])
    (directory / INDEX).write_text(json.dumps(values))


def both_shards(directory: Path) -> None:
    tensors = dict(safetensors_of(directory / SHARD_2))
    tensors["model.norm.weight" if "model.norm.weight" not in tensors else "lm_head.weight"] = np.ones(16, ml_dtypes.bfloat16)
    safetensors.write(directory / SHARD_2, tensors)


def safetensors_of(path: Path) -> dict[str, np.ndarray]:
    file = safetensors.SafetensorsFile(path)
    try:
        return {name: file.read(tensor) for name, tensor in file.tensors.items()}
    finally:
        file.close()


def replace_by_link(path: Path, target: Path) -> None:
    shutil.move(path, target)
    path.symlink_to(target)


def replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


SHARDS: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "missing shard": (lambda d: (d / SHARD_2).unlink(), (SHARD_2, "missing")),
    "missing index": (lambda d: (d / INDEX).unlink(), (INDEX, "missing, but there are shards")),
    "shard not listed": (lambda d: shutil.copy(d / SHARD_1, d / "model-00003.safetensors"), (INDEX, "does not list model-00003")),
    "tensor in two shards": (both_shards, (SHARD_2, "is also in", SHARD_1)),
    "tensor mapped to the wrong shard": (lambda d: edit_index(d, lambda m: m.update({DOWN: other(m[DOWN])})), (INDEX, DOWN)),
    "tensor not mapped": (lambda d: edit_index(d, lambda m: m.pop(DOWN)), (INDEX, DOWN, "is not mapped to it")),
    "mapped tensor that is not there": (lambda d: edit_index(d, lambda m: m.update(x=SHARD_1)), (INDEX, "maps x to", SHARD_1)),
    "absolute path": (lambda d: edit_index(d, lambda m: m.update({DOWN: "/etc/a.safetensors"})), (INDEX, DOWN, "not a plain")),
    "parent": (lambda d: edit_index(d, lambda m: m.update({DOWN: "../a.safetensors"})), (INDEX, DOWN, "not a plain")),
    "backslash": (lambda d: edit_index(d, lambda m: m.update({DOWN: "..\\a.safetensors"})), (INDEX, DOWN, "not a plain")),
    "line break": (lambda d: edit_index(d, lambda m: m.update({DOWN: "a\nb.safetensors"})), (INDEX, DOWN, "not a plain")),
    "tensor with a line break": (lambda d: edit_index(d, lambda m: m.update({"x\ny": SHARD_1})), (INDEX, "'x\\ny'", SHARD_1)),
    "not a name": (lambda d: edit_index(d, lambda m: m.update({DOWN: 3})), (INDEX, DOWN, "not a plain")),  # type: ignore[dict-item]
    "not safetensors": (lambda d: edit_index(d, lambda m: m.update({DOWN: "config.json"})), (INDEX, DOWN, "not a plain")),
    "link out": (lambda d: replace_by_link(d / SHARD_1, d.parent / "else"), (SHARD_1, "symbolic link out of the directory")),
    "dangling link": (lambda d: ((d / SHARD_1).unlink(), (d / SHARD_1).symlink_to("x")), (SHARD_1, "symbolic link to nothing")),
    "loop of links": (lambda d: ((d / SHARD_1).unlink(), (d / SHARD_1).symlink_to(SHARD_1)), (SHARD_1, "cannot be read")),
    "fifo": (lambda d: replace_by_fifo(d / SHARD_1), (SHARD_1, "not a regular file")),
    "folder": (lambda d: ((d / SHARD_1).unlink(), (d / SHARD_1).mkdir()), (SHARD_1, "not a regular file")),
    "index not json": (lambda d: (d / INDEX).write_text("{"), (INDEX, "not JSON")),
    "index twice": (lambda d: (d / INDEX).write_text('{"weight_map": {"a": "b", "a": "c"}}'), (INDEX, "'a' listed twice")),
    "no weight map": (lambda d: (d / INDEX).write_text("{}"), (INDEX, "weight_map: expected an object")),
    "empty weight map": (lambda d: (d / INDEX).write_text('{"weight_map": {}}'), (INDEX, "weight_map: expected an object")),
    "weight map is a list": (lambda d: (d / INDEX).write_text('{"weight_map": []}'), (INDEX, "weight_map: expected an object")),
}


def other(shard: str) -> str:
    return SHARD_2 if shard == SHARD_1 else SHARD_1


@pytest.mark.parametrize("case", SHARDS)
def test_wrong_index(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str):
    apply, needles = SHARDS[case]
    write_model(tmp_path / "m", shards=2)
    apply(tmp_path / "m")
    refused(tmp_path / "m", capsys, *needles)


def test_link_inside_the_directory_is_allowed(tmp_path: Path):
    write_model(tmp_path / "m")
    (tmp_path / "m" / SINGLE).rename(tmp_path / "m" / "weights.bin")
    (tmp_path / "m" / SINGLE).symlink_to("weights.bin")
    load(open_checkpoint(tmp_path / "m"), "bfloat16")


def test_names_with_spaces_and_letters_of_any_alphabet(tmp_path: Path):
    write_model(tmp_path / "mein Modell ü 模型")
    load(open_checkpoint(tmp_path / "mein Modell ü 模型"), "bfloat16")
