"""Laws of paged attention beside the ladder's: a row's NaN stays there, padding is nothing, wrong arguments are refused."""

from __future__ import annotations

import numpy as np
import pytest

from pallas_kernels import operations, paged_decode_attention, paged_prefill_attention
from pallas_kernels.operations import Call
from pallas_kernels.paged_decode_attention.cases import CHECK, make

DECODE = operations.operation("paged_decode_attention")
each_backend = pytest.mark.parametrize("backend", ["reference", "xla", "native", "interpret"])


def run(backend: str, call: Call) -> tuple[np.ndarray, ...]:
    try:
        return DECODE.run(call, backend)
    except NotImplementedError as error:
        pytest.skip(str(error))


def change(call: Call, **arrays: np.ndarray) -> Call:
    return Call({**call.arrays, **arrays}, call.options)


@each_backend
def test_a_nan_of_one_row_stays_in_that_row(backend: str) -> None:
    """The request that owns it ends with an error; the others must not notice."""
    call = make(next(case for case in CHECK if case.dtype == "bfloat16"))
    row = 9
    v_pages = call.arrays["v_pages"].copy()
    v_pages[call.arrays["block_tables"][row, 3], :, 2] = np.nan
    (clean, _), (dirty, _) = run(backend, call), run(backend, change(call, v_pages=v_pages))
    assert np.isnan(dirty[row].astype(np.float32)).all()
    others = np.arange(len(clean)) != row
    assert clean[others].tobytes() == dirty[others].tobytes()


@each_backend
def test_only_padding_yields_zeros(backend: str) -> None:
    call = make(next(case for case in CHECK if case.dtype == "bfloat16"))
    nothing = {name: np.zeros_like(call.arrays[name]) for name in ("block_tables", "kv_lens")}
    out, lse = run(backend, change(call, **nothing))
    assert not out.astype(np.float32).any()
    assert np.isneginf(lse).all()


PAGES = np.zeros((3, 2, 8, 16), np.float32)
GOOD = {
    "q": np.zeros((1, 1, 4, 16), np.float32),
    "k_pages": PAGES,
    "v_pages": PAGES,
    "block_tables": np.zeros((1, 1), np.int32),
    "kv_lens": np.zeros(1, np.int32),
}
BAD = [
    ({"q": np.zeros((1, 1, 3, 16), np.float32)}, "3 heads, not a multiple of the 2"),
    ({"q": np.zeros((1, 4, 16), np.float32)}, "3, 4 and 2 axes, expected 4, 4 and 2"),
    ({"q": np.zeros((1, 1, 4, 32), np.float32)}, "heads of 32, the pages heads of 16"),
    ({"v_pages": PAGES[:2]}, r"k_pages are float32\[3, 2, 8, 16\] and v_pages float32\[2, 2, 8, 16\]"),
    ({"k_pages": PAGES.astype(np.int16), "v_pages": PAGES.astype(np.int16)}, "pages of int16 are not supported"),
    ({"block_tables": np.zeros((2, 1), np.int32)}, r"block_tables is int32\[2, 1\], expected int32 with 1 rows"),
    ({"kv_lens": np.zeros(1, np.int16)}, r"kv_lens is int16\[1\]"),
    ({"sinks": np.zeros(2, np.float32)}, r"sinks have shape \[2\], expected \[4\]"),
    ({"k_scales": np.ones(2, np.float32)}, "k_scales and v_scales come together"),
    (
        {"k_scales": np.ones(4, np.float32), "v_scales": np.ones(2, np.float32)},
        r"k_scales have shape \[4\], expected \[2\] or \[3, 2, 8\]",
    ),
    ({"k_pages": PAGES.astype(np.int8), "v_pages": PAGES.astype(np.int8)}, "int8 pages need k_scales"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_errors_name_what_is_wrong(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paged_decode_attention(**{**GOOD, **wrong}, scale=1.0)
    with pytest.raises(ValueError, match=message):
        paged_prefill_attention(**{**GOOD, **wrong}, first_positions=np.zeros(1, np.int32), scale=1.0)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ValueError, match="'fast', expected one of auto"):
        paged_decode_attention(**GOOD, scale=1.0, backend="fast")
    with pytest.raises(ValueError, match=r"window -1 and soft_cap 0\.0 must be 0 or more"):
        paged_decode_attention(**GOOD, scale=1.0, window=-1)
