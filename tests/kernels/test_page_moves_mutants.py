"""Bugs planted in the kernels that move pages, and the rung of the ladder that sees each of them.

"race" is the interpreter's detector, "definition" the bits. What neither sees: a block that exits before its store has read
shared memory (the last `wait_smem_to_gmem`), and addresses of less than 64 bits.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from planting import planted

from pallas_kernels import operations
from pallas_kernels.backends import MOSAIC_JAX
from pallas_kernels.copy_pages.cases import Case as Pages
from pallas_kernels.write_kv_pages.cases import Case as Tokens

MOVE, WRITE, QUANTISE = (
    f"pallas_kernels.{name}" for name in ("copy_pages.mosaic", "write_kv_pages.mosaic", "write_kv_pages.quantise")
)
LAYERS, PADDED, PIECES = Pages(3, L=2), Pages(5, padding=3), Pages(1, K=8, S=64, H=128, dtype="bfloat16")
SEVERAL, NOTHING = Tokens(19, K=1, H=32, S=8), Tokens(7, padding=3)  # SEVERAL: three tokens a block, one block has but one
SCALED = Tokens(12, dtype="int8", new_dtype="float32", scales="token", padding=1)

# what is wrong, module, old text, new text, operation, case, backend, rung
MUTANTS = (
    (
        "stored before it has arrived",
        MOVE,
        "            plgpu.barrier_wait(arrived)\n",
        "",
        "copy_pages",
        LAYERS,
        "interpret",
        "race",
    ),
    (
        "the page before",
        MOVE,
        "num_layers) + page\n",
        "num_layers) + page - 1\n",
        "copy_pages",
        LAYERS,
        "interpret",
        "definition",
    ),
    (
        "layers next to each other",
        MOVE,
        "layer * (array.shape[0] // num_layers)",
        "layer",
        "gather_pages",
        LAYERS,
        "interpret",
        "definition",
    ),
    ("one layer", MOVE, "grid=(num_layers, num", "grid=(1, num", "scatter_pages", LAYERS, "interpret", "definition"),
    (
        "staged by layer",
        MOVE,
        "pair * num_layers + layer",
        "layer * indices[0].shape[0] + pair",
        "gather_pages",
        LAYERS,
        "interpret",
        "definition",
    ),
    ("one piece of a page", MOVE, ".at[to_row, piece]", ".at[to_row, 0]", "copy_pages", PIECES, "interpret", "race"),
    ("padding is copied", MOVE, "read == write if", "False if", "copy_pages", PADDED, "interpret", "race"),
    ("padding is swapped in", MOVE, "write == 0 if", "False if", "scatter_pages", PADDED, "interpret", "race"),
    (
        "the next slot",
        WRITE,
        "lax.rem(slot, jnp.int32(S)), is_live",
        "lax.rem(slot + 1, jnp.int32(S)), is_live",
        "write_kv_pages",
        SEVERAL,
        "interpret",
        "definition",
    ),
    (
        "stored before it has arrived",
        WRITE,
        "                    plgpu.barrier_wait(arrived.at[i])\n",
        "",
        "write_kv_pages",
        SEVERAL,
        "interpret",
        "race",
    ),
    (
        "the first head alone",
        WRITE,
        "(buffers[i], pages_ref.at[page, :, offset])",
        "(buffers[i].at[0], pages_ref.at[page, 0, offset])",
        "write_kv_pages",
        NOTHING,
        "interpret",
        "definition",
    ),
    (
        "one buffer for all tokens",
        WRITE,
        "new_ref.at[token], buffers[i]",
        "new_ref.at[token], buffers[0]",
        "write_kv_pages",
        SEVERAL,
        "interpret",
        "race",
    ),
    (
        "padding is written",
        WRITE,
        " & (lax.rem(page, jnp.int32(P // num_layers)) != 0)",
        "",
        "write_kv_pages",
        NOTHING,
        "interpret",
        "race",
    ),
    ("tokens after the last", WRITE, "(token < X) & ", "", "write_kv_pages", SEVERAL, "interpret", "race"),
    (
        "the neighbour's scale",
        WRITE,
        "new_scales_ref[token, k]",
        "new_scales_ref[token, 0]",
        "write_kv_pages",
        SCALED,
        "interpret",
        "definition",
    ),
    ("rounded to zero", QUANTISE, "jnp.round(clipped)", "jnp.trunc(clipped)", "write_kv_pages", SCALED, "xla", "definition"),
    (
        "ties away from zero",
        QUANTISE,
        "jnp.round(clipped)",
        "jnp.trunc(clipped + jnp.where(clipped < 0, -0.5, 0.5))",
        "write_kv_pages",
        SCALED,
        "xla",
        "definition",
    ),
    (
        "a scale of zero",
        QUANTISE,
        "np.float32(LOWEST_SCALE))",
        "np.float32(0))",
        "write_kv_pages",
        SCALED,
        "xla",
        "definition",
    ),
    (
        "NaN in silence",
        QUANTISE,
        "jnp.where(jnp.isfinite(peak), scale, jnp.nan)",
        "scale",
        "write_kv_pages",
        SCALED,
        "xla",
        "definition",
    ),
)


def verdict(name: str, case: Any, backend: str) -> str:
    """The rung that sees something wrong with an operation as it is now, "" for none."""
    # The swaps take the kernel of copy_pages by name when they are imported.
    for module in ("gather_pages", "scatter_pages"):
        sys.modules.pop(f"pallas_kernels.{module}.mosaic", None)
    operation = operations.operation(name)
    call = operation.cases.make(case)
    try:
        got = jax.jit(partial(operation.function, **call.options, backend=backend))(**call.arrays)
        got = [np.asarray(x) for x in (got if isinstance(got, tuple) else (got,))]
        if backend == "interpret":
            from pallas_kernels import _compat

            _compat.check_races()
    except Exception as error:
        if "race" not in str(error).lower():
            raise
        return "race"
    exact = operation.cases.define(call)
    wrong = [not operations.judge("", x, wanted, None).is_right for x, wanted in zip(got, exact, strict=True)]
    return "definition" if any(wrong) else ""


@pytest.mark.parametrize(
    ("module", "old", "new", "name", "case", "backend", "rung"),
    [pytest.param(*mutant[1:], id=f"{mutant[4]}: {mutant[0]}") for mutant in MUTANTS],
)
def test_a_planted_bug_is_seen_and_the_healthy_kernel_is_clean(
    module: str, old: str, new: str, name: str, case: Any, backend: str, rung: str
) -> None:
    if backend == "interpret" and jax.__version_info__[:3] < MOSAIC_JAX:
        pytest.skip("jax is older than the Mosaic kernels need")
    try:
        assert verdict(name, case, backend) == ""
        with planted(module, old, new):
            assert verdict(name, case, backend) == rung
    finally:
        for swap in ("gather_pages", "scatter_pages"):
            sys.modules.pop(f"pallas_kernels.{swap}.mosaic", None)
        if backend == "interpret":
            from pallas_kernels import _compat

            _compat.reset_interpreter()
