"""Bytes on disk <-> weights: find a checkpoint, read its configuration, load its parameters one at a time.

Knows two layouts, Hugging Face safetensors and the orbax directory that `convert` writes, and trusts neither. Refuses to know
engines and requests, and never executes code that a checkpoint names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from tqdm import tqdm

from jaxpaged.checkpoint.files import CheckpointError, read_json, shown
from jaxpaged.checkpoint.hf import HfTensors
from jaxpaged.checkpoint.manifest import MANIFEST, Manifest, check_digest, check_sizes, read_manifest
from jaxpaged.checkpoint.orbax import DTYPES, ITEM, OrbaxTensors
from jaxpaged.config import FLOAT_DTYPES, ConfigError, ModelConfig
from jaxpaged.model.weights import Parameter, Weights, build, declare

__all__ = ["Checkpoint", "CheckpointError", "check_values", "load", "open_checkpoint", "open_tensors", "read_config", "resolve"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Everything that is read from a checkpoint, and nothing that could be executed.
HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "merges.txt", "LICENSE*"]


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


# --- finding -----------------------------------------------------------------------------------------------------


def resolve(model: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """The local directory of a model: a path to one, or the hub id 'organisation/name' of one, downloaded when needed.

    A directory on disk wins over the hub. HF_HUB_OFFLINE, HF_HOME and the hub's cache are honoured by huggingface_hub.

    Raises:
      CheckpointError: it is neither, or the hub does not give it.
    """
    name = os.fspath(model)
    if not name or not name.isprintable():
        raise CheckpointError(f"{shown(name)}: not a usable path")
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return path
        exists = path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # longer than the system allows, a loop of links, a NUL byte
        raise CheckpointError(f"{shown(name)}: not a usable path ({getattr(error, 'strerror', None) or error})") from None
    if exists:
        raise CheckpointError(f"{name}: is a file, expected the directory that holds config.json")
    if not _HUB_ID.fullmatch(name):
        raise CheckpointError(f"{name}: no such directory (and not a hub id like 'organisation/name')")
    return _from_hub(name, revision)


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download  # 0.3 s that a local path need not pay
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    way = "pass the path of a local directory instead"
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_PATTERNS))
    except GatedRepoError:
        raise CheckpointError(f"{name}: access is restricted; accept its terms on the hub and log in, or {way}") from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{name}: no revision {revision!r} on the hub") from None
    except RepositoryNotFoundError:
        raise CheckpointError(f"{name}: no such directory, and no such model on the hub; {way}") from None
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{name}: no such directory, not in the hub's cache, and the hub cannot be reached; {way}"
        ) from None
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{name}: cannot be downloaded ({reason[:200]}); {way}") from None


# --- configuration -----------------------------------------------------------------------------------------------


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
    try:
        return (directory / ITEM).is_dir() or ((directory / MANIFEST).exists() and not any(directory.glob("*.safetensors")))
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


# --- weights -----------------------------------------------------------------------------------------------------


def open_tensors(checkpoint: Checkpoint, *, verify: bool = True) -> HfTensors | OrbaxTensors:
    """The parameters of a checkpoint, to be read one at a time. Close it."""
    if checkpoint.manifest is not None:
        return OrbaxTensors(checkpoint.directory, checkpoint.config, checkpoint.manifest, verify=verify)
    return HfTensors(checkpoint.directory, checkpoint.config)


def load(
    checkpoint: Checkpoint,
    dtype: str,
    *,
    allow_nonfinite: bool = False,
    verify: bool = True,
    use_tqdm: bool = False,
    place: Callable[[Parameter, np.ndarray], jax.Array] | None = None,
) -> Weights:
    """All parameters at `dtype`, or an error: never a part.

    Parameters are read one after the other; beside the weights themselves, memory holds at most two copies of one parameter.

    Args:
      allow_nonfinite: accept NaN, infinities and matrices of zeros.
      verify: compare the bytes of an orbax directory with their digests.
      place: puts one parameter on its devices; by default on jax's default device.

    Raises:
      CheckpointError: a file is damaged or changes, or its tensors are not those of the model.
    """
    if dtype not in FLOAT_DTYPES:
        raise ConfigError(f"dtype: got {dtype!r}, supported are {', '.join(FLOAT_DTYPES)}")
    place = place or (lambda _, array: jax.device_put(array))
    tensors = open_tensors(checkpoint, verify=verify)
    total = sum(parameter.size for parameter in declare(checkpoint.config)) * DTYPES[dtype].itemsize
    progress = tqdm(total=total, desc="Loading weights", unit="B", unit_scale=True, disable=not use_tqdm)

    def leaf(parameter: Parameter) -> jax.Array:
        array = tensors.read(parameter, DTYPES[dtype])
        if not allow_nonfinite:
            check_values(array, parameter, tensors.source(parameter))
        progress.update(array.nbytes)
        return place(parameter, array)

    try:
        weights = build(checkpoint.config, leaf)
        tensors.check_unchanged()
        return jax.block_until_ready(weights)
    finally:
        progress.close()
        tensors.close()


_EXPONENT = {
    "float32": (np.uint32, 0x7FFFFFFF, 0x7F800000),
    "bfloat16": (np.uint16, 0x7FFF, 0x7F80),
    "float16": (np.uint16, 0x7FFF, 0x7C00),
}
_BLOCK = 2**20  # elements looked at once: 2-4 MB stay in the cache


def check_values(array: np.ndarray, parameter: Parameter, source: str) -> None:
    """Refuse NaN, infinities, and weights that are all zero: the marks of a file that was not written to its end.

    Raises:
      CheckpointError: names the file, what was found and how to go on.
    """
    bits, magnitude, infinity = _EXPONENT[array.dtype.name]
    flat, largest = array.reshape(-1).view(bits), 0
    for start in range(0, flat.size, _BLOCK):
        # Without the sign, the order of the bit patterns is the order of the numbers, and NaN is above infinity.
        largest = max(largest, int((flat[start : start + _BLOCK] & magnitude).max()))
        if largest >= infinity:
            problem = "NaN" if largest > infinity else f"an infinity at {array.dtype.name}"
            raise CheckpointError(f"{source}: holds {problem}; --allow-nonfinite loads it all the same")
    if largest == 0 and parameter.init != "zeros":
        raise CheckpointError(f"{source}: all zero; --allow-nonfinite loads it all the same")
