"""The server's own life: R38, a device that hangs, and R40, an end while there is work.

Each function raises when a law is broken and returns how many cases it has seen.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from hostile import COMPLETION, exchange, parsed, request
from running import ENGINE, Running, wait_until
from storm import address
from test_async_llm import Gated
from test_async_llm import new_llm as new_fake_llm

from jaxpaged.server.options import ServerOptions

DONE = b"data: [DONE]\n\n"


def state(server: Running, path: str) -> tuple[int, dict[str, Any]]:
    """Status and body of a GET."""
    status, _, body = parsed(exchange(address(server), request(path, b"", method="GET")))
    return status, json.loads(body)


def freeze(seconds: float, stall_s: float) -> int:
    """A device that hangs for a while: /health says so in time and why, and then that it is back."""
    llm, runner = new_fake_llm(stall_s=stall_s)
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("jaxpaged")
    logger.addHandler(handler)
    served = Running(llm, ServerOptions())
    try:
        body = json.dumps({"prompt": [1, 2, 3], "max_tokens": 400, "ignore_eos": True, "return_token_ids": True}).encode()
        answers: list[bytes] = []
        runner.pause_s = 0.005  # two seconds for all of it, or it is over before it hangs
        client = threading.Thread(target=lambda: answers.append(exchange(address(served), request(COMPLETION, body), 60)))
        client.start()
        wait_until(lambda: runner.num_steps > 2)
        assert state(served, "/health")[0] == state(served, "/ready")[0] == 200
        runner.gate.clear()
        frozen_s = time.monotonic()
        wait_until(lambda: state(served, "/health")[0] == 503, 2 * stall_s)
        seen_s = time.monotonic() - frozen_s
        status, why = state(served, "/health")
        assert status == 503 and why["error"]["code"] == "engine_stalled" and "no step for" in why["error"]["message"]
        assert state(served, "/ready")[0] == 503 and state(served, "/live")[0] == 200
        while time.monotonic() - frozen_s < seconds:
            time.sleep(0.05)
            assert state(served, "/health")[0] == 503
        runner.gate.set()
        wait_until(lambda: state(served, "/health")[0] == 200, 5)
        client.join(30)
        status, _, content = parsed(answers[0])
        assert status == 200 and len(json.loads(content)["choices"][0]["token_ids"]) == 400
        stacks = [one for one in told if "stack" in one]
        assert len(stacks) == 1 and "waited" in stacks[0], "the stack of what hangs is to be told once"
        print(f"    a device that hangs is seen after {seen_s:.2f} s, the limit is {stall_s:g} s", flush=True)
    finally:
        runner.gate.set()
        logger.removeHandler(handler)
        served.server.should_exit = True
        served.thread.join(10)
        llm.shutdown()
    return 1


def _asks(rng: random.Random, count: int) -> list[tuple[bool, bytes]]:
    found = []
    for _ in range(count):
        is_streamed = rng.random() < 0.7
        body = {"prompt": [rng.randrange(1000) for _ in range(rng.randint(1, 60))], "ignore_eos": True, "stream": is_streamed}
        body |= {"max_tokens": rng.choice((3, 60, 400)), "n": rng.choice((1, 1, 2))}
        found.append((is_streamed, request(COMPLETION, json.dumps(body).encode())))
    return found


def check_ended(is_streamed: bool, raw: bytes) -> str:
    """How an answer ended that was asked for around the end; raises when it is cut without a word."""
    if not raw:
        return "no connection"
    status, _, body = parsed(raw)
    if status == 503:
        assert json.loads(body)["error"]["code"] == "shutting_down"
        return "refused"
    assert status == 200, raw[:300]
    if not is_streamed:
        assert all(choice["finish_reason"] for choice in json.loads(body)["choices"])
        return "whole"
    assert body.endswith(DONE), f"a stream is cut without an error: ...{body[-300:]!r}"
    last = json.loads(body.removesuffix(DONE).rstrip().rpartition(b"data: ")[2])
    if "error" in last:
        assert last["error"]["code"] == "shutting_down"
        return "ended"
    return "whole"


def ends(seeds: Iterable[int]) -> int:
    """SIGTERM while requests run, wait and come, on a device without a model; every third time another one soon after it."""
    count, how = 0, {}
    logger = logging.getLogger("jaxpaged")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        for seed in seeds:
            for found in _end(seed):
                how[found] = how.get(found, 0) + 1
            count += 1
    finally:
        logger.setLevel(level)
    print(f"    answers: {how}", flush=True)
    return count


def _end(seed: int) -> list[str]:
    rng = random.Random(f"end {seed}")
    runner = Gated()
    runner.pause_s = 0.002
    llm, _ = new_fake_llm(runner)
    drain_s = rng.choice((0.0, 0.05, 0.3))
    served = Running(llm, ServerOptions(drain_s=drain_s))
    is_forced = seed % 3 == 2
    found: list[str] = []
    errors: list[BaseException] = []

    def ask(is_streamed: bool, raw: bytes, after_s: float) -> None:
        time.sleep(after_s)
        try:
            answer = exchange(address(served), raw, 20)
        except (ConnectionRefusedError, ConnectionResetError):
            answer = b""
        try:
            if not is_forced:
                found.append(check_ended(is_streamed, answer))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, args=(*one, rng.uniform(0.0, 0.25))) for one in _asks(rng, 16)]
    try:
        for thread in threads:
            thread.start()
        time.sleep(rng.uniform(0.05, 0.2))
        served.server.handle_exit(signal.SIGTERM, None)
        told_s = time.monotonic()
        if is_forced:
            served.server.handle_exit(signal.SIGTERM, None)
        served.thread.join(drain_s + 8)
        assert not served.thread.is_alive(), "it does not end"
        assert not is_forced or time.monotonic() - told_s < 2, "a second signal is to end it at once"
        llm.shutdown()
        for thread in threads:
            thread.join(20)
        assert not errors, f"trial {seed}, drain_s {drain_s}: {errors[0]}"
        assert llm._engine.pool.num_used == 0
    finally:
        served.server.should_exit = True
        served.thread.join(10)
        llm.shutdown()
    return found


def processes(count: int) -> int:
    """The same on the real command: its exit status is 0, whatever it was doing."""
    flags = [f"--{name.replace('_', '-')}={str(value).strip('(),')}" for name, value in ENGINE.items()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "jaxpaged", "serve", "--port", "0", "--drain-s", "0.2", *flags]
    for number in range(count):
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
            try:
                line = process.stderr.readline()  # type: ignore[union-attr]
                assert "serving on" in line, line
                place = "127.0.0.1", int(line.split()[-1].rpartition(":")[2])
                body = {"prompt": "One day", "max_tokens": 900, "ignore_eos": True, "stream": True}
                answers: list[bytes] = []
                raw = request(COMPLETION, json.dumps(body).encode())
                threads = [threading.Thread(target=lambda: answers.append(exchange(place, raw))) for _ in range(12)]  # noqa: B023
                for thread in threads:
                    thread.start()
                time.sleep(random.Random(number).uniform(0.1, 0.6))
                process.send_signal(signal.SIGTERM)
                if number % 2:
                    time.sleep(0.1)  # two that come at once are one
                    process.send_signal(signal.SIGTERM)
                    assert process.wait(20) in (0, -signal.SIGTERM)
                else:
                    assert process.wait(20) == 0
                for thread in threads:
                    thread.join(20)
                for answer in answers if not number % 2 else ():
                    check_ended(True, answer)
            finally:
                process.kill()
    return count
