"""Reading checkpoints that are sound: every family, dtype and division into shards, bit for bit."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import DTYPES, FAMILIES, config_values, write_model, write_shards

from jaxpaged.checkpoint import CheckpointError, hf, load, open_checkpoint
from jaxpaged.config import ConfigError
from jaxpaged.model.weights import to_hf

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DOWN = "model.layers.0.mlp.down_proj.weight"


def equal_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loads_every_family_bit_for_bit(tmp_path: Path, family: str, dtype: str, shards: int):
    tensors = write_model(tmp_path / "m", family, dtype=dtype, shards=shards)
    checkpoint = open_checkpoint(tmp_path / "m")
    assert checkpoint.kind == "hf" and checkpoint.config.dtype == dtype
    assert checkpoint.config.eos_token_ids == (2, 3) and checkpoint.generation_defaults["temperature"] == 0.6
    loaded = dict(to_hf(load(checkpoint, dtype), checkpoint.config))
    assert loaded.keys() == tensors.keys()
    assert all(equal_bits(loaded[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
def test_casts_as_numpy_does(tmp_path: Path, wanted: str):
    tensors = write_model(tmp_path / "m", dtype="float32")
    checkpoint = open_checkpoint(tmp_path / "m")
    loaded = dict(to_hf(load(checkpoint, wanted), checkpoint.config))
    assert all(equal_bits(loaded[name], tensor.astype(DTYPES[wanted])) for name, tensor in tensors.items())


def test_tensors_of_one_parameter_may_differ_in_dtype(tmp_path: Path):
    tensors = write_model(tmp_path / "m", dtype="bfloat16")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].astype(np.float32)
    write_shards(tmp_path / "m", tensors)
    load(open_checkpoint(tmp_path / "m"), "bfloat16")


def test_a_family_saved_by_transformers_loads(tmp_path: Path, torch: Any):
    transformers = pytest.importorskip("transformers")
    common = {key: value for key, value in config_values("llama").items() if key not in ("model_type", "architectures")}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, pad_token_id=0)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "m", max_shard_size="10KB")
    assert (tmp_path / "m" / INDEX).exists()
    checkpoint = open_checkpoint(tmp_path / "m")
    loaded = dict(to_hf(load(checkpoint, "bfloat16"), checkpoint.config))
    for name, tensor in model.state_dict().items():
        assert loaded[name].tobytes() == tensor.view(torch.int16).numpy().tobytes(), name


def test_tied_head_is_accepted_if_equal(tmp_path: Path):
    tensors = write_model(tmp_path / "m", "llama-tied")
    write_shards(tmp_path / "m", {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, 2)
    (tmp_path / "m" / SINGLE).unlink()
    assert load(open_checkpoint(tmp_path / "m"), "bfloat16").lm_head is None
    # Also when it was saved at another width: the numbers count, not the bits.
    shutil.rmtree(tmp_path / "m")
    tensors = write_model(tmp_path / "m", "llama-tied")
    write_shards(tmp_path / "m", {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].astype(np.float32)})
    load(open_checkpoint(tmp_path / "m"), "bfloat16")


def test_computed_tensors_of_old_writers_are_ignored(tmp_path: Path):
    tensors = write_model(tmp_path / "m")
    write_shards(tmp_path / "m", {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)})
    load(open_checkpoint(tmp_path / "m"), "bfloat16")


def test_zero_biases_and_signed_zeros_are_sound(tmp_path: Path):
    tensors = write_model(tmp_path / "m", "llama-biases")
    for name in tensors:
        if name.endswith("bias"):
            tensors[name] = np.zeros_like(tensors[name])
    write_shards(tmp_path / "m", tensors)
    load(open_checkpoint(tmp_path / "m"), "bfloat16")


def test_place_gets_every_parameter_and_a_failure_returns_nothing(tmp_path: Path):
    write_model(tmp_path / "m")
    seen: list[str] = []

    def place(parameter: Any, array: np.ndarray) -> Any:
        seen.append(parameter.name)
        if parameter.name == "norm":
            raise RuntimeError("device lost")
        return array

    with pytest.raises(RuntimeError, match="device lost"):
        load(open_checkpoint(tmp_path / "m"), "bfloat16", place=place)
    assert seen[0] == "embed" and seen[-1] == "norm"


def test_unknown_dtype_is_refused(tmp_path: Path):
    write_model(tmp_path / "m")
    with pytest.raises(ConfigError, match=r"dtype: got 'float8', supported are float32, bfloat16, float16"):
        load(open_checkpoint(tmp_path / "m"), "float8")


@pytest.mark.parametrize("how", ["touched", "grown", "shrunk", "replaced"])
def test_file_that_changes_during_load(tmp_path: Path, how: str):
    write_model(tmp_path / "m")
    path = tmp_path / "m" / SINGLE

    def place(parameter: Any, array: np.ndarray) -> np.ndarray:
        if parameter.name != "norm":
            return array
        if how == "touched":
            os.utime(path, ns=(0, 0))
        elif how == "grown":
            path.write_bytes(path.read_bytes() + b"0")
        elif how == "shrunk":
            os.truncate(path, 1000)
        else:
            shutil.copy(path, tmp_path / "copy")
            os.replace(tmp_path / "copy", path)
        return array

    with pytest.raises(CheckpointError, match=r"model\.safetensors: changed during load"):
        load(open_checkpoint(tmp_path / "m"), "bfloat16", place=place)  # type: ignore[arg-type]


def test_the_format_is_that_of_the_safetensors_library(tmp_path: Path):
    library = pytest.importorskip("safetensors")
    tensors = write_model(tmp_path / "m", dtype="float32")
    with library.safe_open(tmp_path / "m" / SINGLE, "np") as file:
        assert set(file.keys()) == set(tensors)
        assert all(equal_bits(file.get_tensor(name), tensor) for name, tensor in tensors.items())


def test_large_tied_heads_are_compared_to_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hf, "_BLOCK", 16 * 7)  # 96 rows in blocks of 7: the last is shorter
    tensors = write_model(tmp_path / "m", "llama-tied")
    head = tensors["model.embed_tokens.weight"].copy()
    write_shards(tmp_path / "m", {**tensors, "lm_head.weight": head})
    load(open_checkpoint(tmp_path / "m"), "bfloat16")
    head[95, 0] += 1
    write_shards(tmp_path / "m", {**tensors, "lm_head.weight": head})
    with pytest.raises(CheckpointError, match="lm_head"):
        load(open_checkpoint(tmp_path / "m"), "bfloat16")
