"""Bugs planted in sampling, each seen by the ladder: every one gives a wrong token in a case that the healthy code gets right.

What no rung without a GPU sees: `approx_math=True` in `_compete` or `_search` (the interpreter's exp and log are good; on a chip
the approximate logarithm near 1 is off by more than the noise of the winners), a load that is wider than rows are aligned (the
compiler chooses the width), and reductions of two warpgroups at once in the one scratch space (why there is one warpgroup).
"""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from planting import planted

from pallas_kernels import backends, operations, sample_logits
from pallas_kernels.sample_logits import cases

MOSAIC, XLA, ROWS = (f"pallas_kernels.sample_logits.{name}" for name in ("mosaic", "xla", "rows"))

# Name, module, old text, new text, what is sampled, backend. The rung is the definition: there is no shared memory to race in.
BUGS = [
    (
        "the overlap of the last tile counts twice",
        MOSAIC,
        "jnp.where(token >= tile * TILE, clean(x), -jnp.inf)",
        "clean(x)",
        cases.Case(513, recipes=("k5", "k_p", "k5", "k5")),
        "interpret",
    ),
    (
        "a turn leaves out its last tile",
        MOSAIC,
        "for i in range(TURN_TILES):",
        "for i in range(TURN_TILES - 1):",
        cases.Case(2048, recipes=("k5", "k", "p", "all")),
        "interpret",
    ),
    (
        "a count ends while two tokens are in the bracket",
        MOSAIC,
        "(at_low - at_high > 1.5)",
        "(at_low - at_high > 20.5)",
        cases.Case(1301, recipes=("k",) * 8),
        "interpret",
    ),
    (
        "the last of equal tokens wins",
        MOSAIC,
        "jnp.min(jnp.where(score == best, winner, jnp.iinfo(jnp.int32).max))",
        "jnp.max(jnp.where(score == best, winner, -1))",
        cases.Case(2051, kind="ties", recipes=("greedy", "greedy")),
        "interpret",
    ),
    (
        "greedy rows get noise",
        MOSAIC,
        "amplitude * noise.gumbel",
        "noise.gumbel",
        cases.Case(2051, kind="ties", recipes=("greedy", "greedy")),
        "interpret",
    ),
    (
        "top-p is a part of everything, not of what is left",
        MOSAIC,
        "measure([jnp.where(p < 1, kept, above)]",
        "measure([jnp.where(p < 1, lowest, above)]",
        cases.Case(1301, kind="flat", recipes=("all", "k_p", "k_p", "k_p")),
        "interpret",
    ),
    (
        "the bracket of top-p forgets how many tokens there are",
        ROWS,
        "(1.0 - self.top_ps) / (2.0 * vocab_size)",
        "(1.0 - self.top_ps)",
        cases.Case(1301, recipes=("hot_p", "hot_p")),
        "interpret",
    ),
    (
        "tokens that may still win are not visited",
        ROWS,
        "(noise.MOST - noise.LEAST + 0.1)",
        "1.0",
        cases.Case(2051, recipes=("plain",) * 4),
        "interpret",
    ),
    (
        "the words of a key change places",
        XLA,
        "noise.gumbel(row.first_keys, row.second_keys, tokens)",
        "noise.gumbel(row.second_keys, row.first_keys, tokens)",
        cases.Case(513, recipes=("plain", "plain")),
        "xla",
    ),
    (
        "a threshold at the bound of the candidates is trusted",
        XLA,
        "jnp.where(kept > bound,",
        "jnp.where(kept >= bound,",
        cases.Case(20011, kind="ties", recipes=("k",) * 8),
        "xla",
    ),
    (
        "the weight of the candidates is taken for all weight",
        XLA,
        "lambda: _weight(clean(logits[b]), row, highest, least)",
        "lambda: _weight(x, row, highest, least)",
        cases.Case(20011, recipes=("p",) * 4),
        "xla",
    ),
    (
        "min-p is forgotten by the portable path",
        ROWS,
        "jnp.maximum(rank(floor), LOWEST_RANK + 1)",
        "jnp.maximum(rank(floor) * 0 + LOWEST_RANK, LOWEST_RANK + 1)",
        cases.Case(1301, recipes=("min", "min", "min1")),
        "xla",
    ),
]


def is_right(case: cases.Case, backend: str) -> bool:
    """Compiled anew each time, so that what is planted is what runs."""
    call = cases.make(case)
    got = jax.jit(functools.partial(sample_logits, backend=backend))(**call.arrays)
    (exact,), (plain,) = cases.define(call), cases.plain(call)
    return operations.judge("tokens", np.asarray(got), exact, plain).is_right


@pytest.mark.parametrize(("module", "old", "new", "case", "backend"), [bug[1:] for bug in BUGS], ids=[bug[0] for bug in BUGS])
def test_a_planted_bug_gives_a_wrong_token(module: str, old: str, new: str, case: cases.Case, backend: str) -> None:
    if backend == "interpret" and jax.__version_info__[:3] < backends.MOSAIC_JAX:
        pytest.skip("there is no Mosaic here")
    assert is_right(case, backend)
    with planted(module, old, new):
        assert not is_right(case, backend)
