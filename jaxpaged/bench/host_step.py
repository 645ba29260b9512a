"""Where the host's microseconds of a decode step go: `python -m jaxpaged.bench.host_step --num-seqs 1,16,64`.

So many sequences of the bundled model decode, one step after the other, none planned ahead. The parts of each step: plan (the
scheduler), pad (the arrays), options (what changes logits), dispatch (the call of the compiled step; a small one runs in it),
wait (for its result), commit (tokens become events), and the rest. What counts is processor time of the engine's thread, medians
over the steps: a machine that has other things to do changes it little, and what XLA's own threads take is not in it.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

from jaxpaged.bench.stopwatch import Stopwatch
from jaxpaged.engine import Engine
from jaxpaged.host.request import SamplingParams
from jaxpaged.llm import LLM

OURS = ("plan", "pad", "commit")  # what is the host's alone, whatever the model


def measure(
    engine: Engine, num_seqs: int, num_steps: int, prompt_len: int, clock: Callable[[], float] = time.thread_time
) -> dict[str, float]:
    """Microseconds of each part of a step in which so many sequences decode."""
    draw = random.Random(num_seqs)
    params = SamplingParams(temperature=0, max_tokens=num_steps + 8, ignore_eos=True)
    for _ in range(num_seqs):
        engine.add_request([draw.randrange(3, engine.model.vocab_size) for _ in range(prompt_len)], params)
    while sum(sequence.num_uncomputed == 1 for sequence in engine.scheduler.running) < num_seqs:
        engine.step()
    steps: list[dict[str, float]] = []
    with Stopwatch(clock) as watch:
        runner: Any = engine.runner
        watch.watch(engine.scheduler, "plan", "plan")
        watch.watch(engine.scheduler, "commit", "commit")
        watch.watch(runner, "_pad", "pad")
        watch.watch(runner.adjuster, "adjustments", "options")
        watch.watch(runner, "_run", "dispatch")
        watch.watch(runner, "submit", "submit", lambda wait: watch.timed(wait, "wait"))
        watch.watch(engine, "step", "step")
        while len(steps) < num_steps and engine.has_unfinished:
            watch.seconds.clear()
            engine.step()
            steps.append(dict(watch.seconds))
    while engine.has_unfinished:
        engine.step()
    found = {name: 1e6 * statistics.median(step[name] for step in steps) for name in steps[0]}
    found["rest of submit"] = found["submit"] - found["pad"] - found["options"] - found["dispatch"]
    found["rest of step"] = found["step"] - found["plan"] - found.pop("submit") - found["wait"] - found["commit"]
    return found | {"+".join(OURS): sum(found[name] for name in OURS)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--num-seqs", default="1,16,64")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    for num_seqs in map(int, arguments.num_seqs.split(",")):
        options: dict[str, Any] = {"max_num_seqs": num_seqs, "decode_row_buckets": (num_seqs,), "async_scheduling": False}
        options["max_model_len"] = arguments.prompt_len + arguments.steps + 32
        with LLM(arguments.model, dtype="float32", use_tqdm_on_load=False, **options) as llm:
            found = measure(llm.engine, num_seqs, arguments.steps, arguments.prompt_len)
        if arguments.json:
            print(json.dumps({"num_seqs": num_seqs, **found}))
        else:
            print(f"{num_seqs} sequences, us:", ", ".join(f"{name} {value:.0f}" for name, value in found.items()))


if __name__ == "__main__":
    main()
