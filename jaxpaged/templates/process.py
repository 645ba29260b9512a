"""Our side of the process in which templates run: one for all templates, started when the first is needed.

A template can neither keep nor exhaust us: it has CPU_S of processor time, which the kernel takes from it, then the process is
replaced. Refuses to know messages.
"""

from __future__ import annotations

import contextlib
import functools
import json
import marshal
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jaxpaged import framed

CPU_S = 0.2  # processor time of one template: what a loaded machine does to others does not count
WALL_S = 5.0  # and this long at most, if the process gets no processor
START_S = 60.0
MAX_RENDERED = 4 * 2**20  # characters of a rendered chat: a template may loop over what a user sends
MAX_QUESTION_BYTES = 32 * 2**20
_MAX_REPLY_BYTES = 4 * MAX_RENDERED + 1

_CODE = """\
import json, sys
folders, *limits = json.loads(sys.argv[1])
sys.path[:] = folders
from jaxpaged.templates.child import main
main(*limits)
"""


class TemplateError(Exception):
    """A template, or what it made of its values, in one line."""


@dataclass(frozen=True)
class Look:
    """What a template reads, and whether it takes a message's content as a list of parts."""

    variables: frozenset[str]
    lists_content: bool


class TemplateProcess:
    """Invariant: between two calls the process waits for a question or is gone. One caller at a time; others wait."""

    def __init__(self, *, cpu_s: float = CPU_S, wall_s: float = WALL_S):
        self._cpu_s, self._wall_s = cpu_s, wall_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # the process that started it: a fork of that one must not talk to it
        self._ending = lambda: None

    def look(self, source: str) -> Look:
        """Check a template without running it. Raises TemplateError."""
        found = json.loads(self._ask(("look", source, None, None)))
        return Look(frozenset(found["variables"]), found["lists_content"])

    def render(self, source: str, variables: Mapping[str, Any], now: datetime) -> str:
        """Fill in a template. `variables` are plain values: see `messages.plain`. Raises TemplateError."""
        moment = (now.year, now.month, now.day, now.hour, now.minute, now.second, now.microsecond)
        return self._ask(("render", source, dict(variables), moment))

    def close(self) -> None:
        """End the process; the next call starts another."""
        self._ending()
        self._process, self._ending = None, lambda: None

    def _ask(self, question: tuple[Any, ...]) -> str:
        try:
            packed = marshal.dumps(question)
        except ValueError as error:
            raise TemplateError(f"values that cannot be handed to it ({error})") from None
        if len(packed) > MAX_QUESTION_BYTES:
            raise TemplateError(f"{len(packed):,} bytes of messages, the limit is {MAX_QUESTION_BYTES:,}")
        with self._lock:
            process = self._started()
            deadline = time.monotonic() + self._wall_s
            try:
                framed.send(process, packed, deadline)
                reply = framed.receive(process, deadline, _MAX_REPLY_BYTES)
            except BaseException as error:  # Ctrl-C too: its answer would be taken for that of the next question
                self._end(process)
                if not isinstance(error, (OSError, TimeoutError, EOFError)):
                    raise
                raise TemplateError(self._why(process, error)) from None
        text = reply[1:].decode("utf-8", "surrogatepass")
        if reply[:1] != b"+":
            raise TemplateError(text[:1000])
        return text

    def _why(self, process: subprocess.Popen[bytes], error: BaseException) -> str:
        if process.returncode == -signal.SIGPROF:
            return f"more than {1000 * self._cpu_s:.0f} ms of processor time"
        if isinstance(error, TimeoutError):
            return f"no answer within {self._wall_s} s"
        return "its process died"

    def _started(self) -> subprocess.Popen[bytes]:
        if self._owner != os.getpid():
            self._process = None
        if self._process is not None and self._process.poll() is None:
            return self._process
        if self._process is not None:
            self.close()
        folders = [*filter(None, sys.path), str(Path(__file__).parents[2])]
        told = json.dumps([folders, self._cpu_s, MAX_RENDERED])
        try:
            # The paths are ours, so nothing of the environment and no site configuration is needed to start.
            process = framed.start([sys.executable, "-I", "-S", "-c", _CODE, told])
        except OSError as error:
            raise TemplateError(f"its process did not start ({error.strerror})") from None
        self._process, self._owner = process, os.getpid()
        self._ending = weakref.finalize(self, _stop, process, self._owner)
        try:
            framed.receive(process, time.monotonic() + START_S, _MAX_REPLY_BYTES)
        except (OSError, EOFError):
            self._end(process)
            raise TemplateError("its process did not start") from None
        return process

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.05)  # the kernel may be just ending it: then its status says why
        self.close()


def _stop(process: subprocess.Popen[bytes], owner: int) -> None:
    """Kill and forget a process, if it is ours."""
    if owner == os.getpid():
        framed.stop(process)


@functools.cache
def shared() -> TemplateProcess:
    """The one that everybody uses."""
    return TemplateProcess()
