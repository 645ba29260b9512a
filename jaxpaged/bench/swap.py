"""Recompute beside swap: how a preempted sequence comes back sooner, by its length: `python -m jaxpaged.bench.swap`.

One sequence, alone in an engine, has to give way and comes back at once, by recompute and by swap in turn. What the request sees
is the time from there to its next token: with swap its full pages are saved to host memory, loaded into other pages, and the rest
of its tokens computed; with recompute all of them, in the chunks that the scheduler plans. What the device sees is the part of it
inside the runner, without planning and padding. Of both, medians are reported, and of their ratio the median over turns.

The preemption is forced from outside. A pool that is too small would bring it about as well, but only with an older sequence,
whose steps would be in the time, and whose next pages would push the victim's out one by one. Here somebody takes all pages at
that moment and gives them back, so that nothing is left on the device. This is swap at its worst: a save that runs beside the
steps of others is free to the one who waits. Each turn checks the counters of pages and of tokens computed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import statistics
import time
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import jax

from jaxpaged.bench.decode import SHAPE_135M
from jaxpaged.bench.ratios import spread
from jaxpaged.bench.stopwatch import Stopwatch
from jaxpaged.checkpoint.configuration import read_config
from jaxpaged.config import EngineConfig, ModelConfig
from jaxpaged.demo import DRAFT_DIR, MODEL_DIR
from jaxpaged.engine import Engine
from jaxpaged.host.preemption import SwapCosts, is_worth_keeping
from jaxpaged.host.request import SamplingParams
from jaxpaged.host.scheduler import MAX_PREEMPTIONS
from jaxpaged.llm import LLM
from jaxpaged.model import weights as model_weights

WAYS = ("recompute", "swap")
METRICS = ("request", "device")
TURNS_EACH = (MAX_PREEMPTIONS - 1) // len(WAYS)  # of one request; one more preemption and it would be protected
DIRECTORIES = {"bundled": MODEL_DIR, "draft": DRAFT_DIR}


def open_engine(name: str, dtype: str, longest: int) -> Engine:
    """An engine with room for one sequence, on the device and in host memory.

    Args:
      name: bundled, draft (the bundled model's small companion), 135M for random weights of that shape, or a directory.
      longest: tokens of the longest sequence that is preempted.
    """
    is_random = name == "135M"
    directory = DIRECTORIES.get(name, Path(name))
    model = ModelConfig.from_hf({**SHAPE_135M, "dtype": dtype}) if is_random else read_config(directory)
    options: dict[str, Any] = {"dtype": dtype, "max_num_seqs": 1, "async_scheduling": False, "flight_recorder_bytes": 0}
    options["max_model_len"] = longest + MAX_PREEMPTIONS
    resolved = EngineConfig(**options).resolved(model, jax.default_backend())
    num_pages = resolved.max_blocks_per_seq
    options["swap_space"] = num_pages * model.page_bytes(resolved.block_size, resolved.kv_cache_dtype) / 2**30  # type: ignore[arg-type]
    options |= {"num_gpu_blocks_override": 2 * num_pages + 1, "preemption_mode": "auto"}  # auto: the engine measures its costs
    if not is_random:
        return LLM(str(directory), **options, skip_tokenizer_init=True, use_tqdm_on_load=False).engine
    return Engine.from_weights(EngineConfig(**options), model, model_weights.init(model, jax.random.key(0), dtype))


def come_back(engine: Engine, way: str) -> dict[str, float]:
    """Preempt the only sequence, leave none of its pages on the device, and wait for its next token: seconds of each metric.

    Raises:
      RuntimeError: its pages did not go the way they should have.
    """
    scheduler, pool = engine.scheduler, engine.pool
    (sequence,) = scheduler.running
    pool.tier.clear()  # type: ignore[union-attr]  # what was saved in another turn
    scheduler.preemption_mode = way
    page_size = scheduler.limits.page_size
    num_pages = sequence.num_computed // page_size if way == "swap" else 0
    expected = [num_pages, num_pages, sequence.num_tokens - num_pages * page_size]
    before, plans = engine.stats(), []
    with Stopwatch() as watch:
        watch.watch(scheduler, "plan", "plan", lambda plan: plans.append(plan) or plan)
        watch.watch(engine.runner, "_pad", "pad")
        watch.watch(engine.runner, "submit", "submit", lambda wait: watch.timed(wait, "wait"))
        started = time.perf_counter()
        scheduler._preempt(sequence)
        pool.free(pool.allocate(pool.num_free) or ())
        while not engine.step():
            pass
        taken = time.perf_counter() - started
    after = engine.stats()
    found = [after[counter] - before[counter] for counter in ("num_blocks_swapped_out", "num_blocks_swapped_in")]
    found.append(sum(plan.num_tokens for plan in plans))
    if found != expected:
        raise RuntimeError(f"{way}: pages saved, pages loaded and tokens computed were {found}, expected {expected}")
    return {"request": taken, "device": watch.seconds["submit"] - watch.seconds["pad"] + watch.seconds["wait"]}


def live(engine: Engine, rng: random.Random, length: int, turns: int, first: int) -> list[dict[str, dict[str, float]]]:
    """The turns of one request, each by all ways; it has `length` tokens when it is first preempted, and a few more at the end.

    Args:
      first: the number of the first turn: the ways of odd ones go in the other order.
    """
    prompt = [rng.randrange(engine.model.vocab_size) for _ in range(length - 1)]
    params = SamplingParams(temperature=0, max_tokens=MAX_PREEMPTIONS, ignore_eos=True)
    request_id = engine.add_request(prompt, params).request_id
    while not engine.step():
        pass
    found = []
    for turn in range(first, first + turns):
        found.append({way: come_back(engine, way) for way in (reversed(WAYS) if turn % 2 else WAYS)})
    engine.abort(request_id)
    engine.reset_prefix_cache()
    return found


def measure(engine: Engine, lengths: Seq[int], *, rounds: int, seconds: float) -> dict[int, list[dict[str, dict[str, float]]]]:
    """Turns of every length, which go round until each has `rounds`, or as many as one request takes and the time is up."""
    rng, started = random.Random(0), time.perf_counter()
    turns: dict[int, list[dict[str, dict[str, float]]]] = {length: [] for length in lengths}
    live(engine, rng, max(lengths), 1, 0)  # touches the memory of all slots for the first time, and does not count
    for first in range(0, rounds, TURNS_EACH):
        if first and time.perf_counter() - started > seconds:
            break
        for length in lengths:
            turns[length] += live(engine, rng, length, min(TURNS_EACH, rounds - first), first)
    return turns


def summary(length: int, turns: Seq[dict[str, dict[str, float]]], page_size: int, costs: SwapCosts) -> dict[str, Any]:
    """Medians of both ways, and of each turn's ratio of swap to recompute the median and how far it goes; what auto chooses."""
    num_pages = (length - 1) // page_size  # the last token is sampled and has no place yet
    row: dict[str, Any] = {"tokens": length, "pages": num_pages, "turns": len(turns)}
    for metric in METRICS:
        row[metric] = {f"{way}_ms": 1e3 * statistics.median(turn[way][metric] for turn in turns) for way in WAYS}
        row[metric] |= spread([turn["swap"][metric] / turn["recompute"][metric] for turn in turns])
    row["auto"] = WAYS[is_worth_keeping("auto", num_pages * page_size, num_pages, costs)]
    low, high = row["request"]["quartiles"]
    row["is_right"] = (row["auto"] == "swap") == (row["request"]["ratio"] < 1)
    row["is_clear"] = high < 1 or low > 1
    return row


def crossover(lengths: Seq[int], ratios: Seq[float]) -> float | str:
    """Tokens from which on swap is sooner, on a straight line between two lengths; always or never where there is no such place.

    Where noise makes it several the last counts: from there on swap is sooner at every length that was measured.
    """
    last = max((index for index, ratio in enumerate(ratios) if ratio >= 1), default=None)
    if last is None:
        return "always"
    if last == len(ratios) - 1:
        return "never"
    above, below = ratios[last : last + 2]
    return lengths[last] + (lengths[last + 1] - lengths[last]) * (above - 1) / (above - below)


def auto_begins(limit: int, page_size: int, costs: SwapCosts) -> int | str:
    """Tokens from which on auto swaps; never where that is above `limit`."""
    counts = range(1, limit // page_size + 1)
    first = next((count for count in counts if is_worth_keeping("auto", count * page_size, count, costs)), None)
    return "never" if first is None else first * page_size


def report(name: str, engine: Engine, turns: dict[int, list[dict[str, dict[str, float]]]]) -> dict[str, Any]:
    """What was found on one engine.

    `auto_right_where_clear` counts only lengths at which the middle half of the turns agrees on who is sooner; `auto_loss` is the
    time that auto takes over all lengths, beyond that of the right choices, as a share.
    """
    page_size, costs = engine.scheduler.limits.page_size, engine.scheduler.costs
    rows = [summary(length, of, page_size, costs) for length, of in turns.items()]
    lengths = list(turns)
    chosen = sum(row["request"][f"{row['auto']}_ms"] for row in rows)
    clear = [row["is_right"] for row in rows if row["is_clear"]]
    best = sum(min(row["request"][f"{way}_ms"] for way in WAYS) for row in rows)
    return {
        "model": name,
        "dtype": engine.config.dtype,
        "page_bytes": engine.model.page_bytes(page_size, engine.config.kv_cache_dtype),  # type: ignore[arg-type]
        "costs": dataclasses.asdict(costs),
        "rows": rows,
        "crossover": {metric: crossover(lengths, [row[metric]["ratio"] for row in rows]) for metric in METRICS},
        "auto_begins": auto_begins(max(lengths), page_size, costs),
        "auto_right": sum(row["is_right"] for row in rows) / len(rows),
        "auto_right_where_clear": sum(clear) / len(clear) if clear else None,
        "num_clear": len(clear),
        "auto_loss": chosen / best - 1,
    }


def table(found: dict[str, Any]) -> str:
    """A report for a reader."""
    costs = {name.removesuffix("_s"): f"{1e6 * seconds:.3g}" for name, seconds in found["costs"].items()}
    lines = [f"{found['model']}, {found['dtype']}, pages of {found['page_bytes'] / 1024:g} KiB; measured at the start, in us: "]
    lines[0] += ", ".join(f"{name} {value}" for name, value in costs.items())
    heads = "recompute", "swap", "ratio", "half within", "all within", "recompute", "swap", "ratio", "auto", "right"
    line = "{:>6} {:>5} {:>5} {:>11} {:>9} {:>7} {:>12} {:>12} {:>11} {:>9} {:>7} {:>10} {:>6}".format
    lines.append(line("", "", "", "request, ms:", *[""] * 4, "device, ms:", *[""] * 4).rstrip())
    lines.append(line("tokens", "pages", "turns", *heads))
    for row in found["rows"]:
        request, device = row["request"], row["device"]
        words = [f"{request[f'{way}_ms']:.2f}" for way in WAYS] + [f"{request['ratio']:.2f}"]
        words += ["{:.2f}-{:.2f}".format(*request["quartiles"]), f"{request['lowest']:.2f}-{request['highest']:.2f}"]
        words += [f"{device[f'{way}_ms']:.2f}" for way in WAYS] + [f"{device['ratio']:.2f}"]
        words += [row["auto"], "yes" if row["is_right"] else "no"]
        lines.append(line(row["tokens"], row["pages"], row["turns"], *words))
    request, device, auto = (_tokens(value) for value in (*found["crossover"].values(), found["auto_begins"]))
    lines.append(f"swap is sooner from: {request} as the request sees it, {device} as the device does; auto swaps from: {auto}")
    right = f"auto is right at {found['auto_right']:.0%} of {len(found['rows'])} lengths"
    if found["num_clear"]:
        right += f", at {found['auto_right_where_clear']:.0%} of the {found['num_clear']} where the better way is clear"
    lines.append(f"{right}, and takes {found['auto_loss']:.1%} longer than the best choices")
    return "\n".join(lines)


def _tokens(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.0f} tokens"


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m jaxpaged.bench.swap", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", default="draft,bundled,135M", help="with commas: these or directories (%(default)s)")
    parser.add_argument("--dtypes", default="float32", help="with commas (%(default)s)")
    # Half a page beyond whole pages, which is the rest that a sequence has on average.
    parser.add_argument("--lengths", default="24,40,56,72,136,264,520,1000", help="tokens when it is preempted (%(default)s)")
    parser.add_argument("--rounds", type=int, default=30, help="turns of each length, at most (%(default)s)")
    parser.add_argument("--seconds", type=float, default=40, help="after which no more rounds begin with a model (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args(argv)
    lengths = sorted({int(word) for word in args.lengths.split(",")})
    if lengths[0] < 2 or args.rounds < 1:
        parser.error("expected --lengths of at least 2, and --rounds of at least 1")

    loads, reports = [os.getloadavg()[0]], []
    for name in args.models.split(","):
        for dtype in args.dtypes.split(","):
            with open_engine(name, dtype, lengths[-1]) as engine:
                turns = measure(engine, lengths, rounds=args.rounds, seconds=args.seconds)
                reports.append(report(name, engine, turns))
            loads.append(os.getloadavg()[0])
            print(table(reports[-1]), end="\n\n", flush=True)
    print(f"{os.cpu_count()} cores; load average meanwhile: {', '.join(f'{load:.1f}' for load in loads)}")
    if args.json:
        options = {name: str(value) for name, value in vars(args).items()}
        device = jax.devices()[0].device_kind
        found = {"args": options, "jax": jax.__version__, "device": device, "load_average": loads, "reports": reports}
        args.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
