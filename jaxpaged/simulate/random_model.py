"""Next tokens of a language model that does not exist: what the beams of a simulated search choose among.

Knows log-probabilities. Refuses to know pages and time.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence as Seq

from jaxpaged.config import ConfigError
from jaxpaged.host.beams import Candidates
from jaxpaged.host.plan import Chunk

NUM_TOKENS = 32  # so many have a probability, and so no search is wider
# Beams of width 2, 4, 6 of the bundled model, twelve prompts x 120 tokens, November 2026. No token has more than 0.9 in 0.34,
# 0.31, 0.27 of its steps; there the likeliest has a mean log-probability of -1.35, -1.30, -1.20, and of all steps the median is
# -0.004. From these come the first, the spread and the lead.
OPEN_SHARE = 0.3
# On average the last 12, 27, 28 tokens are not those of all beams. Here they are 9, 23, 35: this decides what is shared, and this
# constant decides it. Two beams want the same token at the same place in 0.45, 0.56, 0.31 of the places, a bound from below,
# because after a word more or less they want the same a place later.
KINSHIP = 0.85
_SPREAD = 1.6  # of the logits where the choice is open
_LEAD = 6.0  # of the likeliest where it is not
_NUM_ROWS = 4096


class RandomModel:
    """Distributions over a few tokens, each a function of the seed, the request and what the beam has written.

    A choice is open, with several likely tokens, or not. At some places all beams of a request see the same distribution
    whatever they have written, at the others each sees its own, for as long as they differ in one token: how soon one beam
    outruns the others, and so how many tokens they share, hangs on both.

    This is a stand-in: a language model's beams see distributions that are alike, not the same or strangers.

    Args:
      open_share: of all choices, in [0, 1].
      kinship: share of the places where all beams of a request see the same, in [0, 1]. At 1 nothing that was written matters,
        and old alternatives stay as good as new ones.
    """

    def __init__(self, *, open_share: float = OPEN_SHARE, kinship: float = KINSHIP, seed: int = 0):
        for name, share in (("open_share", open_share), ("kinship", kinship)):
            if not 0 <= share <= 1:
                raise ConfigError(f"{name}: got {share:g}, expected a number in [0, 1]")
        self.open_share, self.kinship, self.seed = open_share, kinship, seed
        rng = random.Random(f"model {seed}")
        # Drawn once: a search asks for a row of these at each step of each beam, and shares none of them with a neighbour.
        self._rows = [_row(rng, is_open=index < open_share * _NUM_ROWS) for index in range(_NUM_ROWS)]

    def candidates(self, chunks: Seq[Chunk]) -> list[Candidates]:
        """The likeliest tokens of each chunk that is a beam's, best first; nothing for the others."""
        return [self._candidates(chunk) if chunk.sequence.group is not None else () for chunk in chunks]

    def _candidates(self, chunk: Chunk) -> Candidates:
        sequence = chunk.sequence
        written = sequence.tokens[sequence.num_prompt :]
        place = hash((self.seed, sequence.request.seed, len(written)))  # of whole numbers alone: the same in every process
        if place % 1_000_003 >= self.kinship * 1_000_003:
            place = hash((place, *written))
        return self._rows[place % _NUM_ROWS][: sequence.group.num_candidates]  # type: ignore[union-attr]


def _row(rng: random.Random, *, is_open: bool) -> Candidates:
    logits = sorted((rng.gauss(0.0, _SPREAD) for _ in range(NUM_TOKENS)), reverse=True)
    if not is_open:
        logits[0] += _LEAD
    total = math.log(math.fsum(map(math.exp, logits)))
    token_ids = rng.sample(range(NUM_TOKENS), NUM_TOKENS)  # which of them is likely has nothing to do with its number
    return [(token_id, logit - total) for token_id, logit in zip(token_ids, logits, strict=True)]
