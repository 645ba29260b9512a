"""guidellm: its load generator one at a time and eight at a time, by its own command, and what its report counts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from checks import Checks, holds, same

NUM_REQUESTS, NUM_PROMPT, NUM_OUTPUT = 16, 32, 16
run = Checks()
target = run.target


def benchmarked(name: str, profile: str) -> dict[str, Any]:
    """The one benchmark of guidellm's report. Raises RuntimeError when it fails."""
    out = Path(target.out, f"{name}.json")
    command = [sys.executable, "-m", "guidellm", "run", "--disable-console-interactive"]
    command += ["--backend", f"kind=openai_http,target={target.url},model={target.model},api_key={target.key}"]
    command += ["--tokenizer", f"kind=huggingface_auto,model={target.model_dir}", "--profile", profile]
    command += ["--data", f"kind=synthetic_text,prompt_tokens={NUM_PROMPT},output_tokens={NUM_OUTPUT}"]
    command += ["--constraint", f"kind=max_requests,count={NUM_REQUESTS}", "--output", f"kind=json,path={out}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    print(done.stdout[-4000:], done.stderr[-4000:])
    if done.returncode:
        raise RuntimeError(f"it ended with {done.returncode}: {(done.stderr or done.stdout)[-250:]}")
    [found] = json.loads(out.read_text(encoding="utf-8"))["benchmarks"]
    return found


for name, profile in (("one at a time", "kind=synchronous"), ("eight at a time", "kind=concurrent,streams=8")):
    with run.check(name):
        found = benchmarked(name.replace(" ", "-"), profile)
        totals = found["metrics"]["request_totals"]
        same((totals["successful"], totals["errored"]), (NUM_REQUESTS, 0))
        # It asks for exactly so many tokens, and counts those of the usage that it is told.
        outputs = found["metrics"]["output_token_count"]["successful"]
        same((outputs["min"], outputs["max"]), (NUM_OUTPUT, NUM_OUTPUT))
        first, between = (found["metrics"][one]["successful"] for one in ("time_to_first_token_ms", "inter_token_latency_ms"))
        holds(first["mean"] > 0 and between["mean"] > 0, (first, between))

run.finish()
