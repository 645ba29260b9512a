"""What the page shows, and what has changed of it: looked at between two steps, once for all who have the page open.

Knows numbers of requests, pages and tokens. It never has a prompt's tokens, a text or whose a request is.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxpaged.engine import Engine
from jaxpaged.observe.snapshot import pool_counts, sequence_line
from jaxpaged.server.bodies import dump_json
from jaxpaged.server.errors import as_api_error
from jaxpaged.server.looks import SharedLook
from jaxpaged.server.service import Service
from jaxpaged.server.ui.page_map import PageMaps, changes, value_of, whole
from jaxpaged.streams import EngineError
from jaxpaged.version import __version__

MAX_LINES = 200  # requests that are listed
_NUM_KEPT = 8  # maps that a page may have seen last
_PATIENCE_S = 2.0  # for a step to end, before the page is told that it has not


@dataclass(frozen=True)
class Taken:
    """What is copied while the engine stands still: nothing is counted or written before it goes on."""

    at_s: float
    counts: dict[str, int | float]
    pool: dict[str, int]
    lines: list[dict[str, Any]]
    num_left_out: int
    owned: list[tuple[int, list[int]]]
    refcounts: list[int]
    known: list[int]


@dataclass(frozen=True)
class Frame:
    """One look, ready to be written. `texts` are what has been written of it, by the map that a page has already."""

    name: str
    at_s: float
    head: dict[str, Any]
    groups: list[list[Any]]
    values: np.ndarray
    texts: dict[str | None, bytes] = field(default_factory=dict)


class Live:
    """The state of one server for its page. A map has a name; whoever names the last one that it has seen gets what is new."""

    def __init__(self, service: Service):
        self._service, self._llm = service, service.llm
        self._server = service.make_id()[:32]  # another after a restart: names of maps never mean another server's
        self._maps = PageMaps()
        self._frames: OrderedDict[str, Frame] = OrderedDict()
        self._num_looks = 0
        self._look = SharedLook(service.llm, take, self._frame)

    async def answer(self, since: str) -> bytes:
        """The next look as JSON, or the last one when a step takes so long that there is none.

        Args:
          since: name of the map that the page has.

        Raises:
          ClosedError: there is no engine any more.
        """
        problem = None
        try:
            frame = await asyncio.wait_for(self._look.get(), _PATIENCE_S)
        except TimeoutError:
            frame = next(reversed(self._frames.values()), None)
            if self._look.held_up_s > _PATIENCE_S / 2:  # it was not put off for the engine's sake
                problem = f"A step has taken {self._look.held_up_s:.0f} s so far."
        try:
            self._llm.check_health()
        except EngineError as error:
            problem = as_api_error(error).body["error"]["message"]
        now = {
            **{"server": self._server, "version": __version__, "model": self._service.names[0]},
            **{"is_ready": self._llm.is_ready, "problem": problem},
            "look_age_s": max(0.0, round(self._llm.clock() - frame.at_s, 3)) if frame is not None else None,
        }
        text = b"null"
        if frame is not None:
            known = since if since in self._frames else None
            text = frame.texts.get(known) or await self._llm.in_thread(self._text, frame, known)
        return b'{"now":' + dump_json(now) + b',"look":' + text + b"}"

    def _frame(self, taken: Taken) -> Frame:
        """On a thread for texts, one at a time."""
        values = self._maps.add(taken.refcounts, taken.known, taken.owned)
        self._num_looks += 1
        admission, config = self._llm.admission, self._llm.config
        head = {
            "at_s": taken.at_s,
            "counts": {
                **taken.counts,
                **{"num_queued_requests": admission.num_outputs, "num_queued_tokens": admission.num_tokens},
            },
            "limits": {
                **{"max_num_seqs": config.max_num_seqs, "max_model_len": config.max_model_len},
                "max_queued_requests": admission.max_queued_requests,
            },
            **{"pool": taken.pool, "requests": taken.lines, "left_out": taken.num_left_out},
        }
        groups = [[value, list(numbers)] for numbers, value in self._maps.groups.items()]
        frame = Frame(f"{self._server}-{self._num_looks}", taken.at_s, head, groups, values)
        self._frames[frame.name] = frame
        while len(self._frames) > _NUM_KEPT:
            self._frames.popitem(last=False)
        return frame

    def _text(self, frame: Frame, known: str | None) -> bytes:
        before = self._frames.get(known) if known is not None else None
        runs = changes(before.values, frame.values) if before is not None else None
        found = {"name": frame.name, "num_pages": len(frame.values), "groups": frame.groups}
        found |= {"whole": whole(frame.values)} if runs is None else {"since": known, "changes": runs}
        frame.texts[known] = text = dump_json({**frame.head, "map": found})
        return text


def take(engine: Engine) -> Taken:
    """Copy what the page shows; on the engine's thread."""
    scheduler, pool, now = engine.scheduler, engine.pool, engine.clock()
    lines = []
    for state, sequences in (("running", scheduler.running), ("waiting", scheduler.waiting)):
        for sequence in sequences:
            if len(lines) == MAX_LINES:
                break
            line = sequence_line(sequence)
            line["age_s"] = round(now - line.pop("arrival_s"), 3)
            lines.append({"state": state, "value": value_of(sequence.number), "number": sequence.number, **line})
    return Taken(
        at_s=now,
        counts=engine.counts(),
        pool=pool_counts(scheduler),
        lines=lines,
        num_left_out=len(scheduler.running) + len(scheduler.waiting) - len(lines),
        owned=[(sequence.number, sequence.owned_pages.copy()) for sequence in scheduler.running],
        refcounts=pool.refcounts(),
        known=pool.cache.known_pages() if pool.cache is not None else [],
    )
