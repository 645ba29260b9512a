"""Traces of the device and the host, written by jax's profiler: one at a time in a process. Knows folders."""

from __future__ import annotations

import threading
from pathlib import Path

import jax

from jaxpaged.errors import ConfigError

_lock = threading.Lock()
_folder: Path | None = None


def start(directory: str | Path) -> Path:
    """Begin a trace in a folder, which is made. For TensorBoard's profiler or xprof.

    Raises:
      ConfigError: one runs already, or the folder cannot be written.
    """
    global _folder
    folder = Path(directory).expanduser()
    with _lock:
        if _folder is not None:
            raise ConfigError(f"start_profile: a trace into {_folder} runs already")
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            jax.profiler.start_trace(str(folder))
        except (OSError, RuntimeError) as error:
            why = error.strerror if isinstance(error, OSError) else "the profiler runs already"
            raise ConfigError(f"start_profile: {folder}: {why}") from None
        _folder = folder
    return folder


def stop() -> Path:
    """End the trace and write it: its folder.

    Raises:
      ConfigError: none runs.
    """
    global _folder
    with _lock:
        if _folder is None:
            raise ConfigError("stop_profile: no trace runs")
        folder, _folder = _folder, None
        jax.profiler.stop_trace()
    return folder
