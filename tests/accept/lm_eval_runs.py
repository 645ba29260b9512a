"""lm-eval's own command on eight questions that the bundled model answers right, by scores of choices and by generation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from checks import Target

TASKS = Path(__file__).parent / "lm_eval_tasks"
NUM_QUESTIONS = 8


def evaluated(target: Target, name: str, batch_size: int = 1, **options: str) -> dict[str, dict[str, Any]]:
    """What lm-eval finds, by task. Raises RuntimeError with the end of its output when it fails.

    Args:
      name: of the folder for its results.
      options: of its model, over those that every run has.
    """
    out = Path(target.out, name)
    given = {"model": target.model, "base_url": f"{target.base_url}/completions", "num_concurrent": "4", "max_length": "1024"}
    told = ",".join(f"{key}={value}" for key, value in {**given, **options}.items())
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", told]
    command += ["--tasks", "jaxpaged_choices,jaxpaged_answers", "--include_path", str(TASKS), "--output_path", str(out)]
    command += ["--batch_size", str(batch_size)]
    variables = {**os.environ, "OPENAI_API_KEY": target.key}
    done = subprocess.run(command, cwd=TASKS, env=variables, capture_output=True, text=True, timeout=500)
    print(done.stdout[-4000:], done.stderr[-6000:])
    if done.returncode:
        raise RuntimeError(f"it ended with {done.returncode}: {done.stderr[-250:]}")
    [path] = sorted(out.rglob("results_*.json"))[-1:]
    return json.loads(path.read_text(encoding="utf-8"))["results"]
