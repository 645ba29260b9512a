"""What every test shares: warnings are errors, compiled steps are kept for the length of the session, torch may be missing."""

from __future__ import annotations

import importlib.util
import logging
import signal
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from hypothesis import HealthCheck, settings

# Warnings that this project can do nothing about, each with its reason. Everything else fails the test that caused it.
ALLOWED_WARNINGS = [
    "ignore::DeprecationWarning:orbax.*",  # orbax still uses names that its own dependencies have renamed
    "ignore::DeprecationWarning:etils.*",
    "ignore::DeprecationWarning:google.*",
    "ignore::DeprecationWarning:torch.*",  # imported by transformers, not by us
    "ignore::FutureWarning:torch.*",
    # A future of tensorstore, which orbax reads with, that comes after the event loop of a read that failed.
    "ignore:(?s)Exception ignored in. None.*Event loop is closed:pytest.PytestUnraisableExceptionWarning",
    # Two workers compile one program at once, and one finds what the other has half written: jax compiles it then.
    "ignore:Error reading persistent compilation cache entry:UserWarning",
    "ignore::DeprecationWarning:<frozen importlib._bootstrap>",  # SWIG types of a dependency's extension module
]


def pytest_configure(config: pytest.Config) -> None:
    # Where the suite runs behind a shell's `&`, Ctrl-C is ignored, and would be by every process that a test begins.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("filterwarnings", "error")
    # New examples are for the long fuzzing; and a machine that is held up is no failure.
    settings.register_profile(
        "suite", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("suite")
    for line in ALLOWED_WARNINGS:
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(scope="session", autouse=True)
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of compiled programs, new in each session and shared by its workers: equal steps of two tests compile once."""
    base = tmp_path_factory.getbasetemp()
    # Under pytest-xdist each worker has a folder of its own inside the session's.
    folder = (base.parent if base.name.startswith("popen-") else base) / "compiled"
    folder.mkdir(exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # jax names the folder it writes to, and each program it compiles, at level WARNING when asked; neither is a test's business.
    logging.getLogger("jax._src.compilation_cache").setLevel(logging.ERROR)
    return folder


@pytest.fixture
def own_logger() -> Iterator[None]:
    """A command sets up the library's logger for its process; tests share one."""
    logger = logging.getLogger("jaxpaged")
    before = logger.handlers, logger.level, logger.propagate
    yield
    logger.handlers, logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


@pytest.fixture
def torch():
    """The torch module, or a skip: jaxpaged needs transformers, never torch."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed; transformers' own models are the reference only where it is")
    import torch

    return torch
