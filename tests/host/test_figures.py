"""A part of each figure of the host side; `make fuzz` shows all of them. What each claims is in figures.py."""

from __future__ import annotations

import figures
import pytest


@pytest.mark.slow
def test_twenty_thousand_requests_equal_their_isolated_runs() -> None:
    assert figures.equal_to_isolated_runs(range(1000)) == 20_000


def test_prompts_around_the_limits_of_pools() -> None:
    assert figures.pools_and_prompts([1, 2, 5, 40, 41, 63, 79, 80]) > 1000


def test_overloads_come_to_an_end_with_a_step_in_flight_too() -> None:
    assert figures.overloads(range(20_000, 20_100)) == 100


def test_nobody_ends_later_than_one_after_another() -> None:
    assert figures.queues(range(100)) == 100


def test_the_last_of_its_policy_advances() -> None:
    assert figures.unpopular(range(200), ageing_steps=100) == 200
    assert figures.unpopular(range(2)) == 2


# --- R09 ---

STATES = (
    *("unknown", "queued", "preempted", "fetching", "loading in flight", "in a chunk", "copying in flight"),
    *("decoding", "forked", "search", "over"),
)


def test_an_abort_at_any_moment_is_the_end_of_one_request_alone() -> None:
    count, states = figures.abort_everywhere(every=12)
    assert count > 900 and min(states[state] for state in STATES) > 0, states
    assert sum(count for state, count in states.items() if state.endswith("in flight")) > 100


@pytest.mark.slow
def test_ten_thousand_aborts() -> None:
    count, states = figures.abort_everywhere()
    assert count >= 10_000 and min(states[state] for state in STATES) >= 10, states
