"""Requests that mix everything there is: nothing compiles after warm-up (R23), and every pair of features goes together (R15).

OPTIONS is the one table of what a request may ask and FEATURES that of what may go on; whoever adds a feature adds a line. Each
function raises when a law is broken and returns how many cases it has seen. test_mixes.py does a part, `make fuzz` all.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import families
from driving import Ask, ShuffledPool, another_engine, compilations, few_steps

from jaxpaged.config import EngineConfig
from jaxpaged.engine import Engine
from jaxpaged.host.request import SamplingParams, TokenEvent
from jaxpaged.host.structured import StructuredOutputsParams
from jaxpaged.structured.grammars import Grammars

(FAMILY,) = [family for family in families.FAMILIES if family.name == "qwen2-window"]
MODEL = FAMILY.config
V, PAGE, MAX_LEN = MODEL.vocab_size, 8, 96
ENGINE: dict[str, Any] = few_steps(PAGE, MAX_LEN)
FEW_PAGES = MAX_LEN // PAGE + 8
SPECULATION = {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "adaptive": False}}


@functools.cache
def grammars() -> Grammars:
    """Those of a tokenizer whose tokens are the printable characters of ASCII and the end of a line."""
    characters = ["\u0120", *map(chr, range(33, 127)), "\u010a"]  # as byte-level tokenizers spell a space and an end of line
    vocab = {character: token_id for token_id, character in enumerate(characters)}
    tokenizer = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": vocab, "merges": []}}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return Grammars(lambda: json.dumps({**tokenizer, "pre_tokenizer": byte_level, "decoder": byte_level}))


def _new_engine(**options: Any) -> Engine:
    config = EngineConfig(**{**ENGINE, **options})
    return Engine.from_weights(config, MODEL, FAMILY.weights(), pool_type=ShuffledPool, grammars=grammars())


@functools.cache
def engine() -> Engine:
    """One for the life of the process: two compiled steps."""
    return _new_engine()


@functools.cache
def speculating() -> Engine:
    """Likewise, with rows for drafts."""
    return _new_engine(**SPECULATION)


# --- R23: nothing compiles ---


def some_ids(rng: random.Random, most: int) -> list[int]:
    return rng.sample(range(V), rng.randint(1, most))


# option -> a random value of it; a request takes each with a chance of its own
OPTIONS: dict[str, Callable[[random.Random], Any]] = {
    "temperature": lambda rng: rng.choice((0.0, 1e-6, 0.3, 1.0, 2.5)),
    "top_k": lambda rng: rng.choice((-1, 0, 1, 5, V, 10**6)),
    "top_p": lambda rng: rng.choice((1e-6, 0.3, 0.9, 1.0)),
    "min_p": lambda rng: rng.choice((0.0, 0.05, 1.0)),
    "seed": lambda rng: rng.getrandbits(64) - 2**63,
    "n": lambda rng: rng.choice((1, 2, 3)),
    "best_of": lambda rng: rng.choice((3, 4)),
    "presence_penalty": lambda rng: rng.uniform(-2, 2),
    "frequency_penalty": lambda rng: rng.uniform(-2, 2),
    "repetition_penalty": lambda rng: rng.choice((0.5, 1.2, 2.0)),
    "min_tokens": lambda rng: rng.randint(0, 3),
    "logit_bias": lambda rng: {token_id: rng.uniform(-9, 9) for token_id in some_ids(rng, 50)},
    "allowed_token_ids": lambda rng: rng.sample(range(V), V // 2),
    "bad_words_token_ids": lambda rng: [some_ids(rng, 3) for _ in range(rng.randint(1, 9))],
    "logprobs": lambda rng: rng.choice((0, 1, 20)),
    "prompt_logprobs": lambda rng: rng.choice((0, 1, 20)),
    "stop_token_ids": lambda rng: some_ids(rng, 4),
    "ignore_eos": lambda rng: rng.random() < 0.5,
    "structured_outputs": lambda rng: rng.choice(FORMS),
}
FORMS = (
    StructuredOutputsParams(regex="[a-z]{2,9}"),
    StructuredOutputsParams(choice=["long words that leave one choice", "short"]),
    StructuredOutputsParams(json={"type": "object", "properties": {"name": {"type": "integer"}}, "required": ["name"]}),
)
SEARCH: dict[str, Callable[[random.Random], Any]] = {
    "n": lambda rng: rng.choice((1, 2, 3)),
    "temperature": lambda rng: rng.choice((0.0, 0.7)),
    "length_penalty": lambda rng: rng.choice((0.0, 1.0, 2.0)),
    "early_stopping": lambda rng: rng.choice((True, False, "never")),
}


def random_params(rng: random.Random) -> SamplingParams:
    """Anything that a request may ask; every tenth is a beam search."""
    options: dict[str, Any] = {"max_tokens": rng.randint(3, 8)}
    if rng.random() < 0.1:
        return SamplingParams(use_beam_search=True, **options, **{name: draw(rng) for name, draw in SEARCH.items()})
    options |= {name: draw(rng) for name, draw in OPTIONS.items() if rng.random() < 0.25}
    if "best_of" in options:
        options["temperature"] = 1.0
    return SamplingParams(**options)


def no_compilations(count: int, seed: int = 0) -> int:
    """So many requests that mix everything, on few pages and with aborts, through three engines: no compilation."""
    rng = random.Random(seed)
    beginnings = [[rng.randrange(V) for _ in range(40)] for _ in range(4)]
    ones = [
        another_engine(engine(), num_pages=FEW_PAGES),
        another_engine(engine(), num_pages=FEW_PAGES, async_scheduling=False, long_prefill_token_threshold=7),
        another_engine(engine(), scheduling_policy="sjf", eager_copy=True),
        another_engine(speculating(), num_pages=FEW_PAGES),
    ]
    for one in (engine(), speculating()):
        one.runner.warm_up_grammars()  # type: ignore[attr-defined]  # as the first request with a grammar does
    for form in FORMS:
        grammars().find(form)  # what the process is that tries them out, is no business of the steps
    per_one = -(-count // len(ones))  # one after the other: their steps are those of one runner
    with compilations() as seen:
        for number in range(count):
            prompt = rng.choice(beginnings)[: rng.choice((0, 8, 17, 40))] + [rng.randrange(V) for _ in range(rng.randint(1, 30))]
            one = ones[number // per_one]
            params = random_params(rng)
            if params.use_beam_search:
                prompt = prompt[:30]  # all beams have to fit into few pages
            one.add_request(prompt, params, request_id=str(number))
            while len(one.scheduler.waiting) > 4:
                one.step()
            if rng.random() < 0.05:
                one.abort(str(rng.randint(0, number)))
            if rng.random() < 0.01:
                one.reset_prefix_cache()
            while one.has_unfinished and (number + 1 == count or (number + 1) % per_one == 0):
                one.step()
        assert seen == [], f"{len(seen)} traces and compilations"
    stats = [one.stats() for one in ones]
    assert all(one["prefix_cache_hits"] for one in stats) and sum(one["num_preemptions"] for one in stats)
    assert sum(one.scheduler.num_copies for one in ones) and stats[-1]["spec_decode_num_accepted_tokens"]
    return count


# --- R15: all pairs ---


@dataclass(frozen=True)
class Feature:
    """Something that a request asks or that goes on around it.

    `keeps`: with it a request of the other feature has the tokens that it has without; else it changes them by itself.
    `without`: features that cannot go with it, refused by name.
    """

    params: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)  # of the engine
    keeps: bool = True
    without: tuple[str, ...] = ()
    is_warm: bool = False  # the same requests have run before, so that their prompts are known
    num_pages: int | None = None


FEATURES: dict[str, Feature] = {
    "stream": Feature(),  # events add up to the whole: how all of these are read
    "n": Feature({"n": 3}),
    "logprobs": Feature({"logprobs": 3}),
    "prompt_logprobs": Feature({"prompt_logprobs": 2}),
    "stop": Feature({"stop_token_ids": tuple(range(0, V, 9))}, keeps=False),
    "min_tokens": Feature({"min_tokens": 4, "ignore_eos": False}, keeps=False),
    "penalties": Feature({"frequency_penalty": 0.7, "repetition_penalty": 1.2}, keeps=False),
    "seed": Feature({"temperature": 1.0, "seed": 7}, keeps=False),
    "prefix hit": Feature(is_warm=True),
    "preemption": Feature(num_pages=FEW_PAGES),
    "swap": Feature(options={"swap_space": 0.002, "preemption_mode": "swap"}, num_pages=FEW_PAGES),
    "grammar": Feature({"structured_outputs": StructuredOutputsParams(regex="[a-z ]{35,40}")}, keeps=False),
    "speculation": Feature(options=SPECULATION),
    "async off": Feature(options={"async_scheduling": False}),
    "chunks": Feature(options={"long_prefill_token_threshold": 5}),
}
PLAIN = {"temperature": 0.0, "ignore_eos": True, "max_tokens": 30}


@functools.cache
def prompts() -> tuple[list[int], ...]:
    rng = random.Random(5)
    return tuple([rng.randrange(V) for _ in range(rng.randint(17, 40))] for _ in range(6))


def outputs_with(names: tuple[str, ...]) -> dict[tuple[str, int], list[TokenEvent]]:
    """The events of all outputs of some requests with these features."""
    chosen = [FEATURES[name] for name in names]
    params, options = dict(PLAIN), {}
    for one in chosen:
        params |= one.params
        options |= one.options
    num_pages = min((one.num_pages for one in chosen if one.num_pages is not None), default=None)
    asks = [Ask(prompt, SamplingParams(**params)) for prompt in prompts()]
    with contextlib.ExitStack() as stack:
        one = _engine_with(stack, options, num_pages)
        found = _events(one, asks)
        if any(feature.is_warm for feature in chosen):
            found = _events(one, asks, is_reversed=True)  # where pages are few, those of the last are there still
        for name, feature in zip(names, chosen, strict=True):
            assert not feature.num_pages or one.scheduler.num_preemptions > 0, f"{name}: nobody was preempted"
            assert name != "swap" or one.scheduler.num_swaps > 0, "nobody was swapped"
            assert name != "speculation" or one.stats()["spec_decode_num_drafts"] > 0, "nothing was proposed"
            wanted = not feature.is_warm or "prompt_logprobs" in names or one.stats()["prefix_cache_hits"]
            assert wanted, "nothing was known"
    return found


def _engine_with(stack: contextlib.ExitStack, options: dict[str, Any], num_pages: int | None) -> Engine:
    """Around the shared steps where pages stay on the device; with tiers below them, one of its own."""
    if "swap_space" not in options:
        return another_engine(speculating() if "speculative_config" in options else engine(), num_pages=num_pages, **options)
    return stack.enter_context(_new_engine(num_gpu_blocks_override=num_pages, enforce_eager=True, **options))


def _events(one: Engine, asks: list[Ask], *, is_reversed: bool = False) -> dict[tuple[str, int], list[TokenEvent]]:
    found: dict[tuple[str, int], list[TokenEvent]] = {}
    for number, ask in reversed([*enumerate(asks)]) if is_reversed else enumerate(asks):
        one.add_request(ask.prompt, ask.params, request_id=str(number))
    while one.has_unfinished:
        for event in one.step():
            found.setdefault((event.request_id, event.index), []).append(event)
        one.scheduler.check()
    assert one.pool.num_used == 0
    return found


def pairs(names: tuple[str, ...] | None = None) -> int:
    """All pairs of FEATURES, or those with one of `names`."""
    count = 0
    for pair in itertools.combinations(FEATURES, 2):
        if names is None or set(names) & set(pair):
            check_pair(*pair)
            count += 1
    return count


@functools.cache
def tokens_with(asked: tuple[str, ...]) -> dict[tuple[str, int], list[int | None]]:
    """The plain path: the same requests with nothing going on that must not matter."""
    return {key: [event.token_id for event in events] for key, events in outputs_with(asked).items()}


def check_pair(first: str, second: str) -> None:
    """Both together do what each has to do, and what must not change the tokens does not."""
    if second in FEATURES[first].without or first in FEATURES[second].without:
        return
    found, names = outputs_with((first, second)), {first, second}
    changing = tuple(name for name in (first, second) if not FEATURES[name].keeps)
    wanted = tokens_with(changing)
    for (request_id, index), events in found.items():
        tokens = [event.token_id for event in events]
        if index == 0:
            assert tokens == wanted[request_id, 0], f"{first} and {second} together give other tokens"
        assert events[-1].finish_reason in ("stop", "length")
        assert all(event.finish_reason is None and event.token_id is not None for event in events[:-1])
        if "logprobs" in names:
            assert all(len(event.likelihood.likeliest) == 3 and event.likelihood.rank >= 1 for event in events)  # type: ignore[union-attr]
        if "prompt_logprobs" in names and index == 0:
            assert len(events[0].prompt_likelihoods) == len(prompts()[int(request_id)]) - 1
        if "n" in names and "seed" not in names:
            assert tokens == wanted[request_id, 0], "outputs of one greedy request differ"
    assert len(found) == len(prompts()) * (3 if "n" in names else 1)
    if {"n", "seed"} == names:
        assert len({tuple(event.token_id for event in events) for (name, _), events in found.items() if name == "0"}) == 3
        # Each output is the one of a request of its own, whose seed is one more.
        for index in range(3):
            params = SamplingParams(**{**PLAIN, "temperature": 1.0, "seed": 7 + index})
            alone = _events(another_engine(engine()), [Ask(prompts()[0], params)])
            assert [event.token_id for event in alone["0", 0]] == [event.token_id for event in found["0", index]]
