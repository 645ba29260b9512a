"""One prompt or several in a field of a request, as text or as token ids. Knows OpenAI's four forms."""

from __future__ import annotations

from typing import Any

from jaxpaged.host.checks import shown
from jaxpaged.host.request import RequestError
from jaxpaged.prompts import Prompt


def listed(name: str, given: Any, limit: int) -> list[Prompt]:
    """The prompts of a field. Raises RequestError."""
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list):
        raise RequestError(f"{name}: got {shown(given)}, expected a text, token ids, or a list of them")
    if not given:
        raise RequestError(f"{name}: got an empty list, expected at least one")
    if isinstance(given[0], int) and not isinstance(given[0], bool):
        return [given]
    if len(given) > limit:
        raise RequestError(f"{name}: got {len(given):,} prompts, the limit is {limit} (max_prompts)")
    kind = str if isinstance(given[0], str) else list
    for place, one in enumerate(given):
        if not isinstance(one, kind) or (kind is list and not one):
            raise RequestError(f"{name}[{place}]: got {shown(one)}, expected texts, or lists of token ids")
    return given
