"""Another engine's process that does what a test asks of it: `python fake_peer.py SIDE`, as `jaxpaged/bench/peers/child.py`.

The model that it is told to load says how it goes wrong. Its tokens count up from the last token of each prompt.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jaxpaged

sys.path.insert(0, str(Path(jaxpaged.__file__).parent / "bench" / "peers"))
import child


class Side:
    """See `child.Side`."""

    def load(self, model: str, dtype: str, max_model_len: int, max_num_seqs: int, num_threads: int, options: dict) -> dict:
        """`model` is what goes wrong."""
        self.wrong = model
        print("this is no answer")  # on stdout, where engines print
        if model == "raise":
            raise ValueError("no such model\nin two lines")
        if model == "die":
            print("the last words", file=sys.stderr, flush=True)
            os._exit(7)
        return {
            "versions": {"fake": "1.0"},
            "dtype": dtype,
            "threads": num_threads,
            "variable": os.environ.get("OMP_NUM_THREADS"),
        }

    def run(self, prompts: list[list[int]], num_outputs: list[int]) -> tuple[float, list[list[int]]]:
        """A second for each token, by its own clock."""
        if self.wrong == "hang":
            os.system("sleep 600 & sleep 600")
        if self.wrong == "garbage":
            os.write(answers, b"Loading: 100%\n" * 9)
        less = 1 if self.wrong == "fewer" else 0
        tokens = [[ids[-1] + 1 + number for number in range(num - less)] for ids, num in zip(prompts, num_outputs, strict=True)]
        return (0.0 if self.wrong == "no time" else float(sum(num_outputs))), tokens

    def trace(self, prompt: list[int], num_output: int) -> tuple[list[float], list[int]]:
        """The first token after 2 s, then one each half second."""
        less = 1 if self.wrong == "fewer" else 0
        times = [2.0 + 0.5 * number for number in range(num_output - less)]
        return times, [prompt[-1] + 1 + number for number in range(num_output)]


if __name__ == "__main__":
    answers = os.dup(1)
    sys.modules["fake_side"] = sys.modules["__main__"]
    child.main("fake_side:Side")
