"""What `batch_invariant` costs: `python -m jaxpaged.bench.batch_invariant`.

Two engines on one model, without and with it, serve the same requests in turn. Prompts and decoding count apart: prompt tokens
per second until the last sequence has its first token, and new tokens per second from there to the first end of a sequence. Of
both, medians are reported, and of their ratio, with over without, the median over turns, because a shared machine changes.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from jaxpaged.bench.decode import SHAPE_135M
from jaxpaged.bench.ratios import spread
from jaxpaged.config import EngineConfig, ModelConfig
from jaxpaged.demo import MODEL_DIR
from jaxpaged.engine import Engine
from jaxpaged.host.request import SamplingParams
from jaxpaged.llm import LLM
from jaxpaged.model import weights as model_weights

METRICS = {"prompt_tokens_per_s": "prompts", "new_tokens_per_s": "decoding"}


@contextmanager
def open_engines(name: str, dtype: str, num_seqs: int, length: int, num_tokens: int) -> Iterator[dict[bool, Engine]]:
    """An engine without and one with `batch_invariant`.

    Args:
      name: bundled, 135M for random weights of that shape, or a directory.
      num_seqs: at a time.
      length, num_tokens: of each prompt and answer.
    """
    options: dict[str, Any] = {"dtype": dtype, "max_num_seqs": num_seqs, "max_model_len": length + num_tokens}
    # Steps for one prompt and for many, one row and many, and no others.
    options |= {"enable_prefix_caching": False, "prefill_tile": 16, "prefill_tile_buckets": (-(-length // 16),)}
    engines = {}
    for is_on in (False, True):
        if name == "135M":
            model = ModelConfig.from_hf({**SHAPE_135M, "dtype": dtype})
            weights = model_weights.init(model, jax.random.key(0), dtype)
            engines[is_on] = Engine.from_weights(EngineConfig(**options, batch_invariant=is_on), model, weights)
        else:
            directory = str(MODEL_DIR) if name == "bundled" else name
            llm = LLM(directory, **options, batch_invariant=is_on, skip_tokenizer_init=True, use_tqdm_on_load=False)
            engines[is_on] = llm.engine
    try:
        yield engines
    finally:
        for engine in engines.values():
            engine.close()


def take_turn(engine: Engine, prompts: Seq[list[int]], num_tokens: int) -> dict[str, float]:
    """Serve the prompts: prompt tokens per second, then new tokens per second.

    Raises:
      RuntimeError: a sequence ended before the last one began.
    """
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    started = time.perf_counter()
    waiting = {engine.add_request(prompt, params).request_id for prompt in prompts}
    while waiting:
        for event in engine.step():
            waiting.discard(event.request_id)
            if event.finish_reason is not None:
                raise RuntimeError("the sequences never decoded together: raise --output-len")
    begun = time.perf_counter()
    count, is_over = 0, False
    while not is_over:
        events = engine.step()
        count, is_over = count + len(events), any(event.finish_reason for event in events)
    ended = time.perf_counter()
    while engine.has_unfinished:
        engine.step()
    return {
        "prompt_tokens_per_s": sum(map(len, prompts)) / (begun - started),
        "new_tokens_per_s": count / (ended - begun),
    }


def compare(
    engines: dict[bool, Engine], num_seqs: Seq[int], *, rounds: int, length: int, num_tokens: int
) -> list[dict[str, Any]]:
    """Every number of sequences, both engines, in turn; one turn before does not count.

    Args:
      engines: by whether they are batch-invariant.
    """
    rng = random.Random(0)
    turns: dict[int, list[dict[bool, dict[str, float]]]] = {count: [] for count in num_seqs}
    for turn in range(rounds + 1):
        for count in num_seqs:
            prompts = [[rng.randrange(engines[True].model.vocab_size) for _ in range(length)] for _ in range(count)]
            order = (False, True) if turn % 2 else (True, False)
            found = {is_on: take_turn(engines[is_on], prompts, num_tokens) for is_on in order}
            if turn:
                turns[count].append(found)
    return [summary(count, several) for count, several in turns.items()]


def summary(count: int, turns: Seq[dict[bool, dict[str, float]]]) -> dict[str, Any]:
    """Medians without and with, and of each turn's ratio the median and how far it goes."""
    row: dict[str, Any] = {"num_seqs": count}
    for metric in METRICS:
        off, on = ([turn[is_on][metric] for turn in turns] for is_on in (False, True))
        row[metric] = {"off": statistics.median(off), "on": statistics.median(on)}
        row[metric] |= spread([b / a for a, b in zip(off, on, strict=True)])
    return row


def table(rows: Seq[dict[str, Any]]) -> str:
    """The summaries of one model for a reader."""
    line = "{:>9} {:10} {:>12} {:>12} {:>7} {:>14} {:>14}".format
    lines = [line("sequences", "", "without /s", "with /s", "ratio", "half within", "all within")]
    for row in rows:
        for metric, words in METRICS.items():
            found = row[metric]
            ranges = "{:.2f}-{:.2f}".format(*found["quartiles"]), f"{found['lowest']:.2f}-{found['highest']:.2f}"
            values = f"{found['off']:,.0f}", f"{found['on']:,.0f}", f"{found['ratio']:.2f}"
            lines.append(line(row["num_seqs"], words, *values, *ranges))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m jaxpaged.bench.batch_invariant", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", default="bundled,135M", help="with commas: these or directories (%(default)s)")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="with commas (%(default)s)")
    parser.add_argument("--num-seqs", default="1,16", help="sequences at a time, with commas (%(default)s)")
    parser.add_argument("--input-len", type=int, default=128, help="tokens of each prompt (%(default)s)")
    parser.add_argument("--output-len", type=int, default=32, help="tokens of each answer (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each, after one that does not count (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args(argv)
    num_seqs = [int(word) for word in args.num_seqs.split(",")]
    if min(num_seqs) < 1 or args.output_len < 3 or min(args.input_len, args.rounds) < 1:
        parser.error("expected whole numbers of at least 1, and --output-len of at least 3")

    reports = []
    for name in args.models.split(","):
        for dtype in args.dtypes.split(","):
            with open_engines(name, dtype, max(num_seqs), args.input_len, args.output_len) as engines:
                sizes = {"rounds": args.rounds, "length": args.input_len, "num_tokens": args.output_len}
                rows = compare(engines, num_seqs, **sizes)
            reports.append({"model": name, "dtype": dtype, "rows": rows})
            print(f"{name}, {dtype}", table(rows), sep="\n", end="\n\n", flush=True)
    if args.json:
        options = {name: str(value) for name, value in vars(args).items()}
        args.json.write_text(json.dumps({"args": options, "jax": jax.__version__, "reports": reports}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
