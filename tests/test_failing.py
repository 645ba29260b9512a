"""A part of R11: steps that fail are computed anew, and who makes them fail is found; `make fuzz-server` has the rest."""

from __future__ import annotations

import math
import random

import failing
import pytest

from jaxpaged.suspects import Suspects


def test_a_step_that_fails_costs_nobody_anything_but_who_makes_it_fail() -> None:
    assert failing.trials(range(24)) == 24


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 64])
def test_one_that_makes_all_its_steps_fail_is_found_by_halves(count: int) -> None:
    ids = [str(number) for number in range(count)]
    for guilty in random.Random(count).sample(ids, min(count, 8)):
        suspects, num_failed, given_up = Suspects(), 0, []
        while not given_up:
            running = [one for one in ids if suspects.on_trial is None or one in suspects.on_trial]
            if guilty in running:
                num_failed += 1
                given_up = suspects.failed(running)
            else:
                for one in running:
                    suspects.over(one)
        assert given_up == [guilty] and num_failed <= 2 + 2 * math.ceil(math.log2(count))
        for one in ids:
            suspects.over(one)
        assert suspects.on_trial is None


def test_who_has_had_a_token_since_is_not_suspected() -> None:
    suspects = Suspects()
    for _ in range(5):
        assert suspects.failed(["a", "b"]) == [] and suspects.on_trial is None
        suspects.over("a")
        suspects.over("b")
    assert suspects.failed(["a"]) == [] and suspects.failed(["b"]) == [] and suspects.failed(["b"]) == ["b"]


def test_some_that_a_failed_step_had_no_room_for_are_tried_after_it() -> None:
    suspects = Suspects()
    assert suspects.failed("abcdefgh") == suspects.failed("abcdefgh") == []
    assert suspects.on_trial == frozenset("abcd")
    assert suspects.failed("ab") == [] and suspects.on_trial == frozenset("a")
    suspects.over("a")
    assert suspects.failed("b") == ["b"] and suspects.on_trial == frozenset("cd")
