"""Weight files that are damaged or not what the model needs (table B1): refused, with file, tensor and fault in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import refused, write_model, write_shards

from jaxpaged.checkpoint import CheckpointError, load, open_checkpoint, safetensors

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DOWN = "model.layers.0.mlp.down_proj.weight"


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
    with pytest.raises(CheckpointError, match="an infinity at float16"):
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
