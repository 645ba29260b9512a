"""`jaxpaged complete`: what follows a text, from a server or from a model in this process; line by line, or once."""

from __future__ import annotations

import argparse
import sys
from contextlib import closing

from jaxpaged.cli.generate import MAX_TOKENS
from jaxpaged.cli.options import Parser
from jaxpaged.cli.talk import add_flags, lines, open_source, quick, try_show

DESCRIPTION = "Go on with texts: each line that is typed is one, and what follows it appears while it is made."
EPILOG = """\
examples:
  jaxpaged complete                                    the bundled model
  jaxpaged complete --url http://127.0.0.1:8000 --stats --max-tokens 64
  jaxpaged complete -q "One day" --temperature 0       one text, on stdout
  jaxpaged complete < beginnings.txt                   one text a line

/exit or Ctrl-D leaves, Ctrl-C stops a text. 'jaxpaged generate' does many at once."""

_HELP = "/exit or Ctrl-D leaves, Ctrl-C stops a text."


def add_arguments(parser: Parser) -> None:
    """The flags of this command."""
    parser.usage = "jaxpaged complete [FLAGS] [MODEL]"
    add_flags(parser, "go on with this one text and leave", str(MAX_TOKENS))


def run(arguments: argparse.Namespace) -> int:
    """Complete until the input ends; the exit code."""
    with closing(open_source(arguments, MAX_TOKENS)) as source:
        if arguments.quick is not None:
            return quick(lambda: source.complete(arguments.quick), has_stats=arguments.stats)
        if sys.stdin.isatty():
            print(_HELP, file=sys.stderr)
        for line in lines():
            if line == "/exit":
                return 0
            if line == "/help":
                print(_HELP, file=sys.stderr)
                continue
            try_show(lambda line=line: source.complete(line), has_stats=arguments.stats)
    return 0
