"""Speculation beside plain decoding, by method and number of proposed tokens: `python -m jaxpaged.bench.speculation`.

Two kinds of text: one that repeats what is in its prompt, as summaries and edits do, and a story that is made up, drawn
at temperature 1. Around one set of compiled steps there is an engine without speculation, one for each number of proposed tokens,
and one that chooses the number itself. They serve the same prompts in turn, each beside the plain one right before and after it,
because a shared machine's speed changes by the minute; of the ratios of tokens per second the median is reported.

Tokens per step are those of one sequence in a step that decodes it: without speculation 1.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import random
import statistics
import time
from collections.abc import Sequence as Seq
from typing import Any

from jaxpaged.bench.ratios import spread
from jaxpaged.demo import skills
from jaxpaged.engine import Engine
from jaxpaged.host.request import SamplingParams
from jaxpaged.llm import LLM

# What else a method needs; a row of the table is a method and a number of tokens.
METHODS: dict[str, dict[str, Any]] = {
    "ngram": {"method": "ngram", "prompt_lookup_min": 2, "prompt_lookup_max": 4},
    "draft_model": {"method": "draft_model"},
}
WORKLOADS = {"repeats": 0.0, "story": 1.0}  # and the temperature
ADAPTIVE = 0  # stands for the number of tokens of the engine that chooses it


def prompts_of(workload: str, llm: LLM, count: int, length: int) -> list[list[int]]:
    """Prompts of about so many tokens: a text, again, and its beginning; or the beginning of a story."""
    found = []
    for number in range(count):
        text = skills.plain(random.Random(f"{workload} {number}"))
        token_ids = llm.get_tokenizer().encode(text)[: length // 2 if workload == "repeats" else length]
        found.append((2 * token_ids + token_ids[:8]) if workload == "repeats" else token_ids)
    return found


def engines_of(llm: LLM, plain: LLM, speculation: dict[str, Any], tokens: Seq[int]) -> dict[int | None, Engine]:
    """Engines around the steps of one: None is without speculation, the others by their number of proposed tokens."""
    engine = llm.engine

    def around(speculation: dict[str, Any] | None) -> Engine:
        config = dataclasses.replace(engine.config, speculative_config=speculation)
        return Engine(config, engine.model, engine.runner)

    engines: dict[int | None, Engine] = {None: plain.engine if plain is not llm else around(None)}
    for count in tokens:
        engines[count] = around({**speculation, "num_speculative_tokens": count, "adaptive": False})
    engines[ADAPTIVE] = around({**speculation, "num_speculative_tokens": max(tokens)})
    return engines


def serve(engine: Engine, prompts: Seq[list[int]], num_seqs: int, num_tokens: int, temperature: float) -> dict[str, Any]:
    """Tokens per second over all prompts, so many at a time, and what became of what was proposed."""
    params = SamplingParams(temperature=temperature, seed=1, max_tokens=num_tokens, ignore_eos=True)
    before, waiting, num_live, num_new = engine.stats(), list(prompts), 0, 0
    started = time.perf_counter()
    while waiting or engine.has_unfinished:
        while waiting and num_live < num_seqs:
            engine.add_request(waiting.pop(), params)
            num_live += 1
        for event in engine.step():
            num_new += event.token_id is not None
            num_live -= event.finish_reason is not None
    seconds, after = time.perf_counter() - started, engine.stats()
    proposed, accepted = (
        after.get(f"spec_decode_{name}", 0) - before.get(f"spec_decode_{name}", 0)
        for name in ("num_draft_tokens", "num_accepted_tokens")
    )
    places = sorted(name for name in after if name.startswith("spec_decode_num_accepted_tokens_per_pos_"))
    num_drafts = after.get("spec_decode_num_drafts", 0) - before.get("spec_decode_num_drafts", 0)
    accepted_at = [round((after[name] - before[name]) / num_drafts, 3) if num_drafts else 0.0 for name in places]
    # The first token of each comes of its prompt.
    num_decoded = num_new - len(prompts)
    return {
        "tokens_per_s": num_new / seconds,
        "tokens_per_step": num_decoded / (num_decoded - accepted),
        "proposed_per_token": proposed / num_new,
        "acceptance": accepted / proposed if proposed else 0.0,
        "accepted_at": accepted_at,
    }


def compare(
    engines: dict[int | None, Engine], prompts: Seq[list[int]], num_seqs: int, *, temperature: float, rounds: int, num_tokens: int
) -> list[dict[str, Any]]:
    """A row for each engine with speculation; one turn before does not count."""
    turns: dict[int, list[tuple[float, dict[str, Any]]]] = {count: [] for count in engines if count is not None}
    for turn in range(rounds + 1):
        plain = [serve(engines[None], prompts, num_seqs, num_tokens, temperature)["tokens_per_s"]]
        for count, several in turns.items():
            found = serve(engines[count], prompts, num_seqs, num_tokens, temperature)
            plain.append(serve(engines[None], prompts, num_seqs, num_tokens, temperature)["tokens_per_s"])
            if turn:
                several.append((statistics.mean(plain[-2:]), found))
    rows = []
    for count, several in turns.items():
        last = several[-1][1]
        medians = {name: statistics.median(found[name] for _, found in several) for name in last if name != "accepted_at"}
        medians["accepted_at"] = last["accepted_at"][: count or None]
        ratios = spread([found["tokens_per_s"] / beside for beside, found in several])
        beside = statistics.median(beside for beside, _ in several)
        rows.append({"num_seqs": num_seqs, "tokens": count, "plain_tokens_per_s": beside, **medians, **ratios})
    return rows


def verdict(rows: Seq[dict[str, Any]]) -> str:
    """Where speculation pays best, and from where on it does not."""
    fixed = {row["tokens"]: row["ratio"] for row in rows if row["tokens"] != ADAPTIVE}
    best = max(fixed, key=fixed.__getitem__)
    if fixed[best] < 1:
        return f"never pays: {fixed[best]:.2f} at best, with {best}"
    lost = [count for count, ratio in fixed.items() if count > best and ratio < 1]
    return f"pays best with {best} ({fixed[best]:.2f})" + (f", and no more from {min(lost)} on" if lost else "")


def table(rows: Seq[dict[str, Any]]) -> str:
    """The rows for a reader."""
    line = "{:8} {:12} {:>9} {:>8} {:>11} {:>11} {:>9} {:>9}   {}".format
    heads = ("text", "method", "sequences", "tokens", "acceptance", "tokens/step", "plain/s", "tokens/s", "ratio")
    lines, groups = [line(*heads)], {}
    for row in rows:
        groups.setdefault((row["workload"], row["method"], row["num_seqs"]), []).append(row)
    for key, group in groups.items():
        for row in group:
            rates = f"{row['acceptance']:.0%}", f"{row['tokens_per_step']:.2f}"
            speeds = f"{row['plain_tokens_per_s']:,.0f}", f"{row['tokens_per_s']:,.0f}"
            ratio = "{:.2f} (half within {:.2f}-{:.2f})".format(row["ratio"], *row["quartiles"])
            lines.append(line(*key, row["tokens"] or "adaptive", *rates, *speeds, ratio))
        longest = max(group, key=lambda row: row["tokens"])["accepted_at"]
        lines.append(f"{'':9}accepted, by place among those proposed: {', '.join(f'{share:.0%}' for share in longest)}")
        lines.append(f"{'':9}{verdict(group)}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m jaxpaged.bench.speculation", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", help="a directory or hub id (default: the bundled model)")
    parser.add_argument("--draft", help="directory or hub id of the draft model (default: the one of the bundled model)")
    parser.add_argument("--dtype", default="auto", help="(%(default)s)")
    parser.add_argument("--method", default=",".join(METHODS), help="separated by commas (%(default)s)")
    parser.add_argument("--num-seqs", default="1,16", help="sequences at a time, separated by commas (%(default)s)")
    parser.add_argument("--tokens", default="1,2,3,4,5,6,7,8", help="that are proposed at a time, likewise (%(default)s)")
    parser.add_argument("--input-len", type=int, default=48, help="tokens of each prompt, about (%(default)s)")
    parser.add_argument("--output-len", type=int, default=96, help="tokens of each answer (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each, after one that does not count (%(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args(argv)
    methods = args.method.split(",")
    if unknown := set(methods) - METHODS.keys():
        parser.error(f"--method: got {', '.join(sorted(unknown))}, expected some of {', '.join(METHODS)}")
    num_seqs, tokens = ([int(word) for word in text.split(",")] for text in (args.num_seqs, args.tokens))
    if min(*num_seqs, *tokens, args.rounds) < 1 or args.input_len < 16 or args.output_len < 2:
        parser.error("expected whole numbers of at least 1, --input-len of at least 16, and --output-len of at least 2")

    rows = []
    for method in methods:
        for count in num_seqs:
            # As many rows as an engine with this number of tokens would have compiled for it.
            sizes = tuple(sorted({count, *(count * (1 + most) for most in tokens)}))
            options = {"model": args.model, "use_tqdm_on_load": False, "max_num_seqs": count, "prefill_tile_buckets": (4,)}
            options |= {"decode_row_buckets": sizes, "flight_recorder_bytes": 0, "max_num_batched_tokens": max(512, sizes[-1])}
            options["dtype"] = args.dtype
            speculation = {**METHODS[method], **({"model": args.draft} if method == "draft_model" else {})}
            with contextlib.ExitStack() as stack:
                wanted = {**speculation, "num_speculative_tokens": max(tokens)}
                llm = plain = stack.enter_context(LLM(**options, speculative_config=wanted))
                if method == "draft_model":  # its steps are no plain ones
                    plain = stack.enter_context(LLM(**{**options, "decode_row_buckets": sizes[:1]}))
                engines = engines_of(llm, plain, speculation, tokens)
                for workload, temperature in WORKLOADS.items():
                    prompts = prompts_of(workload, llm, max(4, count), args.input_len)
                    given = {"temperature": temperature, "rounds": args.rounds, "num_tokens": args.output_len}
                    found = compare(engines, prompts, count, **given)
                    rows += [{"workload": workload, "method": method, **row} for row in found]
    print(json.dumps({"args": vars(args), "rows": rows}) if args.json else table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
