"""Messages to and from a process of our own that may hang or die: a length, then so many bytes, each by a deadline.

Refuses to know what they say.
"""

from __future__ import annotations

import contextlib
import os
import select
import struct
import subprocess
import time

HEAD = struct.Struct("<I")


def start(command: list[str]) -> subprocess.Popen[bytes]:
    """A process that reads messages from stdin and answers on stdout. Ctrl-C is not for it."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, bufsize=0, start_new_session=True, **pipes)  # type: ignore[call-overload]
    os.set_blocking(process.stdin.fileno(), False)  # type: ignore[union-attr]
    return process


def stop(process: subprocess.Popen[bytes]) -> None:
    """Kill and forget it."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        pipe.close()  # type: ignore[union-attr]


def send(process: subprocess.Popen[bytes], body: bytes, deadline: float) -> None:
    """Raises TimeoutError after the deadline, of `time.monotonic()`, and OSError when it has died."""
    view = memoryview(HEAD.pack(len(body)) + body)
    file = process.stdin.fileno()  # type: ignore[union-attr]
    while view:
        _wait(file, select.POLLOUT, deadline)
        with contextlib.suppress(BlockingIOError):
            view = view[os.write(file, view) :]


def receive(process: subprocess.Popen[bytes], deadline: float, most: int) -> bytes:
    """The next message, of at most so many bytes. Raises as `send`, and EOFError at the end or when it says more."""
    file = process.stdout.fileno()  # type: ignore[union-attr]
    reply, wanted = bytearray(), HEAD.size
    while len(reply) < wanted:
        _wait(file, select.POLLIN, deadline)
        piece = os.read(file, 2**20)
        if not piece:
            raise EOFError("it has ended")
        reply += piece
        if wanted == HEAD.size and len(reply) >= HEAD.size:
            wanted += HEAD.unpack(reply[: HEAD.size])[0]
            if wanted > HEAD.size + most:
                raise EOFError(f"an answer of {wanted:,} bytes")  # nothing of ours says so much
    return bytes(reply[HEAD.size :])


def _wait(file: int, event: int, deadline: float) -> None:
    poll = select.poll()  # unlike select, for any number of open files
    poll.register(file, event)
    if not poll.poll(max(0.0, 1000 * (deadline - time.monotonic()))):
        raise TimeoutError("no answer in its time")
