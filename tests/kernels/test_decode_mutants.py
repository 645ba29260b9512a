"""Bugs planted in the decode kernel, its tiles and its work list, and in the kernel that merges its parts; see planting.py.

What no rung without a GPU sees: the order of the weights' way through shared memory, as the interpreter runs the warps of a
warpgroup as one thread; the waits of the cp.async form below sm_90, which it has no copies for; a layout or swizzle that is wrong
for `mma` or slow (compile_check sees some). Not wrong, only slow: a chunk that goes on past its row's end (all is masked), and
copies that are started later than they could be. A second copy of a tile that is still to come is no race in all runs: the
interpreter may stop at the barrier first, or name another race.
"""

from __future__ import annotations

import pytest
from planting import Bug, check

from pallas_kernels.merge_states.cases import Case as Parts
from pallas_kernels.paged_decode_attention.cases import INTERPRET, Case

DECODE, MERGE = "paged_decode_attention", "merge_states"
KERNEL, SHARED, TILES = (f"pallas_kernels.paged_decode_attention.{name}" for name in ("mosaic", "mosaic_tiles", "tiles"))
MERGING = "pallas_kernels.merge_states.mosaic"

RING = INTERPRET[1]  # chunks of three tiles through two slots, halves of pages, the first row of one chunk
ONE = Case(2, 1, 64, dtype="bfloat16", lens=(30,))  # one tile, which is not full
ROWS = Case(2, 1, 64, dtype="bfloat16", lens=(0, 20, 150))  # several chunks of one tile, and none
SHORT = Case(4, 2, 64, dtype="bfloat16", lens=(0, 20))  # nothing to merge
WINDOW = Case(2, 1, 64, window=70, dtype="bfloat16", lens=(200,))
CAP = Case(2, 1, 64, soft_cap=2.0, spread=4.0, dtype="bfloat16", lens=(30,))
SINKS = Case(4, 1, 64, has_sinks=True, T=3, dtype="bfloat16", lens=(150,))
FLOATS = Case(2, 1, 32, lens=(30,))
TOKENS = Case(2, 1, 64, S=32, dtype="bfloat16", kv_dtype="float8_e4m3fn", scales="token", lens=(70,))
HEADS = Case(4, 2, 64, dtype="bfloat16", kv_dtype="float8_e4m3fn", scales="head", lens=(30,))
MANY = Parts(9, (8,), 32, spread=20.0)  # more parts than are loaded at once

BUGS = (
    Bug("nobody waits for keys", KERNEL, 'wait("k", tile, is_full, 2 * stages - 2)', "pass", "race", DECODE, ONE),
    Bug("nobody waits for values", KERNEL, 'wait("v", tile, is_full, 2 * stages - 3)', "pass", "race", DECODE, ONE),
    Bug("tiles are refilled while they are read", KERNEL, "mt.fence(target)", "pass", "race", DECODE, RING),
    Bug(
        "the page after", KERNEL, "jnp.minimum(index, last_page)", "jnp.minimum(index + 1, last_page)", "definition", DECODE, ROWS
    ),
    Bug("pages beyond the row's last", KERNEL, "jnp.minimum(index, last_page)", "index", "bounds", DECODE, ROWS),
    Bug(
        "refills have the pages of the tile before",
        KERNEL,
        "next_ahead = pages_of(last + 1)",
        "next_ahead = pages_of(last)",
        "definition",
        DECODE,
        RING,
    ),
    Bug("the first page for all of a tile", SHARED, "tile * count + j", "tile * count", "definition", DECODE, ROWS),
    Bug(
        "values beyond the row are not cleared",
        KERNEL,
        "mt.zero_rows_from(kv_len - tile * C, part)",
        "pass",
        "poison",
        DECODE,
        ONE,
    ),
    Bug(
        "columns beyond the row are seen",
        KERNEL,
        "sees = position <= by_row(last_seen, C)",
        "sees = position <= by_row(last_seen + C, C)",
        "definition",
        DECODE,
        ONE,
    ),
    Bug(
        "a query does not see itself",
        KERNEL,
        "sees = position <= by_row(last_seen, C)",
        "sees = position < by_row(last_seen, C)",
        "definition",
        DECODE,
        ONE,
    ),
    Bug(
        "queries of a head are taken for tokens",
        KERNEL,
        "+ row_tile * R, jnp.int32(G))",
        "+ row_tile * R, jnp.int32(1))",
        "definition",
        DECODE,
        SINKS,
    ),
    Bug(
        "masked scores are capped",
        KERNEL,
        "scores = jnp.where(sees, scores, -jnp.inf)\n",
        "scores = jnp.where(sees, scores, -options.soft_cap * mt.LOG2_E)\n",
        "definition",
        DECODE,
        CAP,
    ),
    Bug(
        "the window's first tile is one too late",
        KERNEL,
        "first_positions - options.window + 1",
        "first_positions - options.window + tiles.num_tokens",
        "definition",
        DECODE,
        WINDOW,
    ),
    Bug(
        "a chunk's last tile is lost",
        TILES,
        "jnp.minimum(start + chunk, stop_tile[row])",
        "jnp.minimum(start + chunk - 1, stop_tile[row])",
        "definition",
        DECODE,
        RING,
    ),
    Bug(
        "a tile at a chunk's border counts twice",
        TILES,
        "jnp.minimum(start + chunk, stop_tile[row])",
        "jnp.minimum(start + chunk + 1, stop_tile[row])",
        "definition",
        DECODE,
        ROWS,
    ),
    Bug(
        "a row begins with the item before",
        TILES,
        "first_item = ends - count",
        "first_item = jnp.maximum(ends - count - 1, 0)",
        "definition",
        DECODE,
        ROWS,
    ),
    Bug(
        "a row's last chunk is not merged",
        KERNEL,
        "items.first_item, items.count,",
        "items.first_item, jnp.maximum(items.count - 1, jnp.minimum(items.count, 1)),",
        "definition",
        DECODE,
        ROWS,
    ),
    Bug(
        "a padding row writes nothing",
        KERNEL,
        ' | (ref["is_first"][item] == 1))(attend_chunk)',
        ")(attend_chunk)",
        "definition",
        DECODE,
        SHORT,
    ),
    Bug(
        "sums of values are not rescaled",
        KERNEL,
        "mt.product(acc * by_row(rescale, H), weights",
        "mt.product(acc, weights",
        "definition",
        DECODE,
        RING,
    ),
    Bug(
        "an LSE in base 2",
        KERNEL,
        "peak * (1 / mt.LOG2_E) + jnp.log(divisor)",
        "peak + jnp.log(divisor) * mt.LOG2_E",
        "definition",
        DECODE,
        ONE,
    ),
    Bug(
        "a sink counts in every chunk",
        KERNEL,
        '(ref["is_first"][item] == 1) & (kv_len > 0)',
        "kv_len > 0",
        "definition",
        DECODE,
        SINKS,
    ),
    Bug(
        "the scales of the page before",
        KERNEL,
        '_scales"].at[page, head, tokens]',
        '_scales"].at[page - 1, head, tokens]',
        "definition",
        DECODE,
        TOKENS,
    ),
    Bug(
        "values without their scales",
        KERNEL,
        "weights = weights * by_column(jnp.where(column < kv_len",
        "weights * by_column(jnp.where(column < kv_len",
        "definition",
        DECODE,
        TOKENS,
    ),
    Bug(
        "scales beyond the row",
        KERNEL,
        'jnp.where(column < kv_len, scales_of("v", tile), 0.0)',
        'scales_of("v", tile)',
        "poison",
        DECODE,
        TOKENS,
    ),
    Bug("keys of a head without its scale", KERNEL, 'scale = ref["k_scales"][head] * scale', "pass", "definition", DECODE, HEADS),
    Bug("small products are left out", SHARED, "if i + j < max(len(a), len(b))", "if i + j < 1", "definition", DECODE, FLOATS),
    Bug(
        "an empty part is multiplied",
        MERGING,
        "jnp.where(wide(weight) > 0, value.astype(jnp.float32), 0.0)",
        "value.astype(jnp.float32)",
        "definition",
        MERGE,
        MANY,
    ),
    Bug(
        "weights without the peak",
        MERGING,
        "weight = jnp.exp2(lse - new_peak)",
        "weight = jnp.exp2(lse)",
        "definition",
        MERGE,
        MANY,
    ),
    Bug(
        "the last parts are not merged",
        MERGING,
        "lax.div(num_items + (AT_ONCE - 1), jnp.int32(AT_ONCE))",
        "lax.div(num_items, jnp.int32(AT_ONCE))",
        "definition",
        MERGE,
        MANY,
    ),
    Bug(
        "the last part counts several times",
        MERGING,
        "jnp.where(part < num_items, 0.0, -jnp.inf)",
        "jnp.where(part < num_items, 0.0, 0.0)",
        "definition",
        MERGE,
        MANY,
    ),
    Bug("merged sums are not rescaled", MERGING, "total * rescale, acc * wide(rescale)", "total, acc", "definition", MERGE, MANY),
)


@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_a_planted_bug_is_seen(bug: Bug) -> None:
    check(bug)
