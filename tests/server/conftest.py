"""What tests of the server share: one model for all of a run, a server around it for a file, and a browser."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from browser import Browser, find_browser

if TYPE_CHECKING:  # where the extra `serve` is missing, tests are skipped, and this file must still load
    from running import Running

    from jaxpaged.async_llm import AsyncLLM


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Skips where there is no Chromium."""
    if find_browser() is None:
        pytest.skip("there is no Chromium")
    one = Browser(tmp_path_factory.mktemp("profile"))
    yield one
    one.close()


@pytest.fixture(scope="session")
def model() -> Iterator[AsyncLLM]:
    """The bundled model. What it has counted before is no test's business."""
    from running import new_llm

    llm = new_llm()
    yield llm
    llm.shutdown()


@pytest.fixture(scope="module")
def shared(model: AsyncLLM) -> Iterator[Running]:
    """A server with the options that it has by default."""
    from running import running

    with running(model) as one:
        yield one


@pytest.fixture
def server(shared: Running) -> Iterator[Running]:
    """The file's server; a test must leave its engine empty."""
    from running import is_empty, wait_until

    yield shared
    wait_until(lambda: is_empty(shared.llm))
    shared.engine.scheduler.check()
