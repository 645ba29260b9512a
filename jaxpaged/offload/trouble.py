"""A line in the log when something begins to go wrong, once until the trouble is over.

Knows good and bad. Refuses to know of what.
"""

from __future__ import annotations

import logging

logger = logging.getLogger("jaxpaged")

CALM = 64  # good ones in a row: a disk that fails now and then is one trouble and not many


class Trouble:
    """One kind of trouble."""

    def __init__(self, message: str):
        """`message` is the line, with places for what `bad` is given."""
        self._message = message
        self._num_good_needed = 0

    def bad(self, *args: object) -> None:
        """It has happened."""
        if not self._num_good_needed:
            logger.warning(self._message, *args)
        self._num_good_needed = CALM

    def good(self) -> None:
        """It has not happened."""
        if self._num_good_needed:
            self._num_good_needed -= 1
