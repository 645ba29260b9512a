"""Who owns which page, as one number for each page, and what has changed between two looks.

Knows arrays of page numbers. Refuses to know engines and requests.
"""

from __future__ import annotations

import base64
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

FREE, CACHED, SHARED = 0, 1, 2  # SHARED: by whom is not said
FIRST_REQUEST = 3
FIRST_GROUP = 1 << 15
_NUM_REQUESTS, _NUM_GROUPS = FIRST_GROUP - FIRST_REQUEST, (1 << 16) - FIRST_GROUP
_MAX_SHARES = 20_000  # owners of shared pages, each of each, that are told apart; it takes a microsecond for each


def value_of(number: int) -> int:
    """What pages are that one request owns alone. Of 32,765 requests in a row each has another."""
    return FIRST_REQUEST + number % _NUM_REQUESTS


class PageMaps:
    """Maps of one pool, look by look.

    A map has a value for each page from 1 on: FREE, CACHED, SHARED, of a request, or of a group of requests that share it.
    Invariant: a group has one value for as long as there are pages that it shares.
    """

    def __init__(self):
        self.groups: dict[tuple[int, ...], int] = {}  # numbers of requests -> value, of the last map
        self._next_group = 0

    def add(self, refcounts: Sequence[int], known: Sequence[int], owned: Sequence[tuple[int, Sequence[int]]]) -> np.ndarray:
        """The map of a moment.

        Args:
          refcounts: of each page, the null page first.
          known: pages that the prefix cache knows.
          owned: for each sequence that owns pages, the number of its request, and the pages; the null page may be among them.
        """
        owners = _as_array(refcounts)
        values = np.zeros(len(owners), np.uint16)
        values[_as_array(known)] = CACHED
        pages = _as_array([page for _, some in owned for page in some])
        numbers = np.repeat(_as_array([number for number, _ in owned]), [len(some) for _, some in owned])
        values[owners > 0] = SHARED  # whatever the sequences do not say of a page that has an owner
        is_alone = owners[pages] == 1
        values[pages[is_alone]] = FIRST_REQUEST + numbers[is_alone] % _NUM_REQUESTS
        is_shared = (owners[pages] > 1) & (pages > 0)
        self._name_groups(values, pages[is_shared], numbers[is_shared])
        return values[1:]

    def _name_groups(self, values: np.ndarray, pages: np.ndarray, numbers: np.ndarray) -> None:
        """Tell apart who shares what."""
        owners: dict[int, set[int]] = {}
        if len(pages) <= _MAX_SHARES:
            for page, number in zip(pages.tolist(), numbers.tolist(), strict=True):
                owners.setdefault(page, set()).add(number)
        shared: dict[tuple[int, ...], list[int]] = {}
        for page, some in owners.items():
            shared.setdefault(tuple(sorted(some)), []).append(page)
        before, self.groups = self.groups, {}
        for group in shared:
            if group in before:
                self.groups[group] = before[group]
        taken = set(self.groups.values())
        for group, some in shared.items():
            if group not in self.groups and len(taken) < _NUM_GROUPS:
                while (value := FIRST_GROUP + self._next_group) in taken:
                    self._next_group = (self._next_group + 1) % _NUM_GROUPS
                self._next_group = (self._next_group + 1) % _NUM_GROUPS
                self.groups[group] = value
                taken.add(value)
            values[some] = self.groups.get(group, SHARED)


def whole(values: np.ndarray) -> str:
    """A map as base64 of 16-bit numbers, the low byte first."""
    return base64.b64encode(values.astype("<u2").tobytes()).decode()


def changes(before: np.ndarray, after: np.ndarray) -> list[int] | None:
    """Runs of pages that have another value now: place in the map, length, value, and so on. None when the whole is shorter."""
    places = np.flatnonzero(before != after)
    if not len(places):
        return []
    values = after[places].astype(np.int64)
    begins = np.flatnonzero(np.concatenate(([True], (np.diff(places) != 1) | (np.diff(values) != 0))))
    if 14 * len(begins) > 3 * len(after):  # bytes of a run, and of a page in `whole`
        return None
    lengths = np.diff(np.concatenate((begins, [len(places)])))
    return np.stack((places[begins], lengths, values[begins]), axis=1).ravel().tolist()


def _as_array(numbers: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.frombuffer(array("q", numbers), np.int64)
