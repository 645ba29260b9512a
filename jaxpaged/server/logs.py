"""The log of a server: one line an event, as text or JSON, and nothing in it that a client could forge a line with.

Knows how a record looks. Refuses to know what is worth one, and to hold anybody up: lines are written on a thread of their own.
"""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import os
import queue
import select
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, TextIO

MAX_TEXT_LEN = 8192  # characters of one text in a line; a prompt has a limit of its own
_MAX_WAITING = 10_000  # lines that a reader who does not read makes wait; those after them are lost
_LAST_WORDS_S = 2.0  # for what waits to be written at the end
_LOGGERS = ("jaxpaged", "uvicorn", "opentelemetry")
_IN_MESSAGE = ("method", "route", "status")  # of a request's line: what it begins with
REQUESTS = "jaxpaged.requests"  # the logger of the requests' own lines


def clean(text: str) -> str:
    """A text without line ends, escapes and whatever else is not for printing, each of which is spelled out; not too long."""
    if len(text) > MAX_TEXT_LEN:
        text = text[:MAX_TEXT_LEN] + "..."
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


class TextLines(logging.Formatter):
    """`jaxpaged: warning: what happened name=value`, the form of our errors. Of an exception it says what and where."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        words = [f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else "", record.getMessage()]
        for name, value in _fields(record).items():
            if value is not None and name not in _IN_MESSAGE:
                words.append(f" {name}={f'{value:.4f}' if isinstance(value, float) else value}")
        if record.exc_info and record.exc_info[1] is not None:
            last = traceback.extract_tb(record.exc_info[2])[-1:]
            words.append(f" ({type(record.exc_info[1]).__name__}{f' at {last[0].filename}:{last[0].lineno}' if last else ''})")
        return "jaxpaged: " + clean("".join(words))


class JsonLines(logging.Formatter):
    """One JSON object: time, level, logger, message, the fields of the event, and the whole traceback of an exception."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        found: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": clean(record.getMessage()),
        }
        for name, value in _fields(record).items():
            if value is not None:
                found[name] = clean(value) if isinstance(value, str) else round(value, 6) if isinstance(value, float) else value
        if record.exc_info and record.exc_info[1] is not None:
            found["exception"] = "".join(traceback.format_exception(record.exc_info[1]))[-MAX_TEXT_LEN:]
        return json.dumps(found, default=str)  # ASCII: what is not for a terminal is escaped


class _Handler(logging.handlers.QueueHandler):
    """Hands a line over, or loses it when too many wait."""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """The record as its line, made here, where what it tells of is still as it was."""
        record.line = self.format(record)
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        """Never wait."""
        with contextlib.suppress(queue.Full):
            self.queue.put_nowait(record)


class _Listener(logging.handlers.QueueListener):
    """Ends in time, be the last lines read or not. Has no handler: logging waits for their locks at the end."""

    def __init__(self, waiting: queue.Queue[logging.LogRecord], write: Callable[[str], object]):
        super().__init__(waiting)
        self._write = write

    def handle(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody is there any more
            self._write(record.line + "\n")  # type: ignore[attr-defined]

    def stop(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            with contextlib.suppress(queue.Full):
                self.queue.put(self._sentinel, timeout=_LAST_WORDS_S)  # type: ignore[attr-defined, call-arg]
            thread.join(_LAST_WORDS_S)


def _writer(stream: TextIO) -> Callable[[str], object]:
    """What writes to the stream's own descriptor, where it has one.

    A thread that waits there for a reader holds no lock of Python's stream, which the end of the process would wait for.
    """
    try:
        descriptor = stream.fileno()
    except (OSError, AttributeError):

        def write_text(line: str) -> None:
            stream.write(line)
            stream.flush()

        return write_text

    def write(line: str) -> None:
        rest = line.encode(stream.encoding or "utf-8", "backslashreplace")
        while rest:
            try:
                rest = rest[os.write(descriptor, rest) :]
            except BlockingIOError:  # whoever has the other end has made it so
                select.select((), (descriptor,), ())

    stream.flush()
    return write


@contextlib.contextmanager
def logging_to(stream: TextIO | None = None, *, log_format: str = "text", is_verbose: bool = False) -> Iterator[None]:
    """Write what our loggers and uvicorn's say, until the block ends.

    Args:
      stream: None is stderr.
      is_verbose: also what is no warning; the requests' own lines come in either case.
    """
    waiting: queue.Queue[logging.LogRecord] = queue.Queue(_MAX_WAITING)
    handler = _Handler(waiting)
    handler.setFormatter(JsonLines() if log_format == "json" else TextLines())
    listener = _Listener(waiting, _writer(stream or sys.stderr))
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO if is_verbose else logging.WARNING)
    logging.getLogger(REQUESTS).setLevel(logging.INFO)
    listener.start()
    try:
        yield
    finally:
        logging.getLogger(REQUESTS).setLevel(logging.NOTSET)
        for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)
        listener.stop()


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return getattr(record, "fields", {})
