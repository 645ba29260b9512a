"""Bugs planted in the C++ source, each caught by the rung that is there for it; and what a processor without AVX-512 gets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from planting import Bug, changed, first_rung, fresh, healthy_rung

from pallas_kernels import native
from pallas_kernels.operations import Call
from pallas_kernels.paged_decode_attention.cases import Case

DECODE, SOURCE = "paged_decode_attention", "pallas_kernels.native"
WINDOW = Case(4, 2, 64, window=24)
SINKS = Case(4, 2, 64, has_sinks=True)
TOKENS = Case(4, 2, 64, kv_dtype="int8", scales="token")
HALF = Case(4, 2, 64, dtype="float16", soft_cap=20.0, spread=10.0)
FLOAT8 = Case(4, 2, 64, dtype="bfloat16", kv_dtype="float8_e4m3fn")

BUGS = (
    Bug(
        "the neighbour's scale",
        SOURCE,
        "= c.k_scales[*slot];",
        "= c.k_scales[*slot ^ 1];",
        "definition",
        DECODE,
        TOKENS,
        "native",
    ),
    Bug("a sink that is not in the sum", SOURCE, "c.sinks ? 1.0f : 0.0f", "0.0f", "definition", DECODE, SINKS, "native"),
    Bug(
        "a window of one more", SOURCE, "first + t + 1 - c.window", "first + t - c.window", "definition", DECODE, WINDOW, "native"
    ),
    Bug(
        "tokens past the end",
        SOURCE,
        "(kBlock, kv_len - start)",
        "(kBlock, (kv_len - start + 3) / 4 * 4)",
        "poison",
        DECODE,
        WINDOW,
        "native",
    ),
)


@pytest.fixture
def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """From the call on, the native backend is another source, or one for another processor; none of it is in the user's cache."""

    def used(source: str, tunings: tuple[tuple[str, ...], ...] = native._TUNINGS) -> None:
        path = tmp_path / "changed.cc"
        path.write_text(source)
        monkeypatch.setattr(native, "_SOURCE", path)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setattr(native, "_target", lambda name, head_dim: f"{tmp_path}.{name}.{head_dim}")
        monkeypatch.setattr(native, "_TUNINGS", tunings)
        if (reason := native._unavailable.__wrapped__(64)) is not None:
            pytest.skip(reason)

    if (reason := native.unavailable(64)) is not None:
        pytest.skip(reason)
    return used


@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_a_planted_bug_is_seen(use: Callable[..., None], bug: Bug) -> None:
    assert healthy_rung(bug.operation, bug.case, bug.backend) == ""
    use(changed(native._SOURCE, bug.old, bug.new))
    assert first_rung(bug.operation, bug.case, bug.backend) == bug.rung


def test_a_nan_of_8_bits_that_is_a_number_is_seen(use: Callable[..., None]) -> None:
    """Pages are never NaN where a case looks: this one is put there."""
    assert not is_nan_lost()
    use(changed(native._SOURCE, "kFloat8NaN = 0x7f", "kFloat8NaN = 0x80"))
    assert is_nan_lost()


def test_without_avx512_it_is_the_definition_too(use: Callable[..., None]) -> None:
    """Sums and conversions are written twice; a cheap machine for `make test` may have only one of them."""
    use(native._SOURCE.read_text(), tunings=(("-march=native", "-mno-avx512f"), ("-mcpu=native",), ()))
    assert [first_rung(DECODE, case, "native") for case in (TOKENS, FLOAT8, HALF)] == ["", "", ""]
    assert not is_nan_lost()


def is_nan_lost() -> bool:
    """Whether a NaN among a row's values does not reach the row's result."""
    operation = fresh(DECODE)
    call = operation.cases.make(FLOAT8)
    v_pages = call.arrays["v_pages"].copy()
    v_pages[call.arrays["block_tables"][9, 3], :, 2] = np.nan
    out = operation.run(Call({**call.arrays, "v_pages": v_pages}, call.options), "native")[0]
    return not np.isnan(out[9].astype(np.float32)).all()
