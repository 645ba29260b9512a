"""Speculation beside plain decoding on a tiny random model (R21): the same tokens, request by request, and the same distribution.

Used by test_speculation.py, and at length by `make fuzz`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import families
import numpy as np
import oracle
from driving import Ask, ShuffledPool, another_engine
from scipy import stats

from jaxpaged.config import EngineConfig
from jaxpaged.drafter import Draft
from jaxpaged.engine import Engine
from jaxpaged.host.request import SamplingParams
from jaxpaged.host.request import Sequence as Output

(FAMILY,) = [family for family in families.FAMILIES if family.name == "qwen2-window"]
V, PAGE, MOST = FAMILY.config.vocab_size, 8, 4
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": MOST,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
    "adaptive": False,
}
OPTIONS = {
    "dtype": "float32",
    "block_size": PAGE,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "prefill_tile": 16,
    "decode_row_buckets": (40,),
    "prefill_tile_buckets": (4,),
    "num_gpu_blocks_override": 8 * 16 + 1,
    "speculative_config": NGRAM,
}
FEW_PAGES = 18  # eight sequences of this file preempt each other
Tokens = dict[tuple[str, int], list]


def new_engine(**options: Any) -> Engine:
    """An engine with prompt lookup, compiled; others are driven around its runner."""
    return Engine.from_weights(EngineConfig(**{**OPTIONS, **options}), FAMILY.config, FAMILY.weights(), pool_type=ShuffledPool)


class Scripted:
    """Proposes what is known to come, with a wrong token now and then; it may be too long, or nothing."""

    is_free = True

    def __init__(self, coming: Mapping[tuple[str, int], list[int]], *, rightness: float, seed: int = 0, is_sure: bool = False):
        self.coming, self.rightness, self.is_sure, self.rng = coming, rightness, is_sure, random.Random(seed)
        self.is_closed = False

    def may_propose(self, sequence: Output) -> bool:
        return True

    def propose(self, asked: Mapping[Output, int]) -> dict[Output, list[int]]:
        drafts = {}
        for sequence, most in asked.items():
            assert most > 0 and not sequence.num_pending and sequence.num_uncomputed == 1
            known = len(sequence.tokens) - sequence.num_prompt
            key = sequence.request.request_id, sequence.index
            coming = self.coming.get(key, [])[known : known + self.rng.randint(0, most)]
            if found := [one if self.rng.random() < self.rightness else (one + 1) % V for one in coming]:
                drafts[sequence] = found
        return drafts

    def close(self) -> None:
        self.is_closed = True


def random_asks(count: int, seed: int) -> list[Ask]:
    """Texts that repeat themselves, under every option of sampling: each alone, and any of them together."""
    rng, asks = random.Random(seed), []
    beginnings = [[rng.randrange(6) for _ in range(rng.randint(17, 40))] for _ in range(3)]
    for _ in range(count):
        phrase = [rng.randrange(V) for _ in range(rng.randint(1, 6))]
        prompt = (rng.choice(beginnings) if rng.random() < 0.6 else []) + phrase * rng.randint(1, 5)
        options: dict[str, Any] = {"temperature": rng.choice((0.0, 0.0, 0.5, 1.0, 2.0)), "seed": rng.getrandbits(40)}
        every = {
            "frequency_penalty": rng.choice((-2.0, -1.0, 1.5)),
            "presence_penalty": rng.uniform(-2, 2),
            "repetition_penalty": rng.choice((0.4, 0.6, 1.3)),
            "min_tokens": rng.randint(1, 12),
            "stop_token_ids": rng.sample(range(V), 8),
            "logit_bias": {token_id: 8.0 for token_id in phrase},
            "allowed_token_ids": sorted({*phrase, *rng.sample(range(V), 2)}),
            "bad_words_token_ids": [[rng.choice(phrase) for _ in range(rng.randint(1, 3))] for _ in range(3)],
            "top_k": rng.randint(1, 5),
            "top_p": rng.uniform(0.3, 1.0),
            "logprobs": rng.randint(0, 3),
            "n": rng.choice((2, 3)),
        }
        options |= {name: value for name, value in every.items() if rng.random() < 0.3}
        if "allowed_token_ids" in options:  # or nothing may be left to choose
            options.pop("bad_words_token_ids", None)
        max_tokens = rng.randint(options.get("min_tokens", 1), 30)
        asks.append(Ask(prompt[:70], SamplingParams(max_tokens=max_tokens, **options)))
    return asks


def tokens_of(engine: Engine, asks: Iterable[Ask], *, per_step: float = 0.7) -> tuple[Tokens, Tokens]:
    """What becomes of requests that come one by one: tokens and ends of every output, and its log-probabilities."""
    asks = list(asks)
    rng, number = random.Random(len(asks)), 0
    tokens: Tokens = {}
    likelihoods: Tokens = {}
    while number < len(asks) or engine.has_unfinished:
        while number < len(asks) and (rng.random() < per_step or not engine.has_unfinished):
            engine.add_request(asks[number].prompt, asks[number].params, request_id=str(number))
            number += 1
        for event in engine.step():
            key = event.request_id, event.index
            tokens.setdefault(key, []).append((event.token_id, event.finish_reason, event.stop_reason))
            likelihoods.setdefault(key, []).append(event.likelihood)
        engine.scheduler.check()
    assert engine.pool.num_used == 0
    return tokens, likelihoods


def check_same(found: tuple[Tokens, Tokens], plain: tuple[Tokens, Tokens]) -> int:
    """Raise unless all outputs are the same and their log-probabilities close: how many requests."""
    for key, expected in plain[0].items():
        assert found[0][key] == expected, f"output {key}: {found[0][key]} with drafts, {expected} without"
        for one, other in zip(found[1][key], plain[1][key], strict=True):
            assert (one is None) == (other is None) and (one is None or len(one.likeliest) == len(other.likeliest))
            assert one is None or math.isclose(one.logprob, other.logprob, rel_tol=1e-3, abs_tol=1e-3)
    assert found[0].keys() == plain[0].keys()
    return len({request_id for request_id, _ in plain[0]})


def equal_to_plain(engine: Engine, count: int, seed: int, *, watch: Callable[[Engine], None] = lambda engine: None) -> int:
    """Requests whose tokens are those without speculation: by prompt lookup, and by proposers that are right more or less often;
    with many pages and with few, with and without a prefix cache.

    Args:
      watch: is given each engine with drafts when it has served all.
    """
    asks, total = random_asks(count, seed), 0
    plain = tokens_of(another_engine(engine, speculative_config=None), asks)
    coming = {key: [token_id for token_id, *_ in found if token_id is not None] for key, found in plain[0].items()}
    for number, (num_pages, is_async) in enumerate(itertools.product((None, FEW_PAGES), (True, False))):
        options = {"num_pages": num_pages, "async_scheduling": is_async, "enable_prefix_caching": is_async}
        one = another_engine(engine, **options)  # type: ignore[arg-type]
        if (seed + number) % 2:
            scripted = Scripted(coming, rightness=(0.0, 0.5, 0.9, 1.0)[seed % 4], seed=seed)
            one._drafting.proposers = (scripted, *one._drafting.proposers)  # type: ignore[union-attr]
        total += check_same(tokens_of(one, asks), plain)
        watch(one)
    return total


def crowds(seeds: Iterable[int], *, each: int = 25) -> int:
    """Requests, each served four ways."""
    engine = new_engine()
    with engine:
        return sum(equal_to_plain(engine, each, seed) for seed in seeds)


# --- by distribution ---

SMALL = dataclasses.replace(FAMILY, fields={**FAMILY.fields, "vocab_size": 16})
PROMPT, LENGTH, HEAT = [3, 7, 1, 3, 7, 1, 3], 4, 1.0


def exact_distribution(top_k: int = 0) -> np.ndarray:
    """The probability of each text of LENGTH tokens after PROMPT, by enumeration over the float64 model."""
    tensors, found = SMALL.tensors(), np.zeros((16,) * LENGTH)

    def follow(output: list[int], probability: float) -> None:
        if len(output) == LENGTH:
            found[tuple(output)] = probability
            return
        scores = oracle.logits(tensors, SMALL.config, PROMPT + output)[-1] / HEAT
        if top_k:
            scores[np.argsort(scores)[:-top_k]] = -np.inf
        weights = np.exp(scores - scores.max())
        for token_id, weight in enumerate(weights / weights.sum()):
            if weight:
                follow([*output, token_id], probability * weight)

    follow([], 1.0)
    return found


class Likeliest:
    """Proposes the likeliest way to go on, by the exact distribution, or now and then another one."""

    is_sure, is_free = False, True

    def __init__(self, probabilities: np.ndarray, seed: int):
        self.probabilities, self.rng = probabilities, random.Random(seed)

    def may_propose(self, sequence: Output) -> bool:
        return True

    def propose(self, asked: Mapping[Output, int]) -> dict[Output, list[int]]:
        return {sequence: self._after(sequence.output_token_ids, most) for sequence, most in asked.items()}

    def _after(self, output: list[int], count: int) -> list[int]:
        drafts: list[int] = []
        for _ in range(count):
            ahead = self.probabilities[(*output, *drafts)]
            each = ahead.sum(axis=tuple(range(1, ahead.ndim)))
            drafts.append(int(np.argmax(each)) if self.rng.random() < 0.7 else self.rng.randrange(16))
        return drafts

    def close(self) -> None: ...


def drawn_distribution(
    num_draws: int, probabilities: np.ndarray, *, seed: int, top_k: int = 0, draft: Draft | None = None
) -> tuple[np.ndarray, dict[str, int | float]]:
    """How often each text comes when the engine draws it with drafts, 125 at a time; and the engine's counters.

    Args:
      draft: a model that proposes; None are the `Likeliest`.
    """
    options = {"max_num_seqs": 125, "max_num_batched_tokens": 400, "decode_row_buckets": (375,), "prefill_tile_buckets": (25,)}
    options |= {"num_gpu_blocks_override": 125 * 3 + 1, "speculative_config": {**NGRAM, "num_speculative_tokens": 2}}
    counts: Counter[tuple[int, ...]] = Counter()
    if draft is not None:
        options["speculative_config"] = {"model": "of the test", "num_speculative_tokens": 2, "adaptive": False}
    config = EngineConfig(**{**OPTIONS, **options})
    with Engine.from_weights(config, SMALL.config, SMALL.weights(), draft=draft) as engine:
        if draft is None:
            engine._drafting.proposers = (Likeliest(probabilities, seed),)  # type: ignore[union-attr]
        for first in range(0, num_draws, 125):
            params = SamplingParams(
                n=125, temperature=HEAT, top_k=top_k, max_tokens=LENGTH, ignore_eos=True, seed=seed * 10**9 + first
            )
            engine.add_request(PROMPT, params)
            texts: dict[int, tuple[int, ...]] = {}
            while engine.has_unfinished:
                for event in engine.step():
                    texts[event.index] = (*texts.get(event.index, ()), event.token_id)  # type: ignore[arg-type]
            counts.update(texts.values())
        found = np.zeros((16,) * LENGTH)
        for text, count in counts.items():
            found[text] = count
        return found, engine.stats()


def p_value(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """Of the chi-square test, cells of less than five expected ones put together."""
    expected = probabilities.ravel() * counts.sum()
    counts = counts.ravel()
    assert not counts[expected == 0].any(), "a text that cannot be was drawn"
    is_large = expected >= 5
    assert is_large.sum() > 50, f"only {is_large.sum()} texts are likely enough to be compared"
    groups: Sequence[np.ndarray] = (counts, expected)
    observed, wanted = (np.append(one[is_large], one[~is_large].sum()) for one in groups)
    kept = wanted > 0
    return float(stats.chisquare(observed[kept], wanted[kept] * observed[kept].sum() / wanted[kept].sum()).pvalue)


def chi_square(num_draws: int, seeds: Sequence[int] = (0, 1), *, has_draft_model: bool = False) -> int:
    """Draws, of the whole distribution and of one that is cut: raises when either is not the exact one.

    Args:
      has_draft_model: what is proposed comes from a model with other weights, which is often wrong.
    """
    each = num_draws // len(seeds)
    for seed in seeds:
        top_k = 5 * (seed % 2)
        probabilities = exact_distribution(top_k)
        bad = dataclasses.replace(SMALL, seed=SMALL.seed + 1000)
        draft = Draft(bad.config, bad.weights()) if has_draft_model else None
        counts, counters = drawn_distribution(each, probabilities, seed=seed, top_k=top_k, draft=draft)
        share = counters["spec_decode_num_accepted_tokens"] / counters["spec_decode_num_draft_tokens"]
        assert 0.1 < share < 0.9 and counters["spec_decode_num_draft_tokens"] > each, f"{share:.0%} of the drafts were accepted"
        p = p_value(counts, probabilities)
        assert p > 1e-4, f"p = {p:.2g} over {each:,} draws"
    return num_draws
