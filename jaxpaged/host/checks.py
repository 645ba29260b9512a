"""How a value of a request is refused: in one line that says which field, what it got and what is allowed."""

from __future__ import annotations


class RequestError(ValueError):
    """A request that cannot be served. One line: which field, what it got, what is allowed. Nothing was taken for it."""


def check_number(name: str, value: object, low: float, high: float, *, exclude_low: bool = False) -> None:
    """Refuse what is no finite number in [low, high], or (low, high] with `exclude_low`."""
    # `not (low <= value)` rather than `value < low`: every comparison with NaN is False, and NaN must not pass.
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not (low <= value <= high) or (exclude_low and value == low):  # type: ignore[operator]
        allowed = f"a finite number in {'(' if exclude_low else '['}{low:g}, {high:g}]"
        raise RequestError(f"{name}: got {shown(value)}, expected {allowed}")


def check_int(name: str, value: object, low: int, high: int) -> None:
    """Refuse what is no whole number in [low, high]; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{name}: got {shown(value)}, expected a whole number in [{low}, {high}]")


def shown(value: object, limit: int = 64) -> str:
    """A value for a message of one short line, whatever it is."""
    try:
        text = ascii(value).replace("\n", " ")  # an array's repr has lines
    except (ValueError, RecursionError):  # Python spells out neither thousands of digits nor of brackets
        text = f"a value of type {type(value).__name__} that is too long to show"
    return text if len(text) <= limit else text[: limit - 3] + "..."
