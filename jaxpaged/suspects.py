"""Which request it is that makes steps fail: what was in a failed step is tried again, then in halves.

Knows ids, and which steps failed with them. Refuses to know engines: whoever drives one runs only those that are `on_trial`.
"""

from __future__ import annotations

from collections.abc import Iterable


class Suspects:
    """A step that fails is computed anew once. When that fails too, those that were in it are tried by themselves, in halves of
    halves, until one fails alone.

    Law: of n requests of which one makes all of its steps fail, that one is named after at most 2 + 2 * ceil(log2(n)) of them,
    and no other. Who has had a token since is not suspected any more.
    """

    def __init__(self) -> None:
        self._once: frozenset[str] = frozenset()  # were in the last step that failed, and have had no token since
        self._groups: list[list[str]] = []  # to be tried, the first of them now

    @property
    def on_trial(self) -> frozenset[str] | None:
        """The requests that alone are to run; None when all may."""
        return frozenset(self._groups[0]) if self._groups else None

    def failed(self, request_ids: Iterable[str]) -> list[str]:
        """A step with these has failed: those that it was for certain, to be failed with it, and to be told as `over`."""
        ids = list(dict.fromkeys(request_ids))
        if not self._groups:
            is_second = not self._once.isdisjoint(ids)
            self._once = frozenset(ids)
            if not is_second:
                return []
            self._groups = [ids]
        group = self._groups.pop(0)
        there = [one for one in group if one in ids] or group
        rest = [one for one in group if one not in there]
        self._groups[:0] = [rest] if rest else []
        if len(there) == 1:
            return there
        middle = len(there) // 2
        self._groups[:0] = [there[:middle], there[middle:]]
        return []

    def over(self, request_id: str) -> None:
        """A request has had a token, or has ended."""
        self._once -= {request_id}
        if self._groups:
            self._groups = [left for group in self._groups if (left := [one for one in group if one != request_id])]
