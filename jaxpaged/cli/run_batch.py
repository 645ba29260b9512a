"""`jaxpaged run-batch`: a file of requests in, a file of answers out, as OpenAI's batches have them."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import hashlib
import importlib.util
import sys
from typing import Any

from tqdm import tqdm

from jaxpaged.admission import QueueOptions
from jaxpaged.cli.options import Parser, UsageError, add_fields, add_verbose, given_fields, set_up_logging, whole_number
from jaxpaged.config import EngineConfig
from jaxpaged.server.options import ServerOptions

DESCRIPTION = """\
Answer all requests of a file, each line of which is {"custom_id": ..., "method": "POST", "url": "/v1/chat/completions",
"body": {...}}, in this process, as the server would. Answers come in the order in which they are ready, one a line."""
EPILOG = """\
examples:
  jaxpaged run-batch -i in.jsonl -o out.jsonl                    the bundled model
  jaxpaged run-batch -i in.jsonl -o out.jsonl ./llama --max-num-seqs 64
  jaxpaged run-batch -i in.jsonl -o out.jsonl --overwrite

Until all is answered the answers are in out.jsonl.part; the same command goes on where it ended, however that was.
A line that cannot be read, or asked, is answered with an error of its own. Exit code 1: some requests have no good answer."""

_OWN = ("served_model_name", "tool_call_parser", "max_outputs", "max_prompts")
_OTHERS = tuple(field.name for field in dataclasses.fields(ServerOptions) if field.name not in _OWN)
_CHUNK = 1 << 20


def add_arguments(parser: Parser) -> None:
    """The flags of this command."""
    parser.usage = "jaxpaged run-batch -i FILE -o FILE [FLAGS] [MODEL]"
    parser.add_argument("model_path", nargs="?", metavar="MODEL", help="the same as --model")
    parser.add_argument("-i", "--input-file", metavar="FILE", help="the requests, JSONL")
    parser.add_argument("-o", "--output-file", metavar="FILE", help="the answers, JSONL")
    parser.add_argument("--overwrite", action="store_true", help="begin anew, whatever is there already")
    text = "requests at a time (default: twice max_num_seqs)"
    parser.add_argument("--max-concurrency", type=whole_number, metavar="N", help=text)
    add_verbose(parser)
    add_fields(parser, ServerOptions, "requests", leave_out=_OTHERS)
    add_fields(parser, EngineConfig, "model and engine")


def run(arguments: argparse.Namespace) -> int:
    """Answer all; the exit code. What can be refused is refused before anything is loaded."""
    for name in ("input_file", "output_file"):
        if getattr(arguments, name) is None:
            raise UsageError(f"-{name[0]}: missing (see 'jaxpaged run-batch --help')")
    if arguments.max_concurrency is not None and arguments.max_concurrency < 1:
        raise UsageError(f"--max-concurrency: got {arguments.max_concurrency}, expected at least 1")
    given = given_fields(arguments, EngineConfig)
    if arguments.model_path is not None:
        if "model" in given:
            raise UsageError("MODEL: given twice, also as --model")
        given["model"] = arguments.model_path
    EngineConfig.from_options(**given)
    options = ServerOptions(**given_fields(arguments, ServerOptions, leave_out=_OTHERS))
    if importlib.util.find_spec("fastapi") is None:
        raise UsageError("fastapi is not installed: pip install 'jaxpaged[serve]'")
    set_up_logging(arguments)
    digest, num_lines = _looked_at(arguments.input_file)
    from jaxpaged.server.batch_file import Output

    answers = {"input file": digest, "model": given.get("model")}
    with Output(arguments.output_file, answers, overwrite=arguments.overwrite) as output:
        if output.done:
            print(f"jaxpaged: going on: {len(output.done):,} of {num_lines:,} are answered already", file=sys.stderr)
        counts = _answered(arguments, given, options, output, num_lines)
        output.finish()
    what = f"{counts.answered:,} answered, {counts.failed:,} failed"
    before = f", {counts.done_before:,} from before" if counts.done_before else ""
    print(f"jaxpaged: {what}{before}: {arguments.output_file}", file=sys.stderr)
    return 1 if counts.failed else 0


def _answered(arguments: argparse.Namespace, given: dict[str, Any], options: ServerOptions, output: Any, num_lines: int) -> Any:
    from jaxpaged.async_llm import AsyncLLM
    from jaxpaged.server.app import build_app
    from jaxpaged.server.batch_file import EngineGoneError, answer_all, read_lines

    # How many wait is limited by how many are asked at a time.
    queue = QueueOptions(max_queued_requests=2**20, max_queued_tokens=2**40)
    with (
        AsyncLLM.from_options(**given, queue=queue, use_tqdm_on_load=sys.stderr.isatty()) as llm,
        open(arguments.input_file, "rb") as file,
        tqdm(total=num_lines, desc="Requests", dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar,
    ):

        def on_end(counts: Any) -> None:
            if counts.failed:
                bar.set_postfix_str(f"{counts.failed:,} failed", refresh=False)
            bar.update()

        max_concurrency = arguments.max_concurrency or 2 * llm.config.max_num_seqs  # type: ignore[operator]  (resolved)
        app = build_app(llm, options)
        try:
            return asyncio.run(answer_all(app, read_lines(file), output, max_concurrency=max_concurrency, on_end=on_end))
        except EngineGoneError as error:
            raise RuntimeError(f"the engine has ended, what was answered is kept: {error}") from None


def _looked_at(path: str) -> tuple[str, int]:
    """A digest of the file, and how many lines it has. Raises UsageError."""
    digest, num_lines = hashlib.sha256(), 0
    try:
        with open(path, "rb") as file:
            while piece := file.read(_CHUNK):
                digest.update(piece)
                num_lines += piece.count(b"\n")
    except OSError as error:
        raise UsageError(f"-i: {path}: {error.strerror}") from None
    return digest.hexdigest(), num_lines
