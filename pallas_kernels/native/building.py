"""The C++ sources beside this file as libraries of XLA's: compiled for the very machine at first use, and kept.

Knows compilers and folders. Refuses to know what the sources compute.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

logger = logging.getLogger("pallas_kernels")

# Nothing but errno, traps and the sign of a zero is loosened: infinities and NaN keep their meaning.
MATH = ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros")
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared")
# From the best for this machine to what every compiler takes.
TUNINGS = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",), ())


def register(source: Path, handlers: Mapping[str, str], flags: Sequence[str], purpose: str) -> str | None:
    """Compile a source where that was not done yet, and tell XLA's CPU backend of its handlers: symbol -> name of the target.

    Returns why that cannot be, or None.
    """
    if jax.default_backend() != "cpu":
        return f"it runs on cpu, the default backend is {jax.default_backend()}"
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    try:
        library = ctypes.cdll.LoadLibrary(str(_build(compiler, source, flags, purpose)))
    except (OSError, RuntimeError) as error:
        return str(error)
    for symbol, target in handlers.items():
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")
    return None


def _build(compiler: str | None, source: Path, flags: Sequence[str], purpose: str) -> Path:
    """The shared library for this source, its headers and flags, jax, compiler and processor; compiled when it is not there yet.

    Raises:
      RuntimeError: there is no compiler, or it fails.
    """
    if compiler is None:
        raise RuntimeError("no C++ compiler was found (looked for c++, g++, clang++)")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    texts = [path.read_text() for path in (source, *sorted(source.parent.glob("*.h")))]
    key = "\0".join((*texts, jax.__version__, compiler, version, _processor(), *_FLAGS, *flags))
    folder = Path.home() / ".cache" / "pallas_kernels"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if hasattr(os, "getuid") and folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to another user")
    target = folder / f"native-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if target.exists():
        return target
    logger.info("Compiling the native %s (once, a few seconds).", purpose)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = Path(scratch) / "native.so"
        arguments = [*_FLAGS, *flags, f"-I{jax.ffi.include_dir()}", str(source), "-o", str(built)]
        for tuning in TUNINGS:
            result = subprocess.run([compiler, *tuning, *arguments], capture_output=True, text=True, check=False)
            if result.returncode == 0:
                os.replace(built, target)  # whole or not at all, should two processes build at once
                return target
    raise RuntimeError(f"{compiler} failed: {(result.stderr.strip().splitlines() or ['no message'])[0]}")


def _processor() -> str:
    """What tells this processor's instruction set from another's, for machines that share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
