"""What the package says of itself: its dependencies, its rooms, its licence, and what importing it costs."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]

# Too slow, or too much, for who only asks for the version or checks an option.
HEAVY = (
    "jax",
    "jaxlib",
    "numpy",
    "flax",
    "optax",
    "orbax",
    "transformers",
    "tokenizers",
    "torch",
    "safetensors",
    "huggingface_hub",
)


def names(requirements: list[str]) -> list[str]:
    """Normalised names of a list of requirements."""
    return [
        re.split(r"[\s\[<>=!~;@(]", line.strip(), maxsplit=1)[0].lower().replace("_", "-").replace(".", "-")
        for line in requirements
    ]


def all_requirements() -> list[str]:
    extras = PROJECT.get("optional-dependencies", {}).values()
    groups = PYPROJECT.get("dependency-groups", {}).values()
    entries = [*PYPROJECT["build-system"]["requires"], *PROJECT["dependencies"], *(r for extra in extras for r in extra)]
    return [*entries, *(r for group in groups for r in group if isinstance(r, str))]


def test_the_registry_s_pallas_is_no_dependency() -> None:
    """The package of that name is unrelated to JAX's Pallas, which is jax.experimental.pallas."""
    assert "pallas" not in names(all_requirements())
    assert not any(name.startswith("pallas") for name in names(all_requirements()))


def test_names_of_requirements() -> None:
    assert names(
        ["pallas", "Pallas>=1", "pallas[x]==2", "pallas @ https://x", "pallas;python_version>'3'", "ml_dtypes>=0.5"]
    ) == [
        *["pallas"] * 5,
        "ml-dtypes",
    ]


def test_what_it_is_built_on_is_declared() -> None:
    assert {"jax", "flax", "optax", "orbax-checkpoint", "transformers", "safetensors", "numpy"} <= set(
        names(PROJECT["dependencies"])
    )


def test_every_requirement_has_a_lower_bound_and_jax_an_upper_one() -> None:
    assert [line for line in PROJECT["dependencies"] if ">=" not in line] == []
    (jax,) = (line for line in PROJECT["dependencies"] if names([line]) == ["jax"])
    assert jax == "jax>=0.10.2,<0.13"
    for extra in ("cuda12", "cuda13"):
        assert PROJECT["optional-dependencies"][extra] == [jax.replace("jax", f"jax[{extra}]", 1)], (
            "the extra must not widen the range"
        )


def test_python_and_name() -> None:
    assert PROJECT["name"] == "jaxpaged"
    assert PROJECT["requires-python"] == ">=3.11"
    assert PYPROJECT["tool"]["ruff"]["target-version"] == "py311"


def test_the_wheel_holds_the_three_rooms_of_library_code() -> None:
    packages = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert packages == ["jaxpaged", "pallas_kernels", "convert"]
    for package in packages:
        assert (ROOT / package / "__init__.py").is_file()


def test_the_licence_is_apache_2() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION" in text and "END OF TERMS AND CONDITIONS" in text


def test_the_version_is_written_once() -> None:
    assert "version" in PROJECT["dynamic"] and "version" not in PROJECT
    assert PYPROJECT["tool"]["hatch"]["version"]["path"] == "jaxpaged/version.py"
    (version,) = re.findall(r'^__version__ = "(.+)"$', (ROOT / "jaxpaged" / "version.py").read_text(), re.MULTILINE)
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", version)


def python(code: str) -> str:
    """What a fresh interpreter prints, warnings as errors."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize(
    "code",
    [
        "import jaxpaged.version",
        "import jaxpaged",
        "import jaxpaged; jaxpaged.__version__",
        "from jaxpaged import SamplingParams; SamplingParams(temperature=0)",
        "import jaxpaged.config",
        "import jaxpaged.host.scheduler",
    ],
)
def test_importing_little_costs_little(code: str) -> None:
    loaded = f"print(*[name for name in {HEAVY!r} if name in sys.modules])"
    assert python(f"import sys\n{code}\n{loaded}") == ""


def test_the_version_is_the_same_everywhere() -> None:
    import jaxpaged

    assert python("import jaxpaged; print(jaxpaged.__version__)") == jaxpaged.__version__


def test_every_public_name_is_there() -> None:
    import jaxpaged

    missing = [name for name in jaxpaged.__all__ if getattr(jaxpaged, name, None) is None]
    assert missing == []
    assert set(jaxpaged.__all__) <= set(dir(jaxpaged))
    with pytest.raises(AttributeError, match="SamplingParam"):
        jaxpaged.SamplingParam  # noqa: B018
