"""`jaxpaged bench all`: the tables of how this engine behaves on this machine, as one report."""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path

from jaxpaged.cli.options import Parser, UsageError, add_verbose, set_up_logging, whole_number
from jaxpaged.config import nearest
from jaxpaged.version import __version__

DESCRIPTION = """\
Measure this engine on this machine, and write one report: throughput by length, static against continuous batching, sizes of
pages and steps, a shared prefix, what paging and compiling do, and how the time of a step grows, beside its floor. Sides of a
table run in turn; medians are reported. Workloads are the same in each run."""
EPILOG = """\
examples:
  jaxpaged bench all --out report --quick             minutes, on the bundled model
  jaxpaged bench all --out report --model 135M --dtype bfloat16
  jaxpaged bench all --out report --tables growth_pool,paging

It writes report.md, report.html and results.json, and figures where matplotlib is there: pip install 'jaxpaged[bench]'.
The growth tables use random weights of a small shape with a long context where no --model is given."""


def add_arguments(parser: Parser) -> None:
    """The flags of this command."""
    parser.add_argument("--out", metavar="DIR", help="the folder to write to")
    parser.add_argument("--tables", metavar="NAME,NAME", help="these alone (default: all)")
    parser.add_argument("--quick", action="store_true", help="smaller workloads, fewer points")
    parser.add_argument("--tiny", action="store_true", help="seconds: whether it works, not how quick it is")
    parser.add_argument("--rounds", type=whole_number, metavar="N", help="turns of each side (default: 5, with --quick 3)")
    parser.add_argument("--model", help="a directory or hub id, or 135M, 0.6B, long: random weights (default: the bundled model)")
    parser.add_argument("--dtype", default="float32", help="of weights and activations (default: float32)")
    add_verbose(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure and write; the exit code."""
    if arguments.out is None:
        raise UsageError("--out: missing: the folder to write to (see 'jaxpaged bench all --help')")
    if arguments.quick and arguments.tiny:
        raise UsageError("--quick: not with --tiny")
    if arguments.rounds is not None and arguments.rounds < 1:
        raise UsageError(f"--rounds: got {arguments.rounds}, expected at least 1")
    set_up_logging(arguments)
    import jax

    from jaxpaged.bench import report
    from jaxpaged.bench.tables import TABLES
    from jaxpaged.bench.tables.measuring import Settings

    names = arguments.tables.split(",") if arguments.tables else list(TABLES)
    for name in names:
        if name not in TABLES:
            raise UsageError(f"--tables: unknown table {name!r}{nearest(name, list(TABLES))} (of: {', '.join(TABLES)})")
    scale = "tiny" if arguments.tiny else "quick" if arguments.quick else "full"
    rounds = arguments.rounds or {"full": 5, "quick": 3, "tiny": 1}[scale]
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)  # before minutes are spent
    if not report.has_matplotlib():
        print("jaxpaged: no figures: matplotlib is not installed (pip install 'jaxpaged[bench]')", file=sys.stderr)
    found = report.measure(names, Settings(arguments.model, arguments.dtype, scale, rounds), on_end=_say)
    about = {"model": arguments.model or "bundled", "dtype": arguments.dtype, "scale": scale, "rounds": rounds}
    about |= {"device": jax.devices()[0].device_kind, "jaxpaged": __version__, "jax": jax.__version__}
    about |= {"machine": f"{platform.system()} {platform.machine()}", "python": platform.python_version()}
    for path in report.write(folder, found, about):
        print(path)
    return 0


def _say(line: str) -> None:
    print(f"jaxpaged: {line}", file=sys.stderr)
