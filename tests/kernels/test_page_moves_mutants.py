"""Bugs planted in the kernels that move pages, and the rung of the ladder that sees each of them.

"race" is the interpreter's detector, "definition" the bits. What neither sees: a block that exits before its store has read
shared memory (the last `wait_smem_to_gmem`), and addresses of less than 64 bits.
"""

from __future__ import annotations

import pytest
from planting import Bug, check

from pallas_kernels.copy_pages.cases import Case as Pages
from pallas_kernels.write_kv_pages.cases import Case as Tokens

MOVE, WRITE, QUANTISE = (
    f"pallas_kernels.{name}" for name in ("copy_pages.mosaic", "write_kv_pages.mosaic", "write_kv_pages.quantise")
)
LAYERS, PADDED, PIECES = Pages(3, L=2), Pages(5, padding=3), Pages(1, K=8, S=64, H=128, dtype="bfloat16")
SEVERAL, NOTHING = Tokens(19, K=1, H=32, S=8), Tokens(7, padding=3)  # SEVERAL: three tokens a block, one block has but one
SCALED = Tokens(12, dtype="int8", new_dtype="float32", scales="token", padding=1)

BUGS = (
    Bug(
        "a page is stored before it has arrived",
        MOVE,
        "            plgpu.barrier_wait(arrived)\n",
        "",
        "race",
        "copy_pages",
        LAYERS,
    ),
    Bug("the page before", MOVE, "num_layers) + page\n", "num_layers) + page - 1\n", "definition", "copy_pages", LAYERS),
    Bug(
        "layers next to each other", MOVE, "layer * (array.shape[0] // num_layers)", "layer", "definition", "gather_pages", LAYERS
    ),
    Bug("one layer", MOVE, "grid=(num_layers, num", "grid=(1, num", "definition", "scatter_pages", LAYERS),
    Bug(
        "staged by layer",
        MOVE,
        "pair * num_layers + layer",
        "layer * indices[0].shape[0] + pair",
        "definition",
        "gather_pages",
        LAYERS,
    ),
    Bug("one piece of a page", MOVE, ".at[to_row, piece]", ".at[to_row, 0]", "race", "copy_pages", PIECES),
    Bug("padding is copied", MOVE, "read == write if", "False if", "race", "copy_pages", PADDED),
    Bug("padding is swapped in", MOVE, "write == 0 if", "False if", "race", "scatter_pages", PADDED),
    Bug(
        "the next slot",
        WRITE,
        "lax.rem(slot, jnp.int32(S)), is_live",
        "lax.rem(slot + 1, jnp.int32(S)), is_live",
        "definition",
        "write_kv_pages",
        SEVERAL,
    ),
    Bug(
        "a token is stored before it has arrived",
        WRITE,
        "                    plgpu.barrier_wait(arrived.at[i])\n",
        "",
        "race",
        "write_kv_pages",
        SEVERAL,
    ),
    Bug(
        "the first head alone",
        WRITE,
        "(buffers[i], pages_ref.at[page, :, offset])",
        "(buffers[i].at[0], pages_ref.at[page, 0, offset])",
        "definition",
        "write_kv_pages",
        NOTHING,
    ),
    Bug(
        "one buffer for all tokens",
        WRITE,
        "new_ref.at[token], buffers[i]",
        "new_ref.at[token], buffers[0]",
        "race",
        "write_kv_pages",
        SEVERAL,
    ),
    Bug(
        "padding is written", WRITE, " & (lax.rem(page, jnp.int32(P // num_layers)) != 0)", "", "race", "write_kv_pages", NOTHING
    ),
    Bug("tokens after the last", WRITE, "(token < X) & ", "", "race", "write_kv_pages", SEVERAL),
    Bug(
        "the neighbour's scale",
        WRITE,
        "new_scales_ref[token, k]",
        "new_scales_ref[token, 0]",
        "definition",
        "write_kv_pages",
        SCALED,
    ),
    Bug("rounded to zero", QUANTISE, "jnp.round(clipped)", "jnp.trunc(clipped)", "definition", "write_kv_pages", SCALED, "xla"),
    Bug(
        "ties away from zero",
        QUANTISE,
        "jnp.round(clipped)",
        "jnp.trunc(clipped + jnp.where(clipped < 0, -0.5, 0.5))",
        "definition",
        "write_kv_pages",
        SCALED,
        "xla",
    ),
    Bug(
        "a scale of zero", QUANTISE, "np.float32(LOWEST_SCALE))", "np.float32(0))", "definition", "write_kv_pages", SCALED, "xla"
    ),
    Bug(
        "NaN in silence",
        QUANTISE,
        "jnp.where(jnp.isfinite(peak), scale, jnp.nan)",
        "scale",
        "definition",
        "write_kv_pages",
        SCALED,
        "xla",
    ),
)


@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_a_planted_bug_is_seen(bug: Bug) -> None:
    check(bug)
