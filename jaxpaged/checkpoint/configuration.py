"""Everything of a checkpoint but its weights: layout, configuration, defaults for generation.

Knows config.json and generation_config.json. Refuses to open a file of weights.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jaxpaged.checkpoint.files import CheckpointError, read_json
from jaxpaged.checkpoint.find import resolve
from jaxpaged.checkpoint.manifest import MANIFEST, MANIFEST_DIGEST, Manifest, check_digest, check_sizes, read_manifest
from jaxpaged.checkpoint.orbax import ITEM
from jaxpaged.config import ConfigError, ModelConfig


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose small files have been read and found sound; the weights have not been touched.

    `config.eos_token_ids` are those of generation_config.json where it names any, else those of config.json.
    `generation_defaults` is the object in generation_config.json, empty without that file.
    """

    directory: Path
    kind: Literal["hf", "orbax"]
    config: ModelConfig
    generation_defaults: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    manifest: Manifest | None = None


def open_checkpoint(model: str | os.PathLike[str], *, revision: str | None = None) -> Checkpoint:
    """Find a checkpoint and read everything but its weights.

    An orbax directory is compared with its manifest: every file by size, all but the weights by digest.

    Raises:
      CheckpointError: something is missing, damaged or not supported.
    """
    directory = resolve(model, revision=revision)
    manifest = None
    if _is_orbax(directory):
        manifest = read_manifest(directory)
        if manifest.layout != "orbax":
            raise CheckpointError(f"{directory / MANIFEST}: describes safetensors files, and there are none")
        check_sizes(directory, manifest)
        of_tensors = {entry["file"] for entry in manifest.tensors.values()}
        for name in sorted(set(manifest.files) - of_tensors):
            check_digest(directory, manifest, name)

    config, generation, warnings = _read_configs(directory)
    return Checkpoint(directory, "orbax" if manifest else "hf", config, generation, warnings, manifest)


def read_config(directory: str | os.PathLike[str]) -> ModelConfig:
    """The model configuration of a local directory, with the end-of-sequence tokens of generation_config.json.

    Raises:
      CheckpointError: a file is missing or not strict JSON, or a field is not supported.
    """
    return _read_configs(Path(directory))[0]


def _is_orbax(directory: Path) -> bool:
    """Whether `convert` made it. One mark suffices: what lost the others is a damaged orbax directory, not another kind."""
    marks = [directory / ITEM / "_METADATA", directory / ITEM / "_CHECKPOINT_METADATA"]
    manifests = [directory / MANIFEST, directory / MANIFEST_DIGEST]
    try:
        if any(mark.exists() for mark in marks):
            return True
        return any(mark.exists() for mark in manifests) and not any(directory.glob("*.safetensors"))
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read ({error.strerror})") from None


def _read_configs(directory: Path) -> tuple[ModelConfig, dict[str, Any], tuple[str, ...]]:
    values = read_json(directory, "config.json")
    path, generation_path = directory / "config.json", directory / "generation_config.json"
    try:
        config = ModelConfig.from_hf(values, str(path))
    except ConfigError as error:
        hint = "; custom code (auto_map) is not supported" if "auto_map" in values and "model_type" in str(error) else ""
        raise CheckpointError(f"{error}{hint}") from None
    if not generation_path.exists() and not generation_path.is_symlink():
        return config, {}, ()

    generation = read_json(directory, "generation_config.json")
    if generation.get("eos_token_id") is None:
        return config, generation, ()
    try:
        merged = ModelConfig.from_hf({**values, "eos_token_id": generation["eos_token_id"]}, str(generation_path))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    ignored = sorted(set(config.eos_token_ids) - set(merged.eos_token_ids))
    text = f"{path}: eos_token_id {ignored} is not used: generation_config.json says {list(merged.eos_token_ids)}"
    return merged, generation, (text,) if ignored else ()
