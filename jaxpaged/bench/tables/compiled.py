"""The compiled step against the same step, operation by operation."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp

from jaxpaged.bench.tables.measuring import Row, Settings, in_turn
from jaxpaged.model import step as model_step
from jaxpaged.runner import attention_backend

name = "compiled"
title = "Compiled against operation by operation"
text = "A decode step of the model as one compiled program, and without `jit`: each operation is a program of its own then."

CONTEXT = 64


def run(settings: Settings) -> list[Row]:
    """Milliseconds of a step by rows."""
    sizes = settings.pick((1, 8, 32), (1, 8), (1,))
    sides = {}
    with settings.engine(max_num_seqs=max(sizes), max_model_len=2 * CONTEXT) as engine:
        runner, model, pages_each = engine.runner, engine.model, -(-CONTEXT // engine.config.block_size)  # type: ignore[operator]
        backend = attention_backend(engine.config, model)

        def decode(*arrays: Any) -> tuple[jax.Array, Any]:
            return model_step.decode(runner.weights, runner.cache, *arrays, config=model, backend=backend)  # type: ignore[attr-defined]

        for rows in sizes:
            tables = 1 + jnp.arange(rows * pages_each, dtype=jnp.int32).reshape(rows, pages_each)
            arrays = jnp.ones(rows, jnp.int32), tables, jnp.full(rows, CONTEXT, jnp.int32)
            # Neither gives the pages away, so both copy them.
            for way, call in (("compiled", jax.jit(decode)), ("operation by operation", decode)):
                sides[way, rows] = lambda call=call, arrays=arrays: _timed(call, arrays)
        found = in_turn(sides, settings.rounds)
    return [{"way": way, "rows": rows, **row} for (way, rows), row in found.items()]


def _timed(call: Any, arrays: tuple[jax.Array, ...]) -> Row:
    started = time.perf_counter()
    jax.block_until_ready(call(*arrays))
    return {"step_ms": 1e3 * (time.perf_counter() - started)}


def figure(rows: list[Row], axes: Any) -> None:
    """A line for each way."""
    for way in dict.fromkeys(row["way"] for row in rows):
        own = [row for row in rows if row["way"] == way]
        axes.plot([row["rows"] for row in own], [row["step_ms"] for row in own], marker="o", label=way)
    axes.set_yscale("log")
    axes.set_ylim(bottom=min(row["step_ms"] for row in rows) / 2)
    axes.set_xlabel("sequences")
    axes.set_ylabel("ms a step")
    axes.legend()
