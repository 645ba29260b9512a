"""Random damage to every file of a checkpoint: a converted one never loads silently; of a plain one, what can be known is said.

A plain safetensors file has no digest: a flipped bit of a number is another number. One test states that limit, so that nobody
believes more than is true. `jaxpaged convert` is the way to digests.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
from checkpoints import write_model

from convert.job import convert, verify
from jaxpaged.checkpoint import CheckpointError, load, open_checkpoint, safetensors
from jaxpaged.model.weights import to_hf

KINDS = ("flip", "set", "truncate", "append", "insert", "remove", "zero")


def mutate(content: bytes, kind: str, rng: random.Random) -> bytes | None:
    """Other bytes than before; None for a file that is gone."""
    at = rng.randrange(len(content))
    if kind == "flip":
        return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
    if kind == "set":
        return content[:at] + bytes([(content[at] + rng.randrange(1, 256)) % 256]) + content[at + 1 :]
    if kind == "truncate":
        return content[:at]
    if kind == "append":
        return content + rng.randbytes(rng.randrange(1, 64))
    if kind == "insert":
        return content[:at] + rng.randbytes(rng.randrange(1, 8)) + content[at:]
    if kind == "zero":  # a page that never reached the disk: the size is right
        zeroed = content[:at] + b"\0" * len(content[at:])
        return zeroed if zeroed != content else None
    return None


def apply(path: Path, content: bytes, kind: str, rng: random.Random) -> None:
    mutated = mutate(content, kind, rng)
    if mutated is None:
        path.unlink()
    else:
        assert mutated != content
        path.write_bytes(mutated)


def restore(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def host(_: object, array: np.ndarray) -> np.ndarray:
    return array


def test_500_mutations_of_a_converted_checkpoint(tmp_path: Path):
    """Every one is refused by loading, and by `--verify`, with the name of the file."""
    write_model(tmp_path / "hf", "llama-biases", num_hidden_layers=1)
    convert(tmp_path / "hf", tmp_path / "m")
    files = sorted(path for path in (tmp_path / "m").rglob("*") if path.is_file())
    rng = random.Random(0)
    silent: list[str] = []
    seen: Counter[str] = Counter()
    for index in range(500):
        path = files[index % len(files)]
        kind, content = rng.choice(KINDS), path.read_bytes()
        apply(path, content, kind, rng)
        where = str(path.relative_to(tmp_path / "m"))
        seen[kind] += 1
        try:
            load(open_checkpoint(tmp_path / "m"), "bfloat16", place=host)  # type: ignore[arg-type]
            silent.append(f"{index}: load: {kind} {where}")
        except CheckpointError as error:
            if path.name not in str(error) and path.name != "manifest.sha256":
                silent.append(f"{index}: {kind} {where} is not named: {error}")
        try:
            problems = verify(tmp_path / "m")[1]
        except CheckpointError as error:
            problems = [str(error)]
        if len(problems) != 1:
            silent.append(f"{index}: verify: {kind} {where}: {problems}")
        restore(path, content)
    print(f"{len(files)} files, {dict(seen)}")
    assert silent == [] and len(seen) == len(KINDS)
    load(open_checkpoint(tmp_path / "m"), "bfloat16", place=host)  # type: ignore[arg-type]


def test_every_single_bit_of_the_small_files(tmp_path: Path):
    """All bits of a manifest's digest and of the shortest files, all bytes of the rest of the text."""
    write_model(tmp_path / "hf", num_hidden_layers=1)
    convert(tmp_path / "hf", tmp_path / "m")
    for name in ("manifest.sha256", "chat_template.jinja", "generation_config.json"):
        path = tmp_path / "m" / name
        content = path.read_bytes()
        for bit in range(8 * len(content)):
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            try:
                open_checkpoint(tmp_path / "m")
            except CheckpointError:
                continue
            raise AssertionError(f"{name}: bit {bit} is not noticed")
        path.write_bytes(content)


def weights_of(directory: Path) -> dict[str, bytes]:
    checkpoint = open_checkpoint(directory)
    weights = load(checkpoint, "bfloat16", place=host)  # type: ignore[arg-type]
    return {name: array.tobytes() for name, array in to_hf(weights, checkpoint.config)}


def test_plain_files_that_change_their_length_are_refused(tmp_path: Path):
    """Truncated, appended to, or gone: of the weights, of the index and of config.json, always noticed."""
    write_model(tmp_path / "m", shards=2)
    names = [*sorted(path.name for path in (tmp_path / "m").glob("model*")), "config.json"]
    rng = random.Random(1)
    for index in range(200):
        path = tmp_path / "m" / names[index % len(names)]
        kind, content = rng.choice(("truncate", "append", "remove")), path.read_bytes()
        apply(path, content, kind, rng)
        try:
            weights_of(tmp_path / "m")
        except CheckpointError:
            restore(path, content)
            continue
        raise AssertionError(f"{index}: {kind} {path.name} is not noticed")


def test_a_damaged_header_is_refused_or_changes_nothing(tmp_path: Path):
    """No flip in a header loads other weights. What loads was a flip in a comment, or a blank that is another blank."""
    write_model(tmp_path / "m")
    sound, path = weights_of(tmp_path / "m"), tmp_path / "m" / "model.safetensors"
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    rng = random.Random(2)
    loaded = 0
    for _ in range(300):
        at = rng.randrange(header)
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :])
        try:
            assert weights_of(tmp_path / "m") == sound
            loaded += 1
        except CheckpointError as error:
            assert "\n" not in str(error)
    print(f"{loaded} of 300 changed nothing that is read")
    assert loaded < 30


def test_the_limit_a_flipped_number_of_a_plain_file_is_not_noticed(tmp_path: Path):
    """It changes that one tensor and no other; only NaN and infinities are refused. After conversion, all of it is refused."""
    write_model(tmp_path / "m")
    sound, path = weights_of(tmp_path / "m"), tmp_path / "m" / "model.safetensors"
    content = path.read_bytes()
    file = safetensors.SafetensorsFile(path)
    file.close()
    rng = random.Random(3)
    silent = 0
    for _ in range(100):
        tensor = rng.choice(list(file.tensors.values()))
        at = rng.randrange(tensor.begin, tensor.end)
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :])
        try:
            found = weights_of(tmp_path / "m")
        except CheckpointError as error:
            assert tensor.name in str(error)
            continue
        silent += 1
        assert [name for name in sound if found[name] != sound[name]] == [tensor.name]
    print(f"{silent} of 100 flips in plain tensor data load silently")
    assert silent


def test_a_damaged_configuration_never_breaks_out(tmp_path: Path):
    """A flipped byte of plain JSON may be another sound value, which nothing can know; it is never another kind of exception."""
    write_model(tmp_path / "m", shards=2)
    rng = random.Random(4)
    refused = Counter[str]()
    for index in range(300):
        name = ("config.json", "generation_config.json", "model.safetensors.index.json")[index % 3]
        path = tmp_path / "m" / name
        content = path.read_bytes()
        apply(path, content, rng.choice(("flip", "set", "insert")), rng)
        try:
            weights_of(tmp_path / "m")
        except CheckpointError as error:
            assert "\n" not in str(error) and str(error).isprintable()
            refused[name] += 1
        restore(path, content)
    print(dict(refused))
    assert refused["model.safetensors.index.json"] > 80


def test_a_shard_that_is_another_download(tmp_path: Path):
    """One shard of another revision with the same names and shapes is sound by itself: only a manifest can tell."""
    write_model(tmp_path / "a", shards=2)
    write_model(tmp_path / "b", shards=2, seed=1)
    convert(tmp_path / "a", tmp_path / "out", layout="hf")
    shutil.copy(tmp_path / "b" / "config.json", tmp_path / "out" / "config.json")
    assert verify(tmp_path / "out")[1] == []  # equal bytes
    write_model(tmp_path / "c", seed=2)
    shutil.copy(tmp_path / "c" / "model.safetensors", tmp_path / "out" / "model.safetensors")
    (problem,) = verify(tmp_path / "out")[1]
    assert "model.safetensors: content differs from its digest" in problem
