"""Paged attention and page writes on a CPU, in C++, called by XLA on its own threads.

XLA's CPU backend reads a page pool through a gather at a small part of what memory gives (see TRIED.md). The source beside this
file is compiled for the very machine at first use, with the compiler found there, and kept in the user's cache folder.
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
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bits import as_bits

if TYPE_CHECKING:
    from pallas_kernels.paged_decode_attention.dispatch import Arrays, Options

logger = logging.getLogger("pallas_kernels")

_SOURCE = Path(__file__).with_name("paged_attention.cc")
# Sums may be reordered for vector registers, and nothing else is loosened: infinities and NaN keep their meaning.
_MATH = ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math")
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", *_MATH)
# From the best for this machine to what every compiler takes.
_TUNINGS = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",), ())
_KINDS = {"float32": 0, "bfloat16": 1, "float16": 2, "float8_e4m3fn": 3, "int8": 4}  # of pages that `attend` reads


def unavailable(head_dim: int, page_dtype: str = "float32") -> str | None:
    """Why this backend cannot run here for such pages, or None when it can. Builds and registers it at the first call."""
    if page_dtype not in _KINDS:
        return f"pages of {page_dtype} are not among {', '.join(_KINDS)}"
    return _unavailable(head_dim)


@functools.cache
def _unavailable(head_dim: int) -> str | None:
    if jax.default_backend() != "cpu":
        return f"it runs on cpu, the default backend is {jax.default_backend()}"
    if head_dim % 16 or head_dim > 256:
        return f"head size {head_dim} is not a multiple of 16 up to 256"
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    try:
        library = ctypes.cdll.LoadLibrary(str(_build(compiler, head_dim)))
    except (OSError, RuntimeError) as error:
        return str(error)
    for name in ("PagedAttend", "WritePages"):
        jax.ffi.register_ffi_target(_target(name, head_dim), jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return None


def _target(name: str, head_dim: int) -> str:
    return f"pallas_kernels.{name}.{head_dim}"


def _build(compiler: str | None, head_dim: int) -> Path:
    """The shared library for this source, head size, jax, compiler and processor; compiled when it is not there yet.

    Raises:
      RuntimeError: there is no compiler, or it fails.
    """
    if compiler is None:
        raise RuntimeError("no C++ compiler was found (looked for c++, g++, clang++)")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    key = "\0".join((_SOURCE.read_text(), str(head_dim), jax.__version__, compiler, version, _processor(), *_FLAGS))
    folder = Path.home() / ".cache" / "pallas_kernels"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if hasattr(os, "getuid") and folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to another user")
    target = folder / f"native-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if target.exists():
        return target
    logger.info("Compiling the native attention backend for head size %d (once, a few seconds).", head_dim)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = Path(scratch) / "native.so"
        arguments = [*_FLAGS, f"-DHEAD_SIZE={head_dim}", f"-I{jax.ffi.include_dir()}", str(_SOURCE), "-o", str(built)]
        for tuning in _TUNINGS:
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


def attend(arrays: Arrays, options: Options) -> tuple[jax.Array, jax.Array]:
    """Causal attention of T consecutive queries per row, the first at `first_positions[b]`: [B, T, N, H] and LSE [B, T, N]."""
    q, k_pages, v_pages, block_tables, kv_lens, first_positions, sinks, k_scales, v_scales = arrays
    outputs = jax.ShapeDtypeStruct(q.shape, jnp.float32), jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)
    call = jax.ffi.ffi_call(_target("PagedAttend", q.shape[-1]), outputs)
    optional = (jnp.zeros(0) if x is None else x.astype(jnp.float32) for x in (sinks, k_scales, v_scales))
    out, lse = call(
        q.astype(jnp.float32),
        *(as_bits(k_pages), as_bits(v_pages), block_tables, kv_lens, first_positions),
        *optional,
        scale=np.float32(options.scale),
        soft_cap=np.float32(options.soft_cap),
        window=np.int64(options.window),
        kind=np.int64(_KINDS[k_pages.dtype.name]),
    )
    return out.astype(q.dtype), lse


def write_kv_pages(pages: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
    """See the contract in `pallas_kernels.write_kv_pages`."""
    bits = as_bits(pages)
    name = _target("WritePages", pages.shape[-1])
    call = jax.ffi.ffi_call(name, jax.ShapeDtypeStruct(bits.shape, bits.dtype), input_output_aliases={0: 0})
    return call(bits, as_bits(new.astype(pages.dtype)), slots.astype(jnp.int32)).view(pages.dtype)
