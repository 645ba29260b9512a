"""Bugs planted in the C++ source, each caught by the rung that is there for it; and what a processor without AVX-512 gets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from pallas_kernels import native, operations
from pallas_kernels.operations import Call
from pallas_kernels.paged_decode_attention.cases import Case

DECODE = operations.operation("paged_decode_attention")
WINDOW = Case(4, 2, 64, window=24)
SINKS = Case(4, 2, 64, has_sinks=True)
TOKENS = Case(4, 2, 64, kv_dtype="int8", scales="token")
HALF = Case(4, 2, 64, dtype="float16", soft_cap=20.0, spread=10.0)
FLOAT8 = Case(4, 2, 64, dtype="bfloat16", kv_dtype="float8_e4m3fn")

Run = Callable[[Call], tuple[np.ndarray, ...]]


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """The native backend from a changed source, or for another processor; nothing of it reaches the user's cache."""

    def built(old: str = "", new: str = "", tunings: tuple[tuple[str, ...], ...] | None = None) -> Run:
        source = native._SOURCE.read_text()
        if old and source.count(old) != 1:
            raise LookupError(f"the text of this bug stands {source.count(old)} times in the source; plant it anew: {old!r}")
        changed = tmp_path / "changed.cc"
        changed.write_text(source.replace(old, new) if old else source)
        monkeypatch.setattr(native, "_SOURCE", changed)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setattr(native, "_target", lambda name, head_dim: f"{tmp_path}.{name}.{head_dim}")
        if tunings is not None:
            monkeypatch.setattr(native, "_TUNINGS", tunings)
        if (reason := native._unavailable.__wrapped__(64)) is not None:
            pytest.skip(reason)
        # A function of its own for every build: jit remembers what it compiled by the function.
        return lambda call: tuple(
            np.asarray(x) for x in jax.jit(lambda a: DECODE.function(**a, **call.options, backend="native"))(dict(call.arrays))
        )

    return built


def definition_sees(run: Run, case: Case) -> bool:
    call = DECODE.cases.make(case)
    checked = zip(DECODE.cases.OUTPUTS, run(call), DECODE.cases.define(call), DECODE.cases.plain(call), strict=True)
    return not all(operations.judge(*outputs).is_right for outputs in checked)


def poison_sees(run: Run, case: Case) -> bool:
    call = DECODE.cases.make(case)
    both = zip(run(call), run(DECODE.cases.poison(call)), strict=True)
    return any(clean.tobytes() != dirty.tobytes() for clean, dirty in both)


def nan_is_lost(run: Run, case: Case) -> bool:
    """Whether a NaN among a row's values does not reach the row's result."""
    call = DECODE.cases.make(case)
    v_pages = call.arrays["v_pages"].copy()
    v_pages[call.arrays["block_tables"][9, 3], :, 2] = np.nan
    out = run(Call({**call.arrays, "v_pages": v_pages}, call.options))[0]
    return not np.isnan(out[9].astype(np.float32)).all()


MUTANTS = [
    ("the neighbour's scale", "= c.k_scales[*slot];", "= c.k_scales[*slot ^ 1];", definition_sees, TOKENS),
    ("a sink that is not in the sum", "c.sinks ? 1.0f : 0.0f", "0.0f", definition_sees, SINKS),
    ("a window of one more", "first + t + 1 - c.window", "first + t - c.window", definition_sees, WINDOW),
    ("tokens past the end", "(kBlock, kv_len - start)", "(kBlock, (kv_len - start + 3) / 4 * 4)", poison_sees, WINDOW),
    ("the NaN of 8 bits is a number", "kFloat8NaN = 0x7f", "kFloat8NaN = 0x80", nan_is_lost, FLOAT8),
]


@pytest.mark.parametrize(("old", "new", "sees", "case"), [m[1:] for m in MUTANTS], ids=[m[0] for m in MUTANTS])
def test_the_rung_sees_the_bug_and_only_the_bug(build: Callable[..., Run], old: str, new: str, sees, case: Case) -> None:
    if (reason := native.unavailable(64)) is not None:
        pytest.skip(reason)
    assert not sees(lambda call: DECODE.run(call, "native"), case)
    assert sees(build(old, new), case)


def test_without_avx512_it_is_the_definition_too(build: Callable[..., Run]) -> None:
    """Sums and conversions are written twice; a cheap machine for `make test` may have only one of them."""
    run = build(tunings=(("-march=native", "-mno-avx512f"), ("-mcpu=native",), ()))
    assert not [case for case in (TOKENS, FLOAT8, HALF) if definition_sees(run, case)]
    assert not nan_is_lost(run, FLOAT8)
