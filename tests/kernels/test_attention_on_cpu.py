"""What the portable path and the native one promise beyond the ladder: tables, sinks and dtypes at their edges."""

from __future__ import annotations

import os

import jax
import numpy as np
import pytest

from pallas_kernels import native, operations
from pallas_kernels.operations import Call
from pallas_kernels.paged_decode_attention import gather
from pallas_kernels.paged_decode_attention.cases import Case
from pallas_kernels.paged_decode_attention.dispatch import Arrays, Options

each_backend = pytest.mark.parametrize("backend", ["xla", "native"])
each_operation = pytest.mark.parametrize("name", ["paged_decode_attention", "paged_prefill_attention"])


def run(name: str, call: Call, backend: str) -> tuple[np.ndarray, ...]:
    try:
        return operations.operation(name).run(call, backend)
    except NotImplementedError as error:
        pytest.skip(str(error))


def call_of(name: str, **options) -> Call:
    case = Case(4, 2, 64, T=16 if "prefill" in name else 1, is_prefill="prefill" in name, **options)
    return operations.operation(name).cases.make(case)


@each_operation
@each_backend
@pytest.mark.parametrize("number", [2**31 - 1, -(2**31), 10**6])
def test_table_entries_past_a_rows_last_page_may_be_any_number(name: str, backend: str, number: int) -> None:
    """They are never followed: neither the result changes nor is memory outside the pool touched."""
    call = call_of(name)
    tables, S = call.arrays["block_tables"].copy(), call.arrays["k_pages"].shape[2]
    num_pages = -(-call.arrays["kv_lens"] // S)
    tables[np.arange(tables.shape[1]) >= num_pages[:, None]] = number
    changed = Call({**call.arrays, "block_tables": tables}, call.options)
    for clean, dirty in zip(run(name, call, backend), run(name, changed, backend), strict=True):
        assert clean.tobytes() == dirty.tobytes()


@each_operation
@each_backend
def test_sinks_of_minus_infinity_are_none(name: str, backend: str) -> None:
    call = call_of(name)
    changed = Call({**call.arrays, "sinks": np.full(4, -np.inf, np.float32)}, call.options)
    is_real = call.arrays["kv_lens"] > 0
    for without, infinite in zip(run(name, call, backend), run(name, changed, backend), strict=True):
        got, wanted = infinite[is_real], without[is_real]
        seen = np.isfinite(wanted)  # a padding query sees nothing, and what it yields means nothing
        np.testing.assert_allclose(got[seen], wanted[seen], rtol=1e-6, atol=1e-6)


def test_the_gather_formulation_is_attention() -> None:
    """The one that the backends are compared with, or the comparison says nothing."""
    call = call_of("paged_decode_attention", has_sinks=True, soft_cap=20.0, window=40)
    arrays = Arrays(**call.arrays, first_positions=call.arrays["kv_lens"] - 1)  # type: ignore[arg-type]
    options = Options(scale=call.options["scale"], window=40, soft_cap=20.0)
    wanted = run("paged_decode_attention", call, "reference")
    is_real = call.arrays["kv_lens"] > 0
    for got, expected in zip(jax.jit(gather.attend, static_argnums=1)(arrays, options), wanted, strict=True):
        np.testing.assert_allclose(np.asarray(got)[is_real], expected[is_real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_has_the_same_bits_among_few_and_among_many(dtype: str) -> None:
    """With few rows each of their heads is a task, with many each row is."""
    num_rows = max(400, 16 * (os.cpu_count() or 1))
    case = Case(6, 3, 64, dtype=dtype, window=100, lens=tuple(row % 400 for row in range(num_rows)))
    call = operations.operation("paged_decode_attention").cases.make(case)
    many = run("paged_decode_attention", call, "native")
    of_rows = ("q", "block_tables", "kv_lens")
    for row in (0, 1, 63, 64, 65, 128, 129, 399):
        alone = {name: array[row : row + 1] if name in of_rows else array for name, array in call.arrays.items()}
        for got, wanted in zip(run("paged_decode_attention", Call(alone, call.options), "native"), many, strict=True):
            assert got[0].tobytes() == wanted[row].tobytes(), f"row {row}"


@pytest.mark.parametrize(
    ("dtype", "options"), [("float32", {}), ("float32", {"soft_cap": 20.0, "window": 90}), ("float16", {"window": 30})]
)
def test_a_token_has_the_same_bits_in_a_tile_and_in_a_row(dtype: str, options: dict[str, float]) -> None:
    """Who gave way computes in tiles what it had computed in rows, and is to go on as if nothing had been."""
    case = Case(6, 3, 64, T=16, dtype=dtype, is_prefill=True, lens=tuple(range(16, 177, 16)), **options)  # type: ignore[arg-type]
    call = operations.operation("paged_prefill_attention").cases.make(case)
    arrays, T = dict(call.arrays), 16
    tiles = run("paged_prefill_attention", call, "native")
    positions = arrays.pop("first_positions")[:, None] + np.arange(T)
    is_real = (positions < arrays["kv_lens"][:, None]).reshape(-1)
    arrays["kv_lens"] = np.where(is_real, positions.reshape(-1) + 1, 0).astype(np.int32)
    arrays["block_tables"] = np.repeat(arrays["block_tables"], T, axis=0)
    arrays["q"] = arrays["q"].reshape(-1, 1, *arrays["q"].shape[2:])
    for of_tiles, of_rows in zip(tiles, run("paged_decode_attention", Call(arrays, call.options), "native"), strict=True):
        of_tiles, of_rows = of_tiles.reshape(len(is_real), -1), of_rows.reshape(len(is_real), -1)
        assert of_tiles[is_real].tobytes() == of_rows[is_real].tobytes()
        assert is_real.sum() > 100


@pytest.mark.parametrize("H", [16, 80])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_heads_and_queries_that_no_register_and_no_tile_divides(dtype: str, H: int) -> None:
    """Numbers of 16 bits are taken 32 at a time, and queries of a head that are more than a few as a tile, of a row too."""
    operation = operations.operation("paged_decode_attention")
    for case in (Case(6, 3, H, dtype=dtype), Case(15, 1, H, dtype=dtype), Case(10, 2, H, T=7, S=8, dtype=dtype, window=70)):
        call = operation.cases.make(case)
        run(operation.name, call, "native")  # or it is skipped
        assert all(verdict.is_right for verdict in operations.check(operation, call, "native")), case


def test_native_says_which_pages_it_cannot_read() -> None:
    assert native.unavailable(64, "float64") == "pages of float64 are not among float32, bfloat16, float16, float8_e4m3fn, int8"
