"""Bugs planted in the prefill kernel for Hopper, each seen by the rung of the ladder that is there for it.

What no rung without a GPU sees, because the interpreter's products are done when they return and read keys and values as any
thread does: handing back the slot of keys or values while its product is still in flight, and keys even just before it (planted,
the race of values is seen and that of keys is not, a missing wait for keys in some runs only); the fence between clearing the
tail of the values and the product that reads them; too few registers or a product's wrong operand layout (compile_check sees
these). The turns that two warpgroups take cost or save time and order nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import numpy as np
import pytest
from planting import planted

from pallas_kernels import operations
from pallas_kernels.backends import MOSAIC_JAX
from pallas_kernels.operations import Call
from pallas_kernels.paged_prefill_attention.cases import Case

pytestmark = pytest.mark.skipif(jax.__version_info__[:3] < MOSAIC_JAX, reason="needs the GPU interpreter")

NAME = "pallas_kernels.paged_prefill_attention.mosaic_wgmma"
PREFILL = operations.operation("paged_prefill_attention")
# Six tiles of keys through four slots, two computing warpgroups, a last tile that is not full.
RING = Case(4, 1, 64, T=32, dtype="bfloat16", lens=(330,), is_prefill=True)
WINDOW = Case(4, 1, 64, T=32, window=70, dtype="bfloat16", lens=(330,), is_prefill=True)
SINKS = Case(2, 1, 64, T=16, has_sinks=True, dtype="bfloat16", lens=(30,), is_prefill=True)

# Name, old text, new text, the rung that sees it, the case it sees it in.
BUGS = [
    (
        "keys are refilled while they are read",
        'pl.when(is_refill)(lambda: plgpu.barrier_wait(ref["k_free"].at[slot]))',
        "pass",
        "race",
        RING,
    ),
    (
        "values are refilled while they are read",
        'pl.when(is_refill)(lambda: plgpu.barrier_wait(ref["v_free"].at[slot]))',
        "pass",
        "race",
        RING,
    ),
    (
        "values are handed back before they are read",
        """acc = _compat.wgmma_onto(acc, narrow, ref["v_tiles"].at[slot], target=target, meanwhile=wait_for_keys)
                plgpu.barrier_arrive(ref["v_free"].at[slot])""",
        """plgpu.barrier_arrive(ref["v_free"].at[slot])
                acc = _compat.wgmma_onto(acc, narrow, ref["v_tiles"].at[slot], target=target, meanwhile=wait_for_keys)""",
        "race",
        RING,
    ),
    ("nobody waits for the values", 'plgpu.barrier_wait(ref["v_full"].at[slot])', "pass", "race", RING),
    ("the tail is cleared before it has landed", 'plgpu.barrier_wait(ref["landed"].at[0])', "pass", "race", SINKS),
    (
        "the result is copied out before it is written",
        "queries[...] = acc.astype(q.dtype)\n            plgpu.commit_smem()",
        "queries[...] = acc.astype(q.dtype)",
        "race",
        SINKS,
    ),
    (
        "the tail of the values is not cleared",
        'mt.zero_rows_from(kv_len - tile * C, ref["v_tiles"].at[slot])',
        "pass",
        "poison",
        SINKS,
    ),
    ("padding queries see beyond the row", "jnp.minimum(position, kv_len - 1)", "position", "poison", SINKS),
    ("a query does not see itself", "key <= by_row(last_seen, C)", "key < by_row(last_seen, C)", "definition", SINKS),
    ("the diagonal is not masked", "jnp.minimum(first_query + 1, kv_len)", "kv_len", "definition", RING),
    (
        "a query sees one token too many",
        "key > by_row(position - window, C)",
        "key >= by_row(position - window, C)",
        "definition",
        WINDOW,
    ),
    (
        "the window's first tile is one too late",
        "jnp.maximum(first_query - window + 1, 0)",
        "jnp.maximum(first_query - window + C, 0)",
        "definition",
        WINDOW,
    ),
    ("sums are not rescaled", "acc = acc * by_row(rescale, H)", "pass", "definition", RING),
    ("a tile has the pages of the one before", "ahead = pages_of(tile + 1)", "ahead = pages_of(tile)", "definition", RING),
    ("a sink has no weight", "jnp.where(sink > mt.LOWEST, 1.0, 0.0)", "jnp.zeros_like(sink)", "definition", SINKS),
]


def run(call: Call) -> tuple[np.ndarray, ...]:
    """A call on the interpreter, compiled anew: jit remembers what it compiled by the function."""
    from pallas_kernels import _compat

    _compat.reset_interpreter()
    outputs = jax.jit(functools.partial(PREFILL.function, **call.options, backend="interpret"))(**call.arrays)
    outputs = tuple(np.asarray(x) for x in outputs)
    _compat.check_races()
    return outputs


def race_sees(case: Case) -> bool:
    try:
        run(PREFILL.cases.make(case))
    except Exception as error:  # jax wraps what its callbacks raise
        return "race" in str(error).lower()
    return False


def definition_sees(case: Case) -> bool:
    call = PREFILL.cases.make(case)
    checked = zip(PREFILL.cases.OUTPUTS, run(call), PREFILL.cases.define(call), PREFILL.cases.plain(call), strict=True)
    return not all(operations.judge(*outputs).is_right for outputs in checked)


def poison_sees(case: Case) -> bool:
    call = PREFILL.cases.make(case)
    both = zip(run(call), run(PREFILL.cases.poison(call)), strict=True)
    return any(clean.tobytes() != dirty.tobytes() for clean, dirty in both)


RUNGS: dict[str, Callable[[Case], bool]] = {"race": race_sees, "definition": definition_sees, "poison": poison_sees}


@pytest.fixture(autouse=True)
def forget_the_race() -> object:
    """A race that was wanted is none that conftest should find."""
    yield
    from pallas_kernels import _compat

    _compat.reset_interpreter()


@pytest.mark.parametrize("case", [RING, WINDOW, SINKS], ids=str)
@pytest.mark.parametrize("rung", RUNGS)
def test_the_healthy_kernel_is_clean(rung: str, case: Case) -> None:
    assert not RUNGS[rung](case)


@pytest.mark.parametrize(("old", "new", "rung", "case"), [bug[1:] for bug in BUGS], ids=[bug[0] for bug in BUGS])
def test_planted_bugs_are_seen(old: str, new: str, rung: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from pallas_kernels.paged_prefill_attention import mosaic

    with planted(NAME, old, new) as module:
        monkeypatch.setattr(mosaic, "mosaic_wgmma", module)
        assert RUNGS[rung](case)
