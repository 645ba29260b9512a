"""Strings that end a text, found while it grows.

Knows characters. Refuses to know tokens and requests.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence as Seq


class StopFinder:
    """Finds the first of some strings in a text that comes piece by piece; what it finds does not depend on the pieces.

    Of several strings the one that ends first counts, and of those that end there the longest. Each character is looked at once,
    against one character of each string: Knuth, Morris and Pratt 1977, "Fast Pattern Matching in Strings".
    """

    def __init__(self, strings: Seq[str]):
        """None of them is empty."""
        self._strings = [(string, _borders(string)) for string in strings]
        self._matched = [0] * len(self._strings)  # of each string, its longest beginning that the text ends with

    @property
    def num_open(self) -> int:
        """Characters at the end of the text that may turn out to be the beginning of one of the strings."""
        return max(self._matched, default=0)

    def add(self, piece: str, *, is_exempt: bool = False) -> tuple[str, int] | None:
        """The string that ends in this piece, and one past its last character there; None when there is none.

        To be called no more once it has found one.

        Args:
          is_exempt: none may end in this piece; one that ends later may begin in it.
        """
        for place, character in enumerate(piece, 1):
            found = ""
            for index, (string, borders) in enumerate(self._strings):
                matched = self._matched[index]
                while matched and string[matched] != character:
                    matched = borders[matched]
                matched += string[matched] == character
                if matched == len(string):
                    matched = borders[matched]
                    found = max(found, string, key=len)
                self._matched[index] = matched
            if found and not is_exempt:
                return found, place
        return None


@functools.lru_cache(maxsize=1024)
def _borders(string: str) -> list[int]:
    """Of each of its beginnings, by length: the longest other one that it ends with."""
    borders, matched = [0, 0], 0
    for character in string[1:]:
        while matched and string[matched] != character:
            matched = borders[matched]
        matched += string[matched] == character
        borders.append(matched)
    return borders
