"""Laws of sampling: which tokens may be drawn, how often each is, and that nothing but seed and position decides a draw."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from scipy import stats

from jaxpaged.model.sampler import SamplingInputs, first_largest, keep_likely, processed, sample

DRAWS: dict[str, Callable[..., Any]] = {name: jax.jit(functools.partial(sample, backend=name)) for name in ("xla", "auto")}
keep = jax.jit(keep_likely)
V = 40


@pytest.fixture(params=DRAWS)
def draw(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """`sample` in XLA, and in C++ where that is there."""
    return DRAWS[request.param]


def inputs(rows: int, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seeds=None) -> SamplingInputs:
    """The same options for every row, or an array with one for each; by default row r has seed r."""
    if seeds is None:
        seeds = np.stack([np.zeros(rows), np.arange(rows)], axis=1)
    return SamplingInputs(
        temperature=np.broadcast_to(np.float32(temperature), rows).copy(),
        top_k=np.broadcast_to(np.int32(top_k), rows).copy(),
        top_p=np.broadcast_to(np.float32(top_p), rows).copy(),
        min_p=np.broadcast_to(np.float32(min_p), rows).copy(),
        seeds=np.asarray(seeds).astype(np.uint32),
    )


def random_logits(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, (rows, V)).astype(np.float32)


def adversarial_logits() -> np.ndarray:
    inf, rng = np.inf, np.random.default_rng(1)
    rows = [
        np.zeros(V),  # all tie
        np.where(np.arange(V) % 2, 0.0, -0.0),  # all tie, as numbers
        np.where(np.arange(V) < 7, 1.0, 0.0),  # a tie at the top
        np.where(np.arange(V) == 9, 30.0, -30.0),  # one-hot
        np.where(np.arange(V) == 9, 0.0, -inf),  # exactly one token left
        np.where(np.arange(V) < 5, rng.normal(size=V), -inf),
        np.where(np.arange(V) < 5, 2.0, -inf),
        np.full(V, 3e38),
        np.where(np.arange(V) < 3, 3e38, -3e38),
        -1e30 * np.arange(V),
        np.linspace(-1e-30, 1e-30, V),
        rng.integers(-2, 3, V),  # many ties everywhere
        np.round(rng.normal(0, 1, V), 1),
        1e4 + rng.normal(size=V),
        -1e4 + rng.normal(size=V),
        np.log(2.0 ** -np.minimum(1 + np.arange(V), 30)),  # probabilities that sum to the usual thresholds exactly
    ]
    return np.array(rows, np.float32)


def kept_by_sorting(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> tuple[bool, ...]:
    """The definition, by sorting, in float64: which tokens of one row may be drawn. Ties at a threshold stay together."""
    x = logits.astype(np.float64)
    if min_p > 0:
        x = np.where(x - x.max() >= np.log(min_p), x, -np.inf)
    if 0 < top_k < len(x):
        x = np.where(x >= np.sort(x)[::-1][top_k - 1], x, -np.inf)
    if top_p < 1:
        order = np.argsort(-x, kind="stable")
        weights = np.exp(x[order] - x.max())
        mass = np.cumsum(weights / weights.sum())
        x = np.where(x >= x[order][np.argmax(mass >= top_p)], x, -np.inf)
    return tuple((x > -np.inf).tolist())


# --- which tokens may be drawn --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: random_logits(40), adversarial_logits], ids=["random", "adversarial"])
def test_kept_tokens_are_those_of_the_sorted_definition(make) -> None:
    options = list(
        itertools.product([0, -1, 1, 2, 5, V - 1, V, V + 1, 2**31 - 1], [1.0, 0.999, 0.9, 0.5, 0.1, 1e-6], [0.0, 0.05, 0.5, 1.0])
    )
    base = make()
    logits = np.repeat(base, len(options), axis=0)
    top_k, top_p, min_p = (np.array(column * len(base)) for column in zip(*options, strict=True))
    got = np.asarray(keep(logits, inputs(len(logits), top_k=top_k, top_p=top_p, min_p=min_p)))

    for row, x in enumerate(logits):
        k, p, m = int(top_k[row]), float(np.float32(top_p[row])), float(np.float32(min_p[row]))
        # A sum of probabilities may land on either side of the threshold that it equals; every other row has one answer.
        slack = 1e-6
        allowed = {kept_by_sorting(x, k, p, m)}
        allowed |= {kept_by_sorting(x, k, q, m) for q in (p - slack, p + slack) if q > 0 and p < 1}
        allowed |= {kept_by_sorting(x, k, p, m * q) for q in (1 - slack, 1 + slack) if m * q <= 1}
        assert tuple((got[row] > -np.inf).tolist()) in allowed, (x, k, p, m)
        is_kept = got[row] > -np.inf
        np.testing.assert_array_equal(got[row][is_kept], x[is_kept])


def test_one_token_of_vocabulary(draw: Callable[..., Any]) -> None:
    options = inputs(3, temperature=[0.0, 1.0, 5.0], top_k=[0, 1, 1], top_p=[1.0, 0.1, 1.0], min_p=[0.0, 1.0, 0.5])
    assert np.asarray(draw(np.zeros((3, 1), np.float32), options, np.arange(3, dtype=np.int32))).tolist() == [0, 0, 0]


def test_only_kept_tokens_are_drawn(draw: Callable[..., Any]) -> None:
    rows = 4096
    logits = np.tile(random_logits(1), (rows, 1))
    options = inputs(rows, temperature=3.0, top_k=12, top_p=0.8, min_p=0.05)
    allowed = np.asarray(kept_by_sorting(logits[0] / np.float32(3.0), 12, 0.8, 0.05))
    drawn = np.bincount(np.asarray(draw(logits, options, np.arange(rows, dtype=np.int32))), minlength=V)
    assert (drawn > 0).tolist() == allowed.tolist()


# --- special cases are the general one ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 127, 128, 129, 1000, 4096])
def test_the_first_largest_is_argmax(size: int) -> None:
    rng = np.random.default_rng(size)
    scores = np.concatenate(
        [
            rng.normal(size=(8, size)),
            rng.integers(0, 3, (8, size)),  # many are equal
            np.full((1, size), -np.inf),
            np.full((1, size), -1.0),  # less than what a row may be filled up with
            np.where(np.arange(size) == size - 1, 5.0, -np.inf)[None],
            np.where(rng.random((4, size)) < 0.5, 0.0, -0.0),  # equal numbers of two bit patterns
        ]
    ).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(first_largest)(scores), np.argmax(scores, axis=-1))


def test_the_first_largest_of_what_are_no_numbers_is_a_place_of_the_row() -> None:
    scores = np.full((3, 130), np.nan, np.float32)
    scores[1, :128] = 1
    scores[2, :128] = np.inf
    found = np.asarray(jax.jit(first_largest)(scores))
    assert ((found >= 0) & (found < 130)).all()


def test_temperature_zero_is_the_largest_logit(draw: Callable[..., Any]) -> None:
    logits = np.concatenate([random_logits(64), adversarial_logits()])
    rows = len(logits)
    for temperature in (0.0, np.where(np.arange(rows) % 2, 0.0, 1.0)):  # a batch of greedy rows, and a mixed one
        options = inputs(rows, temperature=temperature, top_k=3, top_p=0.5, min_p=0.1)
        got = np.asarray(draw(logits, options, np.zeros(rows, np.int32)))
        is_greedy = options.temperature == 0
        np.testing.assert_array_equal(got[is_greedy], logits.argmax(axis=1)[is_greedy])


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-3}], ids=str)
def test_keeping_one_token_is_greedy(draw: Callable[..., Any], options: dict) -> None:
    logits = random_logits(256)
    assert np.diff(np.sort(logits, axis=1)[:, -2:]).min() > 0, "no ties at the top"
    if "temperature" in options:
        logits = logits[np.diff(np.sort(logits, axis=1)[:, -2:])[:, 0] > 0.05]
    got = draw(logits, inputs(len(logits), **{"temperature": 2.0, **options}), np.zeros(len(logits), np.int32))
    np.testing.assert_array_equal(np.asarray(got), logits.argmax(axis=1))


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1.2e-38, 1e-44])
def test_a_tiny_temperature_is_greedy_and_does_not_overflow(draw: Callable[..., Any], temperature: float) -> None:
    logits = np.float32(10) * random_logits(256)
    got = draw(logits, inputs(256, temperature=temperature), np.zeros(256, np.int32))
    np.testing.assert_array_equal(np.asarray(got), logits.argmax(axis=1))


def test_filters_that_keep_all_change_no_draw(draw: Callable[..., Any]) -> None:
    logits = random_logits(512)
    positions = np.arange(512, dtype=np.int32)
    plain = np.asarray(draw(logits, inputs(512, temperature=1.5), positions))
    for options in ({"top_k": V}, {"top_k": V + 9}, {"top_k": -1}, {"top_p": 1.0, "min_p": 0.0, "top_k": 0}):
        np.testing.assert_array_equal(np.asarray(draw(logits, inputs(512, temperature=1.5, **options), positions)), plain)


# --- how often each is drawn ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("varies", ["seed", "position"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 2.5},
        {"temperature": 0.6, "top_k": 6},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"top_k": 8, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()) or "plain",
)
def test_draws_follow_the_distribution(draw: Callable[..., Any], options: dict, varies: str) -> None:
    """Chi-square over 200,000 draws: another seed each, or one sequence's successive positions."""
    rows, vocabulary = 200_000, 12
    row = np.random.default_rng(3).normal(0, 1.0, vocabulary).astype(np.float32)
    numbers = np.arange(rows)
    seeds = np.stack([numbers >> 3, numbers * 2654435761 % 2**32], axis=1) if varies == "seed" else np.full((rows, 2), 77)
    positions = np.full(rows, 5, np.int32) if varies == "seed" else numbers.astype(np.int32)
    got = np.asarray(draw(np.tile(row, (rows, 1)), inputs(rows, seeds=seeds, **options), positions))

    scaled = row.astype(np.float64) / options.get("temperature", 1.0)
    kept = np.array(kept_by_sorting(scaled, options.get("top_k", 0), options.get("top_p", 1.0), options.get("min_p", 0.0)))
    weights = np.where(kept, np.exp(scaled), 0.0)
    expected = rows * weights / weights.sum()
    counts = np.bincount(got, minlength=vocabulary)
    assert not counts[~kept].any()
    assert stats.chisquare(counts[kept], expected[kept]).pvalue > 1e-3

    # Neighbours are independent of each other.
    pairs = np.zeros((vocabulary, vocabulary))
    np.add.at(pairs, (got[:-1:2], got[1::2]), 1)
    assert stats.chi2_contingency(pairs[np.ix_(kept, kept)]).pvalue > 1e-3


# --- what decides a draw --------------------------------------------------------------------------------------------


def test_seed_and_position_alone_decide(draw: Callable[..., Any]) -> None:
    """Not the row, not the batch's size, and not how the neighbours sample."""
    rng = np.random.default_rng(4)
    logits, rows = random_logits(64), 64
    options = inputs(rows, temperature=1.0, seeds=rng.integers(0, 2**32, (rows, 2)))
    positions = rng.integers(0, 1000, rows).astype(np.int32)
    want = np.asarray(draw(logits, options, positions))

    for some in (rng.permutation(rows), np.array([17]), np.array([5, 9, 9, 63, 0])):
        part = SamplingInputs(**{name: array[some] for name, array in vars(options).items()})
        np.testing.assert_array_equal(np.asarray(draw(logits[some], part, positions[some])), want[some])
    neighbours = rng.random(rows) < 0.5
    mixed = inputs(
        rows,
        temperature=np.where(neighbours, 0.0, 1.0),
        top_k=np.where(neighbours, 3, 0),
        top_p=np.where(neighbours, 0.3, 1.0),
        seeds=options.seeds,
    )
    np.testing.assert_array_equal(np.asarray(draw(logits, mixed, positions))[~neighbours], want[~neighbours])


def test_every_part_of_the_seed_and_the_position_matter(draw: Callable[..., Any]) -> None:
    rows = 200
    logits = np.zeros((rows, V), np.float32)
    zeros, numbers = np.zeros(rows, np.int64), np.arange(rows)
    for high, low, position in ((numbers, zeros, zeros), (zeros, numbers, zeros), (zeros, zeros, numbers)):
        got = draw(logits, inputs(rows, seeds=np.stack([high, low], axis=1)), position.astype(np.int32))
        assert len(np.unique(np.asarray(got))) > V // 2


def test_what_is_drawn_is_never_told_as_cut(draw: Callable[..., Any]) -> None:
    """Also where a threshold is hit exactly, which is rounded in one way or another."""
    rng = np.random.default_rng(0)
    for size in (3, 7, 20):
        logits = np.log(rng.dirichlet(np.ones(size), 64)).astype(np.float32)
        sums = np.cumsum(np.sort(np.exp(logits.astype(np.float64)), axis=1)[:, ::-1], axis=1)
        options = inputs(64, top_p=sums[np.arange(64), rng.integers(0, size - 1, 64)], temperature=1.0)
        for number in range(8):
            drawn = np.asarray(draw(logits, options, np.full(64, number, np.int32)))
            shown = np.asarray(jax.jit(processed)(logits, options, drawn))
            assert (shown[np.arange(64), drawn] > -np.inf).all()
            others = np.asarray(keep(logits, options)) > -np.inf
            assert ((shown > -np.inf) == (others | (np.arange(size) == drawn[:, None]))).all()
