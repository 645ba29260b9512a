"""Samplers as laws over random and adversarial logits, and draws of the whole engine by their distribution.

Each function raises when a law is broken and returns how many cases it has seen. test_samplers.py does a part, `make fuzz` all.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from typing import Any

import mixes
import numpy as np
import oracle
from driving import Ask, ShuffledPool, another_engine, greedy, run
from model.test_sampler import DRAWS, inputs, keep, kept_by_sorting
from scipy import stats
from test_adjust import chain

from jaxpaged.config import EngineConfig
from jaxpaged.engine import Engine
from jaxpaged.host.request import SamplingParams

SIZES = (1, 2, 3, 7, 40, 257, 1000)


def hostile(rng: np.random.Generator, size: int) -> np.ndarray:
    """A row of logits of one of many kinds, float32 [size]: ties, infinities, huge, tiny, flat, steep."""
    kinds = [
        lambda: rng.normal(0, rng.choice((1e-30, 0.1, 1, 10, 1e3, 1e30)), size),
        lambda: np.zeros(size),
        lambda: rng.integers(-3, 4, size).astype(float),
        lambda: np.where(rng.random(size) < 0.7, -np.inf, rng.normal(size=size)),
        lambda: np.where(rng.random(size) < 0.3, 3e38, -3e38),
        lambda: np.where(np.arange(size) == rng.integers(size), 50.0, rng.normal(size=size)),
        lambda: np.log(2.0 ** -np.minimum(1.0 + rng.permutation(size), 60)),
        lambda: np.where(rng.random(size) < 0.5, 0.0, -0.0),
        lambda: 1e4 + rng.normal(size=size),
        lambda: np.round(rng.normal(0, 2, size), 1),
    ]
    row = kinds[rng.integers(len(kinds))]().astype(np.float32)
    if not np.isfinite(row).any():
        row[rng.integers(size)] = 0.0  # a row with nothing to choose never comes here
    return row


def laws(seeds: Iterable[int]) -> int:
    """Rows whose kept tokens are those of the sorted definition in float64, and whose special cases are the general one."""
    count = 0
    for seed in seeds:
        rng, R = np.random.default_rng(seed), 64
        size = SIZES[seed % len(SIZES)]
        logits = np.stack([hostile(rng, size) for _ in range(R)])
        top_k = rng.choice([0, -1, 1, 2, 5, size - 1, size, size + 1, 2**31 - 1], R)
        top_p = rng.choice(np.float32([1, 0.999, 0.9, 0.5, 0.1, 1e-6]), R)
        min_p = rng.choice(np.float32([0, 0.05, 0.5, 1]), R)
        kept = np.asarray(keep(logits, inputs(R, top_k=top_k, top_p=top_p, min_p=min_p)))
        allowed = [around(logits[row], int(top_k[row]), float(top_p[row]), float(min_p[row])) for row in range(R)]
        for row in range(R):
            assert tuple((kept[row] > -np.inf).tolist()) in allowed[row], (seed, row)
            is_kept = kept[row] > -np.inf
            assert (kept[row][is_kept] == logits[row][is_kept]).all()
        positions, best = rng.integers(0, 10**6, R).astype(np.int32), logits.argmax(axis=1)
        is_clear = (logits == logits.max(axis=1, keepdims=True)).sum(axis=1) == 1
        for draw in DRAWS.values():
            drawn = np.asarray(draw(logits, inputs(R, top_k=top_k, top_p=top_p, min_p=min_p), positions))
            assert all(any(kept[token] for kept in allowed[row]) for row, token in enumerate(drawn)), seed
            for only in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):  # the likeliest alone, and greedy
                drawn = np.asarray(draw(logits, inputs(R, temperature=1.5, **only), positions))
                assert (drawn == best)[is_clear].all() and (logits[np.arange(R), drawn] == logits.max(axis=1)).all()
            assert (np.asarray(draw(logits, inputs(R, temperature=0.0, top_k=3), positions)) == best).all()
            plain = np.asarray(draw(logits, inputs(R, temperature=1.5), positions))
            for everything in ({"top_k": size}, {"top_k": size + 9}, {"top_k": -1}, {"top_p": 1.0, "min_p": 0.0}):
                assert (np.asarray(draw(logits, inputs(R, temperature=1.5, **everything), positions)) == plain).all()
        count += R
    return count


def around(x: np.ndarray, k: int, p: float, m: float) -> set[tuple[bool, ...]]:
    """What may be kept: a sum of probabilities may land on either side of the threshold that it equals."""
    slack = 1e-6
    allowed = {kept_by_sorting(x, k, p, m)}
    allowed |= {kept_by_sorting(x, k, q, m) for q in (p - slack, p + slack) if q > 0 and p < 1}
    return allowed | {kept_by_sorting(x, k, p, m * q) for q in (1 - slack, 1 + slack) if m * q <= 1}


# kind of sampler -> what a request asks
KINDS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 2.5},
    "top_k": {"top_k": 6, "temperature": 3.0},
    "top_p": {"top_p": 0.8, "temperature": 3.0},
    "min_p": {"min_p": 0.1, "temperature": 3.0},
    "all three": {"top_k": 12, "top_p": 0.9, "min_p": 0.02, "temperature": 3.0},
    "penalties": {"temperature": 3.0, "repetition_penalty": 1.3, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    "logit_bias": {"temperature": 3.0, "logit_bias": {3: 6.0, 40: -9.0}},
    "allowed_token_ids": {"temperature": 3.0, "allowed_token_ids": list(range(0, 90, 7))},
}
PROMPT = [5, 9, 11, 5, 5, 30, 2, 8, 1]  # a page and a token: outputs share the page, and none is copied
ROWS = 64


@functools.cache
def wide_engine() -> Engine:
    """Draws so many tokens in a step."""
    sizes = {"max_num_seqs": ROWS, "decode_row_buckets": (ROWS,), "num_gpu_blocks_override": 4 * ROWS}
    config = EngineConfig(**{**mixes.ENGINE, **sizes})
    return Engine.from_weights(config, mixes.MODEL, mixes.FAMILY.weights(), pool_type=ShuffledPool)


def draws(name: str, count: int) -> float:
    """Chi-square's p of so many draws of the whole engine, each the first token of an output with a seed of its own."""
    options, counts, seed = KINDS[name], np.zeros(mixes.V), 0
    one = another_engine(wide_engine())
    while seed < count or one.has_unfinished:
        while seed < count and len(one.scheduler.waiting) < 4:
            n = min(ROWS, count - seed)
            one.add_request(PROMPT, SamplingParams(n=n, seed=seed, max_tokens=1, ignore_eos=True, **options))
            seed += n
        for event in one.step():
            counts[event.token_id] += 1
    assert counts.sum() == count
    params = SamplingParams(**options)
    scores = chain(oracle.logits(mixes.FAMILY.tensors(), mixes.MODEL, PROMPT)[-1], PROMPT, [], params) / params.temperature
    kept = np.array(kept_by_sorting(scores, params.top_k, params.top_p, params.min_p)) & (scores > -np.inf)
    weights = np.where(kept, np.exp(scores - scores.max()), 0.0)
    expected = count * weights / weights.sum()
    assert not counts[~kept].any(), f"{name}: a token was drawn that is cut"
    is_rare = expected < 5  # which chi-square does not count one by one
    seen, wanted = counts[kept & ~is_rare], expected[kept & ~is_rare]
    if (kept & is_rare).any() and expected[kept & is_rare].sum() > 0:
        seen, wanted = np.append(seen, counts[kept & is_rare].sum()), np.append(wanted, expected[kept & is_rare].sum())
    found = float(stats.chisquare(seen, wanted * seen.sum() / wanted.sum()).pvalue)
    assert found > 1e-4, f"{name}: p is {found:.1e}"
    return found


# --- R20: log-probabilities of prompts, however they are computed ---

LENGTHS = (2, 7, 8, 9, 33, 64)


def prompt_logprobs(chunks: Iterable[int] = (1, 7, mixes.PAGE, 0), lengths: Iterable[int] = LENGTHS) -> int:
    """Chunk sizes (0 is all at once) x nothing, a part or all of the prompt cached: complete, and bit for bit the same.

    Equal bits of any chunks are the promise of batch_invariant; with it off they are equal within 1e-4.
    """
    rng, count = np.random.default_rng(0), 0
    for length in lengths:
        prompt = rng.integers(0, mixes.V, length).tolist()
        whole: dict[bool, Any] = {}
        for chunk, cached, is_exact in itertools.product(chunks, ("none", "part", "all"), (False, True)):
            base = exact_engine() if is_exact else mixes.engine()
            one = another_engine(base, long_prefill_token_threshold=chunk, enable_prefix_caching=True)
            if cached != "none":
                known = prompt[: length // 2] if cached == "part" else prompt
                run(one, [Ask([*known, 1], greedy(3))])
            one.add_request(prompt, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=20))
            events = [event for _ in range(4 * length) if one.has_unfinished for event in one.step()]
            found = events[0].prompt_likelihoods
            assert len(found) == length - 1 and events[0].num_cached_tokens == 0
            first = whole.setdefault(is_exact, found)
            if is_exact:
                assert found == first, f"chunks of {chunk}, {cached} cached: other bits"
            else:
                apart = np.abs(np.subtract([x.logprob for x in found], [x.logprob for x in first]))
                assert float(apart.max()) < 1e-4
            count += 1
    return count


@functools.cache
def exact_engine() -> Engine:
    """One whose sums do not depend on what runs together."""
    config = EngineConfig(**mixes.ENGINE, batch_invariant=True)
    return Engine.from_weights(config, mixes.MODEL, mixes.FAMILY.weights(), pool_type=ShuffledPool)
