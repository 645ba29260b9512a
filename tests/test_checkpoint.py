"""Reading checkpoints: every family loads bit for bit, and every damaged file is refused with its name and its fault."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import DTYPES, FAMILIES, config_values, write_model, write_shards

from convert.cli import main
from jaxpaged.checkpoint import CheckpointError, hf, load, open_checkpoint, read_config, resolve, safetensors
from jaxpaged.config import ConfigError
from jaxpaged.model.weights import to_hf

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DOWN = "model.layers.0.mlp.down_proj.weight"


def equal_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# --- what is sound loads -----------------------------------------------------------------------------------------


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


# --- damaged weights: table B1 -----------------------------------------------------------------------------------


def raw(header: bytes | dict[str, Any], body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def entry(begin: int, end: int, shape: Any = None, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


FILES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "git-lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 4976698672\n",
        ("is a Git LFS pointer", "run 'git lfs pull'"),
    ),
    "empty": (b"", ("not a safetensors file (empty)",)),
    "seven bytes": (b"1234567", ("not a safetensors file (starts with",)),
    "html": (b"<!DOCTYPE html><html>404</html>", ("not a safetensors file", "HTML")),
    "html after spaces": (b"\n\n  <html>rate limited</html>", ("not a safetensors file", "HTML")),
    "zip": (b"PK\x03\x04" + b"\0" * 100, ("not a safetensors file", "zip archive")),
    "pickle": (b"\x80\x02}q\x00(X\x01\x00\x00\x00a", ("not a safetensors file", "pickle")),
    "gguf": (b"GGUF\x03\0\0\0" + b"\0" * 50, ("not a safetensors file", "GGUF")),
    "text": (b"hello, this is text", ("not a safetensors file (starts with", "hello, t")),
    "header length 0": (raw(b"", b"\0" * 20), ("header claims 0 bytes, file has 28",)),
    "header longer than the file": (raw(b"{}", length=1000), ("header claims 1,000 bytes, file has 10",)),
    "header of 2^63 bytes": (raw(b"{}", length=2**63), ("header claims 9,223,372,036,854,775,808 bytes",)),
    "header is an array": (raw(b"[1, 2]"), ("header starts with", "expected '{'")),
    "header is not json": (raw(b'{"a": '), ("header: not JSON",)),
    "header is not utf-8": (raw(b'{"\xff": 1}'), ("header: not UTF-8",)),
    "header nests deeply": (raw(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), ("header: nested too deeply",)),
    "huge number": (raw(b'{"a": ' + b"9" * 5000 + b"}"), ("header: not JSON",)),
    "nan in header": (raw(b'{"a": NaN}'), ("NaN is not JSON",)),
    "duplicate tensor": (raw(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":1}', b"1234"), ("'a' listed twice",)),
    "metadata of numbers": (raw({"__metadata__": {"a": 1}}), ("__metadata__: expected an object of strings",)),
    "metadata is a list": (raw({"__metadata__": []}), ("__metadata__: expected an object of strings",)),
    "entry without shape": (raw({"a": {"dtype": "F32"}}), ("'a'", "dtype, shape and data_offsets")),
    "unknown dtype": (raw({"a": entry(0, 4, dtype="F31")}, b"1234"), ("'a'", "unknown dtype 'F31'")),
    "dtype is a number": (raw({"a": entry(0, 4, dtype=7)}, b"1234"), ("'a'", "unknown dtype 7")),
    "negative dimension": (raw({"a": entry(0, 4, [-1])}, b"1234"), ("'a'", "shape [-1]")),
    "dimension is a float": (raw({"a": entry(0, 4, [1.0])}, b"1234"), ("'a'", "shape [1.0]")),
    "dimension is true": (raw({"a": entry(0, 4, [True])}, b"1234"), ("'a'", "shape [True]")),
    "shape overflows": (raw({"a": entry(0, 4, [2**40, 2**40])}, b"1234"), ("'a'", "data_offsets give 4")),
    "begin after end": (raw({"a": entry(4, 0, [1])}, b"1234"), ("'a'", "begin 4 is after end 0")),
    "negative offset": (raw({"a": entry(-4, 0, [1])}, b"1234"), ("'a'", "data_offsets [-4, 0]")),
    "three offsets": (
        raw({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, b"1234"),
        ("'a'", "expected two whole numbers"),
    ),
    "shape against bytes": (raw({"a": entry(0, 8, [1])}, b"12345678"), ("'a'", "needs 4 bytes, data_offsets give 8")),
    "overlap": (raw({"a": entry(0, 8), "b": entry(4, 12)}, b"0" * 12), ("'b' overlaps 'a' by 4 bytes",)),
    "hole": (raw({"a": entry(0, 4), "b": entry(8, 12)}, b"0" * 12), ("hole of 4 bytes before 'b'",)),
    "truncated": (raw({"a": entry(0, 400)}, b"0" * 100), ("truncated: needs ", "(300 missing); download again")),
    "trailing bytes": (raw({"a": entry(0, 4)}, b"0" * 9), ("5 bytes after the last tensor",)),
    "no tensors": (raw({}), ("missing tensors", "model.embed_tokens.weight", "and 11 more")),
    "too many tensors": (
        raw({f"t{index}": entry(0, 0, [0]) for index in range(65_537)}),
        ("too many tensors (65,537, at most 65,536)",),
    ),
}


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


@pytest.mark.parametrize("case", FILES)
def test_damaged_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str):
    content, needles = FILES[case]
    write_model(tmp_path / "m")
    (tmp_path / "m" / SINGLE).write_bytes(content)
    refused(tmp_path / "m", capsys, str(tmp_path / "m") if case == "no tensors" else SINGLE, *needles)


def change(name: str, function: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, np.ndarray]], None]:
    def apply(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = function(tensors[name])

    return apply


def with_value(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def function(tensor: np.ndarray) -> np.ndarray:
        tensor = tensor.copy()
        tensor[-1, -1] = value
        return tensor

    return function


def rename(old: str, new: str) -> Callable[[dict[str, np.ndarray]], None]:
    def apply(tensors: dict[str, np.ndarray]) -> None:
        tensors[new] = tensors.pop(old)

    return apply


TENSORS: dict[str, tuple[Callable[[dict[str, np.ndarray]], Any], tuple[str, ...]]] = {
    "missing": (lambda t: t.pop(DOWN), (f"missing tensor {DOWN}",)),
    "extra": (lambda t: t.update({"model.extra": t[DOWN]}), ("unexpected tensor model.extra",)),
    "misnamed": (
        rename(DOWN, DOWN.replace("down", "dwon")),
        (f"missing tensor {DOWN}", "unexpected tensor", "dwon", f"did you mean '{DOWN}'?"),
    ),
    "many misnamed": (
        lambda t: [rename(name, "decoder." + name)(t) for name in list(t)],
        ("missing tensors", "and 11 more", "unexpected tensors", "decoder."),
    ),
    "another head": (lambda t: t.pop("lm_head.weight"), ("missing tensor lm_head.weight",)),
    "scales": (lambda t: t.update({DOWN + "_scale": t[DOWN]}), ("unexpected tensor", "_scale", "quantised")),
    "transposed": (change(DOWN, lambda a: a.T), (SINGLE, DOWN, "shape [24, 16] (transposed)", "config.json asks for [16, 24]")),
    "flat": (change(DOWN, lambda a: a.reshape(-1)), (DOWN, "shape [384]", "[16, 24]")),
    "vocabulary": (change("lm_head.weight", lambda a: a[:-1]), ("lm_head.weight", "shape [95, 16]", "[96, 16]")),
    "nan": (change(DOWN, with_value(float("nan"))), (SINGLE, DOWN, "NaN", "--allow-nonfinite")),
    "infinity": (change(DOWN, with_value(float("-inf"))), (SINGLE, DOWN, "an infinity")),
    "all zero": (change(DOWN, np.zeros_like), (SINGLE, DOWN, "all zero", "--allow-nonfinite")),
    "all minus zero": (change(DOWN, lambda a: -np.zeros_like(a)), (DOWN, "all zero")),
}


@pytest.mark.parametrize("case", TENSORS)
def test_wrong_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str):
    apply, needles = TENSORS[case]
    tensors = write_model(tmp_path / "m")
    apply(tensors)
    write_shards(tmp_path / "m", tensors)
    refused(tmp_path / "m", capsys, str(tmp_path / "m"), *needles)


@pytest.mark.parametrize("dtype", ["I8", "F8_E4M3", "F8_E5M2", "U8", "BOOL", "I32", "F64", "I64", "C64"])
def test_dtypes_that_are_not_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str):
    tensors = write_model(tmp_path / "m")
    size = safetensors._DTYPE_BYTES[dtype]
    header: dict[str, Any] = {}
    begin = 0
    for name, tensor in tensors.items():
        kind, width = (dtype, size) if name == DOWN else ("BF16", 2)
        end = begin + tensor.size * width
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    (tmp_path / "m" / SINGLE).write_bytes(raw(header, os.urandom(begin)))
    refused(tmp_path / "m", capsys, SINGLE, DOWN, f"dtype {dtype}, supported are F32, BF16, F16")


def test_a_number_too_large_for_the_wanted_dtype(tmp_path: Path):
    tensors = write_model(tmp_path / "m", dtype="float32")
    tensors[DOWN][3, 3] = 1e6
    write_shards(tmp_path / "m", tensors)
    load(open_checkpoint(tmp_path / "m"), "bfloat16")
    with np.errstate(over="ignore"), pytest.raises(CheckpointError, match="an infinity at float16"):
        load(open_checkpoint(tmp_path / "m"), "float16")


def test_allow_nonfinite(tmp_path: Path):
    tensors = write_model(tmp_path / "m")
    tensors[DOWN] = np.full_like(tensors[DOWN], np.nan)
    tensors["lm_head.weight"] = np.zeros_like(tensors["lm_head.weight"])
    write_shards(tmp_path / "m", tensors)
    checkpoint = open_checkpoint(tmp_path / "m")
    assert np.isnan(np.asarray(load(checkpoint, "bfloat16", allow_nonfinite=True).layers[0].down)).all()


def test_tied_head_that_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tensors = write_model(tmp_path / "m", "llama-tied")
    head = tensors["model.embed_tokens.weight"].copy()
    head[95, 15] += 1
    write_shards(tmp_path / "m", {**tensors, "lm_head.weight": head})
    refused(tmp_path / "m", capsys, SINGLE, "lm_head.weight", "tie_word_embeddings")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.gguf", "flax_model.msgpack"])
def test_other_formats_only(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str):
    write_model(tmp_path / "m")
    (tmp_path / "m" / SINGLE).rename(tmp_path / "m" / name)
    refused(tmp_path / "m", capsys, f"only safetensors is supported (found {name}); convert with transformers")


def test_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_model(tmp_path / "m")
    (tmp_path / "m" / SINGLE).unlink()
    refused(tmp_path / "m", capsys, "no weights (expected model.safetensors or model.safetensors.index.json)")


# --- the index of shards -----------------------------------------------------------------------------------------

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


# --- a file that changes under the reader ------------------------------------------------------------------------


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


# --- config.json and generation_config.json: table B2 ------------------------------------------------------------

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
    ("quantization_config", {"quant_method": "awq"}, "quantised checkpoints are not supported"),
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


# --- where a model is --------------------------------------------------------------------------------------------


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
from jaxpaged.checkpoint import CheckpointError, load, open_checkpoint
try:
    checkpoint = open_checkpoint(sys.argv[1])
except CheckpointError as error:
    print("refused:", error)
else:
    load(checkpoint, "bfloat16")
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


def test_a_directory_wins_over_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_model(tmp_path / "acme" / "tiny")
    monkeypatch.chdir(tmp_path)
    assert resolve("acme/tiny") == Path("acme/tiny")


# --- the format ----------------------------------------------------------------------------------------------------


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
