"""`jaxpaged bench ledger`: what starting takes, what each compiled shape took, and how full the steps of a workload were."""

from __future__ import annotations

import argparse
import itertools
import random
import time

from jaxpaged.cli.options import (
    Parser,
    UsageError,
    add_counts,
    add_fields,
    add_json,
    add_verbose,
    given_fields,
    save_json,
    set_up_logging,
)
from jaxpaged.config import EngineConfig

DESCRIPTION = """\
Open an engine, time its start, run requests of mixed lengths, and print the ledger: for each compiled shape the seconds to
compile it, the steps that ran in it, and the share of them that was padding; then which buckets would waste less. The second run
finds compiled steps on disk: the difference is the cold start. --compilation-cache-dir none is always cold."""
EPILOG = """\
examples:
  jaxpaged bench ledger
  jaxpaged bench ledger --model ./llama --num-prompts 64 --max-num-seqs 64 --decode-row-buckets 8,16,64"""


def add_arguments(parser: Parser) -> None:
    """The flags of this command."""
    group = parser.add_argument_group("workload")
    counts = (
        ("num-prompts", 32, "requests, all there from the beginning"),
        ("input-len", 128, "tokens of the longest prompt; the shortest has a sixteenth, lengths are log-uniform"),
        ("output-len", 64, "tokens of the longest output, likewise"),
    )
    add_counts(group, counts)
    add_json(group)
    add_verbose(parser)
    add_fields(parser, EngineConfig, "model and engine")


def run(arguments: argparse.Namespace) -> int:
    """Measure and report; the exit code."""
    for name in ("num_prompts", "input_len", "output_len"):
        if (value := getattr(arguments, name)) < 1:
            raise UsageError(f"--{name.replace('_', '-')}: got {value}, expected at least 1")
    options = given_fields(arguments, EngineConfig)
    EngineConfig.from_options(**options)
    set_up_logging(arguments)
    moments = [time.perf_counter()]
    from jaxpaged.bench.models import open_engine
    from jaxpaged.bench.tables.measuring import drive, jobs
    from jaxpaged.ledger import table
    from jaxpaged.simulate.lengths import LogUniform

    moments.append(time.perf_counter())
    with open_engine(options.pop("model", None), **options) as engine:
        moments.append(time.perf_counter())
        drive(engine, jobs([(4, 1)], engine.model.vocab_size))
        moments.append(time.perf_counter())
        draw = random.Random(0)
        kinds = [LogUniform(max(1, most // 16), most) for most in (arguments.input_len, arguments.output_len)]
        lengths = [tuple(kind.draw(draw) for kind in kinds) for _ in range(arguments.num_prompts)]
        drive(engine, jobs(lengths, engine.model.vocab_size))  # type: ignore[arg-type]
        ledger = engine.runner.ledger  # type: ignore[attr-defined]
    names = "import_s", "open_s", "first_token_s"
    start = {name: after - before for name, (before, after) in zip(names, itertools.pairwise(moments), strict=True)}
    rows, advice = ledger.rows(), ledger.advice()
    compile_s = ledger.compile_s
    said = f"import {start['import_s']:.2f} s, open {start['open_s']:.2f} s, first token {start['first_token_s']:.2f} s; "
    said += f"compiling, all threads together, {compile_s:.2f} s"
    save_json(
        {**start, "compile_s": compile_s, "ledger": rows, "advice": advice}, arguments, "\n".join([said, table(rows), *advice])
    )
    return 0
