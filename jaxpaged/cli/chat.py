"""`jaxpaged chat`: a conversation in the terminal, the model in this process."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from jaxpaged.cli.generate import LEFT_OUT, SAMPLING_TITLE, open_llm, with_defaults
from jaxpaged.cli.options import Parser, add_fields, add_verbose, given_fields, set_up_logging
from jaxpaged.config import EngineConfig
from jaxpaged.host.request import RequestError, SamplingParams

if TYPE_CHECKING:
    from jaxpaged.llm import LLM

DESCRIPTION = "Talk with a model: it remembers the conversation, and answers appear while they are made."
EPILOG = """\
examples:
  jaxpaged chat                                        the bundled model
  jaxpaged chat --model ./llama --system-prompt "Answer briefly."
  jaxpaged chat -q "Sort these words: pear, apple"     one answer, on stdout

in the conversation: /reset forgets it, /exit or Ctrl-D leaves, Ctrl-C stops an answer."""

# One conversation at a time needs few rows, so few compiled steps: a quick start.
_OPTIONS = {"max_num_seqs": 8, "max_num_batched_tokens": 512, "decode_row_buckets": (8,)}
_HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer."


def add_arguments(parser: Parser) -> None:
    """The flags of this command."""
    parser.add_argument("-q", "--quick", metavar="MESSAGE", help="answer this one message and leave")
    parser.add_argument("--system-prompt", metavar="TEXT", help="how the model should behave, before all messages")
    add_verbose(parser)
    add_fields(parser, SamplingParams, SAMPLING_TITLE, leave_out=LEFT_OUT, defaults={"max_tokens": "up to the model's limit"})
    add_fields(parser, EngineConfig, "model and engine", leave_out=("skip_tokenizer_init",))


def run(arguments: argparse.Namespace) -> int:
    """Talk until the input ends; the exit code."""
    sampling = given_fields(arguments, SamplingParams, leave_out=LEFT_OUT)
    SamplingParams(**sampling)  # refuses bad values before anything is loaded
    set_up_logging(arguments)
    system = [{"role": "system", "content": arguments.system_prompt}] if arguments.system_prompt is not None else []
    defaults = {} if given_fields(arguments, EngineConfig).keys() & _OPTIONS.keys() else _OPTIONS
    with open_llm(arguments, **defaults) as llm:
        params = with_defaults(llm, sampling, None)
        if arguments.quick is not None:
            _answer(llm, [*system, {"role": "user", "content": arguments.quick}], params)
            return 0
        _talk(llm, system, params)
    return 0


def _talk(llm: LLM, system: list[dict[str, str]], params: SamplingParams) -> None:
    if sys.stdin.isatty():
        print(_HELP, file=sys.stderr)
    messages = list(system)
    for line in _lines():
        if line == "/exit":
            return
        if line in ("/reset", "/help"):
            messages = list(system) if line == "/reset" else messages
            print("The conversation is forgotten." if line == "/reset" else _HELP, file=sys.stderr)
            continue
        try:
            text = _answer(llm, [*messages, {"role": "user", "content": line}], params)
        except RequestError as error:
            print(f"jaxpaged: error: {error} (/reset starts over)", file=sys.stderr)
            continue
        messages += [{"role": "user", "content": line}, {"role": "assistant", "content": text}]


def _lines() -> Iterator[str]:
    """What the user types, without empty lines; the prompt sign goes to stderr, so that stdout holds answers alone."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _answer(llm: LLM, messages: list[dict[str, str]], params: SamplingParams) -> str:
    """Print the answer while it grows; its text. Ctrl-C ends the answer, not the conversation."""
    text = ""
    results = llm.stream(llm.chat_prompt(messages), params)
    try:
        for output in results:
            new = output.outputs[0].text[len(text) :]
            text += new
            print(new, end="", flush=True)
    except KeyboardInterrupt:
        results.close()  # type: ignore[attr-defined]
        if not sys.stdin.isatty():
            raise
        print(" [stopped]", end="", file=sys.stderr)
    print(flush=True)
    return text
