"""Small checkpoints for tests, written without torch: a configuration of every family and random tensors for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from convert.cli import main
from jaxpaged.checkpoint import CheckpointError, load, open_checkpoint, safetensors
from jaxpaged.config import ModelConfig
from jaxpaged.model.weights import declare

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}

_COMMON = {
    "vocab_size": 96, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral", "sliding_window": 16},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": True},
    "phi3": {"model_type": "phi3", "hidden_size": 32},
}


def config_values(family: str = "llama", **changes: Any) -> dict[str, Any]:
    """The object in config.json."""
    return {**_COMMON, **FAMILIES[family], **changes}


def random_tensors(values: dict[str, Any], dtype: str = "bfloat16", seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor of the checkpoint by its HF name."""
    rng = np.random.default_rng(seed)
    parts = [part for parameter in declare(ModelConfig.from_hf(values)) for part in parameter.parts]
    return {name: rng.standard_normal(shape, np.float32).astype(DTYPES[dtype]) for name, shape in parts}


def write_shards(directory: Path, tensors: dict[str, np.ndarray], count: int = 1) -> None:
    """model.safetensors, or `count` shards and their index."""
    if count == 1:
        safetensors.write(directory / "model.safetensors", tensors)
        return
    names = list(tensors)
    weight_map = {}
    for index in range(count):
        file = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
        shard = {name: tensors[name] for name in names[index::count]}
        safetensors.write(directory / file, shard)
        weight_map.update(dict.fromkeys(shard, file))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_model(
    directory: Path, family: str = "llama", *, dtype: str = "bfloat16", shards: int = 1, seed: int = 0, **changes: Any
) -> dict[str, np.ndarray]:
    """A whole checkpoint with tokenizer files (which nothing here reads); its tensors."""
    directory.mkdir(parents=True)
    values = config_values(family, dtype=dtype, **changes)
    (directory / "config.json").write_text(json.dumps(values, indent=2))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3], "temperature": 0.6}))
    (directory / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": {"vocab": {"ä": 0}}}))
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    tensors = random_tensors(values, dtype, seed)
    write_shards(directory, tensors, shards)
    return tensors


def refused(directory: Path, capsys: pytest.CaptureFixture[str], *needles: str, dtype: str = "bfloat16") -> None:
    """Loading raises, and the command ends with 3: one line, with all of `needles`, no traceback, nothing left behind."""
    with pytest.raises(CheckpointError) as caught:
        load(open_checkpoint(directory), dtype)
    capsys.readouterr()
    before = sorted(directory.parent.iterdir())
    assert main([str(directory), str(directory.parent / "out"), "--quiet"]) == 3
    assert sorted(directory.parent.iterdir()) == before
    output = capsys.readouterr()
    assert output.out == "" and output.err == f"jaxpaged: error: {caught.value}\n" and output.err.count("\n") == 1
    for needle in needles:
        assert needle in output.err


def listing(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}
