"""What plain greedy rows pay for the options that they do not use: `python -m jaxpaged.bench.plain_step`.

The engine's compiled step beside one that only takes the largest logit and checks that all are finite, on the same weights, pages
and inputs of a batch that decodes, in turn within one run. Medians, and of each turn's ratio the median and how far it goes.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from jaxpaged.bench.models import open_engine
from jaxpaged.bench.ratios import spread
from jaxpaged.bench.step_times import full_plan
from jaxpaged.config import Bucket, ModelConfig
from jaxpaged.engine import Engine
from jaxpaged.model.cache import KVCache
from jaxpaged.model.step import StepInputs, forward_paged, sampled_logits
from jaxpaged.model.weights import Weights
from jaxpaged.runner import JaxRunner, attention_backend

CONTEXT = 96  # tokens of each row


def bare(
    weights: Weights, cache: KVCache, inputs: StepInputs, *, config: ModelConfig, backend: Any
) -> tuple[tuple[jax.Array, jax.Array], KVCache]:
    """A step that can do nothing but be greedy."""
    hidden, cache = forward_paged(weights, cache, inputs.fed_tokens(), config=config, backend=backend)
    scores = sampled_logits(weights, hidden, inputs, config=config, backend=backend)
    return (jnp.argmax(scores, axis=-1).astype(jnp.int32), jnp.all(jnp.isfinite(scores), axis=-1)), cache


def measure(engine: Engine, rows: int, turns: int, steps: int) -> dict[str, Any]:
    """Seconds of a step of both, in turn."""
    runner: JaxRunner = engine.runner  # type: ignore[assignment]
    bucket = Bucket(rows, 0)
    plan = full_plan(engine, bucket, CONTEXT)
    if plan is None:
        raise RuntimeError(f"the pool has too few pages for {rows} rows of {CONTEXT} tokens")
    padded = runner._pad(plan, bucket, runner._feed)
    rest = runner.adjuster.plain(rows), None
    inputs = padded.whole(*rest)
    backend = attention_backend(engine.config, engine.model)
    jitted = jax.jit(functools.partial(bare, config=engine.model, backend=backend), donate_argnums=1)
    ways = {
        "whole": (runner._compile(bucket), padded.packed(*rest)),
        "bare": (jitted.lower(runner.weights, runner.cache, inputs).compile(), inputs),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(turns + 1):
        for way in ways if turn % 2 else reversed(ways):
            started = time.perf_counter()
            for _ in range(steps):
                run, given = ways[way]
                outputs, runner.cache = run(runner.weights, runner.cache, given)
                jax.block_until_ready(outputs)
            if turn:  # the first is a warm-up
                seconds[way].append((time.perf_counter() - started) / steps)
    found = {f"{way}_ms": 1e3 * statistics.median(times) for way, times in seconds.items()}
    found["of_minima"] = min(seconds["whole"]) / min(seconds["bare"])  # what a busy machine disturbs least
    return found | spread([one / other for one, other in zip(seconds["whole"], seconds["bare"], strict=True)])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled", choices=("bundled", "135M"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", default="1,8,32")
    parser.add_argument("--turns", type=int, default=31)
    parser.add_argument("--steps", type=int, default=20, help="of a turn")
    arguments = parser.parse_args()
    for rows in map(int, arguments.rows.split(",")):
        options: dict[str, Any] = {"dtype": arguments.dtype, "max_num_seqs": rows, "decode_row_buckets": (rows,)}
        options |= {"max_model_len": 256, "async_scheduling": False, "flight_recorder_bytes": 0, "enforce_eager": True}
        with open_engine(None if arguments.model == "bundled" else arguments.model, **options) as engine:
            found = measure(engine, rows, arguments.turns, arguments.steps)
        print(f"{arguments.model}, {arguments.dtype}, {rows} rows:", {name: _shown(value) for name, value in found.items()})


def _shown(value: Any) -> Any:
    return f"{value:.3f}" if isinstance(value, float) else [f"{one:.3f}" for one in value]


if __name__ == "__main__":
    main()
