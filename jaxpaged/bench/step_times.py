"""Seconds of this machine's steps: `python -m jaxpaged.bench.step_times --output steps.json`, for `simulate --step-times`.

Every compiled shape is filled and run at a few lengths of context, through the runner, as the engine does: from the plan to the
tokens on the host. Shapes take turns, so that a slow minute of the machine does not fall on one of them; medians are written.
Planning and committing are left out: the simulator leaves them out too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import time
from collections.abc import Sequence as Seq
from pathlib import Path

from jaxpaged.config import Bucket
from jaxpaged.engine import Engine
from jaxpaged.host.plan import Chunk, StepPlan
from jaxpaged.host.request import Request, SamplingParams, Sequence
from jaxpaged.llm import LLM

logger = logging.getLogger("jaxpaged")


def full_plan(engine: Engine, bucket: Bucket, context: int) -> StepPlan | None:
    """A plan that fills a bucket: rows of `context` tokens, and prompts whose last tile ends there or as early as it can.

    It owns its pages, which `give_back` frees; None when the pool has too few.
    """
    tile, limit = engine.config.prefill_tile or 1, engine.config.max_model_len or 1
    spans = [(context - 1, context)] * bucket.decode_rows
    tiles_left = bucket.prefill_tiles
    while tiles_left:
        num_tokens = min(tiles_left, max(1, limit // tile)) * tile
        end = min(max(context, num_tokens), limit)
        spans.append((max(0, end - num_tokens), end))
        tiles_left -= num_tokens // tile
    chunks: list[Chunk] = []
    for number, (start, end) in enumerate(spans):
        pages = engine.pool.allocate(-(-end // engine.config.block_size))  # type: ignore[operator]
        if pages is None:
            give_back(engine, chunks)
            return None
        params = SamplingParams(temperature=0)
        request = Request(str(number), (0,) * end, params, seed=0, max_len=limit, stop_ids=frozenset(), arrival_s=0.0)
        sequence = Sequence(request, tokens=[0] * end, pages=pages, num_computed=start)
        chunks.append(Chunk(sequence, start, end - start, True))
    return StepPlan(tuple(chunks[: bucket.decode_rows]), tuple(chunks[bucket.decode_rows :]))


def give_back(engine: Engine, chunks: Seq[Chunk]) -> None:
    """Free the pages of a plan's sequences."""
    for chunk in chunks:
        engine.pool.free(chunk.sequence.pages)


def measure(engine: Engine, contexts: Seq[int], rounds: int) -> list[dict[str, float]]:
    """Medians, as entries of the file."""
    points = list(itertools.product(engine.config.buckets(), contexts))
    seconds: dict[tuple[Bucket, int], list[float]] = {}
    for turn in range(rounds + 1):
        for bucket, context in points:
            plan = full_plan(engine, bucket, context)
            if plan is None:
                continue
            started = time.perf_counter()
            engine.runner.submit(plan)()
            taken = time.perf_counter() - started
            chunks = plan.chunks()
            give_back(engine, chunks)
            if turn:  # the first does not count: it compiles where the engine compiles late
                seconds.setdefault((bucket, sum(chunk.end for chunk in chunks)), []).append(taken)
    missing = {bucket for bucket, _ in points} - {bucket for bucket, _ in seconds}
    if missing:
        logger.warning("%d shapes have more rows than the pool has pages and are left out", len(missing))
    return [
        {
            "decode_rows": bucket.decode_rows,
            "prefill_tiles": bucket.prefill_tiles,
            "num_context": num_context,
            "seconds": statistics.median(taken),
        }
        for (bucket, num_context), taken in sorted(seconds.items())
    ]


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m jaxpaged.bench.step_times", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", help="a directory or hub id (default: the bundled model)")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-num-seqs", type=int)
    parser.add_argument("--max-num-batched-tokens", type=int)
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--block-size", type=int)
    parser.add_argument("--contexts", help="tokens of each row, with commas (default: 1, a half and all of max_model_len)")
    parser.add_argument("--rounds", type=int, default=9, help="measurements of each, in turn (%(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="the file to write")
    args = parser.parse_args(argv)
    names = ("model", "dtype", "max_num_seqs", "max_num_batched_tokens", "max_model_len", "block_size")
    with LLM(**{name: getattr(args, name) for name in names}, skip_tokenizer_init=True, use_tqdm_on_load=False) as llm:
        limit: int = llm.config.max_model_len  # type: ignore[assignment]
        contexts = [int(word) for word in args.contexts.split(",")] if args.contexts else [1, limit // 2, limit]
        if not all(1 <= context <= limit for context in contexts):
            parser.error(f"--contexts: expected whole numbers in [1, {limit}]")
        steps = measure(llm.engine, contexts, args.rounds)
        options = {name: getattr(llm.config, name) for name in (*names[1:], "prefill_tile")}
    args.output.write_text(json.dumps({"options": options, "steps": steps}, indent=1))
    print(f"{len(steps)} measurements of {len({(s['decode_rows'], s['prefill_tiles']) for s in steps})} shapes in {args.output}")
    print("simulate with the same options:", " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
