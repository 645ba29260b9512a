"""The orbax layout of a converted checkpoint: one zarr array per parameter, each in one uncompressed chunk.

Knows where the bytes of a parameter lie, so that they are read and written without a thread or a copy; orbax opens the same
directory. Refuses to know devices: numpy in, numpy out.

Source: orbax-checkpoint 0.12, `use_ocdbt=False, use_zarr3=False`; Zarr storage specification version 2.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxpaged.checkpoint.files import CheckpointError, Reader
from jaxpaged.checkpoint.manifest import MANIFEST, Manifest
from jaxpaged.config import ModelConfig
from jaxpaged.model.weights import Parameter, declare

ITEM = "weights"  # the folder that orbax opens
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
_ZARR_DTYPES = {"float32": "<f4", "bfloat16": "bfloat16", "float16": "<f2"}


def chunk_file(parameter: Parameter) -> str:
    """The file that holds a parameter's bytes, in C order."""
    return f"{ITEM}/{parameter.name}/{'.'.join('0' for _ in parameter.shape)}"


def zarray_file(parameter: Parameter) -> str:
    """The file that describes a parameter's array."""
    return f"{ITEM}/{parameter.name}/.zarray"


def zarray(parameter: Parameter, dtype: str) -> bytes:
    """The description of a parameter's array. One chunk without compression is the array itself."""
    shape = list(parameter.shape)
    values = {"chunks": shape, "compressor": None, "dimension_separator": ".", "dtype": _ZARR_DTYPES[dtype], "fill_value": None}
    return json.dumps({**values, "filters": None, "order": "C", "shape": shape, "zarr_format": 2}).encode()


def tree_metadata(parameters: list[Parameter]) -> bytes:
    """orbax's `_METADATA`: how the arrays form a tree of dicts (key type 2) and lists (key type 1)."""
    tree = {}
    for parameter in parameters:
        keys = [{"key": str(step), "key_type": 1 if isinstance(step, int) else 2} for step in parameter.path]
        value = {"value_type": "np.ndarray", "skip_deserialize": False}
        tree[str(tuple(map(str, parameter.path)))] = {"key_metadata": keys, "value_metadata": value}
    flags = {"use_ocdbt": False, "use_zarr3": False, "store_array_data_equal_to_fill_value": True, "custom_metadata": None}
    return json.dumps({"tree_metadata": tree, **flags}).encode()


def checkpoint_metadata() -> bytes:
    """orbax's `_CHECKPOINT_METADATA`, its mark of a committed checkpoint. The times are 0: equal inputs give equal files."""
    handler = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
    times = {"init_timestamp_nsecs": 0, "commit_timestamp_nsecs": 0}
    return json.dumps(
        {"item_handlers": handler, "metrics": {}, "performance_metrics": {}, **times, "custom_metadata": {}}
    ).encode()


class OrbaxTensors:
    """The parameters of a converted checkpoint, one file each. Names and shapes are those that the model declares."""

    def __init__(self, directory: Path, config: ModelConfig, manifest: Manifest, *, verify: bool = True):
        self._directory, self._manifest, self._verify = directory, manifest, verify
        self._readers: dict[str, Reader] = {}
        declared = {parameter.name: parameter for parameter in declare(config)}
        if set(declared) != set(manifest.tensors):
            names = sorted(set(declared) ^ set(manifest.tensors))
            raise CheckpointError(
                f"{directory / MANIFEST}: {names[0]}: is not both in the manifest and in the model; convert again"
            )
        for name, parameter in declared.items():
            entry = manifest.tensors[name]
            expected = [list(parameter.shape), chunk_file(parameter)]
            size = parameter.size * DTYPES[entry["dtype"]].itemsize if entry["dtype"] in DTYPES else -1
            if [entry["shape"], entry["file"]] != expected or size != manifest.files[entry["file"]].bytes:
                got = f"{entry['dtype']} {entry['shape']}"
                raise CheckpointError(f"{directory / MANIFEST}: {name}: {got}, the model needs {expected[0]}; convert again")

    def dtype(self, parameter: Parameter) -> np.dtype:
        """The dtype of a parameter as saved."""
        return DTYPES[self._manifest.tensors[parameter.name]["dtype"]]

    def read(self, parameter: Parameter, dtype: np.dtype) -> np.ndarray:
        """One parameter at `dtype`, its digest checked. Uses at most twice its size."""
        name = chunk_file(parameter)
        reader = Reader(self._directory / name)
        try:
            if reader.size != self._manifest.files[name].bytes:
                raise CheckpointError(f"{reader.path}: changed during load")
            array = np.empty(parameter.shape, self.dtype(parameter))
            content = array.reshape(-1).view(np.uint8).data
            reader.fill(content, 0)
            if self._verify and hashlib.sha256(content).hexdigest() != self._manifest.files[name].sha256:
                raise CheckpointError(f"{reader.path}: content differs from its digest in {MANIFEST}; convert again")
            reader.check_unchanged()
        finally:
            reader.close()
        with np.errstate(over="ignore", invalid="ignore"):  # what does not fit becomes an infinity, which `check_values` names
            return array.astype(dtype, copy=False)

    def source(self, parameter: Parameter) -> str:
        """Where a parameter comes from, for messages."""
        return str(self._directory / chunk_file(parameter))

    def identity(self) -> list[Any]:
        """What changes when a file changes."""
        return [hashlib.sha256(self._manifest.text()).hexdigest()]

    def check_unchanged(self) -> None:
        """Each file is opened, read and checked on its own in `read`."""

    def close(self) -> None:
        pass
