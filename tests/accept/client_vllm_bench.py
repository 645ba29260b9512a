"""`vllm bench serve`: the tool that operators have, over completions and chats; what its result file counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from checks import Checks, holds, same

NUM_PROMPTS, NUM_INPUT, NUM_OUTPUT = 16, 32, 16
run = Checks()
target = run.target


def benchmarked(name: str, *flags: str) -> dict[str, Any]:
    """Its result file. Raises RuntimeError when it fails."""
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--base-url", target.url]
    command += ["--model", target.model, "--tokenizer", target.model_dir, "--dataset-name", "random", "--seed", "1"]
    command += ["--random-input-len", str(NUM_INPUT), "--random-output-len", str(NUM_OUTPUT), "--num-prompts", str(NUM_PROMPTS)]
    command += ["--save-result", "--result-dir", target.out, "--result-filename", f"{name}.json", "--disable-tqdm", *flags]
    command += ["--percentile-metrics", "ttft,tpot,itl,e2el", "--ignore-eos"]
    variables = {**os.environ, "OPENAI_API_KEY": target.key}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=280)
    print(done.stdout[-4000:], done.stderr[-4000:])
    if done.returncode:
        raise RuntimeError(f"it ended with {done.returncode}: {(done.stderr or done.stdout)[-250:]}")
    return json.loads(Path(target.out, f"{name}.json").read_text(encoding="utf-8"))


for name, flags in (
    ("completions", ("--backend", "openai", "--max-concurrency", "4")),
    ("chats", ("--backend", "openai-chat", "--endpoint", "/v1/chat/completions", "--max-concurrency", "4")),
    ("completions at a rate", ("--backend", "openai", "--request-rate", "20", "--goodput", "ttft:60000")),
):
    with run.check(name):
        found = benchmarked(name.replace(" ", "-"), *flags)
        same((found["completed"], found["failed"]), (NUM_PROMPTS, 0))
        same(found["total_output_tokens"], NUM_PROMPTS * NUM_OUTPUT)
        holds(0 < found["mean_ttft_ms"] <= found["mean_e2el_ms"] and found["mean_itl_ms"] > 0, found)

run.finish()
