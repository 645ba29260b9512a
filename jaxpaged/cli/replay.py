"""`jaxpaged replay`: a flight recording run again without the model, and drawn."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
import time

from jaxpaged.cli.options import Parser, whole_number
from jaxpaged.observe import Difference, Recording, Replay, draw_pool, save_trace
from jaxpaged.observe.records import RecordingError

DESCRIPTION = """\
Run a recording of Engine.save_recording again: the same requests and tokens through today's scheduler, without the model, on
the clock of the recording. Stops at the first step that is decided otherwise and prints both decisions."""
EPILOG = """\
examples:
  jaxpaged replay run.recording                              0 when every step is equal, 1 when one differs
  jaxpaged replay run.recording --check                      and verify every invariant after every step
  jaxpaged replay run.recording --perfetto trace.json        for https://ui.perfetto.dev
  jaxpaged replay run.recording --picture pool.png           the page pool over time

A trace and a picture are made of the record alone, also of one that cannot be replayed."""


def add_arguments(parser: Parser) -> None:
    """The flags of this command."""
    parser.usage = "jaxpaged replay [FLAGS] FILE"
    parser.add_argument("file", metavar="FILE", help="what Engine.save_recording wrote, or recording_dir holds")
    parser.add_argument(
        "--check", action="store_true", help="verify every invariant of scheduler and pool after each step (slow)"
    )
    parser.add_argument("--until", type=whole_number, metavar="STEP", help="stop after this step")
    parser.add_argument("--json", action="store_true", help="the outcome as one JSON object")
    parser.add_argument("--perfetto", metavar="OUT.json", help="write a Chrome trace and do not replay")
    parser.add_argument("--picture", metavar="OUT.png", help="draw the page pool over time (needs matplotlib) and do not replay")


def run(arguments: argparse.Namespace) -> int:
    """Replay, or draw; the exit code."""
    recording = Recording.load(arguments.file)
    if arguments.perfetto or arguments.picture:
        return _draw(recording, arguments)
    started = time.perf_counter()
    replay = Replay(recording)
    difference = replay.run(until=arguments.until, check=arguments.check)
    seconds = time.perf_counter() - started
    if arguments.json:
        print(json.dumps(_as_json(replay, difference), indent=2))
    else:
        print(_as_text(replay, difference, seconds))
    return 1 if difference else 0


def _draw(recording: Recording, arguments: argparse.Namespace) -> int:
    if arguments.perfetto:
        print(f"jaxpaged: wrote {save_trace(recording, arguments.perfetto)}", file=sys.stderr)
    if arguments.picture:
        figure = draw_pool(recording)
        try:
            figure.savefig(arguments.picture, dpi=120)
        except (OSError, ValueError) as error:  # ValueError: a format that matplotlib does not know
            raise RecordingError(f"{arguments.picture}: {getattr(error, 'strerror', None) or error}") from None
        print(f"jaxpaged: wrote {arguments.picture}", file=sys.stderr)
    return 0


def _as_json(replay: Replay, difference: Difference | None) -> dict[str, object]:
    return {
        "first_step": replay.first_step,
        "num_equal_steps": replay.num_steps - replay.first_step,
        "is_equal": difference is None,
        "failure": replay.failure,
        "difference": vars(difference) if difference else None,
    }


def _as_text(replay: Replay, difference: Difference | None, seconds: float) -> str:
    header, num_equal = replay.recording.header, replay.num_steps - replay.first_step
    lines = [f"{header['num_pages'] - 1:,} pages of {header['page_size']} tokens, recorded by jaxpaged {header['jaxpaged']}"]
    if replay.first_step:
        lines.append(f"the ring had dropped the beginning: replayed from the state after step {replay.first_step:,}")
    if difference is None:
        lines.append(f"{num_equal:,} steps replayed in {seconds:.2f} s, all equal")
        if replay.failure:
            lines.append(f"then it raised, as it did when it was recorded: {replay.failure}")
        return "\n".join(lines)
    lines.append(f"{num_equal:,} steps replayed equal, step {difference.step:,} (at {difference.time_s:.6f} s) differs:")
    diff = difflib.unified_diff(difference.recorded, difference.replayed, "recorded", "replayed", n=1000, lineterm="")
    return "\n".join([*lines, *(line for line in diff if not line.startswith("@@"))])
