"""What a step would take: by the roofline of a GPU and a model's shape, or from a table of measured steps.

Knows shapes of steps and seconds. Refuses to know requests and time of day.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any, Protocol

from jaxpaged.config import DTYPE_BYTES, Bucket, ConfigError, EngineConfig, ModelConfig
from jaxpaged.host.plan import StepPlan
from jaxpaged.simulate import shapes
from jaxpaged.simulate.gpus import Gpu

# Assumptions, none of them measured for this engine. Copies reach 0.9 of a Hopper's published bandwidth and products 0.8 of its
# published operations (pallas_kernels/goals.py); kernels in a step do somewhat worse, and between steps the device waits for
# the host.
BANDWIDTH_EFFICIENCY = 0.75
FLOPS_EFFICIENCY = 0.65
STEP_OVERHEAD_S = 0.5e-3


class CostModel(Protocol):
    """Anything that knows what a step takes."""

    def step_s(self, plan: StepPlan) -> float:
        """Seconds from the start of a step until its tokens are known."""
        ...


class Roofline:
    """A step is three parts, one after the other, each as long as its bytes or its operations take, whichever is longer:

    - the layers' matrices and the head: every weight read once, two operations per weight and token. Padding counts: it is the
      tokens of the compiled bucket that run;
    - attention of the decode rows: each reads the keys and values of its context once;
    - attention of the prefill tiles: likewise each chunk, whose tiles find its context in the cache of the chip.

    A layer with a window reads and scores no further than that. Copies of pages read and write each page once.
    """

    def __init__(
        self,
        gpu: Gpu,
        model: ModelConfig,
        config: EngineConfig,
        *,
        bandwidth_efficiency: float = BANDWIDTH_EFFICIENCY,
        flops_efficiency: float = FLOPS_EFFICIENCY,
        overhead_s: float = STEP_OVERHEAD_S,
    ):
        """`config` is resolved.

        Raises:
          ConfigError: an efficiency that is not in (0, 1], or an overhead below 0.
        """
        for name, share in (("bandwidth_efficiency", bandwidth_efficiency), ("flops_efficiency", flops_efficiency)):
            if not 0 < share <= 1:
                raise ConfigError(f"{name}: got {share:g}, expected a number in (0, 1]")
        if not 0 <= overhead_s < math.inf:
            raise ConfigError(f"overhead_s: got {overhead_s:g}, expected a finite number of at least 0")
        self.overhead_s = overhead_s
        self.bytes_per_s = gpu.bytes_per_s * bandwidth_efficiency
        # float32 products run as TF32, at half the speed of bfloat16 on all of these.
        self.flops_per_s = gpu.flops_per_s * flops_efficiency * (0.5 if config.dtype == "float32" else 1.0)
        self._buckets = config.buckets()
        self._tile: int = config.prefill_tile  # type: ignore[assignment]

        layers = model.num_layers * shapes.num_layer_parameters(model)
        head = shapes.num_embedding(model)
        self._weights_s = shapes.num_step_bytes(model, config) / self.bytes_per_s
        self._token_s = 2 * layers / self.flops_per_s
        self._sampled_s = 2 * head / self.flops_per_s
        per_layer = 2 * model.num_kv_heads * model.head_dim * DTYPE_BYTES[config.kv_cache_dtype]
        self._read_s = per_layer / self.bytes_per_s  # one token's keys and values in one layer
        self._score_s = 4 * model.num_heads * model.head_dim / self.flops_per_s  # one query token and one key, in one layer
        page_bytes = model.page_bytes(config.block_size, config.kv_cache_dtype)  # type: ignore[arg-type]
        self._copy_s = 2 * page_bytes / self.bytes_per_s
        self._windows = Counter(model.windows or (0,) * model.num_layers)  # window -> layers that have it

    def step_s(self, plan: StepPlan) -> float:
        """See `CostModel.step_s`."""
        bucket = _bucket(plan, self._buckets, self._tile)
        num_tokens = bucket.decode_rows + bucket.prefill_tiles * self._tile
        num_sampled = bucket.decode_rows + bucket.prefill_tiles
        seconds = max(self._weights_s, num_tokens * self._token_s + num_sampled * self._sampled_s)
        for window, num_layers in self._windows.items():
            seconds += num_layers * (self._decode_s(plan, window) + self._prefill_s(plan, window))
        return seconds + len(plan.copies) * self._copy_s + self.overhead_s

    def _decode_s(self, plan: StepPlan, window: int) -> float:
        num_seen = sum([chunk.start for chunk in plan.decodes]) + len(plan.decodes)
        if window:
            num_seen = sum([min(chunk.start + 1, window) for chunk in plan.decodes])
        return num_seen * max(self._read_s, self._score_s)

    def _prefill_s(self, plan: StepPlan, window: int) -> float:
        num_read = num_scored = 0
        for chunk in plan.prefills:
            num_read += min(chunk.end, chunk.num_tokens + window - 1) if window else chunk.end
            num_scored += _num_seen(chunk.end, window) - _num_seen(chunk.start, window)
        return max(num_read * self._read_s, num_scored * self._score_s)


def _num_seen(num_tokens: int, window: int) -> int:
    """Pairs of a query and a key it sees, over the first `num_tokens` tokens of a sequence."""
    ramp = min(num_tokens, window) if window else num_tokens
    return ramp * (ramp + 1) // 2 + (num_tokens - ramp) * window


def _bucket(plan: StepPlan, buckets: Seq[Bucket], tile: int) -> Bucket:
    """The smallest bucket that holds a plan; see `jaxpaged.batch.fit`, whose module needs numpy and jax."""
    num_tiles = sum(-(-chunk.num_tokens // tile) for chunk in plan.prefills)
    for bucket in buckets:
        if bucket.decode_rows >= plan.num_rows and bucket.prefill_tiles >= num_tiles:
            return bucket
    largest = f"the largest is {buckets[-1].decode_rows} and {buckets[-1].prefill_tiles}"
    raise ConfigError(f"no step holds {plan.num_rows} decode rows and {num_tiles} prefill tiles; {largest}")


class MeasuredSteps:
    """Steps of a device, as measured: per shape, seconds at some lengths of context, with straight lines between them.

    A plan takes the smallest measured shape that holds it, as in the engine. Its context is the sum over its chunks of the
    tokens up to and with them. Below the first measured context a step takes as long as there; beyond the last one the last line
    goes on, level when it falls.
    """

    def __init__(self, rows: Seq[tuple[int, int, int, float]], tile: int):
        """Each row is decode rows, prefill tiles, tokens of context, seconds."""
        found: dict[Bucket, dict[int, float]] = {}
        for decode_rows, prefill_tiles, num_context, seconds in rows:
            found.setdefault(Bucket(decode_rows, prefill_tiles), {})[num_context] = seconds
        self._points = {bucket: sorted(found[bucket].items()) for bucket in found}
        # Few tiles before few rows: a tile is many tokens.
        self._buckets = sorted(found, key=lambda bucket: (bucket.prefill_tiles, bucket.decode_rows))
        self._tile = tile

    @classmethod
    def from_file(cls, path: str, tile: int) -> MeasuredSteps:
        """Read {"steps": [{"decode_rows": 8, "prefill_tiles": 0, "num_context": 4096, "seconds": 0.0123}, ...]}.

        Raises:
          ConfigError: it is not such a file; with the entry, the field, what it got and what is allowed.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: not JSON ({error})") from None
        entries = values.get("steps") if isinstance(values, dict) else None
        if not isinstance(entries, list) or not entries:
            raise ConfigError(f'{path}: expected an object with a list "steps" that is not empty')
        return cls([_entry(entry, f"{path}: steps[{index}]") for index, entry in enumerate(entries)], tile)

    def step_s(self, plan: StepPlan) -> float:
        """See `CostModel.step_s`."""
        points = self._points[_bucket(plan, self._buckets, self._tile)]
        num_context = sum(chunk.end for chunk in plan.chunks())
        if num_context <= points[0][0] or len(points) == 1:
            return points[0][1]
        at = min(bisect_left(points, (num_context, 0.0)), len(points) - 1)
        (x0, y0), (x1, y1) = points[at - 1], points[at]
        slope = (y1 - y0) / (x1 - x0)
        return y1 if num_context > x1 and slope < 0 else y0 + (num_context - x0) * slope


def _entry(entry: Any, where: str) -> tuple[int, int, int, float]:
    if not isinstance(entry, dict):
        raise ConfigError(f"{where}: got {type(entry).__name__}, expected an object")
    numbers = []
    for name in ("decode_rows", "prefill_tiles", "num_context"):
        value = entry.get(name)
        if type(value) is not int or value < 0:
            raise ConfigError(f"{where}: {name}: got {value!r}, expected a whole number of at least 0")
        numbers.append(value)
    seconds = entry.get("seconds")
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < math.inf:
        raise ConfigError(f"{where}: seconds: got {seconds!r}, expected a number above 0")
    return numbers[0], numbers[1], numbers[2], float(seconds)
