"""manifest.json: what a directory made by `convert` holds, with a SHA-256 of every file, and manifest.sha256 over itself.

Knows digests and sizes. Refuses to know what is in the files: no numpy, no jax.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from jaxpaged.checkpoint.files import CheckpointError, parse_json, sha256, shown

MANIFEST = "manifest.json"
MANIFEST_DIGEST = "manifest.sha256"  # in the format of sha256sum; written last, so that it marks a complete checkpoint
FORMAT_VERSION = 1
_MAX_BYTES = 2**26
Layout = Literal["orbax", "hf"]


@dataclass(frozen=True)
class File:
    """Size and digest of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Every file of the directory but the manifest's own two, and for an orbax directory every parameter.

    `tensors` maps a parameter to its file (a key of `files`), shape and dtype. `job` names the conversion that made it.
    """

    layout: Layout
    job: str
    version: str
    files: dict[str, File]
    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)

    def text(self) -> bytes:
        """The bytes of manifest.json."""
        tensors = {
            name: {**entry, "bytes": self.files[entry["file"]].bytes, "sha256": self.files[entry["file"]].sha256}
            for name, entry in self.tensors.items()
        }
        of_tensors = {entry["file"] for entry in self.tensors.values()}
        files = {name: vars(file) for name, file in sorted(self.files.items()) if name not in of_tensors}
        values = {"format": "jaxpaged", "format_version": FORMAT_VERSION, "jaxpaged_version": self.version, "layout": self.layout}
        return json.dumps({**values, "job": self.job, "files": files, "tensors": tensors}, indent=1).encode() + b"\n"

    def digest_text(self) -> bytes:
        """The bytes of manifest.sha256."""
        return _digest_line(self.text())


def _digest_line(text: bytes) -> bytes:
    return f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n".encode()


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a converted checkpoint, whole and unchanged.

    Raises:
      CheckpointError: it is missing, edited or of another format version.
    """
    texts = []
    for name in (MANIFEST, MANIFEST_DIGEST):
        try:
            status = os.lstat(directory / name)
            if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_BYTES:
                raise CheckpointError(f"{directory / name}: not a regular file of at most {_MAX_BYTES:,} bytes")
            texts.append((directory / name).read_bytes())
        except FileNotFoundError:
            way = "conversion was interrupted; rerun 'jaxpaged convert'"
            raise CheckpointError(f"{directory}: checkpoint is incomplete (no {name}): {way}") from None
        except OSError as error:
            raise CheckpointError(f"{directory / name}: cannot be read ({error.strerror})") from None
    text, digest = texts
    if digest != _digest_line(text):
        raise CheckpointError(f"{directory / MANIFEST}: does not have the digest in {MANIFEST_DIGEST}; convert again")
    return _parse(text, directory / MANIFEST)


def _parse(text: bytes, path: Path) -> Manifest:
    values = parse_json(text, str(path))
    if values.get("format") != "jaxpaged" or values.get("format_version") != FORMAT_VERSION:
        got = f"{shown(values.get('format'))} version {shown(values.get('format_version'))}"
        raise CheckpointError(f"{path}: format {got}, this release reads 'jaxpaged' version {FORMAT_VERSION}; convert again")
    try:
        files = {name: _file(name, entry) for name, entry in values["files"].items()}
        tensors = {}
        for name, entry in values["tensors"].items():
            files[entry["file"]] = _file(entry["file"], entry)
            tensors[name] = {"file": entry["file"], "shape": [int(n) for n in entry["shape"]], "dtype": str(entry["dtype"])}
        if values["layout"] not in ("orbax", "hf"):
            raise ValueError("layout")
        return Manifest(values["layout"], str(values["job"]), str(values["jaxpaged_version"]), files, tensors)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path}: {shown(str(error))}: missing or of the wrong kind; convert again") from None


def _file(name: str, entry: dict[str, Any]) -> File:
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or any(part in ("..", ".") for part in name.split("/")):
        raise ValueError(name)
    if not isinstance(entry["bytes"], int) or not re.fullmatch("[0-9a-f]{64}", entry["sha256"]):
        raise ValueError(name)
    return File(entry["bytes"], entry["sha256"])


def check_sizes(directory: Path, manifest: Manifest) -> None:
    """Every file of the manifest is there with its size, and no other is.

    Raises:
      CheckpointError: names the first that is not.
    """
    for problem in problems(directory, manifest, digests=()):
        raise CheckpointError(problem)


def check_digest(directory: Path, manifest: Manifest, name: str) -> None:
    """One file has its digest."""
    for problem in _digest_problems(directory, manifest, [name]):
        raise CheckpointError(problem)


def problems(directory: Path, manifest: Manifest, *, digests: Iterable[str]) -> Iterable[str]:
    """One line for every file that differs from the manifest; contents are compared for the files in `digests`."""
    present = _listing(directory)
    known = {**manifest.files, MANIFEST: None, MANIFEST_DIGEST: None}
    for name in sorted(known):
        expected = known[name]
        if name not in present:
            yield f"{directory / name}: missing; convert again"
        elif present[name] is None:
            yield f"{directory / name}: not a regular file"
        elif expected and present[name] != expected.bytes:
            yield f"{directory / name}: {present[name]:,} bytes, {MANIFEST} says {expected.bytes:,}; convert again"
    for name in unknown_files(directory, manifest):
        yield f"{directory / name}: not in {MANIFEST}; remove it, or convert again"
    sound = [name for name in digests if present.get(name) == manifest.files[name].bytes]
    yield from _digest_problems(directory, manifest, sound)


def unknown_files(directory: Path, manifest: Manifest) -> list[str]:
    """Names of the files that are there and that the manifest does not know."""
    return sorted(set(_listing(directory)) - {*manifest.files, MANIFEST, MANIFEST_DIGEST})


def _digest_problems(directory: Path, manifest: Manifest, names: Iterable[str]) -> Iterable[str]:
    for name in names:
        if sha256(directory / name) != manifest.files[name].sha256:
            yield f"{directory / name}: content differs from its digest in {MANIFEST}; convert again"


def _listing(directory: Path) -> dict[str, int | None]:
    """Size of every regular file below the directory, None for links, FIFOs and the like; links are not followed."""
    found: dict[str, int | None] = {}
    for folder, folders, names in os.walk(directory):
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        for name in names + links:
            status = os.lstat(os.path.join(folder, name))
            path = (Path(folder) / name).relative_to(directory).as_posix()
            found[path] = status.st_size if stat.S_ISREG(status.st_mode) else None
    return found
