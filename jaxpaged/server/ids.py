"""Names for requests and answers, which nobody else has."""

from __future__ import annotations

import random

# Not uuid4: that asks the system for random bytes each time, which costs more than the rest of a refusal. No name is a secret.
_random = random.Random()


def new_id() -> str:
    """32 hexadecimal digits, at random; any thread may ask."""
    return f"{_random.getrandbits(128):032x}"
