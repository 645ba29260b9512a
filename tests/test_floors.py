"""The house's floors, read from the source with `ast`: imports point down, and the library keeps to its own rules.

Nothing is imported here, so that a module that cannot be imported is checked too.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ("jaxpaged", "pallas_kernels", "convert")

# From the ground up. A room imports from floors below its own; rooms of one floor never see each other.
FLOORS = (
    (
        *("jaxpaged.version", "jaxpaged.errors", "jaxpaged.framed", "jaxpaged.stop_strings", "jaxpaged.suspects"),
        *("jaxpaged.cpu_threads", "jaxpaged.tools"),
    ),
    (
        "jaxpaged.admission",
        "jaxpaged.client",
        "jaxpaged.pacing",
        "jaxpaged.profiling",
        "jaxpaged.quantization_config",
        "jaxpaged.speculative_config",
    ),
    ("jaxpaged.config", "pallas_kernels"),
    ("jaxpaged.host", "jaxpaged.ledger", "jaxpaged.model", "jaxpaged.outputs", "jaxpaged.series"),
    ("jaxpaged.batch", "jaxpaged.checkpoint", "jaxpaged.duel", "jaxpaged.observe", "jaxpaged.offload", "jaxpaged.templates"),
    ("jaxpaged.adjuster", "jaxpaged.drafter", "jaxpaged.structured"),
    ("jaxpaged.runner", "jaxpaged.tokenizer", "jaxpaged.demo", "convert"),
    ("jaxpaged.speculative",),
    ("jaxpaged.engine",),
    ("jaxpaged.embedder", "jaxpaged.growing", "jaxpaged.loading", "jaxpaged.prompts", "jaxpaged.simulate"),
    ("jaxpaged.live", "jaxpaged.streams"),
    ("jaxpaged.engine_thread",),
    ("jaxpaged.llm", "jaxpaged.async_llm"),
    ("jaxpaged",),  # the public names; nothing below asks it for them
    ("jaxpaged.server",),
    ("jaxpaged.bench",),
    ("jaxpaged.cli",),
    ("jaxpaged.__main__",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# Rooms that may import nothing but the standard library and these.
ONLY = {
    "jaxpaged.version": (),
    "jaxpaged.errors": (),
    "jaxpaged.admission": ("jaxpaged.errors",),
    "jaxpaged.cpu_threads": (),
    "jaxpaged.client": ("jaxpaged.client", "jaxpaged.errors", "httptools"),
    "jaxpaged.framed": (),
    "jaxpaged.speculative_config": ("jaxpaged.errors",),
    "jaxpaged.config": ("jaxpaged.errors", "jaxpaged.quantization_config", "jaxpaged.speculative_config"),
    "jaxpaged.quantization_config": ("jaxpaged.errors",),
    "jaxpaged.series": (),
    "jaxpaged.stop_strings": (),
    "jaxpaged.suspects": (),
    "jaxpaged.tools": ("jaxpaged.tools",),
    "jaxpaged.host": ("jaxpaged.config", "jaxpaged.host"),
    "jaxpaged.observe": ("jaxpaged.config", "jaxpaged.host", "jaxpaged.observe", "jaxpaged.version"),
    "jaxpaged.simulate": ("jaxpaged.config", "jaxpaged.host", "jaxpaged.simulate"),
    "jaxpaged.templates": ("jaxpaged.framed", "jaxpaged.host", "jaxpaged.templates", "jinja2"),
    "pallas_kernels": ("pallas_kernels", "jax", "jaxlib", "numpy", "ml_dtypes"),
}
# file -> the only reads of the environment in library code: they set no option of ours.
ENVIRONMENT = {
    "jaxpaged/runner.py": "os.environ.get('XDG_CACHE_HOME')",  # the desktop standard's variable for the user's cache
    "jaxpaged/cli/collect_env.py": "os.environ.items()",  # prints them for a bug report
    "jaxpaged/bench/peer.py": "os.environ.copy()",  # what the processes of other engines inherit
    "jaxpaged/templates/child.py": "os.environ.clear()",  # what a template that leaves its sandbox is not to find
    # What its processes inherit: jax takes the folder of its compiler's dumps from the environment alone, when it starts.
    "pallas_kernels/compile_check.py": "os.environ.copy()",
}


def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file, of all library code under `root`."""
    found = {}
    for package in LIBRARY:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """(line, module) of every import in a file, also those inside functions and under TYPE_CHECKING."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                # `from jaxpaged import batch` imports a module, `from jaxpaged import LLM` a name.
                yield node.lineno, f"{source}.{alias.name}" if f"{source}.{alias.name}" in known else source


def room(module: str) -> str | None:
    """The longest name of FLOORS that a module lies in; None for one that has no floor.

    Rooms of jaxpaged are named one by one: a new one must not slip in as a part of `jaxpaged` itself.
    """
    parts = module.split(".")
    if parts[0] == "jaxpaged" and len(parts) > 1:
        name = ".".join(parts[:2])
        return name if name in FLOOR_OF else None
    return parts[0] if parts[0] in FLOOR_OF else None


def floor_problems(root: Path) -> list[str]:
    """Every import that does not point down."""
    problems = []
    known = modules(root)
    for name, path in known.items():
        here = room(name)
        if here is None:
            problems.append(f"{name}: has no floor; give its room one in FLOORS")
            continue
        for line, target in imports(name, path, known):
            where = f"{path.relative_to(root)}:{line}: {target}"
            there = room(target)
            if target.split(".")[0] in LIBRARY:
                if there is None:
                    problems.append(f"{where} has no floor")
                elif there != here and FLOOR_OF[there] >= FLOOR_OF[here]:
                    problems.append(f"{where} is not below {here}")
            allowed = ONLY.get(here)
            if allowed is not None and not is_allowed(target, allowed):
                problems.append(f"{where} is not for {here}, which imports only the standard library and {', '.join(allowed)}")
    return problems


def is_allowed(target: str, allowed: tuple[str, ...]) -> bool:
    """Whether a module is of the standard library or lies in one of the allowed ones."""
    return target.split(".")[0] in sys.stdlib_module_names or any(f"{target}.".startswith(f"{name}.") for name in allowed)


def rule_problems(root: Path) -> list[str]:
    """Library code without assert, without reads of the environment, without `import *`."""
    problems = []
    for path in modules(root).values():
        file = path.relative_to(root).as_posix()
        nodes = list(ast.walk(ast.parse(path.read_text(), str(path))))
        excepted = [node.func.value for node in nodes if is_excepted(node, file)]
        for node in nodes:
            where = f"{file}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Assert):
                problems.append(f"{where}: assert is gone under python -O; use `if ...: raise`")
            elif isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
                problems.append(f"{where}: import * hides where a name comes from")
            elif is_environment(node) and node not in excepted:
                problems.append(f"{where}: reads the environment; make it a field of a config")
    return problems


def is_environment(node: ast.AST) -> bool:
    """`os.environ`, `os.getenv` and their bytes twins, also when imported by name."""
    names = ("environ", "environb", "getenv", "getenvb")
    if isinstance(node, ast.Attribute):
        return node.attr in names and isinstance(node.value, ast.Name) and node.value.id == "os"
    return isinstance(node, ast.ImportFrom) and node.module == "os" and any(alias.name in names for alias in node.names)


def is_excepted(node: ast.AST, file: str) -> bool:
    """Whether a node is the file's entry of ENVIRONMENT: a call of a method of `os.environ`."""
    return isinstance(node, ast.Call) and ast.unparse(node) == ENVIRONMENT.get(file)


def test_imports_point_down() -> None:
    assert floor_problems(ROOT) == []


def test_library_code_keeps_its_rules() -> None:
    assert rule_problems(ROOT) == []


def test_the_whole_library_was_read() -> None:
    found = modules(ROOT)
    assert {"jaxpaged", "jaxpaged.host.scheduler", "jaxpaged.model.step", "pallas_kernels", "convert"} <= set(found)
    targets = {target for name, path in found.items() for _, target in imports(name, path, found)}
    assert {"jax", "jaxpaged.batch", "jaxpaged.host.scheduler", "pallas_kernels.backends"} <= targets


# --- the tests above must be able to fail ---

BAD_IMPORTS = [
    ("jaxpaged/host/pages.py", "import jax", "is not for jaxpaged.host"),
    ("jaxpaged/host/pages.py", "import numpy as np", "is not for jaxpaged.host"),
    ("jaxpaged/host/pages.py", "def f():\n    import jax.numpy", "is not for jaxpaged.host"),
    ("jaxpaged/host/pages.py", "from jaxpaged.model import step", "is not below jaxpaged.host"),
    ("jaxpaged/host/pages.py", "from ..model import step", "is not below jaxpaged.host"),
    ("jaxpaged/host/pages.py", "from ..model.step import x", "is not below jaxpaged.host"),
    ("jaxpaged/host/pages.py", "from jaxpaged import batch", "is not below jaxpaged.host"),
    ("jaxpaged/host/pages.py", "from jaxpaged import LLM", "is not below jaxpaged.host"),
    ("jaxpaged/host/pages.py", "import tqdm", "is not for jaxpaged.host"),
    ("jaxpaged/model/step.py", "import jaxpaged.host.pages", "is not below jaxpaged.model"),
    ("jaxpaged/simulate/run.py", "from jaxpaged.engine import Engine", "is not for jaxpaged.simulate"),
    ("jaxpaged/simulate/cost.py", "import numpy", "is not for jaxpaged.simulate"),
    ("jaxpaged/model/step.py", "if TYPE_CHECKING:\n    from jaxpaged.engine import Engine", "is not below jaxpaged.model"),
    ("jaxpaged/config.py", "import jax", "is not for jaxpaged.config"),
    ("jaxpaged/config.py", "import pallas_kernels", "is not below jaxpaged.config"),
    ("jaxpaged/batch.py", "from jaxpaged.engine import Engine", "is not below jaxpaged.batch"),
    ("jaxpaged/batch.py", "from .engine import Engine", "is not below jaxpaged.batch"),
    ("jaxpaged/batch.py", "import jaxpaged", "is not below jaxpaged.batch"),
    ("jaxpaged/offload/transfer.py", "from jaxpaged.runner import JaxRunner", "is not below jaxpaged.offload"),
    ("jaxpaged/offload/transfer.py", "from jaxpaged import batch", "is not below jaxpaged.offload"),
    ("pallas_kernels/ops.py", "import jaxpaged.config", "is not below pallas_kernels"),
    ("pallas_kernels/ops.py", "import flax", "is not for pallas_kernels"),
    ("convert/cli.py", "from jaxpaged.llm import LLM", "is not below convert"),
    ("jaxpaged/utils.py", "import math", "has no floor"),
    ("jaxpaged/utils/text.py", "import math", "has no floor"),
    ("jaxpaged/cli/__init__.py", "from jaxpaged.utils import text", "has no floor"),
]
GOOD_IMPORTS = [
    (
        "jaxpaged/host/pages.py",
        "import math\nfrom collections import deque\nfrom jaxpaged.config import nearest\nfrom . import request",
    ),
    (
        "jaxpaged/model/step.py",
        "import jax\nfrom jaxpaged.config import Bucket\nfrom pallas_kernels import f\nfrom jaxpaged.model import step",
    ),
    ("jaxpaged/batch.py", "import numpy\nfrom .host import pages\nfrom jaxpaged.model.step import x"),
    ("jaxpaged/cli/__init__.py", "from jaxpaged import LLM\nfrom jaxpaged.llm import x\nimport rich"),
    (
        "pallas_kernels/ops.py",
        "import jax.numpy as jnp\nimport numpy\nfrom jax.experimental import pallas\nfrom . import backends",
    ),
    ("convert/cli.py", "from jaxpaged.checkpoint import x\nfrom jaxpaged.version import __version__"),
]
BAD_RULES = [
    ("assert x", "assert"),
    ("def f():\n    assert x, 'no'", "assert"),
    ("from math import *", r"import \*"),
    ("import os\nx = os.environ['A']", "environment"),
    ("import os\nx = os.environ.get('A')", "environment"),
    ("import os\nx = os.getenv('XDG_CACHE_HOME')", "environment"),
    ("import os\nx = os.environ.get(name)", "environment"),
    ("from os import environ", "environment"),
    ("from os import path, getenv", "environment"),
]


def house(root: Path, file: str, source: str) -> Path:
    """A small tree with one more file in it."""
    rooms = ("host/pages", "host/request", "model/step", "batch", "config", "engine", "llm", "runner", "version", "cli/__init__")
    for path in ("jaxpaged/__init__", *(f"jaxpaged/{name}" for name in rooms), "pallas_kernels/backends", "convert/__init__"):
        target = root / f"{path}.py"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("x = 1\n")
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(source + "\n")
    return root


@pytest.mark.parametrize(("file", "source", "problem"), BAD_IMPORTS)
def test_an_import_that_points_up_is_seen(file: str, source: str, problem: str, tmp_path: Path) -> None:
    problems = floor_problems(house(tmp_path, file, source))
    assert any(problem in line for line in problems), problems


@pytest.mark.parametrize(("file", "source"), GOOD_IMPORTS)
def test_an_import_that_points_down_is_fine(file: str, source: str, tmp_path: Path) -> None:
    assert floor_problems(house(tmp_path, file, source)) == []


@pytest.mark.parametrize(("source", "problem"), BAD_RULES)
@pytest.mark.parametrize(
    "file", ["jaxpaged/runner.py", "jaxpaged/host/pages.py", "pallas_kernels/backends.py", "convert/__init__.py"]
)
def test_a_broken_rule_is_seen(file: str, source: str, problem: str, tmp_path: Path) -> None:
    (line,) = rule_problems(house(tmp_path, file, source))
    assert problem.replace("\\", "") in line


@pytest.mark.parametrize("file", ENVIRONMENT)
def test_the_allowed_reads_of_the_environment(file: str, tmp_path: Path) -> None:
    source = f"import os\nx = {ENVIRONMENT[file]}"
    assert rule_problems(house(tmp_path / "a", file, source)) == []
    assert len(rule_problems(house(tmp_path / "b", "jaxpaged/batch.py", source))) == 1
    assert len(rule_problems(house(tmp_path / "c", file, f"{source}\ny = os.environ['A']"))) == 1
