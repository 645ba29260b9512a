"""`jaxpaged bench latency`: one batch in this process, again and again."""

from __future__ import annotations

import argparse
import random
import sys

from tqdm import tqdm

from jaxpaged.bench import latency
from jaxpaged.cli.generate import open_llm
from jaxpaged.cli.options import Parser, UsageError, add_fields, add_verbose, save_json, set_up_logging, whole_number
from jaxpaged.config import EngineConfig
from jaxpaged.host.request import SamplingParams

DESCRIPTION = """\
Generate for one batch of random prompts, again and again, and say how long it takes. Answers are as long as --output-len.
The prefix cache is off unless asked for: from the second time on all prompts would be known."""
EPILOG = """\
examples:
  jaxpaged bench latency                                           the bundled model, 8 prompts of 32 tokens, 128 each
  jaxpaged bench latency --model ./llama --batch-size 1 --input-len 512 --output-json latency.json
  jaxpaged bench latency --num-iters 5 --json | jq .percentiles"""


def add_arguments(parser: Parser) -> None:
    """The flags of this command."""
    group = parser.add_argument_group("batch")
    for name, default, text in (
        ("input-len", 32, "tokens of each prompt"),
        ("output-len", 128, "tokens of each output"),
        ("batch-size", 8, "prompts at once"),
        ("n", 1, "outputs of each prompt"),
        ("num-iters-warmup", 10, "times before that do not count"),
        ("num-iters", 30, "times"),
    ):
        help = f"{text} (default: {default})"
        group.add_argument(f"--{name}", type=whole_number, metavar="N", default=default, help=help)
    group.add_argument("--use-beam-search", action="store_true", help="the n outputs are those of a beam search of width n")
    group.add_argument("--disable-detokenize", action="store_true", help="make no texts of the tokens")
    group.add_argument("--output-json", metavar="FILE", help="write a JSON file of vLLM's keys")
    group.add_argument("--json", action="store_true", help="one JSON object on stdout instead of a table")
    add_verbose(parser)
    add_fields(parser, EngineConfig, "model and engine", defaults={"enable_prefix_caching": "no"})


def run(arguments: argparse.Namespace) -> int:
    """Measure and report; the exit code."""
    for name, low in (("input_len", 1), ("batch_size", 1), ("num_iters", 1), ("num_iters_warmup", 0)):
        if (value := getattr(arguments, name)) < low:
            raise UsageError(f"--{name.replace('_', '-')}: got {value}, expected at least {low}")
    params = SamplingParams(
        n=arguments.n,
        temperature=0.0 if arguments.use_beam_search else 1.0,
        use_beam_search=arguments.use_beam_search,
        ignore_eos=True,
        max_tokens=arguments.output_len,
        detokenize=not arguments.disable_detokenize,
    )
    set_up_logging(arguments)
    with open_llm(arguments, enable_prefix_caching=False) as llm:
        # As in vLLM ids that need not mean anything: what is computed does not depend on them.
        rng, high = random.Random(0), min(10_000, llm.model_config.vocab_size)
        prompts = [[rng.randrange(high) for _ in range(arguments.input_len)] for _ in range(arguments.batch_size)]
        total = arguments.num_iters_warmup + arguments.num_iters
        with tqdm(total=total, desc="Batches", dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar:
            latencies = latency.measure(
                lambda: llm.generate(prompts, params, use_tqdm=False),
                arguments.num_iters,
                arguments.num_iters_warmup,
                on_end=bar.update,
            )
    numbers = latency.summarise(latencies)
    save_json(numbers, arguments, latency.table(numbers))
    if len(latencies) < arguments.num_iters:
        print(f"jaxpaged: interrupted after {len(latencies)} of {arguments.num_iters}", file=sys.stderr)
        return 130
    return 0
