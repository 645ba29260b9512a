"""R35: more requests than can be served, from a process beside the server's, at a rate that does not care how it fares.

The client's loop is uvloop, for its own time is in the times that it takes: asyncio's was busy all the time at 3,600 connections
a second.

`surge` raises when a law is broken and returns how many requests it has sent.
"""

from __future__ import annotations

import asyncio
import collections
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

sys.path.insert(0, str(Path(__file__).parent))
from hostile import COMPLETION, parsed, request
from running import ENGINE

MOST_QUEUED, MOST_REFUSAL_S, MOST_RECOVERY_S, MOST_GROWN_MIB = 16, 0.050, 5.0, 64
BODY = {"prompt": "One day Omar and Anna went to the station", "max_tokens": 24, "ignore_eos": True}
RAW = request(COMPLETION, json.dumps(BODY).encode())


@dataclass
class Seen:
    """What clients saw: seconds from a request's beginning to its whole answer, by status."""

    taken_s: dict[int, list[float]] = field(default_factory=lambda: collections.defaultdict(list))
    num_without_retry_after: int = 0

    def p99(self, status: int) -> float:
        """Of the answers of this status."""
        taken = sorted(self.taken_s[status])
        return taken[int(0.99 * (len(taken) - 1))] if taken else 0.0


@contextmanager
def process() -> Iterator[tuple[tuple[str, int], int]]:
    """The real command with a short queue: its address and process id."""
    flags = [f"--{name.replace('_', '-')}={str(value).strip('(),')}" for name, value in ENGINE.items()]
    flags += ["--no-access-log"]  # nobody reads what it says
    command = [sys.executable, "-m", "jaxpaged", "serve", "--port", "0", "--max-queued-requests", str(MOST_QUEUED), *flags]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as one:
        try:
            line = one.stderr.readline()  # type: ignore[union-attr]
            assert "serving on" in line, line
            yield ("127.0.0.1", int(line.split()[-1].rpartition(":")[2])), one.pid
        finally:
            one.terminate()
            one.wait(40)


async def _ask(place: tuple[str, int], seen: Seen) -> None:
    reader, writer = await asyncio.open_connection(*place)
    started = time.monotonic()
    writer.write(RAW)
    raw = await reader.read()
    taken_s = time.monotonic() - started
    writer.close()
    status, headers, _ = parsed(raw)
    seen.taken_s[status].append(taken_s)
    seen.num_without_retry_after += status == 429 and int(headers.get("retry-after", 0)) < 1


async def closed(place: tuple[str, int], seconds: float, num_at_once: int = 8) -> float:
    """Requests per second that are served when so many clients each wait for their answer."""
    seen, end = Seen(), time.monotonic() + seconds

    async def client() -> None:
        while time.monotonic() < end:
            await _ask(place, seen)

    await asyncio.gather(*(client() for _ in range(num_at_once)))
    return len(seen.taken_s[200]) / seconds


async def opened(place: tuple[str, int], rate: float, seconds: float) -> Seen:
    """Requests that come at a rate."""
    seen, tasks, started = Seen(), set(), time.monotonic()
    for number in range(round(rate * seconds)):
        await asyncio.sleep(max(0.0, started + number / rate - time.monotonic()))
        task = asyncio.ensure_future(_ask(place, seen))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    return seen


def _grown(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    return 0.0


def surge(double_s: float, tenfold_s: float, *, is_timed: bool = True) -> int:
    """Twice what can be served for a while, then ten times as much. `is_timed`: times are laws, not only told."""
    count = 0

    async def run(place: tuple[str, int], pid: int) -> None:
        nonlocal count
        await closed(place, 2.0)
        capacity, before = await closed(place, 4.0), _grown(pid)
        for times, seconds in ((2, double_s), (10, tenfold_s)):
            seen = await opened(place, times * capacity, seconds)
            num = sum(map(len, seen.taken_s.values()))
            count += num
            refused, served = len(seen.taken_s[429]), len(seen.taken_s[200])
            print(
                f"    x{times} of {capacity:.0f}/s for {seconds:g} s: {num:,} sent, {served:,} served, {refused:,} refused with"
                f" p50 {1000 * statistics.median(seen.taken_s[429] or [0]):.1f} ms, p99 {1000 * seen.p99(429):.1f} ms; served p99"
                f" {seen.p99(200):.2f} s; {_grown(pid) - before:+.1f} MiB",
                flush=True,
            )
            assert set(seen.taken_s) <= {200, 429} and refused and served, seen.taken_s.keys()
            assert not seen.num_without_retry_after
            assert _grown(pid) - before < MOST_GROWN_MIB
            # Who waits is behind at most a full queue and what runs.
            assert not is_timed or seen.p99(200) < 4 * (MOST_QUEUED + 8) / capacity + 1
            assert not is_timed or seen.p99(429) < MOST_REFUSAL_S * (1 if times == 2 else 4), "a refusal takes too long"
        after = await closed(place, MOST_RECOVERY_S)
        print(f"    within {MOST_RECOVERY_S:g} s after it: {after:.0f}/s", flush=True)
        assert not is_timed or after > 0.8 * capacity

    with process() as (place, pid):
        uvloop.run(run(place, pid))
    return count
