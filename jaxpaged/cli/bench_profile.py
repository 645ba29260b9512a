"""`jaxpaged bench profile`: where the time of a step goes, beside the least that this machine can take."""

from __future__ import annotations

import argparse

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
    whole_numbers,
)
from jaxpaged.config import ConfigError, EngineConfig

DESCRIPTION = """\
Profile a step: what the host does before and after it, and what the compiled program spends its time on, each part beside its
floor: bytes that it must read over what memory gives on this machine, or operations over what products give, both measured first.
Rows are full: so many sequences decode behind so many tokens. The flags of an engine hold too."""
EPILOG = """\
examples:
  jaxpaged bench profile                                        the bundled model, 1, 16 and 64 sequences
  jaxpaged bench profile --model 135M --dtype bfloat16 --rows 1,16 --context 512
  jaxpaged bench profile --model ./llama --rows 8 --prefill-tokens 512 --json | jq '.[0].parts'

--model also takes 135M and 0.6B: random weights of these shapes. The profiler costs about a microsecond a thunk."""


def add_arguments(parser: Parser) -> None:
    """The flags of this command."""
    group = parser.add_argument_group("step")
    group.add_argument("--rows", type=whole_numbers, metavar="N,N", default=(1, 16, 64), help="sequences (default: 1,16,64)")
    group.add_argument("--context", type=whole_numbers, metavar="N,N", default=(128,), help="tokens of each (default: 128)")
    counts = (
        ("prefill-tokens", 0, "tokens of prompts in the same step"),
        ("turns", 15, "times that the program runs with the profiler, and as many without"),
        ("thunks", 0, "thunks to name, those that take longest"),
        ("host-steps", 100, "steps of the engine, to see the host's part; 0 leaves it out"),
    )
    add_counts(group, counts)
    add_json(group, form="array")
    add_verbose(parser)
    add_fields(parser, EngineConfig, "model and engine")


def run(arguments: argparse.Namespace) -> int:
    """Measure and report; the exit code."""
    for name, low in (("rows", 1), ("context", 1), ("prefill_tokens", 0), ("turns", 1), ("thunks", 0), ("host_steps", 0)):
        value = getattr(arguments, name)
        if min(value if isinstance(value, tuple) else (value,)) < low:
            raise UsageError(f"--{name.replace('_', '-')}: got {value}, expected at least {low}")
    options = given_fields(arguments, EngineConfig)
    EngineConfig.from_options(**options)
    set_up_logging(arguments)
    from jaxpaged.bench.models import open_engine
    from jaxpaged.bench.step_profile import profile

    name, found, limits = options.pop("model", None), [], None
    for rows in arguments.rows:
        longest = max(arguments.context) + arguments.host_steps + 32
        shape = {"max_num_seqs": rows, "decode_row_buckets": (rows,), "max_model_len": longest, "enforce_eager": True}
        # One step after the other: a part that runs beside the program would be counted twice.
        with open_engine(name, **{**shape, "async_scheduling": False, **options}) as engine:
            for context in arguments.context:
                how = {name: getattr(arguments, name) for name in ("prefill_tokens", "turns", "host_steps")}
                how["num_heaviest"] = arguments.thunks
                try:
                    one = profile(engine, rows=rows, context=context, limits=limits, **how)
                except ValueError as error:
                    raise ConfigError(str(error)) from None
                limits = one.limits
                found.append(one)
    save_json([one.as_json() for one in found], arguments, "\n\n".join(one.table() for one in found))
    return 0
