"""Bugs planted in the prefill kernel for Hopper, each seen by the rung of the ladder that is there for it.

What no rung without a GPU sees, because the interpreter's products are done when they return and read keys and values as any
thread does: handing back the slot of keys or values while its product is still in flight, and keys even just before it (planted,
the race of values is seen and that of keys is not, a missing wait for keys in some runs only); the fence between clearing the
tail of the values and the product that reads them; too few registers or a product's wrong operand layout (compile_check sees
these). The turns that two warpgroups take cost or save time and order nothing.
"""

from __future__ import annotations

import pytest
from planting import Bug, check

from pallas_kernels.paged_prefill_attention.cases import Case

PREFILL = "paged_prefill_attention"
WGMMA = "pallas_kernels.paged_prefill_attention.mosaic_wgmma"
# Six tiles of keys through four slots, two computing warpgroups, a last tile that is not full.
RING = Case(4, 1, 64, T=32, dtype="bfloat16", lens=(330,), is_prefill=True)
WINDOW = Case(4, 1, 64, T=32, window=70, dtype="bfloat16", lens=(330,), is_prefill=True)
SINKS = Case(2, 1, 64, T=16, has_sinks=True, dtype="bfloat16", lens=(30,), is_prefill=True)

BUGS = (
    Bug(
        "keys are refilled while they are read",
        WGMMA,
        'pl.when(is_refill)(lambda: plgpu.barrier_wait(ref["k_free"].at[slot]))',
        "pass",
        "race",
        PREFILL,
        RING,
    ),
    Bug(
        "values are refilled while they are read",
        WGMMA,
        'pl.when(is_refill)(lambda: plgpu.barrier_wait(ref["v_free"].at[slot]))',
        "pass",
        "race",
        PREFILL,
        RING,
    ),
    Bug(
        "values are handed back before they are read",
        WGMMA,
        """acc = _compat.wgmma_onto(acc, narrow, ref["v_tiles"].at[slot], target=target, meanwhile=wait_for_keys)
                plgpu.barrier_arrive(ref["v_free"].at[slot])""",
        """plgpu.barrier_arrive(ref["v_free"].at[slot])
                acc = _compat.wgmma_onto(acc, narrow, ref["v_tiles"].at[slot], target=target, meanwhile=wait_for_keys)""",
        "race",
        PREFILL,
        RING,
    ),
    Bug("nobody waits for the values", WGMMA, 'plgpu.barrier_wait(ref["v_full"].at[slot])', "pass", "race", PREFILL, SINKS),
    Bug(
        "the tail is cleared before it has landed",
        WGMMA,
        'plgpu.barrier_wait(ref["landed"].at[0])',
        "pass",
        "race",
        PREFILL,
        SINKS,
    ),
    Bug(
        "the result is copied out before it is written",
        WGMMA,
        "queries[...] = acc.astype(q.dtype)\n            plgpu.commit_smem()",
        "queries[...] = acc.astype(q.dtype)",
        "race",
        PREFILL,
        SINKS,
    ),
    Bug(
        "the tail of the values is not cleared",
        WGMMA,
        'mt.zero_rows_from(kv_len - tile * C, ref["v_tiles"].at[slot])',
        "pass",
        "poison",
        PREFILL,
        SINKS,
    ),
    Bug("padding queries see beyond the row", WGMMA, "jnp.minimum(position, kv_len - 1)", "position", "poison", PREFILL, SINKS),
    Bug(
        "a query does not see itself",
        WGMMA,
        "key <= by_row(last_seen, C)",
        "key < by_row(last_seen, C)",
        "definition",
        PREFILL,
        SINKS,
    ),
    Bug("the diagonal is not masked", WGMMA, "jnp.minimum(first_query + 1, kv_len)", "kv_len", "definition", PREFILL, RING),
    Bug(
        "a query sees one token too many",
        WGMMA,
        "key > by_row(position - window, C)",
        "key >= by_row(position - window, C)",
        "definition",
        PREFILL,
        WINDOW,
    ),
    Bug(
        "the window's first tile is one too late",
        WGMMA,
        "jnp.maximum(first_query - window + 1, 0)",
        "jnp.maximum(first_query - window + C, 0)",
        "definition",
        PREFILL,
        WINDOW,
    ),
    Bug("sums are not rescaled", WGMMA, "acc = acc * by_row(rescale, H)", "pass", "definition", PREFILL, RING),
    Bug(
        "a tile has the pages of the one before",
        WGMMA,
        "ahead = pages_of(tile + 1)",
        "ahead = pages_of(tile)",
        "definition",
        PREFILL,
        RING,
    ),
    Bug(
        "a sink has no weight",
        WGMMA,
        "jnp.where(sink > mt.LOWEST, 1.0, 0.0)",
        "jnp.zeros_like(sink)",
        "definition",
        PREFILL,
        SINKS,
    ),
)


@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_a_planted_bug_is_seen(bug: Bug) -> None:
    check(bug)
