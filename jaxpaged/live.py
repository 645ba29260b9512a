"""What steps of an engine bring, and what it means for the requests of one caller that grow.

Knows which request an event is of, and that a fault in one is no fault of the others. Refuses to know who waits for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, TypeVar

from jaxpaged.engine import Engine
from jaxpaged.host.request import TokenEvent


class Growing(Protocol):
    """Whoever takes the events of one request: see `GrowingRequest.record`."""

    def record(self, event: TokenEvent, now: float) -> bool:
        """Take an event; whether its output is over for a reason that the engine does not know."""
        ...


G = TypeVar("G", bound=Growing)


def record(
    engine: Engine,
    events: Iterable[TokenEvent],
    live: Mapping[str, G],
    on_fault: Callable[[G, Exception], None] | None = None,
) -> list[G]:
    """Give events to the requests that they are of: those of `live` that changed, the finished ones still among them.

    Args:
      events: what `Engine.step` gave, all of it, whoever's requests it serves.
      live: by request id.
      on_fault: told of what went wrong with the text or the log-probabilities of one request, which is then out of the engine;
        None raises.
    """
    changed: dict[str, G] = {}
    failed: set[str] = set()
    for event in events:
        one = live.get(event.request_id)
        if one is None or event.request_id in failed:  # someone drives the engine beside this caller
            continue
        changed[event.request_id] = one
        try:
            if one.record(event, engine.clock()):
                engine.stop(event.request_id, event.index)
        except Exception as error:
            if on_fault is None:
                raise
            failed.add(event.request_id)
            engine.abort(event.request_id)
            on_fault(one, error)
    return list(changed.values())
