"""A peer's process: reads what to do from stdin, answers on stdout: `python child.py side_vllm:Side`.

A message is a length of four bytes and so many bytes of JSON, as in `jaxpaged/framed.py`. `load` comes first, then any number of
`run` and `trace`. The process ends, with all that it started, when stdin closes. Knows no engine.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import signal
import struct
import sys
import threading
import traceback
from typing import Any, Protocol

_HEAD = struct.Struct("<I")


class Side(Protocol):
    """An engine in its own interpreter. Greedy, the end of text ignored, nothing remembered of earlier prompts."""

    def load(
        self, model: str, dtype: str, max_model_len: int, max_num_seqs: int, num_threads: int, options: dict
    ) -> dict[str, Any]:
        """Load; what is really used: versions, threads, type.

        Args:
          options: the engine's own, from the user.
        """
        ...

    def run(self, prompts: list[list[int]], num_outputs: list[int]) -> tuple[float, list[list[int]]]:
        """All requests at once: the seconds that it took, and each one's tokens."""
        ...

    def trace(self, prompt: list[int], num_output: int) -> tuple[list[float], list[int]]:
        """One request alone: seconds from its start to each of its tokens, and these."""
        ...


def _answer(side: Side, message: dict[str, Any]) -> dict[str, Any]:
    what = message.pop("do")
    if what == "load":
        return side.load(**message)
    if what == "run":
        seconds, tokens = side.run(**message)
        return {"seconds": seconds, "tokens": tokens}
    times, tokens = side.trace(**message)
    return {"times": times, "tokens": tokens}


def _receive(file: int, messages: queue.SimpleQueue[bytes]) -> None:
    """Hand on what comes. At the end of stdin nobody waits for an answer any more: whatever runs is given up."""
    with os.fdopen(file, "rb") as stream:
        while len(head := stream.read(_HEAD.size)) == _HEAD.size:
            messages.put(stream.read(_HEAD.unpack(head)[0]))
    if os.getpgrp() == os.getpid():  # a group of its own: an engine's own processes are in it, and would stay
        with contextlib.suppress(ProcessLookupError):
            os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(0)


def main(side_name: str) -> None:
    """Serve until stdin closes. `side_name`: a module beside this one and its class, MODULE:CLASS."""
    answers, questions = os.dup(1), os.dup(0)
    os.dup2(2, 1)  # whatever the engine prints is no answer
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(questions, messages), daemon=True).start()
    side = None
    while True:
        message = json.loads(messages.get())
        try:
            if side is None:
                module, _, kind = side_name.partition(":")
                side = getattr(importlib.import_module(module), kind)()
            answer = {"ok": _answer(side, message)}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        view = memoryview(json.dumps(answer).encode())
        view = memoryview(_HEAD.pack(len(view)) + bytes(view))
        while view:
            view = view[os.write(answers, view) :]


if __name__ == "__main__":  # an engine that starts processes of its own imports this file again in each
    main(sys.argv[1])
