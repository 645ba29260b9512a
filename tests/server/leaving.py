"""R37: clients that leave, in every way and at every time, beside some that stay.

`disconnects` raises when a law is broken and returns how many it has seen.
"""

from __future__ import annotations

import json
import random
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from hostile import COMPLETION, exchange, parsed, request
from running import Running, wait_until
from storm import address, at_once, settled

WAYS = ("reset", "end", "half", "timeout")
TIMES = ("queued", "prefilling", "streaming", "at the last token", "whole")
MAX_TOKENS = 12
STAYING = {
    "prompt": "One day Omar and Anna went",
    "max_tokens": 300,
    "ignore_eos": True,
    "temperature": 0,
    "return_token_ids": True,
}
MOST_STEPS, MOST_S = 2, 1.0


class Left:
    """When each stream's end was asked for and when it was out, in steps of the engine."""

    def __init__(self, server: Running):
        self.thread, self.num_steps, self.num_ended, self._asked = server.llm._thread, 0, 0, {}
        self._end, self._abort = self.thread.end, self.thread._abort
        self.thread.end, self.thread._abort = self.end, self.abort  # type: ignore[method-assign]

    def end(self, stream: Any) -> None:
        if not stream.is_over:
            self._asked.setdefault(stream.request.request_id, self.thread.engine.num_steps)
        self._end(stream)

    def abort(self, stream: Any) -> None:
        self.num_ended += not stream.is_over
        self._abort(stream)
        since = self._asked.pop(stream.request.request_id, self.thread.engine.num_steps)  # closed twice is ended twice
        self.num_steps = max(self.num_steps, self.thread.engine.num_steps - since)

    def undo(self) -> None:
        self.thread.end, self.thread._abort = self._end, self._abort  # type: ignore[method-assign]


def _ask(when: str, rng: random.Random) -> bytes:
    long = [rng.randrange(5, 300) for _ in range(rng.choice((600, 900)))]
    prompt: Any = long if when == "prefilling" else f"One day {rng.randrange(1000)}"
    max_tokens = MAX_TOKENS if when == "at the last token" else 100 if when == "prefilling" else 900
    body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "stream": when != "whole", "seed": rng.randrange(99)}
    return request(COMPLETION, json.dumps(body).encode())


def _leave(server: Running, way: str, when: str, rng: random.Random) -> None:
    """One client, until it has left."""
    with socket.create_connection(address(server), 20) as client:
        client.sendall(_ask(when, rng))
        if when in ("prefilling", "whole"):
            time.sleep(rng.uniform(0.0, 0.03))
        elif when != "queued":
            found, wanted = b"", 1 if when == "streaming" else MAX_TOKENS - 1
            while found.count(b"data: ") < wanted and (piece := client.recv(4096)):
                found += piece
        if way == "half":
            client.shutdown(socket.SHUT_WR)
            while client.recv(1 << 16):
                pass
        elif way == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif way == "timeout":  # as a proxy does: it has waited for the next byte, in vain
            client.settimeout(0.02)
            try:
                time.sleep(0.02)
                client.recv(1)
            except TimeoutError:
                pass


def disconnects(server: Running, count: int, *, at_a_time: int = 10, seed: int = 0) -> int:
    """So many clients that leave, in groups, so that some of them wait."""
    staying = json.dumps(STAYING).encode()
    wanted = _tokens(exchange(address(server), request(COMPLETION, staying)))
    left, worst_s, num_gone = Left(server), 0.0, 0
    try:
        for trial in range(-(-count // at_a_time)):
            rng = random.Random(f"{seed} {trial}")
            found: list[list[int]] = []

            def stay(found: list[list[int]] = found) -> None:
                found.append(_tokens(exchange(address(server), request(COMPLETION, staying))))

            stays = [threading.Thread(target=stay) for _ in range(2)]
            for thread in stays:
                thread.start()
            wait_until(lambda found=found: server.llm.num_unfinished >= 2 or bool(found))
            way, when = WAYS[trial % len(WAYS)], TIMES[trial // len(WAYS) % len(TIMES)]
            at_once([_one(server, way, when, rng.random()) for _ in range(at_a_time)], at_a_time)
            left_s = time.monotonic()
            wait_until(lambda: server.llm.num_unfinished <= 2 and not server.llm.admission.num_outputs)
            worst_s = max(worst_s, time.monotonic() - left_s)
            for thread in stays:
                thread.join()
            assert found == [wanted] * 2, f"trial {trial}: {way}, {when}: who stays gets something else"
            settled(server)
            num_gone += at_a_time
    finally:
        left.undo()
    early = f"{left.num_ended} of them before the end"
    print(f"    {num_gone} clients have left, {early}: out after at most {left.num_steps} steps and {worst_s:.3f} s", flush=True)
    assert left.num_steps <= MOST_STEPS and worst_s <= MOST_S
    assert left.num_ended > num_gone / 3, "who left was served to the end"
    return num_gone


def _one(server: Running, way: str, when: str, seed: float) -> Callable[[], None]:
    return lambda: _leave(server, way, when, random.Random(seed))


def _tokens(raw: bytes) -> list[int]:
    status, _, body = parsed(raw)
    assert status == 200, body
    return json.loads(body)["choices"][0]["token_ids"]
