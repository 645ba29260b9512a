"""What a step takes, part by part and beside its floor: the host's work, and what the compiled program's thunks are for.

The program runs again and again on full rows; the profiler tells when each thunk began and ended, and the names of
`jax.named_scope` in the model what it is of. Floors are bytes over what memory gives here and operations over what products
give here, both measured on the spot: `jaxpaged bench profile`.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

from jaxpaged.bench import host_step, machine
from jaxpaged.bench.step_times import full_plan, give_back
from jaxpaged.bench.thunks import Heavy, Program, heaviest, read_trace, shares
from jaxpaged.config import Bucket
from jaxpaged.engine import Engine
from jaxpaged.model.panels import PanelMatrix
from jaxpaged.runner import JaxRunner

# The parts that are told apart -> the scopes of the model's code that are of it. What has none of them is "other".
PARTS = {
    "matmuls": ("matmul",),
    "head": ("head",),
    "attention": ("attention",),
    "norms, rope, elementwise": ("norm", "rope", "mlp"),
    "K/V writes": ("kv_write",),
    "checks": ("checks",),
    "sampling": ("sampling", "prompt_logprobs"),
    "other": ("inputs",),
}
_PART_OF = {scope: part for part, scopes in PARTS.items() for scope in scopes}
BETWEEN = "between thunks"
HOST_PARTS = ("plan", "pad", "options", "dispatch", "wait", "commit", "step", "rest of submit", "rest of step")


@dataclass(frozen=True)
class Part:
    """One part of the program: median seconds of its thunks and their number in a step; what it must move and compute."""

    name: str
    seconds: float
    count: int
    num_bytes: int = 0
    flops: int = 0

    def floor_s(self, limits: machine.Limits) -> float:
        """The least that this machine can take for it; 0 where nothing is known."""
        return max(self.num_bytes / limits.bytes_per_s, self.flops / limits.flops)


@dataclass(frozen=True)
class Profile:
    """A step of `rows` sequences that decode behind `context` tokens, and of `tiles` tiles of prompts that end there."""

    rows: int
    tiles: int
    context: int
    step_s: float  # of the compiled program alone, without the profiler: median
    traced_s: float  # with it
    parts: tuple[Part, ...]
    heaviest: tuple[Heavy, ...]
    limits: machine.Limits
    host_us: dict[str, dict[str, float]]  # "processor time" and "wall" -> part -> median microseconds; empty with tiles

    @property
    def floor_s(self) -> float:
        """Of all parts together."""
        return sum(part.floor_s(self.limits) for part in self.parts)

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        parts = [{**asdict(part), "floor_s": part.floor_s(self.limits)} for part in self.parts]
        return {
            **asdict(self),
            "parts": parts,
            "limits": self.limits._asdict(),
            "heaviest": [one._asdict() for one in self.heaviest],
            "floor_s": self.floor_s,
        }

    def table(self) -> str:
        """For a reader."""
        covered = sum(part.seconds for part in self.parts)
        tiles = f" and {self.tiles} tiles of prompts" if self.tiles else ""
        lines = [
            f"{self.rows} rows{tiles}, context {self.context}: {1e3 * self.step_s:.2f} ms a step "
            f"({1e3 * self.traced_s:.2f} under the profiler), floor {1e3 * self.floor_s:.2f} ms",
            f"memory {self.limits.bytes_per_s / 1e9:.1f} GB/s, products {self.limits.flops / 1e9:.0f} GFLOP/s",
            f"{'part':26}{'ms':>9}{'share':>8}{'thunks':>8}{'floor ms':>10}{'of floor':>10}",
        ]
        for part in self.parts:
            floor = part.floor_s(self.limits)
            beside = f"{1e3 * floor:>10.3f}{part.seconds / floor:>9.1f}x" if floor else f"{'-':>10}{'-':>10}"
            share = part.seconds / covered if covered else 0.0
            lines.append(f"{part.name:26}{1e3 * part.seconds:>9.3f}{share:>8.1%}{part.count or '-':>8}{beside}")
        for one in self.heaviest:
            lines.append(f"{1e3 * one.seconds:9.3f} ms  {one.name}  {one.op_name}")
        for clock, found in self.host_us.items():
            lines.append(
                f"host, us of {clock}: " + ", ".join(f"{name} {found[name]:.0f}" for name in HOST_PARTS if name in found)
            )
        return "\n".join(lines)


def profile(
    engine: Engine,
    *,
    rows: int,
    context: int,
    prefill_tokens: int = 0,
    turns: int = 15,
    num_heaviest: int = 0,
    host_steps: int = 100,
    limits: machine.Limits | None = None,
) -> Profile:
    """Measure.

    Args:
      prefill_tokens: of prompts that are computed in the same step.
      num_heaviest: thunks to name, those that take longest.
      turns: of the program with the profiler, and as many without.
      host_steps: of the engine, to see the host's part; 0 leaves it out.

    Raises:
      ValueError: the pool has too few pages for that.
    """
    runner: JaxRunner = engine.runner  # type: ignore[assignment]
    tile: int = engine.config.prefill_tile  # type: ignore[assignment]
    bucket = Bucket(rows, -(-prefill_tokens // tile))
    limits = limits or machine.measure(engine.config.dtype)
    plan = full_plan(engine, bucket, context)
    if plan is None:
        raise ValueError(f"the pool has too few pages for {rows} rows of {context} tokens: raise num_gpu_blocks_override")
    inputs = runner._pad(plan, bucket, runner._feed).packed(runner.adjuster.plain(rows + bucket.prefill_tiles), None)
    compiled = runner.compiled.get(bucket) or runner._compile(bucket)
    num_context = sum(chunk.end for chunk in plan.decodes) + sum(chunk.end for chunk in plan.prefills)
    num_pairs = sum((chunk.start + chunk.end + 1) * chunk.num_tokens // 2 for chunk in plan.chunks())

    def run() -> None:
        outputs, runner.cache = compiled(runner.weights, runner.cache, inputs)
        jax.block_until_ready((outputs, runner.cache))

    step_s, traced_s, parts, heavy = _parts(compiled.as_text() or "", run, turns, num_heaviest)
    give_back(engine, list(plan.chunks()))
    needs = _needs(engine, bucket, num_context, num_pairs)
    found = tuple(Part(name, *parts.get(name, (0.0, 0)), *needs.get(name, (0, 0))) for name in (*PARTS, BETWEEN))
    host_us = {}
    if host_steps and not bucket.prefill_tiles:
        prompt_len = max(1, context - host_steps // 2)
        for name, clock in (("processor time", time.thread_time), ("wall", time.perf_counter)):
            host_us[name] = host_step.measure(engine, rows, host_steps, prompt_len, clock)
    return Profile(rows, bucket.prefill_tiles, context, step_s, traced_s, found, tuple(heavy), limits, host_us)


def floor_s(engine: Engine, rows: int, context: int, limits: machine.Limits) -> float:
    """The least that this machine can take for a step of sequences that decode behind so many tokens."""
    needs = _needs(engine, Bucket(rows, 0), rows * context, rows * context)
    return sum(Part(name, 0.0, 0, *need).floor_s(limits) for name, need in needs.items())


def _parts(
    text: str, run: Callable[[], None], turns: int, num_heaviest: int
) -> tuple[float, float, dict[str, tuple[float, int]], list[Heavy]]:
    """Seconds of the program without and with the profiler, and of its parts: seconds and thunks. And the heaviest of them."""
    program, seconds, traced = Program.read(text, _PART_OF), [], []
    for _ in range(2):
        run()
    for _ in range(turns):
        seconds.append(_timed(run))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(turns):
                traced.append(_timed(run))
        thunks = read_trace(Path(folder), program.name)
    of_scopes, busy, whole = shares(thunks, program)
    parts = {BETWEEN: (whole - busy, 0)}
    for scope, share in of_scopes.items():
        name = _PART_OF.get(scope, "other")
        before = parts.get(name, (0.0, 0))
        parts[name] = before[0] + share.seconds, before[1] + share.count
    return statistics.median(seconds), statistics.median(traced), parts, heaviest(thunks, program, num_heaviest)


def _timed(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _needs(engine: Engine, bucket: Bucket, num_context: int, num_pairs: int) -> dict[str, tuple[int, int]]:
    """Part -> the bytes that it must read and write, and the operations. Each weight is read once, of the cache what is attended.

    `num_context` tokens lie in the cache, `num_pairs` of them and queries meet.
    """
    model, runner = engine.model, engine.runner
    num_tokens = bucket.decode_rows + bucket.prefill_tiles * engine.config.prefill_tile  # type: ignore[operator]
    num_sampling = bucket.decode_rows + bucket.prefill_tiles
    weights = runner.weights  # type: ignore[attr-defined]
    head = weights.embed if weights.lm_head is None else weights.lm_head
    of_layers = [
        one for one in jax.tree.leaves(weights.layers, is_leaf=lambda one: isinstance(one, PanelMatrix)) if len(one.shape) > 1
    ]
    token_bytes = model.page_bytes(1, engine.config.kv_cache_dtype)
    attention_flops = 4 * num_pairs * model.num_heads * model.head_dim * model.num_layers
    return {
        "matmuls": (
            sum(array.nbytes for array in jax.tree.leaves(of_layers)),
            2 * num_tokens * sum(math.prod(one.shape) for one in of_layers),
        ),
        "head": (sum(leaf.nbytes for leaf in jax.tree.leaves(head)), 2 * num_sampling * model.vocab_size * model.hidden_size),
        "attention": (num_context * token_bytes, attention_flops),
        "K/V writes": (num_tokens * token_bytes, 0),
        "sampling": (4 * num_sampling * model.vocab_size, 0),
    }
