"""`make accept`: real clients against a real server, each in an environment of its own, and one table of what they say.

    python tests/accept/run.py                      all of them
    python tests/accept/run.py --only openai,vllm   some
    python tests/accept/run.py --build              only their environments, which takes minutes and gigabytes the first time

The exit code is 1 when a client has failed, 2 when the server did not come up.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from checks import Target
from environments import ENVIRONMENTS, BuildError, build, quiet_variables
from serving import MODEL_DIR, REPOSITORY, Served, StartError, serving_ours
from tables import markdown

HERE = Path(__file__).parent
ROOT = REPOSITORY / ".accept"
CLIENT_S = 600.0
HEAD = ("client", "version", "", "checks", "seconds", "what failed")
# Twice the clients' concurrency; a model of one megabyte needs no more.
FLAGS = ("--max-num-seqs", "16", "--max-num-batched-tokens", "512")


@dataclass(frozen=True)
class Client:
    """A script, and the environment whose interpreter runs it."""

    name: str
    environment: str
    script: str


CLIENTS = (
    Client("openai", "openai", "client_openai.py"),
    Client("langchain-openai", "langchain", "client_langchain.py"),
    Client("llama-index openai-like", "llama-index", "client_llama_index.py"),
    Client("litellm", "litellm", "client_litellm.py"),
    Client("instructor", "instructor", "client_instructor.py"),
    Client("pydantic-ai", "pydantic-ai", "client_pydantic_ai.py"),
    Client("lm-eval, own tokenizer", "lm-eval", "client_lm_eval.py"),
    Client("lm-eval, server's tokenizer", "lm-eval", "client_lm_eval_remote.py"),
    Client("guidellm", "guidellm", "client_guidellm.py"),
    Client("vllm bench serve", "vllm", "client_vllm_bench.py"),
)


@dataclass
class Outcome:
    """What became of one client."""

    client: str
    version: str
    seconds: float = 0.0
    passed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def is_good(self) -> bool:
        return bool(self.passed) and not self.failed

    @property
    def cells(self) -> tuple[str, ...]:
        """Its line of the table."""
        total = len(self.passed) + len(self.failed)
        told = "; ".join(f"{name}: {reason[:100]}" for name, reason in self.failed.items())
        word = "pass" if self.is_good else "FAIL"
        return self.client, self.version, word, f"{len(self.passed)}/{total}", f"{self.seconds:.1f}", told


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME", help="clients, with commas between; a part of a name is enough")
    parser.add_argument("--build", action="store_true", help="build the environments and end")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the outcomes there too")
    parser.add_argument("--url", help="a server that is there, instead of one that is started; with --key")
    parser.add_argument("--key", default="")
    arguments = parser.parse_args(argv)
    chosen = choose(CLIENTS, arguments.only)
    ROOT.mkdir(exist_ok=True)
    outcomes = {client.name: Outcome(client.name, ENVIRONMENTS[client.environment].version) for client in chosen}
    pythons: dict[str, Path] = {}
    for client in chosen:
        if client.environment not in pythons:
            print(f"accept: environment {client.environment}", file=sys.stderr, flush=True)
        try:
            pythons[client.environment] = build(ENVIRONMENTS[client.environment], ROOT)
        except BuildError as error:
            outcomes[client.name].failed["environment"] = str(error)
    if arguments.build:
        return 1 if any(outcome.failed for outcome in outcomes.values()) else 0
    with tempfile.TemporaryDirectory(prefix="run-", dir=ROOT) as folder:
        try:
            if arguments.url:
                served = Served(arguments.url, arguments.key, Path("/dev/null"))
                _run_all(chosen, pythons, outcomes, served, Path(folder))
            else:
                print("accept: starting jaxpaged serve", file=sys.stderr, flush=True)
                with serving_ours(Path(folder), *FLAGS) as served:
                    _run_all(chosen, pythons, outcomes, served, Path(folder))
        except StartError as error:
            print(f"accept: {error}", file=sys.stderr)
            return 2
    print(markdown(HEAD, [one.cells for one in outcomes.values()]))
    told = json.dumps([asdict(one) for one in outcomes.values()], indent=1)
    (arguments.json or ROOT / "accept.json").write_text(told + "\n")
    return 0 if all(one.is_good for one in outcomes.values()) else 1


def choose(clients: Sequence[Client], only: str | None) -> list[Client]:
    """Those whose names have one of these parts; a part that no name has ends the program."""
    if only is None:
        return list(clients)
    parts = [part.strip() for part in only.split(",") if part.strip()]
    for part in parts:
        if not any(part in client.name for client in clients):
            sys.exit(f"--only: got {part!r}, expected a part of one of: {', '.join(client.name for client in clients)}")
    return [client for client in clients if any(part in client.name for part in parts)]


def _run_all(
    chosen: Sequence[Client], pythons: dict[str, Path], outcomes: dict[str, Outcome], served: Served, folder: Path
) -> None:
    for client in chosen:
        outcome = outcomes[client.name]
        if client.environment not in pythons:
            continue
        run_client(client, pythons[client.environment], served, folder / client.script.removesuffix(".py"), outcome)
        word = "pass" if outcome.is_good else "FAIL"
        print(f"accept: {client.name}: {word} in {outcome.seconds:.1f} s", file=sys.stderr, flush=True)


def run_client(client: Client, python: Path, served: Served, folder: Path, outcome: Outcome) -> None:
    """Run a client's script and take down what it says; its output is kept in .accept/NAME.out."""
    folder.mkdir(parents=True)
    texts = json.loads((MODEL_DIR.parent / "expected.json").read_text(encoding="utf-8"))["prompts"]
    expected = {one["prompt"]: one["text"] for one in texts}
    target = Target(served.url, served.key, "demo", str(MODEL_DIR), expected, str(folder))
    target.save(folder / "target.json")
    log, started = ROOT / f"{client.script.removesuffix('.py')}.out", time.monotonic()
    with log.open("w") as file:
        command = (str(python), str(HERE / client.script), str(folder / "target.json"))
        try:
            options = {"env": quiet_variables(folder), "cwd": folder, "stdin": subprocess.DEVNULL, "timeout": CLIENT_S}
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, **options).returncode
        except subprocess.TimeoutExpired:
            code = None
    outcome.seconds = time.monotonic() - started
    report = folder / "report.json"
    if report.is_file():
        found = json.loads(report.read_text(encoding="utf-8"))
        outcome.passed, outcome.failed = found["passed"], found["failed"]
    if code is None:
        outcome.failed["time"] = f"not done within {CLIENT_S:g} s, see {log}"
    elif not report.is_file() or (code != 0) != bool(outcome.failed):
        outcome.failed["script"] = f"it ended with {code}, see {log}"


if __name__ == "__main__":
    sys.exit(main())
