"""The process in which templates run: it reads a question, answers it within its limits or is ended by the kernel.

A question is a length, then (kind, source, variables, time) by `marshal`; an answer is a length, a byte that says whether all
is well, then text. Refuses to know who asks: it ends when its standard input does.
"""

from __future__ import annotations

import contextlib
import json
import marshal
import os
import resource
import signal
import struct
from datetime import datetime

import jinja2.constants  # this and the next are imported when they are used, which is when no file can be opened any more
import jinja2.debug  # noqa: F401

from jaxpaged.templates import sandbox

MEMORY = 2**30  # bytes of address space


def main(cpu_s: float, max_rendered: int) -> None:
    """Answer until there are no more questions, with so much processor time and so many characters for each."""
    sandbox.render(sandbox.WARM_UP, {}, datetime(2000, 1, 1), max_rendered)
    limit_itself()
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, whatever it is in
    _write(b"+ready")
    while (header := _read(4)) is not None:
        question = _read(struct.unpack("<I", header)[0])
        if question is None:
            return
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        reply = answer(question, max_rendered)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _write(reply)


def answer(question: bytes, max_rendered: int) -> bytes:
    """The answer to one question."""
    try:
        kind, source, variables, now = marshal.loads(question)
        if kind == "look":
            text = json.dumps(sandbox.found_in(source))
        else:
            text = sandbox.render(source, variables, datetime(*now), max_rendered)
        return b"+" + text.encode("utf-8", "surrogatepass")
    except MemoryError:
        return b"-more memory than it may have"
    except Exception as error:  # templates can raise anything: TypeError, ZeroDivisionError, RecursionError, ...
        return b"-" + sandbox.one_line(error).encode("utf-8", "surrogatepass")


def limit_itself() -> None:
    """No files, no further processes, little memory, and nothing of the environment: a second wall behind the sandbox."""
    os.environ.clear()
    limits = {"RLIMIT_AS": MEMORY, "RLIMIT_CORE": 0, "RLIMIT_FSIZE": 0, "RLIMIT_NOFILE": 3, "RLIMIT_NPROC": 0}
    for name, value in limits.items():
        with contextlib.suppress(OSError, ValueError, AttributeError):  # not every system has each of them
            resource.setrlimit(getattr(resource, name), (value, value))


def _read(count: int) -> bytes | None:
    """So many bytes, None at the end."""
    pieces = []
    while count:
        piece = os.read(0, min(count, 2**20))
        if not piece:
            return None
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


def _write(reply: bytes) -> None:
    view = memoryview(struct.pack("<I", len(reply)) + reply)
    while view:
        view = view[os.write(1, view) :]
