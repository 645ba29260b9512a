"""`jaxpaged bench throughput`: many requests in this process, all at once."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

from tqdm import tqdm

from jaxpaged.bench import compare, throughput
from jaxpaged.bench.datasets import Ask, DatasetOptions
from jaxpaged.cli.compare import NOTE, add_compare, check_flags, run_compare
from jaxpaged.cli.datasets import add_dataset, dataset_options, drawn
from jaxpaged.cli.generate import open_llm
from jaxpaged.cli.options import (
    Parser,
    UsageError,
    add_fields,
    add_json,
    add_verbose,
    given_fields,
    save_json,
    set_up_logging,
    whole_number,
)
from jaxpaged.config import EngineConfig
from jaxpaged.host.request import RequestOutputKind, SamplingParams

DESCRIPTION = "Generate for many requests, all of them given at once, and say how much gets done in a second."
EPILOG = f"""\
examples:
  jaxpaged bench throughput --num-prompts 200 --input-len 64 --output-len 32
  jaxpaged bench throughput --model ./llama --dataset-name sharegpt --num-prompts 500 --output-json throughput.json
  jaxpaged bench throughput --dataset-name prefix_repetition --async-engine --json
  jaxpaged bench throughput --num-prompts 16 --random-input-len-range 16,512 --random-output-len-range 16,256 \\
    --compare vllm,llamacpp:q8_0 --peer-python vllm=./vllm/bin/python llamacpp=./llama/bin/python --output-json compared.json

--async-engine drives the engine as a server does, on a thread of its own with a task for each request.

{NOTE}"""


def add_arguments(parser: Parser) -> None:
    """The flags of this command."""
    group = parser.add_argument_group("requests")
    group.add_argument("--n", type=whole_number, metavar="N", default=1, help="outputs of each prompt (default: 1)")
    group.add_argument("--async-engine", action="store_true", help="through AsyncLLM")
    group.add_argument("--disable-detokenize", action="store_true", help="make no texts of the tokens")
    add_json(group, saved="write a JSON file of vLLM's keys")
    add_verbose(parser)
    add_compare(parser)
    add_dataset(parser, leave_out=("seed",))
    add_fields(parser, EngineConfig, "model and engine")


def run(arguments: argparse.Namespace) -> int:
    """Measure and report; the exit code."""
    check_flags(arguments)
    options = dataset_options(arguments)
    if arguments.compare is not None:
        return _compared(arguments, options)
    params: dict[str, Any] = {"n": arguments.n, "ignore_eos": True, "detokenize": not _is_without_texts(arguments)}
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
        asks = _asks(options, llm)
        with tqdm(total=len(asks), desc="Requests", dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar:
            numbers = throughput.measure(side, asks, on_end=bar.update)
    finally:
        side.close()
    save_json({**numbers, "side": side.name}, arguments, throughput.table(numbers))
    return 0


def _is_without_texts(arguments: argparse.Namespace) -> bool:
    return arguments.disable_detokenize or getattr(arguments, "skip_tokenizer_init", False)


def _asks(options: DatasetOptions, llm: Any) -> list[Ask]:
    """What is asked, of token ids where there is no tokenizer. Raises UsageError where a request is too long."""
    asks, _ = drawn(options, llm.tokenizer, num_ids=llm.model_config.vocab_size)
    limit: int = llm.config.max_model_len  # type: ignore[assignment]  (resolved)
    if long := next((ask for ask in asks if ask.num_prompt + ask.num_output > limit), None):
        lengths = f"{long.num_prompt:,} + {long.num_output:,} tokens"
        raise UsageError(f"a request has {lengths}, the limit is {limit:,} (max_model_len): see --input-len, --output-len")
    return asks


def _compared(arguments: argparse.Namespace, options: DatasetOptions) -> int:
    """Beside other engines; the exit code."""
    if arguments.n != 1 or arguments.async_engine:
        raise UsageError(f"--{'n' if arguments.n != 1 else 'async-engine'}: not with --compare")
    set_up_logging(arguments)
    with open_llm(arguments, enable_prefix_caching=False) as llm:
        asks = _asks(options, llm)
        prompts = [llm.get_tokenizer().encode(ask.prompt) if isinstance(ask.prompt, str) else list(ask.prompt) for ask in asks]
        num_outputs = [ask.num_output for ask in asks]
        about = {"dataset": {name: value for name, value in dataclasses.asdict(options).items() if value is not None}}
        return run_compare(
            arguments,
            llm,
            compare.throughput_turn(prompts, num_outputs),
            ("output_tokens_per_second", "tokens_per_second"),
            num_seqs=min(len(prompts), llm.config.max_num_seqs),  # type: ignore[type-var]  (resolved)
            max_len=max(len(ids) + num for ids, num in zip(prompts, num_outputs, strict=True)),
            about=about,
        )


def _open_async(arguments: argparse.Namespace, num_outputs: int) -> Any:
    given = given_fields(arguments, EngineConfig)
    EngineConfig.from_options(**given)
    from jaxpaged.admission import QueueOptions
    from jaxpaged.async_llm import AsyncLLM

    queue = QueueOptions(max_queued_requests=max(1, num_outputs), max_queued_tokens=2**40)
    return AsyncLLM.from_options(**given, queue=queue, use_tqdm_on_load=sys.stderr.isatty())
