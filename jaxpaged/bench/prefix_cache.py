"""What the prefix cache gains and costs: `python -m jaxpaged.bench.prefix_cache`.

Two engines on one model, with and without `enable_prefix_caching`, serve the same prompts in turn, of whose tokens a share was
served before. Time to the first token is that of one prompt alone, throughput that of all together, prompts and answers counted.
Of the two, medians are reported, and of their ratio the median over turns, because a shared machine's speed changes by the
minute.

At a share of 0 the cache gains nothing, and the ratio is what it costs; but a percent is less than what turns differ by, so the
share of the time that is spent inside the cache is measured as well.
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

SHARES = (0.0, 0.5, 0.9)
METRICS = ("ttft_ms", "tokens_per_s")


def prompts_of(
    rng: random.Random, count: int, length: int, num_shared: int, vocab_size: int
) -> tuple[list[int], list[list[int]]]:
    """Tokens that all prompts begin with, and the prompts."""
    shared, *owns = ([rng.randrange(vocab_size) for _ in range(length)] for _ in range(count + 1))
    return shared[:num_shared], [shared[:num_shared] + own[num_shared:] for own in owns]


def serve(engine: Engine, prompts: Seq[list[int]], num_tokens: int) -> float:
    """Seconds for so many tokens after each of these prompts, all at once."""
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    started = time.perf_counter()
    for prompt in prompts:
        engine.add_request(prompt, params)
    while engine.has_unfinished:
        engine.step()
    return time.perf_counter() - started


def take_turn(engine: Engine, prefix: list[int], prompts: Seq[list[int]], num_tokens: int, num_alone: int) -> dict[str, float]:
    """One turn of one engine, whose cache knows the prefix and nothing else: `num_alone` prompts alone, the others together."""
    alone, together = prompts[:num_alone], prompts[num_alone:]
    engine.reset_prefix_cache()
    if prefix:
        serve(engine, [[*prefix, 0]], 1)
    before = engine.stats()
    ttft_s = statistics.median(serve(engine, [prompt], 1) for prompt in alone)
    seconds = serve(engine, together, num_tokens)
    after = engine.stats()
    queried, hit = (after[name] - before[name] for name in ("prefix_cache_queries", "prefix_cache_hits"))
    num_served = sum(map(len, together)) + len(together) * num_tokens
    return {"ttft_ms": 1e3 * ttft_s, "tokens_per_s": num_served / seconds, "hits": hit / queried if queried else 0.0}


def inside(engine: Engine, prompts: Seq[list[int]], num_tokens: int) -> float:
    """The share of the time that an engine spends inside its prefix cache on prompts that it does not know.

    Most calls have nothing to do, and take less than a clock: what one adds is seen by a second one around it, and taken off.
    """
    engine.reset_prefix_cache()
    with Stopwatch() as watch:
        for method in ("match", "record", "forget"):
            watch.watch(engine.pool.cache, method, "inside")
            watch.watch(engine.pool.cache, method, "around")
        seconds = serve(engine, prompts, num_tokens)
    return max(0.0, 2 * watch.seconds["inside"] - watch.seconds["around"]) / seconds


def compare(engines: dict[bool, Engine], *, rounds: int, num_prompts: int, num_alone: int, length: int, num_tokens: int) -> Any:
    """Every share of hits, every engine, in turn; of each turn the metrics. One turn before does not count.

    Args:
      engines: by whether they have a prefix cache.
    """
    page_size: int = engines[True].config.block_size  # type: ignore[assignment]
    rng = random.Random(0)
    turns: dict[float, dict[bool, list[dict[str, float]]]] = {share: {True: [], False: []} for share in SHARES}
    shares_inside = []
    for turn in range(rounds + 1):
        for share in SHARES:
            num_shared = round(share * length / page_size) * page_size
            options = (num_prompts + num_alone, length, num_shared, engines[True].model.vocab_size)
            prefix, prompts = prompts_of(rng, *options)
            for is_on in (False, True) if turn % 2 else (True, False):
                found = take_turn(engines[is_on], prefix, prompts, num_tokens, num_alone)
                if turn:
                    turns[share][is_on].append(found)
        prompts = prompts_of(rng, num_prompts, length, 0, engines[True].model.vocab_size)[1]
        shares_inside.append(inside(engines[True], prompts, num_tokens))
    return turns, shares_inside[1:]


def summary(turns: dict[bool, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians with and without, and of the ratio of each turn the median, the quartiles, the lowest and the highest."""
    found: dict[str, Any] = {"hits": statistics.median(turn["hits"] for turn in turns[True])}
    for metric in METRICS:
        on, off = ([turn[metric] for turn in turns[is_on]] for is_on in (True, False))
        found[metric] = {"on": statistics.median(on), "off": statistics.median(off)}
        found[metric] |= spread([a / b for a, b in zip(on, off, strict=True)])
    return found


def table(rows: Seq[dict[str, Any]], shares_inside: Seq[float]) -> str:
    """The summaries for a reader."""
    line = "{:>6} {:24} {:>10} {:>10} {:>8} {:>16} {:>16}".format
    lines = [line("hits", "", "without", "with", "ratio", "half within", "all within")]
    for row in rows:
        for metric, words in zip(METRICS, ("ms to the first token", "tokens/s"), strict=True):
            found = row[metric]
            values = f"{found['off']:,.2f}", f"{found['on']:,.2f}", f"{found['ratio']:.3f}"
            spread = "{:.3f}-{:.3f}".format(*found["quartiles"]), f"{found['lowest']:.3f}-{found['highest']:.3f}"
            lines.append(line(f"{row['hits']:.0%}", words, *values, *spread))
    low, high = min(shares_inside), max(shares_inside)
    cost = f"inside the cache at 0 hits: {statistics.median(shares_inside):.2%} of the time ({low:.2%}-{high:.2%})"
    return "\n".join([*lines, "", cost])


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m jaxpaged.bench.prefix_cache", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", help="a directory or hub id (default: the bundled model)")
    parser.add_argument("--num-prompts", type=int, default=24, help="at a time, for the throughput (%(default)s)")
    parser.add_argument("--num-alone", type=int, default=8, help="one after the other, for the first token (%(default)s)")
    parser.add_argument("--input-len", type=int, default=512, help="tokens of each prompt (%(default)s)")
    parser.add_argument("--output-len", type=int, default=32, help="tokens of each answer (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each, after one that does not count (%(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args(argv)
    for name in ("num_prompts", "num_alone", "input_len", "output_len", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: got {getattr(args, name)}, expected a whole number of at least 1")

    options = {"model": args.model, "skip_tokenizer_init": True, "use_tqdm_on_load": False}
    with LLM(**options) as on, LLM(**options, enable_prefix_caching=False) as off:
        engines = {True: on.engine, False: off.engine}
        sizes = {"num_prompts": args.num_prompts, "num_alone": args.num_alone, "length": args.input_len}
        turns, shares_inside = compare(engines, rounds=args.rounds, num_tokens=args.output_len, **sizes)
    rows = [{"share": share, **summary(of)} for share, of in turns.items()]
    if args.json:
        print(json.dumps({"args": vars(args), "rows": rows, "inside_share": shares_inside}))
    else:
        print(table(rows, shares_inside))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
