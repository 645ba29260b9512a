"""Laws of paged attention: every backend is the formula, and what a row may not see changes no bit of its result."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import DECODE, PREFILL, Arrays, Case, arrays

from pallas_kernels import paged_decode_attention, paged_prefill_attention
from pallas_kernels.backends import BACKENDS

CASES = [*((case, False) for case in DECODE), *((case, True) for case in PREFILL)]
each_case = pytest.mark.parametrize(
    ("case", "is_prefill"), CASES, ids=[f"{'prefill' if is_prefill else 'decode'}-{case}" for case, is_prefill in CASES]
)
each_backend = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "auto"])


@functools.cache
def compiled(case: Case, is_prefill: bool, backend: str):
    operation = paged_prefill_attention if is_prefill else paged_decode_attention
    return jax.jit(functools.partial(operation, scale=case.scale, window=case.window, backend=backend))


def call(case: Case, is_prefill: bool, backend: str, given: Arrays) -> np.ndarray:
    last = (given.first_positions,) if is_prefill else ()
    fields = (given.q, given.k_pages, given.v_pages, given.block_tables, given.kv_lens, *last)
    try:
        return np.asarray(compiled(case, is_prefill, backend)(*fields))
    except NotImplementedError as error:
        pytest.skip(str(error))


def by_definition(case: Case, given: Arrays) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Float64 attention row by row; the same in float32 rounded to the case's dtype; and which query tokens are real [B, T]."""
    T, N = given.q.shape[1:3]
    exact, plain = np.zeros(given.q.shape), np.zeros(given.q.shape, given.q.dtype)
    is_real = given.first_positions[:, None] + np.arange(T) < given.kv_lens[:, None]
    for b, t in zip(*np.nonzero(is_real), strict=True):
        position = given.first_positions[b] + t
        seen = np.arange(max(0, position - case.window + 1) if case.window else 0, position + 1)
        pages, offsets = given.block_tables[b, seen // case.S], seen % case.S
        for dtype, out in ((np.float64, exact), (np.float32, plain)):
            k, v = (np.repeat(x[pages, :, offsets].astype(dtype), N // case.K, axis=1) for x in (given.k_pages, given.v_pages))
            scores = np.einsum("nh,cnh->nc", given.q[b, t].astype(dtype), k) * dtype(case.scale)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[b, t] = np.einsum("nc,cnh->nh", weights / weights.sum(axis=1, keepdims=True), v)
    return exact, plain, is_real


@each_backend
@each_case
def test_attention_is_the_formula(case: Case, is_prefill: bool, backend: str) -> None:
    """Its error is at most twice that of a plain float32 computation rounded to the same dtype."""
    given = arrays(case, is_prefill=is_prefill)
    exact, plain, is_real = by_definition(case, given)
    got = call(case, is_prefill, backend, given)
    assert got.dtype == given.q.dtype
    assert np.isfinite(got.astype(np.float32)).all(), "what padding yields is finite"
    assert not got[given.kv_lens == 0].astype(np.float32).any(), "a padding row yields 0"

    def error(x: np.ndarray) -> float:
        return np.abs(x.astype(np.float64) - exact)[is_real].max()

    assert error(got) <= 2 * error(plain) + 1e-5
    assert np.abs(exact[is_real]).max() > 0.1  # the bound above means something


@each_backend
@each_case
def test_nan_in_every_unused_slot_changes_no_bit(case: Case, is_prefill: bool, backend: str) -> None:
    given = arrays(case, is_prefill=is_prefill)
    poisoned = given.poisoned()
    assert np.isnan(poisoned.v_pages[0].astype(np.float32)).all(), "the null page is poisoned too"
    clean, dirty = call(case, is_prefill, backend, given), call(case, is_prefill, backend, poisoned)
    assert clean.tobytes() == dirty.tobytes()


@each_backend
def test_a_nan_of_one_row_stays_in_that_row(backend: str) -> None:
    """The request that owns it ends with an error; the others must not notice."""
    case = DECODE[0]
    given = arrays(case, is_prefill=False)
    row = 9
    page = given.block_tables[row, 3]
    v_pages = given.v_pages.copy()
    v_pages[page, :, 2] = np.nan
    sick = dataclasses.replace(given, v_pages=v_pages)
    clean, dirty = call(case, False, backend, given), call(case, False, backend, sick)
    assert np.isnan(dirty[row]).all()
    others = np.arange(len(clean)) != row
    np.testing.assert_array_equal(clean[others], dirty[others])


@each_backend
def test_only_padding_yields_zeros(backend: str) -> None:
    case = DECODE[0]
    given = arrays(case, is_prefill=False)
    empty = dataclasses.replace(given, block_tables=np.zeros_like(given.block_tables), kv_lens=np.zeros_like(given.kv_lens))
    assert not call(case, False, backend, empty).any()


@each_backend
def test_pages_may_have_another_dtype_than_queries(backend: str) -> None:
    """A float32 model may keep a bfloat16 cache."""
    case = Case(4, 2, 64, dtype="bfloat16")
    given = arrays(case, is_prefill=False)
    wide = dataclasses.replace(given, q=given.q.astype(np.float32))
    exact, _, is_real = by_definition(case, wide)
    got = call(case, False, backend, wide)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got[is_real], exact[is_real], atol=1e-5)


def test_errors_name_what_is_wrong() -> None:
    pages, tables, lens = jnp.zeros((2, 2, 8, 16)), jnp.zeros((1, 1), jnp.int32), jnp.zeros(1, jnp.int32)
    for operation, last in ((paged_decode_attention, ()), (paged_prefill_attention, (lens,))):
        with pytest.raises(ValueError, match="3 heads, not a multiple of the 2"):
            operation(jnp.zeros((1, 1, 3, 16)), pages, pages, tables, lens, *last, scale=1.0)
        with pytest.raises(ValueError, match="'fast', expected one of"):
            operation(jnp.zeros((1, 1, 2, 16)), pages, pages, tables, lens, *last, scale=1.0, backend="fast")
