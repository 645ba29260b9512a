"""The browser that tests of the page share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from browser import Browser, find_browser


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Skips where there is no Chromium."""
    if find_browser() is None:
        pytest.skip("there is no Chromium")
    one = Browser(tmp_path_factory.mktemp("profile"))
    yield one
    one.close()
