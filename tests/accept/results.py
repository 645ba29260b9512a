"""What the last `make accept` and `make parity` said, as RESULTS.md, with versions and date."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from environments import ENVIRONMENTS
from run import HEAD, ROOT, Outcome
from serving import REPOSITORY
from tables import markdown

_TEXT = """\
# Real clients, and vLLM beside us

{date}, Python {python}, jax {jax}, fastapi {fastapi}, uvicorn {uvicorn}; {cores} CPU cores, shared with other work, so that the
seconds say little. The bundled model in float32 behind `jaxpaged serve` with a key, on loopback. Written by
`python tests/accept/results.py` from what these commands said last:

    make accept
    make parity

## Clients: {num_good} of {num_clients}

Each in a virtual environment of its own; its checks are in `client_*.py` here. The bundled model's answers are known (texts of
transformers', facts, sums, calls), so that they compare what came, and not only that something came.

{clients}

## vLLM {vllm} (CPU build) and jaxpaged

The same model in float32, the same requests, one after the other: greedy token ids, log-probabilities (within 2e-3), names of
fields, statuses, types of errors, finish reasons, streams put together, metrics with their labels and buckets. What is not in the
table is equal.

{parity}"""


def main() -> int:
    outcomes = [Outcome(**one) for one in json.loads((ROOT / "accept.json").read_text())]
    versions = {name: importlib.metadata.version(name) for name in ("jax", "fastapi", "uvicorn")}
    text = _TEXT.format(
        date=datetime.date.today().isoformat(),
        python=platform.python_version(),
        cores=os.cpu_count(),
        vllm=ENVIRONMENTS["vllm"].version,
        num_good=sum(one.is_good for one in outcomes),
        num_clients=len(outcomes),
        clients=markdown(HEAD, [one.cells for one in outcomes]),
        parity=(ROOT / "parity.md").read_text(encoding="utf-8"),
        **versions,
    )
    (Path(__file__).parent / "RESULTS.md").write_text(text.replace(f"{REPOSITORY}/", ""), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
