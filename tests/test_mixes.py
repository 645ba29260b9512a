"""A part of the figures of everything together; mixes.py has the laws and the tables, `make fuzz` shows all."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import mixes
import pytest

from jaxpaged.adjuster import Adjuster

# Every other pair, so that each feature meets half of the others.
QUICK = [
    (one, other)
    for (place, one), (further, other) in itertools.combinations(enumerate(mixes.FEATURES), 2)
    if "swap" not in (one, other) and (place + further) % 2
]


def test_nothing_compiles_whatever_is_asked() -> None:
    assert mixes.no_compilations(300) == 300


@pytest.mark.slow
def test_a_compilation_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Adjuster._biases_of

    def recompiles(self, sequence):
        jax.jit(lambda x: x + len(sequence.tokens))(jnp.zeros(1))
        return one(self, sequence)

    monkeypatch.setattr(Adjuster, "_biases_of", recompiles)
    with pytest.raises(AssertionError, match="traces and compilations"):
        mixes.no_compilations(100)


@pytest.mark.parametrize("name", sorted({pair[0] for pair in QUICK}))
def test_pairs_with_a_feature_go_together(name: str) -> None:
    for pair in QUICK:
        if pair[0] == name:
            mixes.check_pair(*pair)


@pytest.mark.slow
def test_all_pairs_go_together() -> None:
    for pair in itertools.combinations([name for name in mixes.FEATURES if name != "swap"], 2):
        mixes.check_pair(*pair)


@pytest.mark.slow
def test_all_pairs_with_pages_in_host_memory() -> None:
    assert mixes.pairs(("swap",)) == len(mixes.FEATURES) - 1


def test_two_features_that_swap() -> None:
    mixes.check_pair("penalties", "swap")
