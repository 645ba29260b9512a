"""A local socket that answers what an engine is doing: one JSON line asks for a view, one JSON line is the answer.

Knows sockets, threads and when the scheduler stands still. The engine never waits for it: a view is taken by the engine's own
thread between two steps, or, while no step begins, by this thread, which discards what it saw when something moved meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import stat
import threading
import time
from pathlib import Path
from typing import Any

from jaxpaged.config import ConfigError
from jaxpaged.host.scheduler import Scheduler
from jaxpaged.observe.recording import RecordingError
from jaxpaged.observe.snapshot import VIEWS, snapshot

logger = logging.getLogger("jaxpaged")

_MAX_QUESTION = 4096  # bytes
_CLIENT_S = 2.0  # how long a client may take to ask or to read
_ANSWER_S = 5.0  # how long the engine may take to stand still
_LOOK_S = 0.02  # between two looks whether it does


class DebugSocket:
    """Serves one client at a time, readable and writable for its owner alone.

    `begin` and `end` bracket every call that changes the scheduler, and cost two assignments each. A call that only puts a
    request at the end of the line needs no `begin`: nothing that was seen before is wrong after it.
    """

    def __init__(self, path: str, scheduler: Scheduler):
        """Raises ConfigError when the path cannot be bound."""
        self.path, self._scheduler = Path(path), scheduler
        self._version = 0  # of the scheduler's state
        self._is_changing = False
        self._wanted: str | None = None
        self._taken: dict[str, Any] | None = None
        self._is_taken = threading.Event()
        self._socket = _bind(self.path)
        self._inode = self.path.stat().st_ino
        self._thread = threading.Thread(target=self._serve, name="jaxpaged-debug-socket", daemon=True)
        self._thread.start()

    # --- the engine's thread ---

    def begin(self) -> None:
        """The scheduler's state is about to change."""
        self._is_changing = True
        self._version += 1

    def end(self) -> None:
        """It has changed."""
        self._version += 1
        self._is_changing = False
        if self._wanted is not None:
            self._give()

    def close(self) -> None:
        """Stop serving and take the file away, if it is still ours."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._socket.close()
        self._thread.join(_CLIENT_S)
        with contextlib.suppress(OSError):
            if self.path.stat().st_ino == self._inode:
                self.path.unlink()

    def _give(self) -> None:
        view, self._wanted = self._wanted, None
        if view is None:  # the client has just been answered
            return
        try:
            self._taken = snapshot(self._scheduler, view)
        except Exception as error:  # a look must never stop the engine
            self._taken = {"view": view, "error": f"{type(error).__name__}: {error}"}
        self._is_taken.set()

    # --- the socket's thread ---

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:  # closed
                return
            with client:
                client.settimeout(_CLIENT_S)
                # A client that goes away, or asks nothing, is no business of the engine's.
                with contextlib.suppress(OSError):
                    client.sendall(json.dumps(self._answer(_line(client))).encode() + b"\n")

    def _answer(self, question: bytes) -> dict[str, Any]:
        try:
            view = json.loads(question)["view"]
        except (ValueError, TypeError, KeyError):
            return {"error": 'expected one line such as {"view": "scheduler"}'}
        if view not in VIEWS:
            return {"error": f"view: got {str(view)[:64]!r}, expected one of {', '.join(VIEWS)}"}
        deadline = time.monotonic() + _ANSWER_S
        self._is_taken.clear()
        try:
            while time.monotonic() < deadline:
                self._wanted = view
                # What the engine gives may still be the answer to the question before, which this thread answered itself.
                found = self._taken if self._is_taken.wait(_LOOK_S) else self._look(view)
                self._is_taken.clear()
                if found is not None and found["view"] == view:
                    return found
        finally:
            self._wanted = None
        return {"error": f"the scheduler did not stand still for {_ANSWER_S:g} s"}

    def _look(self, view: str) -> dict[str, Any] | None:
        """A view taken beside the engine's thread; None when the state changed meanwhile."""
        version = self._version
        if self._is_changing:
            return None
        try:
            found = snapshot(self._scheduler, view)
        except Exception:  # a list that changes under an iterator: the version has changed too
            found = None
        return found if version == self._version else None


def ask(path: str, view: str, *, timeout_s: float = 10.0) -> dict[str, Any]:
    """A view of the engine behind a socket.

    Raises:
      RecordingError: nobody listens there, or the answer is none.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(timeout_s)
        try:
            client.connect(path)
            client.sendall(json.dumps({"view": view}).encode() + b"\n")
            answer = json.loads(_line(client, limit=2**28))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error) or "no answer"
            raise RecordingError(f"{path}: no engine answers on this socket ({reason})") from None
    if "error" in answer:
        raise RecordingError(f"{path}: {answer['error']}")
    return answer


def _line(client: socket.socket, limit: int = _MAX_QUESTION) -> bytes:
    received = b""
    while b"\n" not in received and len(received) <= limit:
        part = client.recv(65536)
        if not part:
            break
        received += part
    return received.partition(b"\n")[0]


def _bind(path: Path) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            # What a killed engine left behind; anything else of this name is not ours to remove.
            if stat.S_ISSOCK(path.stat().st_mode) and not _is_served(path):
                path.unlink()
        before = os.umask(0o177)
        try:
            listening.bind(str(path))
        finally:
            os.umask(before)
        listening.listen(4)
    except OSError as error:
        listening.close()
        raise ConfigError(f"debug_socket: {path}: {error.strerror or error}") from None
    return listening


def _is_served(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(1.0)
        try:
            client.connect(str(path))
        except OSError:
            return False
    return True
