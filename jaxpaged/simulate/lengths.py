"""How long prompts and answers are: distributions over whole numbers of tokens. Knows no time and no request."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Protocol

from jaxpaged.config import ConfigError


class Lengths(Protocol):
    """A distribution of lengths."""

    def draw(self, rng: random.Random) -> int:
        """A length, at least 1."""
        ...


@dataclass(frozen=True)
class Fixed:
    """Always the same."""

    num_tokens: int

    def __post_init__(self) -> None:
        _check(self.num_tokens >= 1, f"got a length of {self.num_tokens}, expected at least 1")

    def draw(self, rng: random.Random) -> int:
        """See `Lengths.draw`."""
        return self.num_tokens


@dataclass(frozen=True)
class Uniform:
    """Each length from `low` to `high`, both included, as likely as any other."""

    low: int
    high: int

    def __post_init__(self) -> None:
        _check(1 <= self.low <= self.high, f"got lengths from {self.low} to {self.high}, expected 1 <= low <= high")

    def draw(self, rng: random.Random) -> int:
        """See `Lengths.draw`."""
        return rng.randint(self.low, self.high)


@dataclass(frozen=True)
class LogUniform:
    """Lengths from `low` to `high`, both included, whose logarithm is uniform: as often from 16 to 32 as from 256 to 512."""

    low: int
    high: int

    def __post_init__(self) -> None:
        Uniform(self.low, self.high)

    def draw(self, rng: random.Random) -> int:
        """See `Lengths.draw`."""
        return min(self.high, int(math.exp(rng.uniform(math.log(self.low), math.log(self.high + 1)))))


@dataclass(frozen=True)
class LogNormal:
    """Lengths whose logarithm is normal: many short ones, few long ones.

    Args:
      mean: of the lengths themselves.
      sigma: standard deviation of the logarithm; at 1 the median is 0.61 of the mean.
    """

    mean: float
    sigma: float

    def __post_init__(self) -> None:
        _check(1 <= self.mean < math.inf, f"got a mean of {self.mean:g}, expected a number of at least 1")
        _check(0 <= self.sigma <= 4, f"got a sigma of {self.sigma:g}, expected a number in [0, 4]")

    def draw(self, rng: random.Random) -> int:
        """See `Lengths.draw`."""
        return max(1, round(math.exp(rng.gauss(math.log(self.mean) - self.sigma**2 / 2, self.sigma))))


def _check(holds: bool, problem: str) -> None:
    if not holds:
        raise ConfigError(problem)


# name -> lengths of prompts and of answers.
# Means: Kwon et al. 2023 (arXiv 2309.06180), figure 11. The paper prints no variance, only that ShareGPT's is higher: the sigmas
# are ours, an assumption.
DATASETS: dict[str, tuple[Lengths, Lengths]] = {
    "sharegpt": (LogNormal(161.31, 1.0), LogNormal(337.99, 0.9)),
    "alpaca": (LogNormal(19.31, 0.5), LogNormal(58.45, 0.8)),
}
