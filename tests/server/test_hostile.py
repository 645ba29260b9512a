"""Short versions of the server's figures: see show_server.py, which runs them in full."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxpaged.async_llm import AsyncLLM

for name in ("fastapi", "uvicorn", "httptools", "httpx2"):
    pytest.importorskip(name, reason="the extra `serve` is not installed")
sys.path.insert(0, str(Path(__file__).parent))
import storm  # noqa: E402
from running import new_llm, running  # noqa: E402


@pytest.fixture(scope="module")
def model() -> Iterator[AsyncLLM]:
    llm = new_llm()
    yield llm
    llm.shutdown()


def test_what_is_malformed_is_refused_beside_what_is_good(model: AsyncLLM) -> None:
    """R32, R47."""
    with running(model, body_timeout_s=3.0) as server:
        found = storm.storm(server, 300, 60, seed=2)
    assert found[400] > 200 and {413, 415, 431} & set(found)
