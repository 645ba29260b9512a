"""Bugs planted in sampling, each seen by the ladder: every one gives a wrong token in a case that the healthy code gets right.

What no rung without a GPU sees: `approx_math=True` in `_compete` or `_search` (the interpreter's exp and log are good; on a chip
the approximate logarithm near 1 is off by more than the noise of the winners), a load that is wider than rows are aligned (the
compiler chooses the width), and reductions of two warpgroups at once in the one scratch space (why there is one warpgroup).
"""

from __future__ import annotations

import pytest
from planting import Bug, check

from pallas_kernels.sample_logits.cases import Case

SAMPLE = "sample_logits"
MOSAIC, XLA, ROWS = (f"pallas_kernels.sample_logits.{name}" for name in ("mosaic", "xla", "rows"))

# The rung is the definition: there is no shared memory to race in.
BUGS = (
    Bug(
        "the overlap of the last tile counts twice",
        MOSAIC,
        "jnp.where(token >= tile * TILE, clean(x), -jnp.inf)",
        "clean(x)",
        "definition",
        SAMPLE,
        Case(513, recipes=("k5", "k_p", "k5", "k5")),
    ),
    Bug(
        "a turn leaves out its last tile",
        MOSAIC,
        "for i in range(TURN_TILES):",
        "for i in range(TURN_TILES - 1):",
        "definition",
        SAMPLE,
        Case(2048, recipes=("k5", "k", "p", "all")),
    ),
    Bug(
        "a count ends while two tokens are in the bracket",
        MOSAIC,
        "(at_low - at_high > 1.5)",
        "(at_low - at_high > 20.5)",
        "definition",
        SAMPLE,
        Case(1301, recipes=("k",) * 8),
    ),
    Bug(
        "the last of equal tokens wins",
        MOSAIC,
        "jnp.min(jnp.where(score == best, winner, jnp.iinfo(jnp.int32).max))",
        "jnp.max(jnp.where(score == best, winner, -1))",
        "definition",
        SAMPLE,
        Case(2051, kind="ties", recipes=("greedy", "greedy")),
    ),
    Bug(
        "greedy rows get noise",
        MOSAIC,
        "amplitude * noise.gumbel",
        "noise.gumbel",
        "definition",
        SAMPLE,
        Case(2051, kind="ties", recipes=("greedy", "greedy")),
    ),
    Bug(
        "top-p is a part of everything, not of what is left",
        MOSAIC,
        "measure([jnp.where(p < 1, kept, above)]",
        "measure([jnp.where(p < 1, lowest, above)]",
        "definition",
        SAMPLE,
        Case(1301, kind="flat", recipes=("all", "k_p", "k_p", "k_p")),
    ),
    Bug(
        "the bracket of top-p forgets how many tokens there are",
        ROWS,
        "(1.0 - self.top_ps) / (2.0 * vocab_size)",
        "(1.0 - self.top_ps)",
        "definition",
        SAMPLE,
        Case(1301, recipes=("hot_p", "hot_p")),
    ),
    Bug(
        "tokens that may still win are not visited",
        ROWS,
        "(noise.MOST - noise.LEAST + 0.1)",
        "1.0",
        "definition",
        SAMPLE,
        Case(2051, recipes=("plain",) * 4),
    ),
    Bug(
        "the words of a key change places",
        XLA,
        "noise.gumbel(row.first_keys, row.second_keys, tokens)",
        "noise.gumbel(row.second_keys, row.first_keys, tokens)",
        "definition",
        SAMPLE,
        Case(513, recipes=("plain", "plain")),
        "xla",
    ),
    Bug(
        "a threshold at the bound of the candidates is trusted",
        XLA,
        "jnp.where(kept > bound,",
        "jnp.where(kept >= bound,",
        "definition",
        SAMPLE,
        Case(20011, kind="ties", recipes=("k",) * 8),
        "xla",
    ),
    Bug(
        "the weight of the candidates is taken for all weight",
        XLA,
        "lambda: _weight(clean(logits[b]), row, highest, least)",
        "lambda: _weight(x, row, highest, least)",
        "definition",
        SAMPLE,
        Case(20011, recipes=("p",) * 4),
        "xla",
    ),
    Bug(
        "min-p is forgotten by the portable path",
        ROWS,
        "jnp.maximum(rank(floor), LOWEST_RANK + 1)",
        "jnp.maximum(rank(floor) * 0 + LOWEST_RANK, LOWEST_RANK + 1)",
        "definition",
        SAMPLE,
        Case(1301, recipes=("min", "min", "min1")),
        "xla",
    ),
)


@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_a_planted_bug_is_seen(bug: Bug) -> None:
    check(bug)
