"""`jaxpaged generate`: texts in, texts out, on stdout and nothing else there."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from jaxpaged.cli.options import Parser, UsageError, add_fields, add_verbose, given_fields, set_up_logging
from jaxpaged.cli.terminal import said
from jaxpaged.config import EngineConfig
from jaxpaged.host.request import SamplingParams

if TYPE_CHECKING:
    from jaxpaged.llm import LLM
    from jaxpaged.outputs import RequestOutput

DESCRIPTION = "Complete one or more prompts, all together, and print the texts in the order of the prompts."
EPILOG = """\
examples:
  jaxpaged generate "One day" --temperature 0
  jaxpaged generate --model ./llama "Dear" "Once" --max-tokens 200 --json | jq -r .text
  jaxpaged generate "A number:" --structured-outputs '{"regex": "[0-9]{3}"}'
  echo "One day" | jaxpaged generate - --stream

The texts go to stdout, everything else to stderr. Numbers may end in k = 1000 or K = 1024."""

MAX_TOKENS = 128  # where neither a flag nor the model's generation_config.json says anything; 16 is short for a reader
SAMPLING_TITLE = "sampling (the model's generation_config.json comes before these defaults)"
# The seed is the engine's: requests from one command line need none of their own. Nothing is printed of the others.
LEFT_OUT = ("seed", "logprobs", "prompt_logprobs", "output_kind")


def add_arguments(parser: Parser) -> None:
    """The flags of this command."""
    parser.usage = "jaxpaged generate [FLAGS] PROMPT [PROMPT ...]"
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="a text to go on with; - reads one from stdin")
    parser.add_argument("--stream", action="store_true", help="print each text while it grows")
    parser.add_argument("--json", action="store_true", help="one JSON object per prompt and line, with token ids")
    add_verbose(parser)
    defaults = {"max_tokens": str(MAX_TOKENS)}
    add_fields(parser, SamplingParams, SAMPLING_TITLE, leave_out=LEFT_OUT, defaults=defaults)
    add_fields(parser, EngineConfig, "model and engine")


def run(arguments: argparse.Namespace) -> int:
    """Generate and print; the exit code."""
    if not arguments.prompts:
        raise UsageError("PROMPT: missing (a text, or - for stdin; see 'jaxpaged generate --help')")
    if arguments.stream and arguments.json:
        raise UsageError("--stream: not with --json, whose lines are whole results")
    if arguments.prompts.count("-") > 1:
        raise UsageError("PROMPT: - is given twice")
    sampling = given_fields(arguments, SamplingParams, leave_out=LEFT_OUT)
    SamplingParams(**sampling)  # refuses bad values before anything is loaded
    set_up_logging(arguments)
    # A few prompts need a few rows: half as many steps to compile at the first run.
    defaults = {"max_num_seqs": 8} if len(arguments.prompts) <= 8 else {}
    llm = open_llm(arguments, **defaults)
    prompts = [sys.stdin.read() if prompt == "-" else prompt for prompt in arguments.prompts]
    with llm:
        params = with_defaults(llm, sampling, MAX_TOKENS)
        started = time.perf_counter()
        if arguments.stream:
            outputs = _stream(llm, prompts, params)
        else:
            outputs = llm.generate(prompts, params, use_tqdm=sys.stderr.isatty())
            for output in outputs:
                print(json.dumps(as_json(output), ensure_ascii=False) if arguments.json else said(_block(output, len(prompts))))
        sys.stdout.flush()
        _report(outputs, time.perf_counter() - started)
    return 0


def open_llm(arguments: argparse.Namespace, **defaults: Any) -> LLM:
    """The model that the flags name. Options are checked before jax is imported, which takes a second or two."""
    options = {**defaults, **given_fields(arguments, EngineConfig)}
    EngineConfig.from_options(**options)
    from jaxpaged.llm import LLM

    return LLM(**options, use_tqdm_on_load=sys.stderr.isatty())


def with_defaults(llm: LLM, given: dict[str, Any], max_tokens: int | None) -> SamplingParams:
    """The flags over the model's own recommendation; `max_tokens` where neither says how long."""
    base = llm.get_default_sampling_params()
    if given.get("use_beam_search"):  # the model recommends how to draw tokens, and a search draws none
        base = SamplingParams(max_tokens=base.max_tokens)
    if "max_new_tokens" not in llm.generation_defaults:
        base = dataclasses.replace(base, max_tokens=max_tokens)
    return dataclasses.replace(base, **given)


def as_json(output: RequestOutput) -> dict[str, Any]:
    """One result as a flat object."""
    completion = output.outputs[0]
    return {
        "prompt": output.prompt,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "prompt_token_ids": output.prompt_token_ids,
        "token_ids": completion.token_ids,
        "cumulative_logprob": completion.cumulative_logprob,
    }


def _block(output: RequestOutput, num_prompts: int) -> str:
    text = output.outputs[0].text
    return text if num_prompts == 1 else f"--- {_short(output.prompt or '')}\n{text}"


def _short(text: str, width: int = 70) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."


def _stream(llm: LLM, prompts: list[str], params: SamplingParams) -> list[RequestOutput]:
    """Print the texts one after the other while all grow: the first unfinished one is shown, those behind it wait."""
    latest: dict[int, RequestOutput] = {}
    shown, num_out = 0, -1
    for output in llm.stream(prompts, params):
        latest[int(output.request_id)] = output
        while shown in latest and shown < len(prompts):
            text = latest[shown].outputs[0].text
            if num_out < 0:
                head = f"--- {_short(prompts[shown])}\n" if len(prompts) > 1 else ""
                print(said(head), end="")
                num_out = 0
            print(said(text[num_out:]), end="", flush=True)
            num_out = len(text)
            if not latest[shown].finished:
                break
            print(flush=True)
            shown, num_out = shown + 1, -1
    return [latest[index] for index in range(len(prompts))]


def _report(outputs: list[RequestOutput], seconds: float) -> None:
    num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    speed = num_tokens / seconds if seconds else 0.0
    what = f"{counted(len(outputs), 'prompt')}, {counted(num_tokens, 'token')}"
    print(f"jaxpaged: {what} in {seconds:.2f} s ({speed:,.1f} tokens/s)", file=sys.stderr)


def counted(count: int, thing: str) -> str:
    """1 prompt, 2 prompts."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"
