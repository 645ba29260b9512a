"""`jaxpaged debug`: what the scheduler and the prefix cache hold, in a running engine or at any step of a recording."""

from __future__ import annotations

import argparse

from jaxpaged.cli.inspect import add_views, show
from jaxpaged.cli.options import Parser

DESCRIPTION = "Show who runs and who waits, or what the prefix cache knows: of a running engine, or at one step of a recording."
EPILOG = """\
examples:
  jaxpaged debug --scheduler --url http://127.0.0.1:8000 --api-key-file key.txt     a server of 'jaxpaged serve'
  jaxpaged debug --scheduler --socket engine.sock                 an engine with debug_socket="engine.sock"
  jaxpaged debug --prefix-cache --recording run.recording            at its end
  jaxpaged debug --scheduler --recording run.recording --step 417 --json"""
_VIEWS = {
    "scheduler": ("scheduler", "running and waiting sequences: tokens, pages, preemptions"),
    "prefix_cache": ("prefix-cache", "known pages, hits, evictions, and the prefixes that sequences share right now"),
}


def add_arguments(parser: Parser) -> None:
    """The flags of this command."""
    add_views(parser, _VIEWS)


def run(arguments: argparse.Namespace) -> int:
    """Look and print; the exit code."""
    return show(arguments, _VIEWS)
