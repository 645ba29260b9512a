"""Asynchronous beside synchronous scheduling, and where a step's time goes: `python -m jaxpaged.bench.scheduling`.

Two engines on one model, with and without `async_scheduling`, decode the same prompts in turn. Tokens count from the step in
which the last sequence gets its first one to the first end of a sequence. Of the two, medians are reported, and of their ratio
the median over turns, because a shared machine's speed changes by the minute.

The parts of a step are timed from outside: plan; pad, the arrays of its inputs; dispatch, the rest of handing it to the device;
wait, for its tokens to be here; commit; and other, such as the flight recorder. All but wait is host time. Where the device is
the CPU, it takes cores from the host and the host from it, and dispatch may hold some of the step itself.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence as Seq
from typing import Any

from jaxpaged.bench.ratios import spread
from jaxpaged.bench.stopwatch import Stopwatch
from jaxpaged.engine import Engine
from jaxpaged.host.request import SamplingParams
from jaxpaged.llm import LLM

PARTS = ("plan", "pad", "dispatch", "wait", "commit", "other")
NAMES = {False: "synchronous", True: "asynchronous"}


def watch_parts(engine: Engine, watch: Stopwatch) -> None:
    """Time what a step consists of. `submit` holds `pad`, and `step` everything."""
    watch.watch(engine.scheduler, "plan", "plan")
    watch.watch(engine.scheduler, "commit", "commit")
    watch.watch(engine.runner, "_pad", "pad")
    watch.watch(engine.runner, "submit", "submit", lambda wait: watch.timed(wait, "wait"))
    watch.watch(engine, "step", "step")


def take_turn(engine: Engine, prompts: Seq[list[int]], num_tokens: int) -> dict[str, float]:
    """Tokens per second while all of them decode, and milliseconds of each part of a step."""
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    begun = {engine.add_request(prompt, params).request_id: False for prompt in prompts}
    with Stopwatch() as watch:
        watch_parts(engine, watch)  # before what counts, so that the wait for a step that is then in flight is timed
        while not all(begun.values()):
            for event in engine.step():
                begun[event.request_id] = True
                if event.finish_reason is not None:
                    raise RuntimeError("the sequences never decoded together: raise --output-len")
        num_tokens = num_steps = 0
        watch.seconds.clear()
        started = time.perf_counter()
        events = []
        while not any(event.finish_reason for event in events):
            events = engine.step()
            num_tokens, num_steps = num_tokens + len(events), num_steps + 1
        seconds = time.perf_counter() - started
        parts = dict(watch.seconds)
    while engine.has_unfinished:
        engine.step()
    parts["dispatch"] = parts["submit"] - parts["pad"]
    parts["other"] = seconds - sum(parts[name] for name in ("plan", "submit", "wait", "commit"))
    found = {f"{name}_ms": 1e3 * parts[name] / num_steps for name in PARTS}
    return {
        "tokens_per_s": num_tokens / seconds,
        "step_ms": 1e3 * seconds / num_steps,
        "host_share": 1 - parts["wait"] / seconds,
        **found,
    }


def compare(
    engines: dict[bool, Engine], num_seqs: Seq[int], *, rounds: int, length: int, num_tokens: int
) -> list[dict[str, Any]]:
    """Every number of sequences, every engine, in turn; one turn before does not count.

    Args:
      engines: by whether they schedule asynchronously.
    """
    rng = random.Random(0)
    turns: dict[int, dict[bool, list[dict[str, float]]]] = {count: {False: [], True: []} for count in num_seqs}
    for turn in range(rounds + 1):
        for count in num_seqs:
            prompts = [[rng.randrange(engines[True].model.vocab_size) for _ in range(length)] for _ in range(count)]
            for is_async in (False, True) if turn % 2 else (True, False):
                found = take_turn(engines[is_async], prompts, num_tokens)
                if turn:
                    turns[count][is_async].append(found)
    return [summary(count, both) for count, both in turns.items()]


def summary(count: int, turns: dict[bool, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians of both engines, and of the ratio of each turn's tokens/s the median, the quartiles, the lowest and the highest."""
    ratios = [a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(turns[True], turns[False], strict=True)]
    medians = {
        NAMES[is_async]: {name: statistics.median(turn[name] for turn in several) for name in several[0]}
        for is_async, several in turns.items()
    }
    return {"num_seqs": count, **medians, **spread(ratios)}


def table(rows: Seq[dict[str, Any]]) -> str:
    """The summaries for a reader."""
    line = ("{:>9} {:13} {:>9} {:>8} {:>11}" + " {:>8}" * len(PARTS)).format
    lines = [line("sequences", "scheduling", "tokens/s", "ms/step", "host share", *PARTS)]
    for row in rows:
        for name in NAMES.values():
            found = row[name]
            parts = (f"{found[f'{part}_ms']:.3f}" for part in PARTS)
            rate, step = f"{found['tokens_per_s']:,.0f}", f"{found['step_ms']:.2f}"
            lines.append(line(row["num_seqs"], name, rate, step, f"{found['host_share']:.0%}", *parts))
        half = "half within {:.3f}-{:.3f}".format(*row["quartiles"])
        spread = f"{half}, all within {row['lowest']:.3f}-{row['highest']:.3f}"
        lines.append(f"{'':10}asynchronous over synchronous: {row['ratio']:.3f} ({spread})")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m jaxpaged.bench.scheduling", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", help="a directory or hub id (default: the bundled model)")
    parser.add_argument("--num-seqs", default="1,8,32", help="sequences at a time, separated by commas (%(default)s)")
    parser.add_argument("--input-len", type=int, default=64, help="tokens of each prompt (%(default)s)")
    parser.add_argument("--output-len", type=int, default=128, help="tokens of each answer (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each, after one that does not count (%(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args(argv)
    num_seqs = [int(word) for word in args.num_seqs.split(",")]
    if min(num_seqs) < 1 or args.output_len < 3 or min(args.input_len, args.rounds) < 1:
        parser.error("expected whole numbers of at least 1, and --output-len of at least 3")

    options = {"model": args.model, "skip_tokenizer_init": True, "use_tqdm_on_load": False, "max_num_seqs": max(num_seqs)}
    with LLM(**options, async_scheduling=False) as plain, LLM(**options, async_scheduling=True) as ahead:
        engines = {False: plain.engine, True: ahead.engine}
        rows = compare(engines, num_seqs, rounds=args.rounds, length=args.input_len, num_tokens=args.output_len)
    print(json.dumps({"args": vars(args), "rows": rows}) if args.json else table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
