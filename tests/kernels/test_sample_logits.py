"""Laws of sampling beside the ladder's: frequencies, who shares the batch, ties, what can never be sampled, wrong arguments."""

from __future__ import annotations

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from pallas_kernels import operations, sample_logits
from pallas_kernels.operations import Call
from pallas_kernels.sample_logits import cases, noise

SAMPLE = operations.operation("sample_logits")
each_backend = pytest.mark.parametrize("backend", ["reference", "xla", "native", "interpret"])
# Thousands of rows are too many for the interpreter.
each_fast_backend = pytest.mark.parametrize("backend", ["reference", "xla", "native"])


def run(backend: str, **arrays: np.ndarray) -> np.ndarray:
    try:
        return SAMPLE.run(Call(arrays, {}), backend)[0]
    except NotImplementedError as error:
        pytest.skip(str(error))


def rows(logits: np.ndarray, seed: int = 0, **options: float) -> dict[str, np.ndarray]:
    """Arguments for these logits [B, V], the same options for each row and a seed of its own."""
    B = len(logits)
    rng = np.random.default_rng(seed)
    asked = {"temperatures": 1.0, "top_ks": 0, "top_ps": 1.0, "min_ps": 0.0, **options}
    return {
        "logits": logits,
        "seeds": rng.integers(0, 1 << 32, (B, 2), dtype=np.uint32),
        "positions": rng.integers(0, 1000, B, dtype=np.int32),
        **{name: np.full(B, x, np.int32 if name == "top_ks" else np.float32) for name, x in asked.items()},
    }


FILTERS = [
    {},
    {"temperatures": 0.6, "top_ks": 7},
    {"temperatures": 1.5, "top_ps": 0.7},
    {"min_ps": 0.1},
    {"temperatures": 1.2, "top_ks": 12, "top_ps": 0.9, "min_ps": 0.02},
]


@each_fast_backend
@pytest.mark.parametrize("options", FILTERS, ids=lambda options: "-".join(options) or "plain")
def test_frequencies_are_the_softmax_of_what_is_kept_and_nothing_else_is_sampled(options: dict, backend: str) -> None:
    num_rows, V = 20_000, 40
    logits = np.random.default_rng(1).standard_normal(V).astype(np.float32) * 1.5
    arrays = rows(np.broadcast_to(logits, (num_rows, V)), seed=2, **options)
    counts = np.bincount(run(backend, **arrays), minlength=V)

    is_kept = cases.keeps(arrays, 0)
    assert counts[~is_kept].sum() == 0
    weights = np.where(is_kept, np.exp(logits.astype(np.float64) / options.get("temperatures", 1.0)), 0.0)
    expected = num_rows * weights / weights.sum()
    is_rare = expected < 5  # chi-square wants five of each kind: the rare ones are one kind
    observed = np.append(counts[~is_rare], counts[is_rare].sum())
    expected = np.append(expected[~is_rare], expected[is_rare].sum())
    counted = expected > 0
    assert stats.chisquare(observed[counted], expected[counted]).pvalue > 1e-4


@each_fast_backend
def test_consecutive_positions_of_one_seed_are_independent(backend: str) -> None:
    num_rows, V = 20_000, 6
    arrays = rows(np.zeros((num_rows, V), np.float32))
    arrays["seeds"][:] = [0, 42]
    arrays["positions"] = np.arange(num_rows, dtype=np.int32)
    tokens = run(backend, **arrays)
    pairs = np.bincount(tokens[:-1] * V + tokens[1:], minlength=V * V).reshape(V, V)
    assert stats.chi2_contingency(pairs).pvalue > 1e-4


@each_backend
def test_top_1_is_greedy_whatever_the_temperature(backend: str) -> None:
    logits = np.random.default_rng(3).standard_normal((4, 1301)).astype(np.float32)
    arrays = rows(logits)
    arrays["temperatures"] = np.array([0.1, 0.7, 1.0, 9.0], np.float32)
    by_k = run(backend, **{**arrays, "top_ks": np.ones(4, np.int32)})
    by_p = run(backend, **{**arrays, "top_ps": np.zeros(4, np.float32)})
    by_min_p = run(backend, **{**arrays, "min_ps": np.ones(4, np.float32)})
    greedy = run(backend, **{**arrays, "temperatures": np.zeros(4, np.float32)})
    np.testing.assert_array_equal(greedy, logits.argmax(axis=1))
    for tokens in (by_k, by_p, by_min_p):
        np.testing.assert_array_equal(tokens, greedy)


@each_backend
def test_a_row_is_sampled_alone_as_in_a_crowd(backend: str) -> None:
    """And its neighbours' logits and wishes do not matter, which sums and shared decisions could break."""
    case = cases.Case(20011 if backend in ("xla", "native") else 1301, recipes=("k_p", "p_min", "plain", "greedy", "hot_p"))
    crowd = dict(cases.make(case).arrays)
    tokens = run(backend, **crowd)
    others = {name: np.roll(x, 2, axis=0) for name, x in crowd.items()}
    np.testing.assert_array_equal(run(backend, **others), np.roll(tokens, 2))
    for row in range(len(tokens) if backend != "interpret" else 2):
        alone = run(backend, **{name: x[row : row + 1] for name, x in crowd.items()})
        assert alone[0] == tokens[row]


@pytest.mark.parametrize("backend", ["xla", "native"])
def test_backends_agree_on_random_rows(backend: str) -> None:
    arrays = dict(cases.make(cases.Case(20011, B=64)).arrays)
    np.testing.assert_array_equal(run(backend, **arrays), run("reference", **arrays))


@pytest.mark.parametrize("V", [1, 15, 16, 17, 1023, 1024, 1025, 2 * 1024 + 16, 5000])
@pytest.mark.parametrize("kind", ["normal", "ties", "flat", "peaked"])
def test_a_row_of_any_length_has_the_token_of_the_definition(V: int, kind: str) -> None:
    """Around the ends of vectors and blocks of the native backend."""
    if V < 16 and kind == "peaked":
        pytest.skip("too few tokens for nine peaks")
    arrays = dict(cases.make(cases.Case(V, kind=kind)).arrays)
    np.testing.assert_array_equal(run("native", **arrays), cases.define(Call(arrays, {}))[0])


@pytest.mark.parametrize("backend", ["xla", "native"])
def test_the_likeliest_may_stand_anywhere(backend: str) -> None:
    """A token's noise is left out only where it cannot win, wherever the largest logit stands and whatever it is."""
    V, B = 3000, 96
    rng = np.random.default_rng(8)
    logits = rng.standard_normal((B, V)).astype(np.float32) * 4
    logits[np.arange(B), rng.integers(V, size=B)] += rng.uniform(0, 20, B).astype(np.float32)
    logits += rng.choice([-1e4, 0.0, 1e4], (B, 1)).astype(np.float32)
    arrays = rows(np.round(logits, 1), seed=9)  # so that what is rounded decides nothing
    arrays["temperatures"] = rng.choice([0.3, 1.0, 4.0], B).astype(np.float32)
    wanted = cases.define(Call(arrays, {}))[0]
    assert np.mean(run(backend, **arrays) == wanted) > 0.98  # near 1e4 a quotient is rounded to 1e-3
    at_zero = dict(arrays) | {"logits": np.round(logits - logits.max(axis=1, keepdims=True), 1)}
    np.testing.assert_array_equal(run(backend, **at_zero), cases.define(Call(at_zero, {}))[0])


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4, 3e7])
def test_min_p_is_exact_far_from_zero(offset: float) -> None:
    """The sum of a large number and a logarithm is rounded, the difference of two large numbers is not."""
    gap = np.spacing(np.float32(max(abs(offset), 1.0)))
    logits = np.float32(offset) - np.arange(600, dtype=np.float32)[None] * gap
    for steps in (1, 5, 17, 300):
        # Half a step more than so many: the last that is kept is beyond doubt.
        arrays = rows(np.repeat(logits, 64, axis=0), temperatures=gap * 100.0, min_ps=np.exp(-(steps + 0.5) / 100.0))
        drawn = run("native", **arrays)
        assert drawn.max() <= steps
        assert drawn.max() > steps // 2


def test_top_p_finds_its_threshold_however_logits_are_spread() -> None:
    """Near 0, where the middle of two numbers may be 0 for XLA's threads; and each the double of the last."""
    for logits in (np.linspace(1.2e-38, 2.3e-38, 60_000), np.exp2(np.arange(60_000) % 250 - 125.0)):
        arrays = rows(np.repeat(logits.astype(np.float32)[None], 64, axis=0), top_ps=0.5)
        drawn = run("native", **arrays)
        is_kept = cases.keeps(arrays, 0, slack=1e-3)
        assert is_kept[drawn].all() and len(set(drawn.tolist())) > min(is_kept.sum() // 2, 32)


@each_backend
def test_ties_go_to_the_lowest_id_of_a_greedy_row_and_are_all_kept_at_a_threshold(backend: str) -> None:
    logits = np.zeros((6, 1301), np.float32)
    logits[:, [600, 40, 1300]] = 5.0
    logits[:, 41] = 4.0
    arrays = rows(logits)
    greedy = run(backend, **{**arrays, "temperatures": np.zeros(6, np.float32)})
    assert greedy.tolist() == [40] * 6
    # Two of three equal logits cannot be told from the third.
    two = {**arrays, "top_ks": np.full(6, 2, np.int32)}
    np.testing.assert_array_equal(run(backend, **two), run(backend, **{**arrays, "top_ks": np.full(6, 3, np.int32)}))
    assert all((cases.keeps(two, row).nonzero()[0] == [40, 600, 1300]).all() for row in range(6))


@each_backend
def test_minus_zero_and_zero_are_one_number(backend: str) -> None:
    logits = np.full((2, 600), -1.0, np.float32)
    logits[:, 7], logits[:, 599] = -0.0, 0.0
    assert run(backend, **rows(logits, temperatures=0.0)).tolist() == [7, 7]
    arrays = rows(logits, top_ks=1)
    np.testing.assert_array_equal(run(backend, **arrays), cases.define(Call(arrays, {}))[0])


@each_backend
def test_a_row_of_which_nothing_can_be_sampled_is_token_0_and_disturbs_nobody(backend: str) -> None:
    logits = np.random.default_rng(5).standard_normal((4, 700)).astype(np.float32)
    arrays = rows(logits, top_ks=20, top_ps=0.9)
    clean = run(backend, **arrays)
    logits = logits.copy()
    logits[1], logits[2] = -np.inf, np.nan
    tokens = run(backend, **{**arrays, "logits": logits})
    assert tokens.tolist() == [clean[0], 0, 0, clean[3]]


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_the_noise_is_jax_random_gumbel(size: int) -> None:
    """Bit for bit in its uniform numbers; jax 0.11 rounds a logarithm in a vector of five in another way than alone."""
    seeds = np.array([[0, 0], [1, 2], [0xFFFFFFFF, 0x80000000]], np.uint32)
    positions = np.array([0, 77, 2**31 - 1], np.int32)
    first, second = noise.keys(jnp.asarray(seeds), jnp.asarray(positions))
    got = noise.gumbel(first[:, None], second[:, None], jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), (3, size)))
    for row in range(3):
        key = jax.random.key(0, impl="threefry2x32")
        for word in (*seeds[row], positions[row].astype(np.uint32)):
            key = jax.random.fold_in(key, word)
        np.testing.assert_array_max_ulp(np.asarray(got[row]), np.asarray(jax.random.gumbel(key, (size,), jnp.float32)), maxulp=4)
        np.testing.assert_allclose(got[row], cases.gumbel(seeds[row], positions[row], np.arange(size)), rtol=2e-6, atol=2e-6)
    assert float(got.min()) > noise.LEAST
    assert float(got.max()) < noise.MOST


def test_the_bounds_of_the_noise_are_those_of_its_formula() -> None:
    most = -np.log(-np.log(1 - 2.0**-23))
    least = -np.log(-np.log(float(np.finfo(np.float32).tiny)))
    assert noise.LEAST < least < most < noise.MOST


def test_no_combination_compiles_again() -> None:
    compiled = jax.jit(functools.partial(sample_logits, backend="xla"))
    logits = np.random.default_rng(0).standard_normal((3, 50)).astype(np.float32)
    for options in FILTERS:
        compiled(**rows(logits, **options))
    assert compiled._cache_size() == 1


def engine_sampler() -> types.ModuleType:
    return pytest.importorskip("jaxpaged.model.sampler")


@pytest.mark.parametrize("backend", ["xla", "auto"])
def test_the_engine_samples_the_same_tokens(backend: str) -> None:
    sampler = engine_sampler()
    arrays = dict(cases.make(cases.Case(20011, B=48)).arrays)
    asked = {"temperature": "temperatures", "top_k": "top_ks", "top_p": "top_ps", "min_p": "min_ps", "seeds": "seeds"}
    inputs = sampler.SamplingInputs(**{name: jnp.asarray(arrays[ours]) for name, ours in asked.items()})
    tokens = sampler.sample(jnp.asarray(arrays["logits"]), inputs, jnp.asarray(arrays["positions"]), backend=backend)
    # The engine's top_p of 0 cuts everything; nobody can ask it for that.
    is_asked = arrays["top_ps"] > 0
    np.testing.assert_array_equal(run("xla", **arrays)[is_asked], np.asarray(tokens)[is_asked])


GOOD = rows(np.zeros((2, 9), np.float32))
BAD: list[tuple[dict, str]] = [
    ({"logits": np.zeros(9, np.float32)}, r"logits are float32\[9\], expected \[B, V\]"),
    ({"logits": np.zeros((2, 9), np.int32)}, r"logits are int32\[2, 9\], expected .* float32, bfloat16, float16"),
    ({"logits": np.zeros((2, 0), np.float32)}, "V of 1 or more"),
    ({"seeds": np.zeros(2, np.uint32)}, r"seeds are uint32\[2\], expected uint32\[2, 2\]"),
    ({"seeds": np.zeros((2, 2), np.int32)}, r"seeds are int32\[2, 2\], expected uint32\[2, 2\]"),
    ({"positions": np.zeros(3, np.int32)}, r"positions are int32\[3\], expected int32\[2\]"),
    ({"temperatures": np.zeros(2, np.int32)}, r"temperatures are int32\[2\], expected float32\[2\]"),
    ({"top_ks": np.zeros((), np.int32)}, r"top_ks are int32\[\], expected int32\[2\]"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_errors_name_what_is_wrong(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_logits(**{**GOOD, **wrong})


def test_a_backend_that_cannot_run_says_why() -> None:
    with pytest.raises(NotImplementedError, match="backend 'mosaic' cannot run here: "):
        sample_logits(**GOOD, backend="mosaic")
    with pytest.raises(ValueError, match="'fast', expected one of auto"):
        sample_logits(**GOOD, backend="fast")
