"""What the ratios of many turns say together. Knows numbers alone."""

from __future__ import annotations

import statistics
from collections.abc import Sequence as Seq
from typing import Any


def spread(ratios: Seq[float]) -> dict[str, Any]:
    """The median of the turns' ratios, their quartiles, the lowest and the highest."""
    ordered = sorted(ratios)
    low, middle, high = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
    return {"ratio": middle, "quartiles": [low, high], "lowest": ordered[0], "highest": ordered[-1]}
