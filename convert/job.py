"""One conversion: which files the result has, in which order they are written, and what makes two runs the same job.

Knows parameters and layouts. Refuses to know how a file reaches the disk (`disk`) and the target's place (`staging`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from convert.disk import Disk
from convert.staging import ResourceError, Staging, UsageError, check_replaceable, is_done, locked, recover
from jaxpaged.checkpoint import Checkpoint, CheckpointError, check_values, open_checkpoint, open_tensors
from jaxpaged.checkpoint import orbax as orbax_layout
from jaxpaged.checkpoint.files import BLOCK_BYTES, Reader, read_json, regular_file, sha256
from jaxpaged.checkpoint.hf import INDEX, SINGLE, HfTensors
from jaxpaged.checkpoint.manifest import FORMAT_VERSION, MANIFEST, MANIFEST_DIGEST, Layout, Manifest, problems, read_manifest
from jaxpaged.checkpoint.orbax import DTYPES, OrbaxTensors
from jaxpaged.checkpoint.safetensors import header
from jaxpaged.model.weights import Parameter, declare
from jaxpaged.version import __version__

# What travels with the weights, when it is there.
COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
    "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE",
)  # fmt: skip
MAX_SHARD_BYTES = 5 * 10**9  # as transformers: a file that any file system and proxy can carry


@dataclass(frozen=True)
class Result:
    """What a conversion did. `notes` are lines for the user."""

    target: Path
    tensors: int
    bytes: int
    was_done: bool
    notes: tuple[str, ...]


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    layout: Layout = "orbax",
    dtype: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    use_tqdm: bool = False,
    disk: Disk | None = None,
) -> Result:
    """Convert a checkpoint of either layout into `target`.

    The target is, at every moment, what it was before or the complete result. A run that was stopped is taken up by the next one
    of the same job. Memory holds one parameter, at most three copies of it.

    Args:
      dtype: of all parameters of the result; by default each keeps its own.

    Raises:
      CheckpointError: the source is damaged or not supported.
      UsageError: the target may not be written.
      ResourceError, OSError: space, permission, another converter at work.
    """
    disk, target = disk or Disk(), Path(os.path.abspath(target))
    _check_places(source, target)
    with locked(target, disk):
        notes = recover(target, disk)
        checkpoint = open_checkpoint(source, revision=revision)
        notes += checkpoint.warnings
        if checkpoint.config.quantization is not None:
            where = checkpoint.directory / "config.json"
            raise CheckpointError(f"{where}: quantization_config: a quantised checkpoint is not converted, it loads as it is")
        tensors = open_tensors(checkpoint)
        try:
            job = _Job(checkpoint, tensors, layout, dtype, allow_nonfinite, max_shard_bytes)
            if is_done(target, job.key):
                return Result(target, job.num_tensors, job.total_bytes, True, tuple(notes))
            check_replaceable(target, overwrite=overwrite)
            staging = Staging(target, job.key, disk)
            staging.open()
            _check_space(target.parent, job.total_bytes - sum(file.bytes for file in staging.files.values()))
            with tqdm(total=job.total_bytes, desc=target.name, unit="B", unit_scale=True, disable=not use_tqdm) as progress:
                try:
                    job.write(staging, progress)
                    tensors.check_unchanged()
                except CheckpointError:
                    staging.remove()  # the source must change, and with it the job: nothing here will be taken up
                    raise
        finally:
            tensors.close()
        staging.seal(job.manifest(staging))
        check_replaceable(target, overwrite=overwrite)  # again: hours may have passed
        staging.publish()
        staging.remove()
    notes = [note for note in notes if str(staging.path) not in note]
    return Result(target, job.num_tensors, job.total_bytes, False, tuple(notes))


def verify(directory: str | os.PathLike[str]) -> tuple[Manifest, list[str]]:
    """Read every byte of a converted checkpoint; the manifest, and one line for every file that differs from it.

    Raises:
      CheckpointError: there is no sound manifest to compare with.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    if not any(os.path.lexists(directory / name) for name in (MANIFEST, MANIFEST_DIGEST, orbax_layout.ITEM)):
        raise CheckpointError(f"{directory}: no {MANIFEST}: not made by convert, there are no digests to verify")
    manifest = read_manifest(directory)
    return manifest, list(problems(directory, manifest, digests=sorted(manifest.files)))


def _check_places(source: str | os.PathLike[str], target: Path) -> None:
    if not target.name:
        raise UsageError(f"{target}: cannot be the target")
    if not target.parent.is_dir():
        raise UsageError(f"{target.parent}: no such directory, and it would hold the target")
    if not os.path.isdir(source):
        return
    a, b = os.path.realpath(source), os.path.realpath(target)
    if a == b or a.startswith(b + os.sep) or b.startswith(a + os.sep):
        raise UsageError(f"{target}: source and target must be two separate directories")


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ResourceError(f"{folder}: not enough space: needs {needed:,} bytes, has {free:,}")


class _Job:
    """The files of one result. `key` is the same for two runs exactly if they would write the same bytes."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        tensors: HfTensors | OrbaxTensors,
        layout: Layout,
        dtype: str | None,
        allow_nonfinite: bool,
        max_shard_bytes: int,
    ):
        self._checkpoint, self._tensors, self._dtype = checkpoint, tensors, dtype
        self._layout: Layout = layout
        self._allow_nonfinite, self._max_shard_bytes = allow_nonfinite, max_shard_bytes
        self._parameters = declare(checkpoint.config)
        self._dtypes = {p.name: DTYPES[dtype] if dtype else tensors.dtype(p) for p in self._parameters}
        self._companions = [name for name in COMPANIONS if os.path.lexists(checkpoint.directory / name)]
        digests = [[name, sha256(regular_file(checkpoint.directory, name))] for name in self._companions]
        identity = [FORMAT_VERSION, layout, dtype, max_shard_bytes, tensors.identity(), digests]
        self.key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        self.num_tensors = len(self._parameters)
        self.total_bytes = sum(p.size * self._dtypes[p.name].itemsize for p in self._parameters)

    def write(self, staging: Staging, progress: tqdm) -> None:
        """Write every file that is not there yet."""
        for name in self._companions:
            if name not in staging.files:
                staging.write(name, self._companion(name))
        if self._layout == "orbax":
            self._write_orbax(staging, progress)
        else:
            self._write_hf(staging, progress)

    def manifest(self, staging: Staging) -> Manifest:
        """The manifest of the finished files."""
        entries: dict[str, dict] = {}
        if self._layout == "orbax":
            for parameter in self._parameters:
                dtype = self._dtypes[parameter.name].name
                shape = list(parameter.shape)
                entries[parameter.name] = {"file": orbax_layout.chunk_file(parameter), "shape": shape, "dtype": dtype}
        return Manifest(self._layout, self.key, __version__, dict(staging.files), entries)

    def _companion(self, name: str) -> Iterator[bytes]:
        directory = self._checkpoint.directory
        if name == "config.json" and self._dtype and self._dtype != self._checkpoint.config.dtype:
            values = read_json(directory, name)
            values["torch_dtype" if "torch_dtype" in values and "dtype" not in values else "dtype"] = self._dtype
            yield json.dumps(values, indent=2, ensure_ascii=False).encode() + b"\n"
            return
        reader = Reader(regular_file(directory, name))
        try:
            for start in range(0, reader.size, BLOCK_BYTES):
                yield reader.read(start, min(BLOCK_BYTES, reader.size - start))
            reader.check_unchanged()
        finally:
            reader.close()

    def _read(self, parameter: Parameter) -> np.ndarray:
        array = self._tensors.read(parameter, self._dtypes[parameter.name])
        if not self._allow_nonfinite:
            check_values(array, parameter, self._tensors.source(parameter))
        return array

    def _write_orbax(self, staging: Staging, progress: tqdm) -> None:
        for parameter in self._parameters:
            name, description = orbax_layout.chunk_file(parameter), orbax_layout.zarray_file(parameter)
            if description not in staging.files:
                staging.write(description, [orbax_layout.zarray(parameter, self._dtypes[parameter.name].name)])
            if name not in staging.files:
                staging.write(name, [_bytes_of(self._read(parameter))])
            progress.update(staging.files[name].bytes)
        for file, content in (
            ("_METADATA", orbax_layout.tree_metadata(self._parameters)),
            ("_CHECKPOINT_METADATA", orbax_layout.checkpoint_metadata()),
        ):
            if f"{orbax_layout.ITEM}/{file}" not in staging.files:
                staging.write(f"{orbax_layout.ITEM}/{file}", [content])

    def _write_hf(self, staging: Staging, progress: tqdm) -> None:
        shards = self._shards()
        weight_map = {}
        for index, parameters in enumerate(shards):
            name = SINGLE if len(shards) == 1 else f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
            weight_map.update({tensor: name for parameter in parameters for tensor, _ in parameter.parts})
            if name not in staging.files:
                staging.write(name, self._shard(parameters, progress))
            else:
                progress.update(sum(p.size * self._dtypes[p.name].itemsize for p in parameters))
        if len(shards) > 1 and INDEX not in staging.files:
            values = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            staging.write(INDEX, [json.dumps(values, indent=2).encode() + b"\n"])

    def _shards(self) -> list[list[Parameter]]:
        """The parameters in order, cut where the next one would exceed the size of a file."""
        shards: list[list[Parameter]] = [[]]
        size = 0
        for parameter in self._parameters:
            num_bytes = parameter.size * self._dtypes[parameter.name].itemsize
            if shards[-1] and size + num_bytes > self._max_shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(parameter)
            size += num_bytes
        return shards

    def _shard(self, parameters: list[Parameter], progress: tqdm) -> Iterator[bytes | memoryview]:
        yield header((name, self._dtypes[p.name], shape) for p in parameters for name, shape in p.parts)
        for parameter in parameters:
            for array in parameter.unpack(self._read(parameter)):
                yield _bytes_of(array)
                progress.update(array.nbytes)


def _bytes_of(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
