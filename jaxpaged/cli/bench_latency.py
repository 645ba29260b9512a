"""`jaxpaged bench latency`: one batch in this process, again and again."""

from __future__ import annotations

import argparse
import random
import sys

from tqdm import tqdm

from jaxpaged.bench import compare, latency
from jaxpaged.cli.compare import NOTE, add_compare, check_flags, run_compare
from jaxpaged.cli.generate import open_llm
from jaxpaged.cli.options import (
    Parser,
    UsageError,
    add_counts,
    add_fields,
    add_json,
    add_verbose,
    save_json,
    set_up_logging,
    whole_number,
)
from jaxpaged.config import EngineConfig
from jaxpaged.host.request import SamplingParams

DESCRIPTION = """\
Generate for one batch of random prompts, again and again, and say how long it takes. Answers are as long as --output-len.
The prefix cache is off unless asked for: from the second time on all prompts would be known."""
EPILOG = f"""\
examples:
  jaxpaged bench latency                                           the bundled model, 8 prompts of 32 tokens, 128 each
  jaxpaged bench latency --model ./llama --batch-size 1 --input-len 512 --output-json latency.json
  jaxpaged bench latency --num-iters 5 --json | jq .percentiles
  jaxpaged bench latency --compare vllm,llamacpp:q8_0 --peer-python vllm=./vllm/bin/python llamacpp=./llama/bin/python

{NOTE}"""


# flag -> its default, alone and with --compare
_DEFAULTS = {"batch_size": (8, 1), "num_iters_warmup": (10, 1), "num_iters": (30, 3)}


def add_arguments(parser: Parser) -> None:
    """The flags of this command."""
    group = parser.add_argument_group("batch")
    counts = (
        ("input-len", 32, "tokens of each prompt"),
        ("output-len", 128, "tokens of each output"),
        ("n", 1, "outputs of each prompt"),
    )
    add_counts(group, counts)
    for name, text in (
        ("batch-size", "prompts at once"),
        ("num-iters-warmup", "times before that do not count"),
        ("num-iters", "times, with --compare in each round"),
    ):
        default, compared = _DEFAULTS[name.replace("-", "_")]
        help = f"{text} (default: {default}, with --compare {compared})"
        group.add_argument(f"--{name}", type=whole_number, metavar="N", help=help)
    group.add_argument("--use-beam-search", action="store_true", help="the n outputs are those of a beam search of width n")
    group.add_argument("--disable-detokenize", action="store_true", help="make no texts of the tokens")
    add_json(group, saved="write a JSON file of vLLM's keys")
    add_verbose(parser)
    add_compare(parser)
    add_fields(parser, EngineConfig, "model and engine", defaults={"enable_prefix_caching": "no"})


def run(arguments: argparse.Namespace) -> int:
    """Measure and report; the exit code."""
    check_flags(arguments)
    for name, defaults in _DEFAULTS.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, defaults[arguments.compare is not None])
    for name, low in (("input_len", 1), ("batch_size", 1), ("num_iters", 1), ("num_iters_warmup", 0)):
        if (value := getattr(arguments, name)) < low:
            raise UsageError(f"--{name.replace('_', '-')}: got {value}, expected at least {low}")
    if arguments.compare is not None:
        return _compared(arguments)
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
        prompts = _prompts(arguments, llm.model_config.vocab_size)
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


def _prompts(arguments: argparse.Namespace, vocab_size: int) -> list[list[int]]:
    """As in vLLM ids that need not mean anything: what is computed does not depend on them."""
    rng, high = random.Random(0), min(10_000, vocab_size)
    return [[rng.randrange(high) for _ in range(arguments.input_len)] for _ in range(arguments.batch_size)]


def _compared(arguments: argparse.Namespace) -> int:
    """One sequence beside other engines; the exit code."""
    if given := next((name for name in ("n", "batch_size") if getattr(arguments, name) != 1), None):
        raise UsageError(f"--{given.replace('_', '-')}: got {getattr(arguments, given)}, with --compare it is 1")
    if arguments.use_beam_search:
        raise UsageError("--use-beam-search: not with --compare")
    if arguments.output_len < 2:
        raise UsageError(f"--output-len: got {arguments.output_len}, with --compare at least 2: a time per token needs two")
    set_up_logging(arguments)
    with open_llm(arguments, enable_prefix_caching=False) as llm:
        [prompt] = _prompts(arguments, llm.model_config.vocab_size)
        about = {"input_len": arguments.input_len, "output_len": arguments.output_len, "num_iters": arguments.num_iters}
        return run_compare(
            arguments,
            llm,
            compare.latency_turn(prompt, arguments.output_len, arguments.num_iters),
            ("tpot", "ttft", "latency"),
            num_seqs=1,
            max_len=arguments.input_len + arguments.output_len,
            num_warmup=arguments.num_iters_warmup,
            about=about,
        )
