"""A recording in a file: gzip of a line that says what it is, a line of JSON, and the frames of a flight recorder.

Knows the file. Refuses to know the scheduler: see `replay`.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxpaged.observe.records import Frame, Kind, RecordingError, frames, unwords

MAGIC = b"jaxpaged recording 1\n"


@dataclass(frozen=True)
class Segment:
    """Where a part of the ring began, and what was live there.

    `state` is what `state.dump` wrote, empty where the recorder began (`is_beginning`) or could not write it down.
    """

    is_beginning: bool
    num_steps: int
    rows: list[dict[str, Any]]  # the fields of an `Admission` each
    state: bytes

    @classmethod
    def unpack(cls, payload: bytes) -> Segment:
        """From a frame."""
        count = unwords(payload[:4])[0]
        return cls(**json.loads(payload[4 : 4 + count]), state=payload[4 + count :])


@dataclass(frozen=True)
class Recording:
    """What a file holds.

    `header` has limits, num_pages, page_size, pool, prefix_cache, policy (None is a function of somebody's own), ageing_steps,
    options, jaxpaged (the version), byteorder, num_dropped_bytes and why_blind, a reason when later parts cannot be replayed.
    """

    path: str
    header: dict[str, Any]
    frames: list[Frame]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recording:
        """Read a file.

        Raises:
          RecordingError: it is not there, no recording, damaged, or of a machine whose numbers are the other way round.
        """
        header, body = _read(Path(path))
        found = list(frames(body, str(path)))
        try:
            for frame in found:
                if frame.kind is Kind.SEGMENT:
                    Segment.unpack(frame.payload)
        except (ValueError, TypeError, IndexError):
            raise RecordingError(f"{path}: damaged: a segment of the ring has no head") from None
        return cls(str(path), header, found)

    @property
    def num_steps(self) -> int:
        """Plans that it holds."""
        return sum(frame.kind is Kind.PLAN for frame in self.frames)

    def segments(self) -> Iterator[tuple[int, Segment]]:
        """The place in `frames` and the head of each part of the ring."""
        for at, frame in enumerate(self.frames):
            if frame.kind is Kind.SEGMENT:
                yield at, Segment.unpack(frame.payload)


def write(path: Path, header: dict[str, Any], body: bytes) -> None:
    """Write a file that is whole or not there; for its owner alone, since it holds what people asked."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with (
            open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file,
            gzip.GzipFile(fileobj=file, mode="wb", compresslevel=1, mtime=0, filename="") as packed,
        ):
            packed.write(MAGIC + json.dumps({"byteorder": sys.byteorder, **header}, default=repr).encode() + b"\n")
            packed.write(body)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path) -> tuple[dict[str, Any], bytes]:
    try:
        packed = path.read_bytes()
    except OSError as error:
        raise RecordingError(f"{path}: {error.strerror}") from None
    if not packed.startswith(b"\x1f\x8b"):
        raise RecordingError(f"{path}: not a recording of jaxpaged")
    try:
        with gzip.open(io.BytesIO(packed)) as file:
            text = file.read()  # to the end, where the checksum is
    except (OSError, EOFError, zlib.error) as error:
        raise RecordingError(f"{path}: damaged: {error}") from None
    if not text.startswith(MAGIC):
        raise RecordingError(f"{path}: not a recording of jaxpaged, or of another version of the format")
    line, _, body = text[len(MAGIC) :].partition(b"\n")
    try:
        header = json.loads(line)
    except ValueError:
        raise RecordingError(f"{path}: damaged: the header is no JSON") from None
    if not isinstance(header, dict) or header.get("byteorder") != sys.byteorder:
        raise RecordingError(f"{path}: recorded on a machine of the other byte order, this one is {sys.byteorder}-endian")
    return header, body
