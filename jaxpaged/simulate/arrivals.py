"""Who comes when, with how many tokens: random traffic. Knows no scheduler and no cost."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from jaxpaged.config import ConfigError
from jaxpaged.host.request import MAX_N, SamplingParams
from jaxpaged.simulate.lengths import Lengths

# Token ids of prefixes start here; those below are of one request alone. No model's vocabulary is in the way of a simulation.
_FIRST_PREFIX = 2**30
VOCAB_SIZE = 2**31


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request before any check.

    Args:
      num_prompt: in tokens, those of its prefix counted.
      num_output: tokens at which it ends by itself, each of its outputs.
      tenant: requests share prefixes only within one tenant.
      prefix_id: requests of one prefix_id begin with the same `prefix_len` tokens, and share nothing after them.
      n: outputs.
      use_beam_search: they are those of a beam search of width n.
    """

    arrival_s: float
    num_prompt: int
    num_output: int
    tenant: str | None = None
    priority: int = 0
    prefix_id: int = 0
    prefix_len: int = 0
    n: int = 1
    use_beam_search: bool = False

    def sampling_params(self) -> SamplingParams:
        """What is asked of the engine.

        Raises:
          RequestError: n is out of range.
        """
        return SamplingParams(max_tokens=self.num_output, ignore_eos=True, n=self.n, use_beam_search=self.use_beam_search)

    def prompt_token_ids(self, number: int) -> tuple[int, ...]:
        """Tokens that no other request has, `number` being its own, behind those of its prefix."""
        num_shared = min(self.prefix_len, self.num_prompt)
        return (_FIRST_PREFIX + self.prefix_id,) * num_shared + (number,) * (self.num_prompt - num_shared)


RAMPS = ("linear", "exponential")


@dataclass(frozen=True, slots=True)
class Ramp:
    """A rate that grows from the first request to the last, as `--ramp-up-strategy` of vLLM's `bench serve`.

    Args:
      strategy: one of RAMPS: by the same difference from request to request, or by the same factor.
      start_rps: requests per second at the first; 0 for linear alone.
      end_rps: at the last.

    Raises:
      ConfigError: a value out of range.
    """

    strategy: str
    start_rps: float
    end_rps: float

    def __post_init__(self) -> None:
        if self.strategy not in RAMPS:
            raise ConfigError(f"ramp_up_strategy: got {self.strategy!r}, expected one of {', '.join(RAMPS)}")
        is_exponential = self.strategy == "exponential"
        holds = 0 < self.start_rps < math.inf if is_exponential else 0 <= self.start_rps < math.inf
        _check("ramp_up_start_rps", self.start_rps, holds, f"a finite number {'above 0' if is_exponential else 'of at least 0'}")
        holds = 0 < self.end_rps < math.inf and self.end_rps >= self.start_rps
        allowed = f"a finite number above 0 and of at least ramp_up_start_rps, {self.start_rps:g}"
        _check("ramp_up_end_rps", self.end_rps, holds, allowed)

    def rate(self, number: int, num_prompts: int) -> float:
        """Requests per second when request `number`, counted from 0, is due."""
        progress = number / max(num_prompts - 1, 1)
        if self.strategy == "linear":
            return self.start_rps + (self.end_rps - self.start_rps) * progress
        return self.start_rps * (self.end_rps / self.start_rps) ** progress


def random_traffic(
    num_prompts: int,
    input_len: Lengths,
    output_len: Lengths,
    *,
    request_rate: float = math.inf,
    burstiness: float = 1.0,
    prefix_len: int = 0,
    num_prefixes: int = 1,
    num_priorities: int = 1,
    n: int = 1,
    use_beam_search: bool = False,
    max_model_len: int = 2**30,
    seed: int = 0,
) -> Iterator[Arrival]:
    """`num_prompts` requests whose gaps are gamma-distributed, as in vLLM's `bench serve`.

    Gaps and lengths come from generators of their own, so that another rate is the same requests closer together.

    Args:
      request_rate: requests per second on average; inf is all of them at once.
      burstiness: the shape of the gaps' distribution: 1 is a Poisson process, below 1 they come in bursts, above 1 evenly.
      prefix_len: tokens in front of each prompt, besides `input_len`, one of `num_prefixes` drawn for each.
      num_priorities: each request has one of so many, each as likely.
      n: outputs of each; with `use_beam_search` those of a search of this width.
      max_model_len: prompts are cut so that one new token fits.

    Raises:
      ConfigError: a value out of range.
    """
    _check("num_prompts", num_prompts, num_prompts >= 1, "a whole number of at least 1")
    _check("request_rate", request_rate, request_rate > 0, "a number above 0, or inf")
    _check("burstiness", burstiness, 0 < burstiness < math.inf, "a finite number above 0")
    _check("prefix_len", prefix_len, prefix_len >= 0, "a whole number of at least 0")
    _check("num_prefixes", num_prefixes, num_prefixes >= 1, "a whole number of at least 1")
    _check("num_priorities", num_priorities, num_priorities >= 1, "a whole number of at least 1")
    _check("n", n, 1 <= n <= MAX_N, f"a whole number in [1, {MAX_N}]")
    lengths, gaps, priorities = (random.Random(f"{what} {seed}") for what in ("lengths", "gaps", "priorities"))
    return (
        Arrival(
            arrival_s,
            min(prefix_len + input_len.draw(lengths), max_model_len - 1),
            output_len.draw(lengths),
            priority=priorities.randrange(num_priorities),
            n=n,
            use_beam_search=use_beam_search,
            prefix_id=lengths.randrange(num_prefixes),
            prefix_len=prefix_len,
        )
        for arrival_s in arrival_times(num_prompts, request_rate, burstiness, gaps)
    )


def arrival_times(num_prompts: int, request_rate: float | Ramp, burstiness: float, rng: random.Random) -> Iterator[float]:
    """Seconds from the start, the first 0; see `random_traffic`. Of a ramp each gap has the rate of the request after it."""
    now = 0.0
    for number in range(num_prompts):
        if number:
            rate = request_rate.rate(number, num_prompts) if isinstance(request_rate, Ramp) else request_rate
            # Mean shape * scale, so 1 / rate at any burstiness.
            now += rng.gammavariate(burstiness, 1 / burstiness) / rate
        yield now


def _check(name: str, value: float, holds: bool, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{name}: got {value:g}, expected {allowed}")
