"""Histograms that cost next to nothing to write: plain counts, made into Prometheus' form when somebody asks.

Knows buckets. Refuses to know what is measured, and threads: who shares one brings the lock.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.utils import floatToGoString

# vLLM's buckets, so that its boards and rules read ours.
FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
REQUEST_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
ITERATION_TOKENS = (1, *(2**power for power in range(3, 15)))
OUTPUTS = (1, 2, 5, 10, 20)
PREEMPTIONS = (1, 2, 3, 4, 5, 10, 20)
HTTP_S = (0.1, 0.5, 1)


def one_two_five(limit: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50 and so on, up to a limit."""
    found, power = [], 1
    while power <= limit:
        found += [factor * power for factor in (1, 2, 5) if factor * power <= limit]
        power *= 10
    return tuple(found)


class Histogram:
    """How often values fell up to each bound and above the one before it; the last count is of those above all."""

    def __init__(self, bounds: Sequence[float]):
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """A value that came `count` times."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.total += value * count

    def copy(self) -> Histogram:
        """As it is now."""
        other = Histogram(self.bounds)
        other.counts, other.total = self.counts[:], self.total
        return other

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        """Add it to a family of Prometheus, whose buckets count all that is below them too."""
        buckets, count = [], 0
        for bound, here in zip((*self.bounds, float("inf")), self.counts, strict=True):
            count += here
            buckets.append((floatToGoString(bound), count))
        family.add_metric(labels, buckets, self.total)


def of_requests(max_model_len: int) -> dict[str, Histogram]:
    """Those of vLLM's that are about requests and steps, by name."""
    lengths = one_two_five(max_model_len)
    return {
        "time_to_first_token_seconds": Histogram(FIRST_TOKEN_S),
        "inter_token_latency_seconds": Histogram(TOKEN_S),
        "request_time_per_output_token_seconds": Histogram(TOKEN_S),
        **{f"{name}_seconds": Histogram(REQUEST_S) for name in _SPANS},
        **{name: Histogram(lengths) for name in _LENGTHS},
        "request_params_n": Histogram(OUTPUTS),
        "request_num_preemptions": Histogram(PREEMPTIONS),
        "iteration_tokens_total": Histogram(ITERATION_TOKENS),
    }


_SPANS = ("e2e_request_latency", "request_queue_time", "request_inference_time", "request_prefill_time", "request_decode_time")
_LENGTHS = (
    *("request_prompt_tokens", "request_generation_tokens", "request_max_num_generation_tokens"),
    *("request_params_max_tokens", "request_prefill_kv_computed_tokens"),
)
TEXTS = {
    "time_to_first_token_seconds": "Seconds from a request's arrival to its first token.",
    "inter_token_latency_seconds": "Seconds between two steps that brought a request tokens.",
    "request_time_per_output_token_seconds": "Seconds for each token after the first, of a request.",
    "e2e_request_latency_seconds": "Seconds from a request's arrival to its end.",
    "request_queue_time_seconds": "Seconds from a request's arrival to the first step that computes it.",
    "request_inference_time_seconds": "Seconds from there to its end.",
    "request_prefill_time_seconds": "Seconds from there to its first token.",
    "request_decode_time_seconds": "Seconds from its first token to its last.",
    "request_prompt_tokens": "Tokens of a request's prompt.",
    "request_generation_tokens": "Tokens of its outputs.",
    "request_max_num_generation_tokens": "Tokens of the longest of them.",
    "request_params_max_tokens": "max_tokens of a request that has one.",
    "request_params_n": "n of a request.",
    "request_num_preemptions": "How often a request gave its pages up.",
    "request_prefill_kv_computed_tokens": "Tokens of its prompt that were computed and not found in pages.",
    "iteration_tokens_total": "Tokens of a step: new ones, and those of the prompts that it completed.",
}
