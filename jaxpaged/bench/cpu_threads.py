"""What it brings that threads wake in turn: `python -m jaxpaged.bench.cpu_threads --num-seqs 1,8,64`. Linux alone.

One engine serves the same requests in turn with its process's threads as Linux has them (SCHED_OTHER) and as an engine on a CPU
has them (SCHED_BATCH). Of output tokens per second medians are reported, and of the ratio of neighbours in time, SCHED_BATCH over
SCHED_OTHER, the median with its quartiles.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

from jaxpaged import cpu_threads
from jaxpaged.bench.ratios import spread
from jaxpaged.host.request import SamplingParams
from jaxpaged.llm import LLM


def push_on_waking(tasks: Path = Path("/proc/self/task")) -> None:
    """Undo `cpu_threads.wake_in_turn`."""
    for task in tasks.iterdir():
        with contextlib.suppress(OSError):  # it has ended since
            os.sched_setscheduler(int(task.name), os.SCHED_OTHER, os.sched_param(0))


def measure(llm: LLM, num_requests: int, prompt_len: int, num_tokens: int, rounds: int) -> dict[str, Any]:
    """Output tokens per second of each way, and their ratio; the threads are left waking in turn.

    Args:
      num_requests: in one call.
      prompt_len, num_tokens: tokens of a prompt and of its answer.
      rounds: turns of each; one before does not count.
    """
    draw = random.Random(num_requests)
    words = llm.model_config.vocab_size
    prompts = [{"prompt_token_ids": [draw.randrange(3, words) for _ in range(prompt_len)]} for _ in range(num_requests)]
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
    found: dict[str, list[float]] = {"other": [], "batch": []}
    for _ in range(rounds + 1):
        for name, put in (("other", push_on_waking), ("batch", cpu_threads.wake_in_turn)):
            put()
            llm.reset_prefix_cache()
            started = time.perf_counter()
            llm.generate(prompts, params, use_tqdm=False)
            found[name].append(num_requests * num_tokens / (time.perf_counter() - started))
    speeds = {name: several[1:] for name, several in found.items()}
    ratios = [batch / other for other, batch in zip(speeds["other"], speeds["batch"], strict=True)]
    return {f"{name}_tokens_per_s": statistics.median(several) for name, several in speeds.items()} | spread(ratios)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a directory or hub id (default: the bundled model)")
    parser.add_argument("--num-seqs", default="1,8,64", help="at once, numbers with commas (%(default)s)")
    parser.add_argument("--requests-per-seq", type=int, default=4, help="of a turn, for each of those at once (%(default)s)")
    parser.add_argument("--prompt-len", type=int, default=24, help="tokens (%(default)s)")
    parser.add_argument("--tokens", type=int, default=96, help="of an answer (%(default)s)")
    parser.add_argument("--rounds", type=int, default=25, help="turns of each (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    if not hasattr(os, "SCHED_BATCH"):
        parser.error("this system has no SCHED_BATCH")
    sizes = [int(one) for one in args.num_seqs.split(",")]
    if min(args.requests_per_seq, args.prompt_len, args.tokens, args.rounds, *sizes) < 1:
        parser.error("expected whole numbers of at least 1")
    for num_seqs in sizes:
        options: dict[str, Any] = {"max_num_seqs": num_seqs, "skip_tokenizer_init": True, "use_tqdm_on_load": False}
        with LLM(args.model, max_model_len=args.prompt_len + args.tokens, **options) as llm:
            found = measure(llm, num_seqs * args.requests_per_seq, args.prompt_len, args.tokens, args.rounds)
        if args.json:
            print(json.dumps({"num_seqs": num_seqs, **found}))
            continue
        low, high = found["quartiles"]
        speeds = f"{found['other_tokens_per_s']:,.0f} tokens/s as usual, {found['batch_tokens_per_s']:,.0f} in turn"
        print(f"{num_seqs} sequences: {speeds}, {found['ratio']:.2f} times ({low:.2f} to {high:.2f})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
