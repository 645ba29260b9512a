"""A part of the figures of samplers; samplers.py has the laws, `make fuzz` shows all."""

from __future__ import annotations

import pytest
import samplers


def test_hostile_logits() -> None:
    assert samplers.laws((3, 4, 5)) == 3 * 64  # of 7, 40 and 257 tokens


QUICK = ("all three", "penalties", "allowed_token_ids")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in samplers.KINDS]
)
def test_draws_of_the_engine_follow_the_distribution(name: str) -> None:
    assert samplers.draws(name, 4_000) > 1e-4


def test_log_probabilities_of_prompts_are_complete_in_any_chunks() -> None:
    assert samplers.prompt_logprobs(chunks=(1, 7, 0), lengths=(33,)) == 18
