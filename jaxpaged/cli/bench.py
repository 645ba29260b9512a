"""`jaxpaged bench`: which of the measurements is meant; each is a module of its own beside this one."""

from __future__ import annotations

import importlib

from jaxpaged.cli.options import UsageError
from jaxpaged.config import nearest

# name -> what it does; the module is bench_NAME.
KINDS = {
    "serve": "a server from outside: requests that come at a rate, with their latencies",
    "latency": "one batch in this process, again and again",
    "throughput": "many requests in this process at once",
    "profile": "a step, part by part, each beside its floor",
    "ledger": "what starting takes, and how full each compiled step was",
    "all": "the tables of how this engine behaves on this machine, as one report with figures",
}
_EXAMPLES = """\
examples:
  jaxpaged bench serve --base-url http://127.0.0.1:8000 --random-input-len 64 --random-output-len 32 --request-rate 8
  jaxpaged bench latency --input-len 32 --output-len 128 --batch-size 8
  jaxpaged bench throughput --dataset-name sharegpt --num-prompts 200

'jaxpaged bench KIND --help' tells the rest. Flags and results are named as in vLLM's 'bench'."""


def main(argv: list[str]) -> int:
    """Run one of them; the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, KINDS))
        kinds = "\n".join(f"  {name:{width}}  {summary}" for name, summary in KINDS.items())
        print(f"usage: jaxpaged bench KIND [FLAGS]\n\nMeasure.\n\nkinds:\n{kinds}\n\n{_EXAMPLES}")
        return 0 if argv else 2
    kind, rest = argv[0], argv[1:]
    if kind not in KINDS:
        raise UsageError(f"bench: unknown kind {kind!r}{nearest(kind, list(KINDS))} (of: {', '.join(KINDS)})")
    from jaxpaged.cli import run_command

    return run_command(f"jaxpaged bench {kind}", importlib.import_module(f"jaxpaged.cli.bench_{kind}"), rest)
