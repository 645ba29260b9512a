"""`jaxpaged chat`: a conversation in the terminal, with a server or with a model in this process."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing

from jaxpaged.cli.options import Parser
from jaxpaged.cli.talk import Messages, Source, add_flags, lines, open_source, quick, try_show

DESCRIPTION = "Talk with a model: it remembers the conversation, and answers appear while they are made."
EPILOG = """\
examples:
  jaxpaged chat                                        the bundled model
  jaxpaged chat ./llama --system-prompt "Answer briefly."
  jaxpaged chat --url http://127.0.0.1:8000 --stats    a server of OpenAI's API
  jaxpaged chat -q "Sort these words: pear, apple"     one answer, on stdout
  jaxpaged chat < questions.txt                        one message a line

in the conversation: /reset forgets it, /help, /exit or Ctrl-D leaves, Ctrl-C stops an answer."""

_HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer."


def add_arguments(parser: Parser) -> None:
    """The flags of this command."""
    parser.usage = "jaxpaged chat [FLAGS] [MODEL]"
    parser.add_argument("--system-prompt", metavar="TEXT", help="how the model should behave, before all messages")
    add_flags(parser, "answer this one message and leave", "up to the model's limit")


def run(arguments: argparse.Namespace) -> int:
    """Talk until the input ends; the exit code."""
    system = [{"role": "system", "content": arguments.system_prompt}] if arguments.system_prompt is not None else []
    with closing(open_source(arguments, None)) as source:
        if arguments.quick is not None:
            messages = [*system, {"role": "user", "content": arguments.quick}]
            return quick(lambda: source.chat(messages), has_stats=arguments.stats)
        _talk(source, system, has_stats=arguments.stats)
    return 0


def _talk(source: Source, system: Messages, *, has_stats: bool) -> None:
    if sys.stdin.isatty():
        print(_HELP, file=sys.stderr)
    messages = list(system)
    for line in lines():
        if line == "/exit":
            return
        if line in ("/reset", "/help"):
            messages = list(system) if line == "/reset" else messages
            print("The conversation is forgotten." if line == "/reset" else _HELP, file=sys.stderr)
            continue
        asked = [*messages, {"role": "user", "content": line}]
        text = try_show(lambda asked=asked: source.chat(asked), has_stats=has_stats, hint=" (/reset starts over)")
        if text is not None:
            messages = [*asked, {"role": "assistant", "content": text}]
