"""Short versions of the server's figures: see show_server.py, which runs them in full."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

for name in ("fastapi", "uvicorn", "httptools", "httpx2"):
    pytest.importorskip(name, reason="the extra `serve` is not installed")
sys.path.insert(0, str(Path(__file__).parent))
import leaving  # noqa: E402
import lifecycle  # noqa: E402
import limits  # noqa: E402
import stages  # noqa: E402
import storm  # noqa: E402
from running import Running, running  # noqa: E402
from storm import served  # noqa: E402


@pytest.fixture(scope="module")
def shared() -> Iterator[Running]:
    with served(queue={"max_queued_requests": 300}, body_timeout_s=3.0) as one:
        yield one


def test_what_is_malformed_is_refused_beside_what_is_good(shared: Running) -> None:
    """R32, R47."""
    found = storm.storm(shared, 160, 60, seed=2)
    assert found[400] > 90 and {413, 415, 431} & set(found)


def test_a_fault_in_a_stage_of_one_is_no_fault_of_the_others(shared: Running) -> None:
    """R10."""
    assert stages.trials(shared, range(12)) == 12


def test_who_leaves_leaves_nothing(shared: Running) -> None:
    """R37."""
    assert leaving.disconnects(shared, 40, at_a_time=2) == 40


def test_more_outputs_than_may_be_are_refused_unseen(shared: Running) -> None:
    """R36."""
    limits.fan_out(shared)


def test_an_id_that_all_have_is_nobody_s_key(shared: Running) -> None:
    """R42."""
    limits.same_id(shared, 100)


def test_who_never_finishes_a_request_is_shown_out(shared: Running) -> None:
    """R34."""
    with running(shared.llm, body_timeout_s=0.8) as server:
        limits.slow_senders(server, 50)


def test_nothing_without_an_end_is_read_to_it(shared: Running) -> None:
    """R33."""
    with running(shared.llm, max_body_bytes=1 << 20) as server:
        limits.sizes(server, num_chunks=20_000, num_parallel=32)


def test_every_route_needs_a_key_by_every_name(shared: Running) -> None:
    """R46."""
    with running(shared.llm, api_key=limits.KEYS) as server:
        assert limits.keys(server) > 500


def test_a_device_that_hangs_is_seen_from_outside() -> None:
    """R38."""
    lifecycle.freeze(2.0, 1.0)


def test_no_stream_is_cut_without_a_word_at_the_end() -> None:
    """R40."""
    lifecycle.ends(range(6))
