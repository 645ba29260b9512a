"""Bugs planted in the C++ source, each caught by the rung that is there for it; and what a processor without AVX-512 gets."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import test_matmul
import test_packed
from planting import Bug, changed, first_rung, fresh, healthy_rung
from test_quantized_matmul import integers_differ

from pallas_kernels import native
from pallas_kernels.matmul import cases
from pallas_kernels.native import building, heads, matmul, sampling
from pallas_kernels.operations import Call
from pallas_kernels.paged_decode_attention.cases import Case
from pallas_kernels.quantized_matmul.cases import Case as Quantized
from pallas_kernels.rotate_heads.cases import Case as Heads
from pallas_kernels.sample_logits import cases as sample_cases
from pallas_kernels.sample_logits.cases import Case as Logits

DECODE, PREFILL, SOURCE, MATMUL = "paged_decode_attention", "paged_prefill_attention", "paged_attention.cc", "matmul"
WINDOW = Case(4, 2, 64, window=24)
SINKS = Case(4, 2, 64, has_sinks=True)
TOKENS = Case(4, 2, 64, kv_dtype="int8", scales="token")
MANY = Case(6, 3, 64, lens=(30, 70) * (100 + 4 * (os.cpu_count() or 1)))  # more rows than threads: a task has all heads of one
HALF = Case(4, 2, 64, dtype="float16", soft_cap=20.0, spread=10.0)
FLOAT8 = Case(4, 2, 64, dtype="bfloat16", kv_dtype="float8_e4m3fn")
TILES, PAIRS = Case(6, 2, 64, T=16, dtype="bfloat16", is_prefill=True), Case(6, 2, 64, dtype="bfloat16")

BUGS = (
    Bug(
        "the neighbour's scale",
        SOURCE,
        "= c.k_scales[*slot],",
        "= c.k_scales[*slot ^ 1],",
        "definition",
        DECODE,
        TOKENS,
        "native",
    ),
    Bug(
        "another head's queries", SOURCE, "(head - begin) * num_queries", "0 * num_queries", "definition", DECODE, MANY, "native"
    ),
    Bug("a sink that is not in the sum", SOURCE, "c.sinks ? 1.0f : 0.0f", "0.0f", "definition", DECODE, SINKS, "native"),
    Bug(
        "a window of one more", SOURCE, "first + t + 1 - c.window", "first + t - c.window", "definition", DECODE, WINDOW, "native"
    ),
    Bug(
        "tokens past the end",
        SOURCE,
        "(c.kv_lens[b], After",
        "((c.kv_lens[b] + 3) / 4 * 4, After",
        "poison",
        DECODE,
        WINDOW,
        "native",
    ),
)


PRODUCT = cases.Case(13, 100, 33, has_bias=True, has_norm=True, has_residual=True)
GATED = cases.Case(40, 72, 1030, is_gated=True, has_bias=True)
WIDE = cases.Case(9, 96, 20, "float32", weight="bfloat16")
TURNED = cases.Case(40, 72, 1040, is_gated=True, has_panels=True)
WIDE_PAIRS = cases.Case(9, 98, 80, "float32", weight="bfloat16", has_panels=True)
HOLES = cases.Case(64, 72, 40, "float32", holes=0.3)
PRODUCT_BUGS = (
    Bug("a last output twice", "matmul.cc", "(i, count - 1) * D", "(i, count - 2) * D", "definition", MATMUL, PRODUCT, "native"),
    Bug("another row's residual", "matmul.cc", "residual) + at", "residual) + first", "definition", MATMUL, PRODUCT, "native"),
    Bug(
        "the next step's panel",
        "matmul.cc",
        "last_panel) * panel_bytes",
        "last_panel) * (panel_bytes - 64)",
        "definition",
        MATMUL,
        TURNED,
        "native",
    ),
    Bug(
        "half of a pair twice",
        "matmul.cc",
        "x[1] * reinterpret",
        "x[0] * reinterpret",
        "definition",
        MATMUL,
        WIDE_PAIRS,
        "native",
    ),
    Bug(
        "rows behind a hole moved up",
        "matmul.cc",
        "c.real[row + r] * c.F",
        "(row + r) * c.F",
        "definition",
        MATMUL,
        HOLES,
        "native",
    ),
    Bug("the gate's bias for both", "matmul.cc", "c.bias + of_half + at", "c.bias + at", "definition", MATMUL, GATED, "native"),
)

ROTATE, SPOILT = "rotate_heads", Heads(90, 2, 3, 40, has_norms=True, has_holes=True)
HEADS_BUGS = (
    Bug("everybody's first angle", "heads.cc", "c.cos + token", "c.cos + 0", "definition", ROTATE, SPOILT, "native"),
    Bug(
        "norms that are swapped",
        "heads.cc",
        "is_key ? k_norm : q_norm",
        "is_key ? q_norm : k_norm",
        "definition",
        ROTATE,
        SPOILT,
        "native",
    ),
    Bug("values nobody looks at", "heads.cc", "is_sound &= Guard(value,", "Guard(value,", "definition", ROTATE, SPOILT, "native"),
)
ROUNDED = "quantized_matmul"
AROUND = Quantized(64, 132, 224, "int8", dtype="float32", activations="int8", has_panels=True, has_around=True, is_gated=True)
ROUNDED_BUGS = (
    Bug(
        "everybody's first step",
        "matmul.cc",
        "c.row_scales[row + r]",
        "c.row_scales[row]",
        "definition",
        ROUNDED,
        AROUND,
        "native",
    ),
    Bug(
        "the gate's scales for both",
        "matmul.cc",
        "c.scales + of_half + at",
        "c.scales + at",
        "definition",
        ROUNDED,
        AROUND,
        "native",
    ),
    Bug(
        "sums of shifted rows",
        "matmul.cc",
        "if constexpr (kHead<A>)",
        "if constexpr (false)",
        "definition",
        ROUNDED,
        AROUND,
        "native",
    ),
)

SAMPLE, DRAWN = "sample_logits", Logits(1301)
SAMPLE_BUGS = (
    Bug(
        "a token that could still win",
        "sampling.cc",
        "(distance + kMost >= floor)",
        "(distance >= floor)",
        "definition",
        SAMPLE,
        DRAWN,
        "native",
    ),
    Bug(
        "no more than a bound of k",
        "sampling.cc",
        "if (count <= k) return least;",
        "return least;",
        "definition",
        SAMPLE,
        DRAWN,
        "native",
    ),
    Bug("the best half's weight lost", "sampling.cc", "above += upper", "above = upper", "definition", SAMPLE, DRAWN, "native"),
    Bug(
        "a key's words swapped",
        "sampling.cc",
        "{row.first, row.second,",
        "{row.second, row.first,",
        "definition",
        SAMPLE,
        DRAWN,
        "native",
    ),
    Bug(
        "a last token nobody sees",
        "sampling.cc",
        "kPlaces < rest ?",
        "kPlaces < rest - 1 ?",
        "definition",
        SAMPLE,
        Logits(7, kind="ties"),
        "native",
    ),
)


@pytest.fixture
def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """From the call on, the native backend is of other sources, by name, or for another processor; none in the user's cache.

    They are compiled in half the time, and less quick for it.
    """

    def used(changes: Mapping[str, str], tunings: tuple[tuple[str, ...], ...] = building.TUNINGS, needed: str = ".cc") -> None:
        for path in native._SOURCE.parent.iterdir():
            if path.suffix in (".cc", ".h"):
                (tmp_path / path.name).write_text(changes.get(path.name) or path.read_text())
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setattr(building, "TUNINGS", tunings)
        monkeypatch.setattr(building, "_FLAGS", tuple("-Og" if flag == "-O3" else flag for flag in building._FLAGS))
        builds = {native: lambda: native._unavailable.__wrapped__(64)}
        builds |= {module: module.unavailable.__wrapped__ for module in (matmul, heads, sampling)}
        for module, build in builds.items():
            source = module._SOURCE.read_text() + f'"{module._SOURCE.name}"'
            if not module._SOURCE.name.endswith(needed) or (changes and not any(f'"{name}"' in source for name in changes)):
                continue  # each takes seconds to compile
            monkeypatch.setattr(module, "_SOURCE", tmp_path / module._SOURCE.name)
            monkeypatch.setattr(module, "_target", lambda name, head_dim=0: f"{tmp_path}.{name}.{head_dim}")
            reason = build()
            assert reason is None, f"{module._SOURCE.name} does not compile any more: {reason}"

    # The healthy ones first: what they find they keep.
    for reason in (native.unavailable(64), *(module.unavailable() for module in (matmul, heads, sampling))):
        if reason is not None:
            pytest.skip(reason)
    return used


def changed_source(name: str, old: str, new: str) -> dict[str, str]:
    """What `use` takes, of one source with a bug in it."""
    return {name: changed(native._SOURCE.with_name(name), old, new)}


ALL_BUGS = (*BUGS, *PRODUCT_BUGS, *HEADS_BUGS, *ROUNDED_BUGS, *SAMPLE_BUGS)
# Products take longest to compile: every other one.
LATER = [bug for bug in ALL_BUGS if bug.module == "matmul.cc"][1::2]


@pytest.mark.parametrize(
    "bug", [pytest.param(bug, id=str(bug), marks=[pytest.mark.slow] if bug in LATER else []) for bug in ALL_BUGS]
)
def test_a_planted_bug_is_seen(use: Callable[..., None], bug: Bug) -> None:
    assert healthy_rung(bug.operation, bug.case, bug.backend) == ""
    use(changed_source(bug.module, bug.old, bug.new))
    assert first_rung(bug.operation, bug.case, bug.backend) == bug.rung


PAIR_BUGS = (  # seen where there is an instruction for pairs of bfloat16
    Bug("a panel of keys twice", SOURCE, "? p + 1 : p]", "? p : p]", "definition", PREFILL, TILES, "native"),
    Bug("another tile's queries", SOURCE, "q + i * V * kLanes, turned", "q, turned", "definition", PREFILL, TILES, "native"),
    Bug("the other token's value", SOURCE, "(half(1), 16)", "(half(0), 16)", "definition", DECODE, PAIRS, "native"),
)


@test_packed.needs_pairs
@pytest.mark.parametrize("bug", PAIR_BUGS, ids=str)
def test_a_bug_of_pairs_is_seen(use: Callable[..., None], bug: Bug) -> None:
    test_a_planted_bug_is_seen(use, bug)


def test_a_nan_of_8_bits_that_is_a_number_is_seen(use: Callable[..., None]) -> None:
    """Pages are never NaN where a case looks: this one is put there."""
    assert not is_nan_lost()
    use(changed_source("vectors.h", "kFloat8NaN = 0x7f", "kFloat8NaN = 0x80"), needed=SOURCE)
    assert is_nan_lost()


def test_a_row_that_depends_on_its_neighbours_is_seen(use: Callable[..., None]) -> None:
    """Sums in another order for few rows, as close to the definition as before."""
    assert test_matmul.rows_differ(*test_matmul.INVARIANT[0]) == []
    use(changed_source("matmul.cc", "for (int s = 0; s < kLanes; ++s) add(s);", "for (int s = kLanes; s--;) add(s);"))
    assert first_rung(MATMUL, PRODUCT, "native") == ""
    assert test_matmul.rows_differ(*test_matmul.INVARIANT[0])


PACKED_BUGS = (
    ("a stray's neighbour", "1u << strays[p]->place", "1u << (strays[p]->place ^ 1)"),
    ("a stray of the next step", "strays[p]->step == step + s + 1;", "strays[p]->step == step + s;"),
    ("bytes that are not swapped", "s % 2 == 0 ? _mm512_shuffle_epi8(pairs[p], swapped)", "s % 2 == 0 ? pairs[p]"),
    ("what later tiles find is of the other panel", "packed.to[p][step + s]", "packed.to[kPanels - 1 - p][step + s]"),
)


@test_packed.needs_pairs
@pytest.mark.parametrize("bug", PACKED_BUGS, ids=lambda bug: bug[0])
def test_a_bug_of_packed_panels_is_seen(use: Callable[..., None], bug: tuple[str, str, str]) -> None:
    D, F, is_gated, stray = test_packed.SHAPES[1]
    assert test_packed.products_differ(D, F, is_gated=is_gated, stray=stray) == []
    use(changed_source("packed.h", *bug[1:]))
    assert test_packed.products_differ(D, F, is_gated=is_gated, stray=stray)


def test_without_avx512_it_is_the_definition_too(use: Callable[..., None]) -> None:
    """Sums and conversions are written twice; a cheap machine for `make test` may have only one of them."""
    use({}, tunings=(("-march=native", "-mno-avx512f"), ("-mcpu=native",), ()))
    assert [first_rung(DECODE, case, "native") for case in (TOKENS, FLOAT8, HALF)] == ["", "", ""]
    assert first_rung(PREFILL, TILES, "native") == first_rung(DECODE, PAIRS, "native") == ""
    assert [first_rung(MATMUL, case, "native") for case in (PRODUCT, GATED, WIDE, TURNED, WIDE_PAIRS, HOLES)] == [""] * 6
    assert [test_matmul.rows_differ(*each) for each in test_matmul.INVARIANT] == [[]] * len(test_matmul.INVARIANT)
    assert [first_rung(ROTATE, case, "native") for case in (SPOILT, Heads(5, 2, 4, 40, "float16"))] == ["", ""]
    assert first_rung(ROUNDED, AROUND, "native") == ""
    assert [first_rung(SAMPLE, case, "native") for case in sample_cases.CHECK] == [""] * len(sample_cases.CHECK)
    assert not is_nan_lost()
    assert not any(integers_differ(*shape) for shape in ((5, 100, 9), (1, 900, 4)))


def is_nan_lost() -> bool:
    """Whether a NaN among a row's values does not reach the row's result."""
    operation = fresh(DECODE)
    call = operation.cases.make(FLOAT8)
    v_pages = call.arrays["v_pages"].copy()
    v_pages[call.arrays["block_tables"][9, 3], :, 2] = np.nan
    out = operation.run(Call({**call.arrays, "v_pages": v_pages}, call.options), "native")[0]
    return not np.isnan(out[9].astype(np.float32)).all()
