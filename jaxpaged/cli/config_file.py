"""Options from a YAML file: `--config FILE.yaml`, or the name of one that comes along.

The keys are the options' names, with _ or -. Knows YAML. Refuses to know what the options mean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxpaged.cli.options import UsageError, converter
from jaxpaged.config import nearest

FOLDER = Path(__file__).parent / "configs"
MAX_BYTES = 64 << 10


def shipped() -> list[str]:
    """The names of the files that come along."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read(name: str, kinds: Sequence[type]) -> dict[str, Any]:
    """The options of a file by name: fields of these dataclasses, whose values the dataclasses check.

    A text where a number is meant is read as a flag's: 4k is 4000. What is null is not set.

    Raises:
      UsageError: the file cannot be read, or has a key that is no option.
    """
    path = _found(name)
    fields = {field.name: str(field.type).removesuffix(" | None") for kind in kinds for field in dataclasses.fields(kind)}
    found: dict[str, Any] = {}
    for key, value in _mapping(path).items():
        option = key.replace("-", "_") if isinstance(key, str) else key
        if option not in fields:
            raise UsageError(f"config: {path}: unknown option {str(key)[:64]!r}{nearest(str(option), list(fields))}")
        if option in found:
            raise UsageError(f"config: {path}: {key}: given twice")
        if value is not None:
            found[option] = _value(path, key, value, fields[option])
    return found


def _found(name: str) -> Path:
    if Path(name).suffix in (".yaml", ".yml") or Path(name).is_file():
        return Path(name)
    if name not in shipped():
        hint = nearest(name, shipped())
        raise UsageError(f"config: got {name[:200]!r}, expected a .yaml file or one of {', '.join(shipped())}{hint}")
    return FOLDER / f"{name}.yaml"


def _value(path: Path, key: str, value: Any, annotation: str) -> Any:
    if isinstance(value, str):
        try:
            return converter(annotation)(value)
        except Exception as error:  # argparse's, whose text says what was expected
            raise UsageError(f"config: {path}: {key}: {error}") from None
    return _as_tuple(value)


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def _mapping(path: Path) -> dict[Any, Any]:
    try:
        import yaml
    except ImportError:
        raise UsageError("config: pyyaml is not installed: pip install 'jaxpaged[serve]'") from None

    class Loader(yaml.SafeLoader):
        """Plain values alone: no tags, and no aliases, with which a small file becomes a large one."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.events.AliasEvent):
                raise yaml.YAMLError("aliases are not read")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [one.value for one, _ in node.value]
            twice = next((one for one in names if names.count(one) > 1), None)
            if twice is not None:
                raise yaml.YAMLError(f"{str(twice)[:64]}: given twice")
            return super().construct_mapping(node, deep)

    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise UsageError(f"config: {path}: more than {MAX_BYTES:,} bytes")
        found = yaml.load(raw, Loader)  # a SafeLoader
    except OSError as error:
        raise UsageError(f"config: {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise UsageError(f"config: {path}: {' '.join(str(error).split())[:200] or 'nested too deep'}") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise UsageError(f"config: {path}: expected options and their values")
    return found
