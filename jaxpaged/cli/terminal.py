"""What a model says, as a terminal may be given it. Knows characters alone."""

from __future__ import annotations

import sys
from typing import TextIO

# Pictures of the characters that a terminal obeys: C0 but newline and tab, DEL, C1, and what turns the direction of text.
_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
_PICTURES |= {0x7F: 0x2421} | dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)


def harmless(text: str) -> str:
    """A text without anything that a terminal would obey: each such character is a picture of itself."""
    return text.translate(_PICTURES)


def said(text: str, file: TextIO | None = None) -> str:
    """A text as it is to be written to `file`, or stdout: as it is, but harmless to a terminal."""
    return harmless(text) if (file or sys.stdout).isatty() else text
