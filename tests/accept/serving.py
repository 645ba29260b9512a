"""Servers for as long as a block lasts: a process, its log, the address that it says, and an end that leaves nothing behind.

Knows processes. Refuses to know what is asked of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL_DIR = REPOSITORY / "jaxpaged" / "demo" / "model"
START_S = 600.0  # steps are compiled, on two cores that may be busy
_STOP_S = 60.0
_ADDRESS = re.compile(r"serving on (http://\S+)")


class StartError(Exception):
    """A server did not come up; the message holds the end of its log."""


@dataclass(frozen=True)
class Served:
    """Where a server is, and what it asks of those who come."""

    url: str
    key: str
    log: Path


@contextlib.contextmanager
def serving_ours(folder: Path, *flags: str, python: str = sys.executable) -> Iterator[Served]:
    """`jaxpaged serve` with the bundled model in float32, on a free loopback port, with a key."""
    key = secrets.token_hex(16)
    (folder / "keys.txt").write_text(key + "\n")
    command = (python, "-m", "jaxpaged", "serve", "--port", "0", "--api-key-file", str(folder / "keys.txt"), "--dtype", "float32")
    # Programs that are compiled are kept beside the environments: the next run begins seconds after its start.
    variables = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    log = folder / "jaxpaged.log"
    with _process((*command, *flags), log, variables) as process:
        yield Served(_wait_for_address(process, log), key, log)


@contextlib.contextmanager
def serving_vllm(folder: Path, python: Path, *flags: str) -> Iterator[Served]:
    """vLLM's server for CPUs with the same model, its name and its weights' type being those of `serving_ours`."""
    key, port = secrets.token_hex(16), _free_port()
    command = (
        str(python),
        "-m",
        "vllm.entrypoints.cli.main",
        "serve",
        str(MODEL_DIR),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    )
    command += ("--served-model-name", "demo", "--dtype", "float32", "--enforce-eager")
    variables = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VLLM_"))},
        **{"VLLM_CPU_KVCACHE_SPACE": "2", "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
        **{"DO_NOT_TRACK": "1", "VLLM_API_KEY": key, "TOKENIZERS_PARALLELISM": "false"},
        # Shows /reset_prefix_cache, which ours has too.
        "VLLM_SERVER_DEV_MODE": "1",
    }
    log = folder / "vllm.log"
    with _process((*command, *flags), log, variables) as process:
        url = f"http://127.0.0.1:{port}"
        _wait_for_health(process, url, key, log)
        yield Served(url, key, log)


@contextlib.contextmanager
def _process(command: Sequence[str], log: Path, variables: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as file:
        # A session of its own: what it starts ends with it.
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=dict(variables), start_new_session=True
        )
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for_address(process: subprocess.Popen[bytes], log: Path) -> str:
    def found() -> str | None:
        match = _ADDRESS.search(log.read_text(errors="replace"))
        return match[1] if match else None

    return _wait(process, found, log)


def _wait_for_health(process: subprocess.Popen[bytes], url: str, key: str, log: Path) -> None:
    def found() -> str | None:
        request = urllib.request.Request(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"})
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return json.load(answer)["data"][0]["id"]
        except (OSError, urllib.error.URLError):
            return None

    _wait(process, found, log)


def _wait(process: subprocess.Popen[bytes], found, log: Path) -> str:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if (value := found()) is not None:
            return value
        if process.poll() is not None:
            raise StartError(f"it ended with {process.returncode}:\n{_end_of(log)}")
        time.sleep(0.5)
    raise StartError(f"not up within {START_S:g} s:\n{_end_of(log)}")


def _end_of(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
