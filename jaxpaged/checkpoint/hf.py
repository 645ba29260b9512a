"""The tensors of a Hugging Face directory: which file holds which, and are they those the model declares.

Knows names, shards and the index. Refuses to know devices: numpy in, numpy out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxpaged.checkpoint.files import CheckpointError, listed, read_json, regular_file, shown
from jaxpaged.checkpoint.safetensors import DTYPES, INT8, MAX_TENSORS, SafetensorsFile, Tensor
from jaxpaged.config import ModelConfig, nearest
from jaxpaged.model.weights import Parameter, declare

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MAX_INDEX_BYTES = 2**25
_PLAIN_NAME = re.compile(r"[^/\\\x00-\x1f]+\.safetensors")
_FOREIGN = (".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".ckpt")
_BLOCK = 2**22  # elements compared at once

_SCALE = "_scale"  # after a quantised matrix's name: what each of its rows is to be multiplied by, [out, 1]

# What old writers saved beside the parameters although it is computed from the configuration.
_IGNORED = (".rotary_emb.inv_freq",)


class HfTensors:
    """The open files of a checkpoint. Every parameter of the model is there, in its shape, and nothing else is."""

    def __init__(self, directory: Path, config: ModelConfig):
        self._directory = directory
        self._files: list[SafetensorsFile] = []
        self._where: dict[str, tuple[SafetensorsFile, Tensor]] = {}
        try:
            self._open(_shards(directory))
            self._check(config)
        except BaseException:
            self.close()
            raise

    def _open(self, shards: Mapping[str, set[str] | None]) -> None:
        for shard, expected in shards.items():
            file = SafetensorsFile(regular_file(self._directory, shard))
            self._files.append(file)
            if expected is not None and (absent := sorted(expected - set(file.tensors))):
                raise CheckpointError(f"{self._directory / INDEX}: maps {listed(absent)} to {shard}, which does not hold it")
            for name, tensor in file.tensors.items():
                if name in self._where:
                    raise CheckpointError(f"{file.reader.path}: {shown(name)} is also in {self._where[name][0].reader.path.name}")
                if expected is not None and name not in expected:
                    raise CheckpointError(f"{self._directory / INDEX}: {shown(name)} of {shard} is not mapped to it")
                self._where[name] = file, tensor
            if len(self._where) > MAX_TENSORS:
                raise CheckpointError(f"{self._directory}: too many tensors (more than {MAX_TENSORS:,})")

    def _check(self, config: ModelConfig) -> None:
        declared = {name: shape for parameter in declare(config) for name, shape in parameter.parts}
        quantised = self._quantised(config)
        declared |= {name + _SCALE: (declared[name][0], 1) for name in quantised}
        found = {name for name in self._where if not name.endswith(_IGNORED)}
        if config.tie_word_embeddings:
            found.discard("lm_head.weight")
        missing, extra = [name for name in declared if name not in found], sorted(found - set(declared))
        if missing or extra:
            raise CheckpointError(f"{self._directory}: {_difference(missing, extra)}")
        for name, shape in declared.items():
            file, tensor = self._where[name]
            where = f"{file.reader.path}: {name}"
            if tensor.dtype not in DTYPES and name not in quantised:
                hint = "; quantised checkpoints are not supported, load the original weights" if "8" in tensor.dtype else ""
                raise CheckpointError(f"{where}: dtype {tensor.dtype}, supported are {', '.join(DTYPES)}{hint}")
            if tensor.shape != shape:
                hint = " (transposed)" if tensor.shape == shape[::-1] else ""
                raise CheckpointError(f"{where}: shape {list(tensor.shape)}{hint}, config.json asks for {list(shape)}")
        if config.tie_word_embeddings and "lm_head.weight" in self._where:
            self._check_tied()

    def _quantised(self, config: ModelConfig) -> set[str]:
        """Matrices that a quantised checkpoint holds as int8, each with its scales beside it. Raises CheckpointError."""
        if config.quantization is None:
            return set()
        matrices = [name for parameter in declare(config) if parameter.is_matrix for name, _ in parameter.parts]
        found = {name for name in matrices if name in self._where and self._where[name][1].dtype == INT8}
        if not found:
            raise CheckpointError(f"{self._directory}: config.json has a quantization_config, but no tensor is {INT8}")
        return found

    def _check_tied(self) -> None:
        """A second copy of a tied embedding is allowed if it is equal."""
        names = ("model.embed_tokens.weight", "lm_head.weight")
        (_, embed), (file, head) = (self._where[name] for name in names)
        same = embed.shape == head.shape and head.dtype in DTYPES
        if not same or any((a != b).any() for a, b in zip(*map(self._blocks, names), strict=True)):
            problem = "differs from model.embed_tokens.weight, but config.json says tie_word_embeddings is true"
            raise CheckpointError(f"{file.reader.path}: lm_head.weight: {problem}")

    def _blocks(self, name: str) -> Iterator[np.ndarray]:
        """A tensor as bit patterns of float32, some rows at a time."""
        file, tensor = self._where[name]
        rows = max(1, _BLOCK // max(1, tensor.shape[1]))
        row_bytes = (tensor.end - tensor.begin) // tensor.shape[0]
        for row in range(0, tensor.shape[0], rows):
            count = min(rows, tensor.shape[0] - row)
            begin = tensor.begin + row * row_bytes
            block = file.read(Tensor(name, tensor.dtype, (count, tensor.shape[1]), begin, begin + count * row_bytes))
            yield block.astype(np.float32).view(np.uint32)

    def dtype(self, parameter: Parameter) -> np.dtype:
        """The dtype of a parameter as saved.

        Raises:
          CheckpointError: it is made of tensors of different dtypes.
        """
        tensors = [self._where[name][1] for name, _ in parameter.parts]
        if len({tensor.dtype for tensor in tensors}) > 1:
            names = ", ".join(f"{tensor.name} is {tensor.dtype}" for tensor in tensors)
            raise CheckpointError(f"{self._directory}: {parameter.name}: made of different dtypes ({names}); name the one wanted")
        return DTYPES.get(tensors[0].dtype, np.dtype(np.int8))

    def is_int8(self, parameter: Parameter) -> bool:
        """Whether the checkpoint holds a matrix quantised. Raises CheckpointError for one that is so in part."""
        return self.dtype(parameter) == np.int8

    def read_int8(self, parameter: Parameter) -> tuple[np.ndarray, np.ndarray]:
        """A quantised matrix: its numbers [O..., I] as saved and its scales, float32 [O...]."""
        values, scales = [], []
        for name, _ in parameter.parts:
            file, tensor = self._where[name]
            values.append(file.read(tensor))
            file, tensor = self._where[name + _SCALE]
            scales.append(file.read(tensor).astype(np.float32))
        return parameter.pack(values), parameter.pack(scales)[..., 0]

    def read(self, parameter: Parameter, dtype: np.dtype) -> np.ndarray:
        """One parameter, packed from its tensors, at `dtype`. Uses at most twice its size."""
        tensors = []
        for name, _ in parameter.parts:
            file, tensor = self._where[name]
            with np.errstate(
                over="ignore", invalid="ignore"
            ):  # what does not fit becomes an infinity, which `check_values` names
                tensors.append(file.read(tensor).astype(dtype, copy=False))
        return parameter.pack(tensors)

    def source(self, parameter: Parameter) -> str:
        """Where a parameter comes from, for messages."""
        return ", ".join(f"{self._where[name][0].reader.path}: {name}" for name, _ in parameter.parts)

    def identity(self) -> list[list[Any]]:
        """What changes when a file changes: name, size and time of each."""
        return [[file.reader.path.name, file.reader.size, file.reader.mtime_ns] for file in self._files]

    def check_unchanged(self) -> None:
        for file in self._files:
            file.reader.check_unchanged()

    def close(self) -> None:
        for file in self._files:
            file.close()


def _shards(directory: Path) -> Mapping[str, set[str] | None]:
    """The weight files, each with the tensors the index expects in it; None where there is no index."""
    present = sorted(path.name for path in directory.glob("*.safetensors"))
    if SINGLE in present:
        return {SINGLE: None}
    if not (directory / INDEX).exists():
        if present:
            raise CheckpointError(f"{directory / INDEX}: missing, but there are shards ({listed(present, 3)})")
        foreign = sorted(path.name for path in directory.iterdir() if path.suffix in _FOREIGN)
        if foreign:
            way = "convert with transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
            raise CheckpointError(f"{directory}: only safetensors is supported (found {listed(foreign, 3)}); {way}")
        raise CheckpointError(f"{directory}: no weights (expected {SINGLE} or {INDEX})")

    where = directory / INDEX
    weight_map = read_json(directory, INDEX, max_bytes=_MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where}: weight_map: expected an object that maps tensors to files, got {shown(weight_map)}")
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _PLAIN_NAME.fullmatch(shard):
            raise CheckpointError(
                f"{where}: {shown(name)}: {shown(shard)} is not a plain .safetensors file name in this directory"
            )
        shards.setdefault(shard, set()).add(name)
    for shard in shards:
        regular_file(directory, shard)
    if unlisted := [name for name in present if name.startswith("model") and name not in shards]:
        raise CheckpointError(f"{where}: does not list {listed(unlisted)}")
    return dict(sorted(shards.items()))


def _difference(missing: list[str], extra: list[str]) -> str:
    parts = []
    if missing:
        parts.append(
            f"{len(missing)} missing tensors ({listed(missing)})" if len(missing) > 1 else f"missing tensor {missing[0]}"
        )
    if extra:
        hint = nearest(extra[0], missing) if missing else ""
        names = listed(extra)
        parts.append(f"{len(extra)} unexpected tensors ({names}{hint})" if len(extra) > 1 else f"unexpected tensor {names}{hint}")
    if any("scale" in name or "zeros" in name for name in extra):
        parts.append("quantised checkpoints are not supported, load the original weights")
    return "; ".join(parts)
