"""`jaxpaged bench throughput`: many requests in this process, all at once."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from tqdm import tqdm

from jaxpaged.bench import throughput
from jaxpaged.bench.datasets import Ask
from jaxpaged.cli.datasets import add_dataset, dataset_options, drawn
from jaxpaged.cli.generate import open_llm
from jaxpaged.cli.options import (
    Parser,
    UsageError,
    add_fields,
    add_verbose,
    given_fields,
    save_json,
    set_up_logging,
    whole_number,
)
from jaxpaged.config import EngineConfig
from jaxpaged.host.request import RequestOutputKind, SamplingParams

DESCRIPTION = "Generate for many requests, all of them given at once, and say how much gets done in a second."
EPILOG = """\
examples:
  jaxpaged bench throughput --num-prompts 200 --input-len 64 --output-len 32
  jaxpaged bench throughput --model ./llama --dataset-name sharegpt --num-prompts 500 --output-json throughput.json
  jaxpaged bench throughput --dataset-name prefix_repetition --async-engine --json

--async-engine drives the engine as a server does, on a thread of its own with a task for each request."""


def add_arguments(parser: Parser) -> None:
    """The flags of this command."""
    group = parser.add_argument_group("requests")
    group.add_argument("--n", type=whole_number, metavar="N", default=1, help="outputs of each prompt (default: 1)")
    group.add_argument("--async-engine", action="store_true", help="through AsyncLLM")
    group.add_argument("--disable-detokenize", action="store_true", help="make no texts of the tokens")
    group.add_argument("--output-json", metavar="FILE", help="write a JSON file of vLLM's keys")
    group.add_argument("--json", action="store_true", help="one JSON object on stdout instead of a table")
    add_verbose(parser)
    add_dataset(parser, leave_out=("seed",))
    add_fields(parser, EngineConfig, "model and engine", leave_out=("skip_tokenizer_init",))


def run(arguments: argparse.Namespace) -> int:
    """Measure and report; the exit code."""
    options = dataset_options(arguments)
    params: dict[str, Any] = {"n": arguments.n, "ignore_eos": True, "detokenize": not arguments.disable_detokenize}
    SamplingParams(**params)  # refuses bad values before anything is loaded
    set_up_logging(arguments)

    def params_of(ask: Ask) -> SamplingParams:
        return SamplingParams(max_tokens=ask.num_output, output_kind=RequestOutputKind.FINAL_ONLY, **params)

    if arguments.async_engine:
        llm = _open_async(arguments, options.num_prompts * arguments.n)
        side: throughput.Side = throughput.Online(llm, params_of)
    else:
        llm = open_llm(arguments)
        side = throughput.Offline(llm, params_of)
    try:
        asks, _ = drawn(options, llm.tokenizer)
        limit: int = llm.config.max_model_len  # type: ignore[assignment]  (resolved)
        if long := next((ask for ask in asks if ask.num_prompt + ask.num_output > limit), None):
            lengths = f"{long.num_prompt:,} + {long.num_output:,} tokens"
            raise UsageError(f"a request has {lengths}, the limit is {limit:,} (max_model_len): see --input-len, --output-len")
        with tqdm(total=len(asks), desc="Requests", dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar:
            numbers = throughput.measure(side, asks, on_end=bar.update)
    finally:
        side.close()
    save_json({**numbers, "side": side.name}, arguments, throughput.table(numbers))
    return 0


def _open_async(arguments: argparse.Namespace, num_outputs: int) -> Any:
    given = given_fields(arguments, EngineConfig)
    EngineConfig.from_options(**given)
    from jaxpaged.admission import QueueOptions
    from jaxpaged.async_llm import AsyncLLM

    queue = QueueOptions(max_queued_requests=max(1, num_outputs), max_queued_tokens=2**40)
    return AsyncLLM.from_options(**given, queue=queue, use_tqdm_on_load=sys.stderr.isatty())
