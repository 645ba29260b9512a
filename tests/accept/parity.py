"""`make parity`: vLLM's CPU build and this server answer the same requests of the same model, and every difference is told.

    python tests/accept/parity.py                  both, one after the other
    python tests/accept/parity.py --recorded       ours against what vLLM said the last time

A difference that is meant is in `parity_meant.py` with its reason. The exit code is 1 for any other, and for one listed there
that is none any more; 2 when a server did not come up.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx2 as httpx

sys.path.insert(0, str(Path(__file__).parent))
from environments import ENVIRONMENTS, BuildError, build
from parity_cases import CASES, Case
from parity_compare import Difference, compare
from parity_meant import MEANT, Meant
from run import ROOT
from serving import Served, StartError, serving_ours, serving_vllm
from tables import markdown

RECORDED = ROOT / "parity-vllm.json"
# What both are told: as much context as the model has, tool calls as its chat template writes them.
OURS = ("--max-num-seqs", "8", "--max-num-batched-tokens", "512", "--max-model-len", "1024")
VLLM = (*("--max-model-len", "1024", "--max-num-seqs", "8", "--enable-tokenizer-info-endpoint", "--enable-prompt-tokens-details"),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"))  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recorded", action="store_true", help="take vLLM's answers from the last run")
    parser.add_argument("--all", action="store_true", help="print the differences that are meant one by one, too")
    arguments = parser.parse_args(argv)
    ROOT.mkdir(exist_ok=True)
    try:
        if not arguments.recorded:
            python = build(ENVIRONMENTS["vllm"], ROOT)
            with tempfile.TemporaryDirectory(prefix="run-", dir=ROOT) as folder:
                _say("starting vLLM")
                with serving_vllm(Path(folder), python, *VLLM) as served:
                    RECORDED.write_text(json.dumps(answers(served), indent=1))
        with tempfile.TemporaryDirectory(prefix="run-", dir=ROOT) as folder:
            _say("starting jaxpaged serve")
            with serving_ours(Path(folder), *OURS) as served:
                ours = answers(served)
    except (BuildError, StartError) as error:
        _say(str(error))
        return 2
    (ROOT / "parity-ours.json").write_text(json.dumps(ours, indent=1))
    theirs = json.loads(RECORDED.read_text())
    found = [one for case in CASES for one in compare(case, theirs[case.name], ours[case.name])]
    return report(found, MEANT, show_all=arguments.all, keep=ROOT / "parity.md")


def answers(served: Served) -> dict[str, Any]:
    """What a server says to all cases, in order, by name."""
    headers = {"Authorization": f"Bearer {served.key}", "Content-Type": "application/json"}
    with httpx.Client(base_url=served.url, timeout=120) as client:
        found = {}
        for case in CASES:
            found[case.name] = ask(client, case, headers)
            if case.is_drawn:
                found[case.name]["is_repeated"] = ask(client, case, headers)["choices"] == found[case.name]["choices"]
        return found


def ask(client: httpx.Client, case: Case, headers: dict[str, str]) -> dict[str, Any]:
    """One answer: its status, its media type, and its text, object or events; of an object with choices their texts, too."""
    sent = {name: value for name, value in {**headers, **case.headers}.items() if value}
    if case.body is None:
        answer = client.get(case.path, headers=sent)
    else:
        content = case.body if isinstance(case.body, bytes) else json.dumps(case.body).encode()
        answer = client.post(case.path, content=content, headers=sent)
    media_type = answer.headers.get("content-type", "").partition(";")[0]
    found: dict[str, Any] = {"status": answer.status_code, "media_type": media_type, "choices": None}
    if media_type == "text/event-stream":
        events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
        return {**found, "events": [json.loads(event) if event != "[DONE]" else event for event in events]}
    try:
        told = answer.json()
    except ValueError:
        return {**found, "text": answer.text}
    texts = [one.get("text") or one.get("message") for one in told["choices"]] if "choices" in told else None
    return {**found, "json": told, "choices": texts}


def report(found: Sequence[Difference], meant: Sequence[Meant], *, show_all: bool = False, keep: Path | None = None) -> int:
    """Print what differs, and keep it in a file; the exit code."""
    reasons = {one: next((each for each in meant if is_meant(one, each)), None) for one in found}
    unmeant = [one for one, reason in reasons.items() if reason is None]
    rows = []
    for each in meant:
        ones = [one for one, reason in reasons.items() if reason is each]
        shown = f"{ones[0].theirs[:40]} / {ones[0].ours[:40]}" if ones else ""
        rows.append((each.case, each.place, str(len(ones)), shown, each.reason))
    # Of an answer whose status differs, nothing else was compared.
    unseen = [one.case for one in unmeant if one.place == "status"]
    used = set(reasons.values())
    stale = [each for each in meant if each not in used and not any(fnmatch.fnmatchcase(case, each.case) for case in unseen)]

    head = ("request", "place", "vLLM", "jaxpaged")
    told = [f"{len(CASES)} requests, {len(found)} differences, {len(found) - len(unmeant)} of them meant."]
    told.append(markdown(("request", "place", "times", "vLLM / jaxpaged, the first", "why it is meant"), rows))
    if show_all:
        told.append(markdown(head, [one.cells for one in found]))
    if unmeant:
        told += ["Not meant:", markdown(head, [one.cells for one in unmeant])]
    told += [f"parity_meant.py: no such difference any more: {each.case}, {each.place}" for each in stale]
    text = "\n\n".join(told) + "\n"
    print(text)
    if keep is not None:
        keep.write_text(text, encoding="utf-8")
    return 1 if unmeant or stale else 0


def is_meant(one: Difference, each: Meant) -> bool:
    """Whether an entry of the list is about a difference."""
    return fnmatch.fnmatchcase(one.case, each.case) and fnmatch.fnmatchcase(one.place, each.place)


def _say(text: str) -> None:
    print(f"parity: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
