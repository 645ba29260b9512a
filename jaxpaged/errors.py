"""The error of an option that cannot be, and the hint for a misspelt name. Knows no option."""

from __future__ import annotations

import difflib


class ConfigError(ValueError):
    """An option or a field of config.json has a value that is not allowed. One line: what, where, got, allowed."""


def nearest(name: str, allowed: list[str] | tuple[str, ...]) -> str:
    """A hint ', did you mean X?' for a misspelt name, or an empty string when nothing is close."""
    close = difflib.get_close_matches(name.replace("-", "_"), allowed, n=1, cutoff=0.6)
    return f", did you mean {close[0]!r}?" if close else ""
