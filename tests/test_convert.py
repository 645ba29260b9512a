"""Converting: bit-exact both ways, readable by orbax, small in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from checkpoints import DTYPES, FAMILIES, config_values, listing, write_model, write_shards

from convert.cli import main
from convert.job import convert, verify
from jaxpaged.checkpoint import load, open_checkpoint, safetensors
from jaxpaged.config import ModelConfig
from jaxpaged.model.weights import declare, get, to_hf

CASES = [(family, dtype, shards) for family in FAMILIES for dtype, shards in (("bfloat16", 3), ("float32", 1))]


def tensors_of(directory: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for path in sorted(directory.glob("*.safetensors")):
        file = safetensors.SafetensorsFile(path)
        found |= {name: file.read(tensor) for name, tensor in file.tensors.items()}
        file.close()
    return found


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name, array in a.items():
        assert array.dtype == b[name].dtype and array.shape == b[name].shape and array.tobytes() == b[name].tobytes(), name


@pytest.mark.parametrize(("family", "dtype", "shards"), CASES)
def test_round_trip_is_bit_exact(tmp_path: Path, family: str, dtype: str, shards: int):
    tensors = write_model(tmp_path / "hf", family, dtype=dtype, shards=shards)
    convert(tmp_path / "hf", tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "back", layout="hf", max_shard_bytes=1500 if shards > 1 else 10**9)
    assert (tmp_path / "back" / "model.safetensors.index.json").exists() == (shards > 1)
    assert_same(tensors, tensors_of(tmp_path / "back"))
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes()
    for made in ("orbax", "back"):
        assert verify(tmp_path / made)[1] == []
        checkpoint = open_checkpoint(tmp_path / made)
        assert checkpoint.kind == ("orbax" if made == "orbax" else "hf") and checkpoint.config.eos_token_ids == (2, 3)
        assert_same(tensors, dict(to_hf(load(checkpoint, dtype), checkpoint.config)))


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "phi3"])
def test_round_trip_of_models_saved_by_transformers(tmp_path: Path, torch: Any, name: str):
    transformers = pytest.importorskip("transformers")
    values = {key: value for key, value in config_values(name).items() if key != "architectures"}
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values, pad_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "hf", max_shard_size="8KB")
    convert(tmp_path / "hf", tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "back", layout="hf")
    assert_same(tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "back"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    for (parameter, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert a.dtype == b.dtype and a.equal(b), parameter


@pytest.mark.parametrize("family", ["llama-biases", "qwen3"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_orbax_opens_the_result(tmp_path: Path, family: str, dtype: str):
    """As a plain tree, and into a tree of arrays on devices. Its keys are the paths of our parameters."""
    import orbax.checkpoint as ocp

    write_model(tmp_path / "hf", family, dtype=dtype)
    convert(tmp_path / "hf", tmp_path / "out")
    checkpoint = open_checkpoint(tmp_path / "out")
    weights = load(checkpoint, dtype)
    for checkpointer in (ocp.StandardCheckpointer(), ocp.PyTreeCheckpointer()):
        with checkpointer:
            tree = checkpointer.restore(tmp_path / "out" / "weights")
        assert len(jax.tree.leaves(tree)) == len(declare(checkpoint.config))
        for parameter in declare(checkpoint.config):
            node = tree
            for step in parameter.path:
                node = node[step]
            assert node.dtype == DTYPES[dtype] and node.tobytes() == np.asarray(get(weights, parameter.path)).tobytes()

    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), tree)
    with ocp.StandardCheckpointer() as checkpointer:
        placed = checkpointer.restore(tmp_path / "out" / "weights", target)
    assert isinstance(placed["embed"], jax.Array)
    assert all(
        np.asarray(a).tobytes() == b.tobytes() for a, b in zip(jax.tree.leaves(placed), jax.tree.leaves(tree), strict=True)
    )


def test_orbax_refuses_a_missing_chunk_too(tmp_path: Path):
    """A chunk that is gone must not read as zeros, even for a user who does not load through us."""
    import orbax.checkpoint as ocp

    write_model(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "out")
    (tmp_path / "out" / "weights" / "norm" / "0").unlink()
    with pytest.raises(Exception, match="missing"), ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.restore(tmp_path / "out" / "weights")


@pytest.mark.parametrize("wanted", DTYPES)
def test_dtype_casts_weights_and_configuration(tmp_path: Path, wanted: str):
    tensors = write_model(tmp_path / "hf", dtype="float32")
    cast = {name: tensor.astype(DTYPES[wanted]) for name, tensor in tensors.items()}
    convert(tmp_path / "hf", tmp_path / "orbax", dtype=wanted)
    convert(tmp_path / "orbax", tmp_path / "back", layout="hf")
    convert(tmp_path / "hf", tmp_path / "direct", layout="hf", dtype=wanted)
    for made in ("back", "direct"):
        assert_same(cast, tensors_of(tmp_path / made))
    assert open_checkpoint(tmp_path / "orbax").config.dtype == open_checkpoint(tmp_path / "direct").config.dtype == wanted


def test_each_parameter_keeps_its_dtype_and_mixed_ones_need_a_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tensors = write_model(tmp_path / "hf")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)
    write_shards(tmp_path / "hf", tensors)
    convert(tmp_path / "hf", tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "back", layout="hf")
    assert_same(tensors, tensors_of(tmp_path / "back"))

    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(np.float32)
    write_shards(tmp_path / "hf", tensors)
    assert main([str(tmp_path / "hf"), str(tmp_path / "no"), "--quiet"]) == 3
    assert "layers.0.gate_up: made of different dtypes" in capsys.readouterr().err
    assert main([str(tmp_path / "hf"), str(tmp_path / "yes"), "--quiet", "--dtype", "bfloat16"]) == 0


def test_equal_sources_give_equal_bytes(tmp_path: Path):
    write_model(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "a")
    convert(tmp_path / "hf", tmp_path / "b")
    assert listing(tmp_path / "a") == listing(tmp_path / "b")


def test_manifest_names_every_parameter(tmp_path: Path):
    write_model(tmp_path / "hf", "qwen3")
    convert(tmp_path / "hf", tmp_path / "out")
    values = json.loads((tmp_path / "out" / "manifest.json").read_text())
    parameters = declare(ModelConfig.from_hf(config_values("qwen3")))
    assert list(values["tensors"]) == [parameter.name for parameter in parameters]
    embed = values["tensors"]["embed"]
    assert (embed["shape"], embed["dtype"], embed["bytes"]) == ([96, 16], "bfloat16", 96 * 16 * 2) and len(embed["sha256"]) == 64
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} < set(values["files"])
    # The digest file is that of the usual tool.
    check = subprocess.run(["sha256sum", "-c", "manifest.sha256"], cwd=tmp_path / "out", capture_output=True, check=False)
    assert check.returncode == 0


MEMORY_SCRIPT = """
import sys
from convert.job import convert

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

before = peak()
convert(sys.argv[1], sys.argv[2], layout=sys.argv[3], dtype=sys.argv[4] if len(sys.argv) > 4 else None)
print(peak() - before)
"""


def test_peak_memory_is_that_of_one_parameter(tmp_path: Path):
    """240 MB in three shards, the largest parameter 16.8 MB: a copy of the whole, or of one shard, would show."""
    shape = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 6, "vocab_size": 4096, "num_key_value_heads": 4}
    write_model(tmp_path / "hf", dtype="float32", shards=3, **shape)
    parameters = declare(open_checkpoint(tmp_path / "hf").config)
    largest, total = (4 * function(parameter.size for parameter in parameters) for function in (max, sum))
    assert total > 200e6 > 3 * largest + 64e6

    def peak(*arguments: str) -> int:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        run = subprocess.run(
            [sys.executable, "-c", MEMORY_SCRIPT, *arguments], env=environment, capture_output=True, text=True, check=True
        )
        return int(run.stdout)

    peaks = {
        "to orbax": peak(str(tmp_path / "hf"), str(tmp_path / "out"), "orbax"),
        "to orbax, cast": peak(str(tmp_path / "hf"), str(tmp_path / "cast"), "orbax", "bfloat16"),
        "back": peak(str(tmp_path / "out"), str(tmp_path / "back"), "hf"),
    }
    print(
        {name: f"{value / 1e6:.0f} MB" for name, value in peaks.items()},
        f"largest {largest / 1e6:.1f} MB, all {total / 1e6:.0f} MB",
    )
    for value in peaks.values():
        assert value < 3 * largest + 64e6
