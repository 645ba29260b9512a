"""Paged attention and page writes on a CPU, in C++, called by XLA on its own threads.

XLA's CPU backend reads a page pool through a gather at a small part of what memory gives (see TRIED.md). The source beside this file
is compiled for the very machine at first use, with the compiler found there, and kept in the user's cache folder.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bits import as_bits

logger = logging.getLogger("pallas_kernels")

_SOURCE = Path(__file__).with_name("paged_attention.cc")
# Sums may be reordered for vector registers, and nothing else is loosened: infinities and NaN keep their meaning.
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math")
# From the best for this machine to what every compiler takes.
_TUNINGS = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",), ())
_KINDS = {"bfloat16": 1, "float16": 2}


@functools.cache
def unavailable() -> str | None:
    """Why the native backend cannot run here, or None when it can. Builds and registers it at the first call."""
    if jax.default_backend() != "cpu":
        return f"it runs on cpu, the default backend is {jax.default_backend()}"
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    try:
        library = ctypes.cdll.LoadLibrary(str(_build(compiler)))
    except (OSError, RuntimeError) as error:
        return str(error)
    for name in ("JaxpagedAttend", "JaxpagedWrite"):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return None


def _build(compiler: str | None) -> Path:
    """The shared library for this source, jax, compiler and processor; compiled when it is not there yet.

    Raises:
      RuntimeError: there is no compiler, or it fails.
    """
    if compiler is None:
        raise RuntimeError("no C++ compiler was found (looked for c++, g++, clang++)")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    processor = _processor()
    key = "\0".join((_SOURCE.read_text(), jax.__version__, compiler, version, processor, *_FLAGS))
    folder = Path.home() / ".cache" / "pallas_kernels"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if hasattr(os, "getuid") and folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to another user")
    target = folder / f"native-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = Path(scratch) / "native.so"
        for tuning in _TUNINGS:
            command = [compiler, *_FLAGS, *tuning, f"-I{jax.ffi.include_dir()}", str(_SOURCE), "-o", str(built)]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
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


def attend_at(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_tables: jax.Array,
    kv_lens: jax.Array,
    first_positions: jax.Array,
    *,
    scale: float,
    window: int,
) -> jax.Array:
    """Causal attention of T consecutive queries per row, the first at `first_positions[b]`; both operations are this one."""
    call = jax.ffi.ffi_call("JaxpagedAttend", jax.ShapeDtypeStruct(q.shape, q.dtype))
    pages = as_bits(k_pages), as_bits(v_pages)
    kind = np.int64(_KINDS.get(k_pages.dtype.name, 0))
    return call(
        q, *pages, block_tables, kv_lens, first_positions, scale=np.float32(scale), window=np.int64(window), kind=kind
    )


def paged_decode_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_tables: jax.Array,
    kv_lens: jax.Array,
    *,
    scale: float,
    window: int,
) -> jax.Array:
    """See the contract in `pallas_kernels.paged_decode_attention`."""
    return attend_at(q, k_pages, v_pages, block_tables, kv_lens, kv_lens - q.shape[1], scale=scale, window=window)


def write_kv_pages(pages: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
    """See the contract in `pallas_kernels.write_kv_pages`."""
    bits = as_bits(pages)
    call = jax.ffi.ffi_call("JaxpagedWrite", jax.ShapeDtypeStruct(bits.shape, bits.dtype), input_output_aliases={0: 0})
    return call(bits, as_bits(new.astype(pages.dtype)), slots.astype(jnp.int32)).view(pages.dtype)
