"""Plant a bug in a kernel's source and get the module that it makes, so that tests can show which rung of the ladder sees it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType


@contextmanager
def planted(name: str, old: str, new: str) -> Iterator[ModuleType]:
    """The module of that name with `old` replaced by `new` in its source, in place of the healthy one while the block runs.

    `old` must stand in the source exactly once: when a line is rewritten, its bug has to be planted anew.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise LookupError(f"{name}: no such module")
    source = Path(spec.origin).read_text()
    if source.count(old) != 1:
        raise LookupError(f"{name}: the text of this bug stands {source.count(old)} times in the source; plant it anew: {old!r}")
    module = importlib.util.module_from_spec(spec)
    parent, _, leaf = name.rpartition(".")
    healthy = importlib.import_module(name)
    exec(compile(source.replace(old, new), spec.origin, "exec"), module.__dict__)
    sys.modules[name] = module
    setattr(sys.modules[parent], leaf, module)
    try:
        yield module
    finally:
        sys.modules[name] = healthy
        setattr(sys.modules[parent], leaf, healthy)
