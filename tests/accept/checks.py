"""What a client's script checks and how it tells: one check's failure does not hide the next. The standard library alone.

A script is called with one argument, a file that `Target.load` reads, and its last act is `Checks.finish`.
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MAX_REASON_LEN = 300


@dataclass(frozen=True)
class Target:
    """Where the server is, and what is known of its model.

    Args:
      url: without /v1.
      model_dir: of the same model, for clients with a tokenizer of their own.
      expected: texts that transformers says after which prompts, of `jaxpaged/demo/expected.json`.
      out: a folder for whatever the client writes.
    """

    url: str
    key: str
    model: str
    model_dir: str
    expected: dict[str, str]
    out: str

    @classmethod
    def load(cls, path: Path) -> Target:
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @property
    def base_url(self) -> str:
        """As OpenAI's clients want it."""
        return f"{self.url}/v1"


class Checks:
    """The checks of one script, in order."""

    def __init__(self, argv: list[str] | None = None):
        self.target = Target.load(Path((argv or sys.argv)[1]))
        self.passed: list[str] = []
        self.failed: dict[str, str] = {}

    @contextlib.contextmanager
    def check(self, name: str) -> Iterator[None]:
        """What the block claims; an exception in it fails the check and goes no further."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self.failed[name] = reason[:MAX_REASON_LEN]
        else:
            self.passed.append(name)

    def finish(self) -> None:
        """Tell the runner, and end."""
        told = {"passed": self.passed, "failed": self.failed}
        Path(self.target.out, "report.json").write_text(json.dumps(told), encoding="utf-8")
        for name in self.passed:
            print("pass", name)
        for name, reason in self.failed.items():
            print("FAIL", name, reason)
        sys.exit(1 if self.failed or not self.passed else 0)


def same(got: Any, expected: Any) -> None:
    """Raise AssertionError unless they are equal, and say both."""
    if got != expected:
        raise AssertionError(f"got {got!r}, expected {expected!r}")


def holds(claim: Any, why: Any = "") -> None:
    """Raise AssertionError with what is told unless the claim holds."""
    if not claim:
        raise AssertionError(str(why))
