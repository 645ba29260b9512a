"""Differences from vLLM that are meant, each with its reason. An entry that nothing matches any more fails `make parity`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Meant:
    """Differences of the requests and at the places that these patterns match (`*` is anything)."""

    case: str
    place: str
    reason: str


MEANT: tuple[Meant, ...] = ()
