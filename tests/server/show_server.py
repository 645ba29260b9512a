"""Every figure of the server under attack, in full and as a table: `make fuzz-server`. Arguments: see show_figures.py.

Times that are laws are those of a machine that does nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import failing
import leaving
import lifecycle
import limits
import show_figures
import stages
import storm
import surge
from running import Running
from show_figures import Figure, some


def with_server(run: Callable[[Running, float], int], **options: Any) -> Callable[[float], int]:
    """A figure of a server that has these options."""

    def figure(share: float) -> int:
        with storm.served(**options) as server:
            return run(server, share)

    return figure


def _many(count: int, share: float) -> int:
    return max(10, round(count * share))


FIGURES: list[Figure] = [
    (
        "R10",
        "faults in a stage of one of eight requests, bits of the other seven",
        with_server(lambda s, x: stages.trials(s, some(1000, x)), engine={"batch_invariant": True}),
    ),
    ("R11", "steps that fail, the pool lost or not: recomputed, and who does it found", lambda x: failing.trials(some(240, x))),
    (
        "R32",
        "malformed requests beside good ones; R47: nothing of ours in an answer",
        lambda x: storm.full(_many(10_000, x), _many(2000, x)),
    ),
    ("R33", "bodies, headers and chunks without end", with_server(lambda s, x: limits.sizes(s))),
    (
        "R34",
        "clients that never finish a request",
        with_server(lambda s, x: limits.slow_senders(s, _many(500, x)), body_timeout_s=4.0),
    ),
    ("R34", "clients that never read", with_server(lambda s, x: limits.slow_readers(s, _many(16, x)), send_timeout_s=1.0)),
    ("R35", "requests at 2 and at 10 times what can be served", lambda x: surge.surge(60 * x, 10 * x)),
    ("R36", "requests for more outputs than may be", with_server(lambda s, x: limits.fan_out(s))),
    (
        "R37",
        "clients that leave, in every way and at every time",
        with_server(lambda s, x: leaving.disconnects(s, _many(1000, x))),
    ),
    ("R38", "devices that hang for 10 s", lambda x: lifecycle.freeze(10 * x, 1.0)),
    ("R40", "ends under load, 0 streams cut without an error", lambda x: lifecycle.ends(some(100, x))),
    ("R40", "the same of the command itself", lambda x: lifecycle.processes(len(some(10, x)))),
    (
        "R42",
        "requests at once under one id, each its own answer",
        with_server(
            lambda s, x: limits.same_id(s, _many(1000, x), num_at_once=_many(1000, x)), queue={"max_queued_requests": 2000}
        ),
    ),
    ("R46", "requests without a key to every route by every name", with_server(lambda s, x: limits.keys(s), api_key=limits.KEYS)),
]

if __name__ == "__main__":
    sys.exit(show_figures.main(FIGURES, __doc__))
