"""R32 and R47: malformed requests beside good ones, from many clients at once, against a real server."""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import logging
import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from hostile import CHAT, COMPLETION, LEAKS, VALID, exchange, judge, malformed, parsed, request
from running import ENGINE, Running, is_empty, running, wait_until

from jaxpaged.admission import QueueOptions
from jaxpaged.async_llm import AsyncLLM

GREEDY = {"prompt": "One day Omar and Anna went", "max_tokens": 8, "temperature": 0, "return_token_ids": True}


@contextlib.contextmanager
def served(*, queue: dict[str, Any] | None = None, engine: dict[str, Any] | None = None, **options: Any) -> Iterator[Running]:
    """A server of its own, of the bundled model."""
    how = {"use_tqdm_on_load": False, **ENGINE, **(engine or {})}
    llm = AsyncLLM.from_options(None, queue=QueueOptions(**(queue or {})), **how)
    try:
        with running(llm, **options) as one:
            yield one
    finally:
        llm.shutdown()


def at_once(jobs: Iterable[Callable[[], None]], num_threads: int) -> None:
    """Do all of them, so many at a time. Raises what the first raised that failed."""
    left, lock, failed = iter(jobs), threading.Lock(), []

    def work() -> None:
        while not failed:
            with lock:
                job = next(left, None)
            if job is None:
                return
            try:
                job()
            except BaseException as error:
                failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def address(server: Running) -> tuple[str, int]:
    """Where it listens."""
    return "127.0.0.1", int(server.url.rpartition(":")[2])


def asked(server: Running, path: str, body: dict[str, Any], *headers: tuple[str, str]) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of what a good client gets."""
    return parsed(exchange(address(server), request(path, json.dumps(body).encode(), headers=headers)))


def canary(server: Running) -> list[int]:
    """Tokens that never change."""
    status, _, body = asked(server, COMPLETION, GREEDY)
    assert status == 200, body
    return json.loads(body)["choices"][0]["token_ids"]


def settled(server: Running) -> None:
    """Nothing is left of any request, and the pool's own check finds nothing."""
    wait_until(lambda: is_empty(server.llm))
    server.engine.scheduler.check()


@contextlib.contextmanager
def unlogged() -> Iterator[None]:
    """R48: what clients send is not theirs to have in the log, neither to fill it nor to forge lines of it."""
    told: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
    assert not told, f"{len(told)} lines in the log, such as {told[0][:300]!a}"


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) << 10
    return 0


def storm(server: Running, num_malformed: int, num_good: int, *, seed: int = 0, num_threads: int = 8) -> collections.Counter[int]:
    """How often each status came. Every answer is judged, every good request served, and the canary sings after each hundred."""
    golden, found, numbers = canary(server), collections.Counter(), itertools.count()
    good = {round((place + 0.5) * (num_malformed + num_good) / num_good) for place in range(num_good)}

    def bad_one(number: int) -> None:
        case = malformed(random.Random(f"{seed} {number}"))
        try:
            found[judge(case, exchange(address(server), case.raw))] += 1
        except Exception as error:
            raise AssertionError(f"case {seed} {number}: {error}") from error

    def good_one(number: int) -> None:
        path, body = VALID[number % len(VALID)]
        raw = exchange(address(server), request(path, json.dumps(body).encode()))
        status, headers, content = parsed(raw)
        assert status == 200 and not LEAKS.search(raw), (path, body, raw[-400:])
        is_stream = headers["content-type"].startswith("text/event-stream")
        assert not is_stream or (content.endswith(b"data: [DONE]\n\n") and b'"error"' not in content), content
        assert is_stream or path not in (CHAT, COMPLETION) or all(one["finish_reason"] for one in json.loads(content)["choices"])

    def job() -> None:
        number = next(numbers)
        (good_one if number in good else bad_one)(number)
        if number % 100 == 99:
            assert canary(server) == golden

    with unlogged():
        at_once(itertools.repeat(job, num_malformed + num_good), num_threads)
    assert canary(server) == golden
    settled(server)
    return found


def full(num_malformed: int, num_good: int) -> int:
    """With a server of its own."""
    with served(body_timeout_s=3.0) as server:
        storm(server, num_malformed // 3, num_good // 3, seed=1)  # what is cached has a limit, and is there now
        before = anonymous_bytes()
        found = storm(server, num_malformed, num_good)
        grown = (anonymous_bytes() - before) / 2**20
    print(f"    statuses: {dict(sorted(found.items()))}, memory: {grown:+.1f} MiB", flush=True)
    assert grown < 16, "memory has grown"
    return num_malformed + num_good
