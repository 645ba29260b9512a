"""The safetensors format: a header that says where each tensor lies, then the tensors.

Knows one file at a time, and trusts nothing in it. Refuses to know models: any names, any shapes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxpaged.checkpoint.files import CheckpointError, Reader, parse_json, shown

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_TENSORS = 65_536

DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
INT8 = "I8"  # of quantised checkpoints
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "F8_E5M2FNUZ": 1, "F8_E4M3FNUZ": 1, "U16": 2, "I16": 2,
    "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip

_MAGIC = {
    b"PK\x03\x04": "a zip archive, as PyTorch writes",
    b"\x80": "a Python pickle",
    b"GGUF": "a GGUF file",
    b"\x1f\x8b": "a gzip archive",
    b"<": "an HTML or XML page",
}


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies: bytes [begin, end) of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """One open file whose header has been checked: its tensors do not overlap and cover the rest of the file exactly."""

    def __init__(self, path: Path):
        self.reader = Reader(path)
        try:
            self.tensors = _read_header(self.reader)
        except CheckpointError:
            self.reader.close()
            raise

    def read(self, tensor: Tensor) -> np.ndarray:
        """The tensor in memory of its own.

        Raises:
          CheckpointError: its dtype is not float32, bfloat16, float16 or int8.
        """
        if tensor.dtype not in (*DTYPES, INT8):
            raise CheckpointError(f"{self.reader.path}: {tensor.name}: dtype {tensor.dtype}, supported are {', '.join(DTYPES)}")
        array = np.empty(tensor.shape, DTYPES.get(tensor.dtype, np.int8))
        if array.size:
            self.reader.fill(array.reshape(-1).view(np.uint8).data, tensor.begin)
        return array

    def close(self) -> None:
        self.reader.close()


def _read_header(reader: Reader) -> dict[str, Tensor]:
    path, size = reader.path, reader.size
    start = reader.read(0, min(size, 48))
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer ({size} bytes); run 'git lfs pull'")
    length = int.from_bytes(start[:8], "little")
    if size < 8 or length == 0 or length > min(size - 8, MAX_HEADER_BYTES) or start[8:9] != b"{":
        raise CheckpointError(f"{path}: {_not_safetensors(start, size, length)}")

    header = parse_json(reader.read(8, length), f"{path}: header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: header: __metadata__: expected an object of strings")
    if len(header) > MAX_TENSORS:
        raise CheckpointError(f"{path}: too many tensors ({len(header):,}, at most {MAX_TENSORS:,})")

    tensors = {name: _tensor(f"{path}: {shown(name)}", name, entry, 8 + length) for name, entry in header.items()}
    _check_cover(path, tensors.values(), 8 + length, size)
    return tensors


def _not_safetensors(start: bytes, size: int, length: int) -> str:
    if not size:
        return "not a safetensors file (empty)"
    for magic, kind in _MAGIC.items():
        if start.lstrip().startswith(magic):
            return f"not a safetensors file (starts with {shown(start[:8])}: {kind})"
    if size < 8 or (length and start[:8].isascii() and start[:8].decode().isprintable()):
        return f"not a safetensors file (starts with {shown(start[:8])})"
    if 0 < length <= min(size - 8, MAX_HEADER_BYTES):
        return f"not a safetensors file (header starts with {shown(start[8:16])}, expected '{{')"
    limit = f", at most {MAX_HEADER_BYTES:,} are allowed" if MAX_HEADER_BYTES < length <= size - 8 else ""
    return f"header claims {length:,} bytes, file has {size:,}{limit}"


def _tensor(where: str, name: str, entry: Any, offset: int) -> Tensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected an object with dtype, shape and data_offsets, got {shown(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPE_BYTES:
        raise CheckpointError(f"{where}: unknown dtype {shown(dtype)}")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**48 for n in shape) or len(shape) > 32:
        raise CheckpointError(f"{where}: shape {shown(shape)}, expected a list of whole numbers")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and 0 <= n < 2**63 for n in offsets):
        raise CheckpointError(f"{where}: data_offsets {shown(offsets)}, expected two whole numbers")
    begin, end = offsets
    if begin > end:
        raise CheckpointError(f"{where}: data_offsets begin {begin:,} is after end {end:,}")
    needed = math.prod(shape) * _DTYPE_BYTES[dtype]
    if needed != end - begin:
        raise CheckpointError(f"{where}: shape {shape} of {dtype} needs {needed:,} bytes, data_offsets give {end - begin:,}")
    return Tensor(name, dtype, tuple(shape), offset + begin, offset + end)


def _check_cover(path: Path, tensors: Iterable[Tensor], start: int, size: int) -> None:
    last = ""
    for tensor in sorted(tensors, key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.begin < start:
            raise CheckpointError(f"{path}: {shown(tensor.name)} overlaps {shown(last)} by {start - tensor.begin:,} bytes")
        if tensor.begin > start:
            raise CheckpointError(f"{path}: hole of {tensor.begin - start:,} bytes before {shown(tensor.name)}")
        start, last = tensor.end, tensor.name
    if start > size:
        raise CheckpointError(
            f"{path}: truncated: needs {start:,} bytes, has {size:,} ({start - size:,} missing); download again"
        )
    if start < size:
        raise CheckpointError(f"{path}: {size - start:,} bytes after the last tensor (needs {start:,}, has {size:,})")


def header(tensors: Iterable[tuple[str, np.dtype, tuple[int, ...]]]) -> bytes:
    """The bytes before the tensors of a file that holds these (name, dtype, shape) in this order, without gaps."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, dtype, shape in tensors:
        end = begin + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write one whole file. For small models and tests; `convert` streams and survives a crash."""
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    with open(path, "wb") as file:
        file.write(header((name, array.dtype, tensors[name].shape) for name, array in arrays.items()))
        for array in arrays.values():
            file.write(array.reshape(-1).view(np.uint8).data)
