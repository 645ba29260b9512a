"""`jaxpaged inspect`: which pages are in use and by whom, in a running engine or at any step of a recording."""

from __future__ import annotations

import argparse
import json
from typing import Any

from jaxpaged.cli.options import Parser, UsageError, whole_number
from jaxpaged.observe.debug_socket import ask
from jaxpaged.observe.recording import Recording
from jaxpaged.observe.records import RecordingError
from jaxpaged.observe.replay import Replay
from jaxpaged.observe.snapshot import snapshot
from jaxpaged.observe.tables import as_text

DESCRIPTION = "Show the pages that are in use and who owns them: of a running engine, or at one step of a recording."
EPILOG = """\
examples:
  jaxpaged inspect --active-blocks --socket engine.sock                    an engine with debug_socket="engine.sock"
  jaxpaged inspect --active-blocks --recording run.recording               at its end
  jaxpaged inspect --active-blocks --recording run.recording --step 417 --json"""
_VIEWS = {"active_blocks": ("active-blocks", "sequences that own pages, which pages, and how many of them are shared")}


def add_arguments(parser: Parser) -> None:
    """The flags of this command."""
    add_views(parser, _VIEWS)


def run(arguments: argparse.Namespace) -> int:
    """Look and print; the exit code."""
    return show(arguments, _VIEWS)


def add_views(parser: Parser, views: dict[str, tuple[str, str]]) -> None:
    """A flag for each view, and where to look."""
    for view, text in views.values():
        parser.add_argument(f"--{view}", action="store_true", help=text)
    parser.add_argument("--socket", metavar="PATH", help="the debug_socket of a running engine")
    parser.add_argument("--recording", metavar="FILE", help="what Engine.save_recording wrote")
    parser.add_argument("--step", type=whole_number, metavar="N", help="of the recording: after how many steps (default: all)")
    parser.add_argument("--json", action="store_true", help="as one JSON object")


def show(arguments: argparse.Namespace, views: dict[str, tuple[str, str]]) -> int:
    """Print the view that the flags name; the exit code."""
    wanted = [view for name, (view, _) in views.items() if getattr(arguments, name)]
    if len(wanted) != 1:
        raise UsageError(f"expected one of {', '.join(f'--{view}' for view, _ in views.values())}")
    if (arguments.socket is None) == (arguments.recording is None):
        raise UsageError("expected --socket PATH of a running engine or --recording FILE, one of the two")
    if arguments.socket is not None and arguments.step is not None:
        raise UsageError("--step: only with --recording")
    if arguments.socket is not None:
        found = ask(arguments.socket, wanted[0])
    else:
        found = _of_recording(arguments.recording, wanted[0], arguments.step)
    print(json.dumps(found, indent=2) if arguments.json else as_text(found))
    return 0


def _of_recording(path: str, view: str, step: int | None) -> dict[str, Any]:
    """The view after one step of a recording, which is replayed up to there."""
    replay = Replay(Recording.load(path))
    if step is not None and step < replay.first_step:
        raise RecordingError(f"{path}: begins after step {replay.first_step:,}, step {step:,} is not in it")
    difference = replay.run(until=step) if step != replay.first_step else None
    if difference is not None:
        raise RecordingError(f"{path}: step {difference.step:,} is decided otherwise today (see 'jaxpaged replay')")
    if step is not None and replay.num_steps < step:
        raise RecordingError(f"{path}: ends after step {replay.num_steps:,}, step {step:,} is not in it")
    return snapshot(replay.scheduler, view)
