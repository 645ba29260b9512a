"""`jaxpaged inspect`: which pages are in use and by whom, in a running engine or server, or at any step of a recording."""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import Any

from jaxpaged.cli.options import Parser, UsageError, whole_number
from jaxpaged.cli.server_flags import add_headers, headers
from jaxpaged.client.connection import HttpError
from jaxpaged.client.http import Client
from jaxpaged.errors import ConfigError
from jaxpaged.observe.debug_socket import ask
from jaxpaged.observe.recording import Recording
from jaxpaged.observe.records import RecordingError
from jaxpaged.observe.replay import Replay
from jaxpaged.observe.snapshot import snapshot
from jaxpaged.observe.tables import as_text

DESCRIPTION = "Show the pages that are in use and who owns them: of a running engine or server, or at one step of a recording."
EPILOG = """\
examples:
  jaxpaged inspect --active-blocks --url http://127.0.0.1:8000              a server of 'jaxpaged serve'
  jaxpaged inspect --active-blocks --socket engine.sock                    an engine with debug_socket="engine.sock"
  jaxpaged inspect --active-blocks --recording run.recording               at its end
  jaxpaged inspect --active-blocks --recording run.recording --step 417 --json"""
_KEY_IS_WRONG = "the server takes no request without one of its keys (--api-key-file), and does not know this one"
_NO_KEY = "the server takes no request without one of its keys (--api-key-file)"
_TIMEOUT_S = 30.0
_VIEWS = {"active_blocks": ("active-blocks", "sequences that own pages, which pages, and how many of them are shared")}


def add_arguments(parser: Parser) -> None:
    """The flags of this command."""
    add_views(parser, _VIEWS)


def run(arguments: argparse.Namespace) -> int:
    """Look and print; the exit code."""
    return show(arguments, _VIEWS)


def add_views(parser: Parser, views: dict[str, tuple[str, str]]) -> None:
    """A flag for each view, and where to look."""
    parser.add_argument("--url", metavar="URL", help="a running server")
    add_headers(parser)
    for view, text in views.values():
        parser.add_argument(f"--{view}", action="store_true", help=text)
    parser.add_argument("--socket", metavar="PATH", help="the debug_socket of a running engine")
    parser.add_argument("--recording", metavar="FILE", help="what Engine.save_recording wrote")
    parser.add_argument("--step", type=whole_number, metavar="N", help="of the recording: after how many steps (default: all)")
    parser.add_argument("--json", action="store_true", help="as one JSON object")


def show(arguments: argparse.Namespace, views: dict[str, tuple[str, str]]) -> int:
    """Print the view that the flags name; the exit code."""
    places = [arguments.url, arguments.socket, arguments.recording]
    wanted = [view for name, (view, _) in views.items() if getattr(arguments, name) or len(views) == 1]
    if len(wanted) != 1:
        raise UsageError(f"expected one of {', '.join(f'--{view}' for view, _ in views.values())}")
    if places.count(None) != 2:
        raise UsageError("expected one of --url URL of a server, --socket PATH of a running engine, --recording FILE")
    if arguments.recording is None and arguments.step is not None:
        raise UsageError("--step: only with --recording")
    if arguments.url is None and (arguments.api_key_file is not None or arguments.header):
        raise UsageError(f"--{'header' if arguments.header else 'api-key-file'}: only with --url")
    if arguments.url is not None:
        found = _of_server(arguments.url, wanted[0], headers(arguments))
    elif arguments.socket is not None:
        found = ask(arguments.socket, wanted[0])
    else:
        found = _of_recording(str(arguments.recording), wanted[0], arguments.step)
    print(json.dumps(found, indent=2) if arguments.json else as_text(found))
    return 0


def _of_server(url: str, view: str, sent: dict[str, str]) -> dict[str, Any]:
    """The view of the engine behind a server. Raises RecordingError where no server answers, or the answer is no view."""

    async def ask() -> tuple[int, Any]:
        async with Client(url, headers=sent) as client, asyncio.timeout(_TIMEOUT_S):
            return await client.json("GET", f"/state/{view}")

    try:
        status, found = asyncio.run(ask())
    except ConfigError as error:
        raise RecordingError(str(error).replace("base_url", "url", 1)) from None
    except (HttpError, TimeoutError) as error:
        reason = str(error) or f"no answer in {_TIMEOUT_S:g} s"
        raise RecordingError(f"{url}: no server answers there ({reason})") from None
    if status == 401:
        raise RecordingError(f"{url}: {_KEY_IS_WRONG if 'authorization' in sent else _NO_KEY}")
    if status == 404:
        raise RecordingError(f"{url}: the server has no such route: it does not show its state (show_state)")
    found = found if isinstance(found, dict) else {}
    if status == 200 and found.get("view") == view:
        return found
    told = found.get("error")
    problem = told.get("message") if isinstance(told, dict) else None
    raise RecordingError(f"{url}: {problem or f'got no view with status {status}: it may be no server of jaxpaged'}")


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
