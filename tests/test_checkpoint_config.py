"""config.json and generation_config.json (table B2): strict JSON, every field checked, and which file wins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import config_values, refused, write_model

from jaxpaged.checkpoint import CheckpointError, load, open_checkpoint, read_config

TEXTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not JSON"),
    "not json": (b"{'model_type': 'llama'}", "not JSON (line 1"),
    "trailing text": (b"{} {}", "not JSON"),
    "byte-order mark": (b"\xef\xbb\xbf{}", "byte-order mark"),
    "utf-16": ("{}".encode("utf-16"), "byte-order mark"),
    "utf-16 without mark": ("{}".encode("utf-16-le"), "not JSON"),
    "latin-1": ('{"a": "ü"}'.encode("latin-1"), "not UTF-8"),
    "too large": (b'{"a": "' + b"x" * 2**20 + b'"}', "at most 1,048,576 are allowed"),
    "array": (b"[]", "expected a JSON object, got list"),
    "number": (b"1", "expected a JSON object, got int"),
    "null": (b"null", "expected a JSON object, got NoneType"),
    "nested deeply": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "duplicate key": (b'{"hidden_size": 1, "hidden_size": 2}', "'hidden_size' listed twice"),
    "duplicate key inside": (b'{"a": {"b": 1, "b": 2}}', "'b' listed twice"),
    "nan": (b'{"rms_norm_eps": NaN}', "NaN is not JSON"),
    "infinity": (b'{"rms_norm_eps": -Infinity}', "-Infinity is not JSON"),
}


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("case", TEXTS)
def test_config_files_are_strict_json(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, case: str):
    content, needle = TEXTS[case]
    write_model(tmp_path / "m")
    (tmp_path / "m" / name).write_bytes(content)
    refused(tmp_path / "m", capsys, f"{tmp_path / 'm' / name}: ", needle)


FIELDS: list[tuple[str, Any, str]] = [
    ("hidden_size", "32", "got '32'"),
    ("hidden_size", 32.0, "got 32.0"),
    ("hidden_size", True, "got True"),
    ("hidden_size", None, "missing"),
    ("hidden_size", 0, "got 0"),
    ("num_hidden_layers", -1, "got -1"),
    ("num_hidden_layers", 2**31, "got 2147483648"),
    ("vocab_size", 2**31, "got 2147483648"),
    ("vocab_size", 0, "got 0"),
    ("max_position_embeddings", 2**31, "got 2147483648"),
    ("num_attention_heads", 31, "31 is not divisible by num_key_value_heads 2"),
    ("hidden_size", 18, "18 is not divisible by num_attention_heads 4"),
    ("model_type", "gpt2", "got 'gpt2', supported are llama"),
    ("model_type", 3, "got 3"),
    ("model_type", None, "supported are llama"),
    ("architectures", ["LlamaForSequenceClassification"], "expected LlamaForCausalLM"),
    ("quantization_config", {"quant_method": "awq"}, "quant_method: got 'awq'; supported is compressed-tensors"),
    ("rope_scaling", {"rope_type": "yarn", "factor": 2.0}, "got 'yarn'"),
    ("rope_scaling", {"rope_type": "linear", "factor": 0}, "factor: got 0"),
    ("rope_scaling", {"rope_type": "linear"}, "factor: missing"),
    ("rope_scaling", 3, "expected an object"),
    ("rope_theta", 0, "got 0"),
    ("dtype", "float8", "got 'float8'"),
    ("torch_dtype", "int8", "got 'int8'"),
    ("eos_token_id", 96, "expected a token id in [0, 95]"),
    ("eos_token_id", [2, -1], "got -1"),
    ("bos_token_id", 1000, "got 1000"),
    ("tie_word_embeddings", "yes", "got 'yes'"),
    ("hidden_act", "gelu", "got 'gelu'"),
    ("head_dim", 3, "got 3, expected an even number"),
    ("rms_norm_eps", -1, "got -1"),
]


@pytest.mark.parametrize(("field", "value", "needle"), FIELDS, ids=lambda value: str(value)[:30])
def test_config_fields(tmp_path: Path, capsys: pytest.CaptureFixture[str], field: str, value: Any, needle: str):
    write_model(tmp_path / "m")
    values = config_values("llama", **{field: value})
    (tmp_path / "m" / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path / "m")
    refused(tmp_path / "m", capsys, f"{tmp_path / 'm' / 'config.json'}: ", field, needle)


@pytest.mark.parametrize(
    ("change", "needle"),
    [({"sliding_window": 0}, "sliding_window: got 0"), ({"layer_types": ["full_attention"], "sliding_window": 8}, "layer_types")],
)
def test_config_fields_of_windows(tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], needle: str):
    write_model(tmp_path / "m", "mistral")
    (tmp_path / "m" / "config.json").write_text(json.dumps(config_values("mistral", **change)))
    refused(tmp_path / "m", capsys, "config.json", needle)


def test_custom_code_is_never_run(tmp_path: Path):
    """auto_map is ignored where the family is ours, and named in the refusal where it is not; its file is not even read."""
    write_model(tmp_path / "m", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    (tmp_path / "m" / "modeling_evil.py").write_text("raise SystemExit('executed')")
    load(open_checkpoint(tmp_path / "m"), "bfloat16")
    values = config_values("llama", auto_map={"AutoConfig": "modeling_evil.Evil"}, model_type="evil")
    (tmp_path / "m" / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"model_type: got 'evil'.*custom code \(auto_map\) is not supported"):
        open_checkpoint(tmp_path / "m")


def test_weights_that_contradict_tying(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_model(tmp_path / "m", "llama-tied")
    (tmp_path / "m" / "config.json").write_text(json.dumps(config_values("llama")))
    refused(tmp_path / "m", capsys, "missing tensor lm_head.weight")


def test_end_tokens_of_the_generation_config_win(tmp_path: Path):
    write_model(tmp_path / "m", eos_token_id=7)
    checkpoint = open_checkpoint(tmp_path / "m")
    assert checkpoint.config.eos_token_ids == (2, 3) == read_config(tmp_path / "m").eos_token_ids
    (warning,) = checkpoint.warnings
    assert "eos_token_id [7] is not used" in warning
    (tmp_path / "m" / "generation_config.json").write_text('{"eos_token_id": null}')
    assert open_checkpoint(tmp_path / "m").config.eos_token_ids == (7,)
    (tmp_path / "m" / "generation_config.json").unlink()
    assert open_checkpoint(tmp_path / "m").config.eos_token_ids == (7,)
    assert open_checkpoint(tmp_path / "m").generation_defaults == {}


def test_end_token_of_the_generation_config_outside_the_vocabulary(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_model(tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text('{"eos_token_id": [2, 96]}')
    refused(tmp_path / "m", capsys, "generation_config.json: eos_token_id: got 96")
