"""The command line of `python -m convert` and `jaxpaged convert`.

Knows flags, exit codes and how an error is shown. Refuses to import jax before there is something to convert.
"""

from __future__ import annotations

import argparse
import errno
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from convert.disk import Disk

EXIT_USAGE, EXIT_CHECKPOINT, EXIT_RESOURCES, EXIT_BUG, EXIT_INTERRUPTED = 2, 3, 4, 70, 130
_DTYPES = ("float32", "bfloat16", "float16")

_DESCRIPTION = """\
Convert a model checkpoint: Hugging Face safetensors -> orbax, and back.

The weights are streamed, so a model far larger than memory converts. DST is, at every moment, what it was before
or the complete result; after a kill, a crash or a full disk, run the same command again and it goes on."""

_EPILOG = """\
examples:
  jaxpaged convert meta-llama/Llama-3.2-1B out/              from the hub (or its cache) to orbax
  jaxpaged convert ./llama out/ --dtype bfloat16 --verify    cast, then read everything back
  jaxpaged convert --to-hf out/ ./llama-again                orbax to safetensors, bit for bit
  jaxpaged convert --verify out/                             recompute every digest

DST holds config.json, the tokenizer, manifest.json with a SHA-256 of every file, and weights/, which orbax opens:
  orbax.checkpoint.StandardCheckpointer().restore("/absolute/path/of/DST/weights")

exit codes: 0 done, 2 usage, 3 bad checkpoint, 4 space or permission, 130 interrupted"""


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program, description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source", metavar="SRC", help="a directory, or a hub id such as org/name; with --verify alone, what to verify"
    )
    parser.add_argument("target", metavar="DST", nargs="?", help="the directory to make; its parent must exist")
    parser.add_argument("--to-hf", action="store_true", help="write safetensors instead of orbax")
    parser.add_argument("--dtype", choices=_DTYPES, help="cast all parameters (default: as they are)")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it is a converted checkpoint")
    parser.add_argument("--allow-nonfinite", action="store_true", help="accept NaN, infinities and matrices of zeros")
    parser.add_argument("--verify", action="store_true", help="recompute the digest of every file of DST, or of SRC without DST")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def main(argv: Sequence[str] | None = None, *, program: str = "jaxpaged convert", disk: Disk | None = None) -> int:
    """Run one command; the exit code. Errors are one line on stderr, without a traceback unless the fault is ours."""
    parser = _parser(program)
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has printed the help or what is wrong
        return stop.code if isinstance(stop.code, int) else EXIT_USAGE
    if arguments.target is None and not arguments.verify:
        return _fail("DST: missing (where the result goes)", EXIT_USAGE)
    try:
        return _run(arguments, disk)
    except KeyboardInterrupt:
        return _fail("interrupted; run the same command again to go on", EXIT_INTERRUPTED)
    except MemoryError:
        return _fail("not enough memory for the largest parameter", EXIT_RESOURCES)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        hint = "; free some and run the same command again to go on" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        return _fail(f"{where}{error.strerror or error}{hint}", EXIT_RESOURCES)
    except Exception as error:
        code = _exit_code(error)
        if code == EXIT_BUG:
            raise
        return _fail(str(error), code)


def _run(arguments: argparse.Namespace, disk: Disk | None) -> int:
    from convert.job import convert, verify

    if arguments.target is not None:
        start = time.perf_counter()
        result = convert(
            arguments.source,
            arguments.target,
            layout="hf" if arguments.to_hf else "orbax",
            dtype=arguments.dtype,
            revision=arguments.revision,
            overwrite=arguments.overwrite,
            allow_nonfinite=arguments.allow_nonfinite,
            use_tqdm=not arguments.quiet,
            disk=disk,
        )
        for note in result.notes:
            print(f"jaxpaged: note: {note}", file=sys.stderr)
        how = "already converted" if result.was_done else f"converted in {time.perf_counter() - start:.1f} s"
        print(f"{result.target}: {result.tensors} parameters, {result.bytes:,} bytes, {how}")
    if not arguments.verify:
        return 0

    directory = arguments.source if arguments.target is None else arguments.target
    manifest, found = verify(directory)
    if not found:
        print(
            f"{directory}: {len(manifest.files)} files, {sum(f.bytes for f in manifest.files.values()):,} bytes, all as converted"
        )
        return 0
    if len(found) > 1:
        print(*found, sep="\n")
    return _fail(found[0] + (f" (and {len(found) - 1} more, listed above)" if len(found) > 1 else ""), EXIT_CHECKPOINT)


def _exit_code(error: Exception) -> int:
    from convert.staging import ResourceError, UsageError
    from jaxpaged.checkpoint import CheckpointError
    from jaxpaged.config import ConfigError

    codes = (
        (CheckpointError, EXIT_CHECKPOINT),
        (ConfigError, EXIT_CHECKPOINT),
        (UsageError, EXIT_USAGE),
        (ResourceError, EXIT_RESOURCES),
    )
    return next((code for kind, code in codes if isinstance(error, kind)), EXIT_BUG)


def _fail(message: str, code: int) -> int:
    print("jaxpaged: error: " + " ".join(message.split("\n")), file=sys.stderr)
    return code
