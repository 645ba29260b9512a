"""R22: with `batch_invariant` a request has the same bits whatever is around it. Without it, it has not.

Every composition draws batch mates, their order and arrival, chunk sizes, prefix cache (off, on, hit), pages so few that requests
are preempted, recomputed or swapped, a policy, and asynchronous scheduling or not. What is compared are the tokens and, as
float32, the log-probabilities of the whole vocabulary after each of them, of every token of the prompt, and the scores of beams.
test_batch_invariant.py does a part, `make fuzz` all.
"""

from __future__ import annotations

import functools
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import families
import jax
import numpy as np
from driving import Ask, another_engine

from jaxpaged import LLM
from jaxpaged.config import EngineConfig
from jaxpaged.engine import Engine
from jaxpaged.host.request import SamplingParams, TokenEvent
from jaxpaged.offload.transfer import Offload

NUM_PAGES = 140  # of 8 tokens; a request has up to 94, a search three beams of 29
FEW_PAGES = {8: 20, 16: 12}  # by page size
BEAM_PROMPT = 20
NUM_SLOTS = 64  # host pages, where a composition has some
Bits = dict[tuple[str, int], list[bytes]]
"""By request and output, for each event: its token and all that is told with it."""


def new_engine(family: str = "qwen2-window", *, dtype: str = "float32", **options: Any) -> Engine:
    """An engine of few compiled steps, of one row and of more, that can tell the log-probability of every token."""
    (found,) = [one for one in families.FAMILIES if one.name == family]
    given = {"block_size": 8, "max_num_seqs": 8, "max_num_batched_tokens": 64, "prefill_tile": 16, "max_model_len": 128}
    given |= {"decode_row_buckets": (1, 8), "prefill_tile_buckets": (4,), "num_gpu_blocks_override": NUM_PAGES}
    config = EngineConfig(dtype=dtype, max_logprobs=found.config.vocab_size, **{**given, **options})
    weights = jax.tree.map(lambda x: x.astype(dtype), found.weights())
    engine = Engine.from_weights(config, found.config, weights)
    engine.runner.offload = Offload(engine.runner.cache, engine.model, num_slots=NUM_SLOTS)  # type: ignore[attr-defined]
    return engine


def asks(rng: random.Random, vocab_size: int, count: int) -> list[Ask]:
    """Requests of every kind; many begin alike. All want every log-probability, half of them those of the prompt."""
    beginnings = [[random.Random(i).randrange(vocab_size) for _ in range(50)] for i in range(3)]
    found = []
    for _ in range(count):
        prompt = rng.choice(beginnings)[: rng.choice((0, 0, 8, 16, 33, 50))]
        prompt = prompt + [rng.randrange(vocab_size) for _ in range(rng.randint(1, 24))]
        options: dict[str, Any] = {"max_tokens": rng.randint(1, 20), "seed": rng.getrandbits(40), "ignore_eos": True}
        kind = rng.choice(("greedy", "drawn", "filtered", "penalties", "rules", "several", "beams"))
        if kind == "beams":
            options = {"use_beam_search": True, "n": 3, "temperature": 0.0, "max_tokens": rng.randint(1, 9), "ignore_eos": True}
            found.append(Ask(prompt[:BEAM_PROMPT], SamplingParams(**options)))
            continue
        options |= {
            "greedy": {"temperature": 0.0},
            "drawn": {"temperature": 0.8},
            "filtered": {"top_k": 20, "top_p": 0.9, "min_p": 0.01},
            "penalties": {"temperature": 1.3, "presence_penalty": 0.3, "frequency_penalty": 0.7, "repetition_penalty": 1.1},
            "rules": {"logit_bias": {3: 1.7, 5: -2.3}, "bad_words_token_ids": ((7,), (9, 11)), "temperature": 0.9},
            "several": {"n": 2, "temperature": 1.5},
        }[kind]
        asked = {"logprobs": vocab_size, "prompt_logprobs": rng.choice((None, 5))}
        found.append(Ask(prompt, SamplingParams(**options, **asked)))
    return found


def bits_of(event: TokenEvent) -> bytes:
    """All that an event tells of tokens, to the last bit."""
    numbers, ids = [event.cumulative_logprob or 0.0], [event.token_id or 0, *event.token_ids]
    for found in (*((event.likelihood,) if event.likelihood else ()), *event.prompt_likelihoods):
        ids += [found.rank, *(token_id for token_id, _ in found.likeliest)]
        numbers += [found.logprob, *(logprob for _, logprob in found.likeliest)]
    # A beam's score is a sum in float64 of numbers in float32.
    return np.array(ids, np.int64).tobytes() + np.array(numbers, np.float64).tobytes()


def serve(engine: Engine, named: Iterable[tuple[str, Ask]], wait: Callable[[], int] = lambda: 0) -> Bits:
    """Serve requests, each added `wait()` steps after the one before it."""
    waiting, found = list(named), Bits()
    pause = wait()
    while waiting or engine.has_unfinished:
        while waiting and (pause <= 0 or not engine.has_unfinished):
            name, ask = waiting.pop(0)
            engine.add_request(ask.prompt, ask.params, request_id=name)
            pause = wait()
        pause -= 1
        for event in engine.step():
            assert event.finish_reason in (None, "stop", "length"), event
            found.setdefault((event.request_id, event.index), []).append(bits_of(event))
    assert engine.pool.num_used == 0
    return found


@dataclass
class Seen:
    """What compositions have shown."""

    compositions: int = 0
    outputs: int = 0
    bytes: int = 0
    differ: list[tuple[int, str, int]] = field(default_factory=list)  # seed, request and output of those with other bits
    kinds: Counter[str] = field(default_factory=Counter)


class Invariance:
    """Requests alone in an engine, in the plainest way, and the same requests in any company, in this engine and in others."""

    def __init__(self, engines: list[Engine], *, num_targets: int = 16):
        self.engines = engines
        vocab_size = engines[0].model.vocab_size
        self.targets = {f"target {number}": ask for number, ask in enumerate(asks(random.Random(0), vocab_size, num_targets))}
        plain = {"async_scheduling": False, "enable_prefix_caching": False}
        self.alone = Bits()
        for name, ask in self.targets.items():
            self.alone |= serve(another_engine(engines[0], **plain), [(name, ask)])

    def compose(self, seeds: Iterable[int]) -> Seen:
        """One composition for each seed."""
        seen = Seen()
        for seed in seeds:
            rng = random.Random(seed)
            engine = self._engine(rng, seen)
            targets = [(name, self.targets[name]) for name in rng.sample(sorted(self.targets), rng.randint(1, 4))]
            mates = asks(rng, engine.model.vocab_size, rng.choice((0, 1, 3, 7, 12)))
            if rng.random() < 0.3:  # they begin like targets
                mates = [Ask(rng.choice(targets)[1].prompt[: len(mate.prompt)], mate.params) for mate in mates]
            if rng.random() < 0.3:  # the targets have been here before
                serve(engine, [(f"before {name}", ask) for name, ask in targets])
            named = targets + [(f"mate {number}", mate) for number, mate in enumerate(mates)]
            rng.shuffle(named)
            longest = rng.choice((0, 1, 6))
            found = serve(engine, named, functools.partial(rng.randint, 0, longest))
            seen.compositions += 1
            for key in [key for key in found if key[0] in self.targets]:
                seen.outputs, seen.bytes = seen.outputs + 1, seen.bytes + sum(map(len, found[key]))
                if found[key] != self.alone[key]:
                    seen.differ.append((seed, *key))
            stats = engine.stats()
            seen.kinds["alone"] += not mates
            seen.kinds["preempted"] += engine.scheduler.num_preemptions > 0
            seen.kinds["cached"] += stats["prefix_cache_hits"] > 0
            seen.kinds["swapped"] += stats.get("num_blocks_swapped_in", 0) > 0
        return seen

    def _engine(self, rng: random.Random, seen: Seen) -> Engine:
        engine = rng.choice(self.engines)
        options: dict[str, Any] = {
            "async_scheduling": rng.random() < 0.5,
            "enable_prefix_caching": rng.random() < 0.7,
            "long_prefill_token_threshold": rng.choice((0, 0, 1, 5, 16, 17)),
            "max_num_partial_prefills": rng.choice((0, 0, 1)),
            "scheduling_policy": rng.choice(("fcfs", "lifo", "sjf")),
            "batch_merge_window": rng.choice((0, 0, 3)),
            "max_num_seqs": rng.choice((4, 8)),
        }
        page_size: int = engine.config.block_size  # type: ignore[assignment]
        if rng.random() < 0.5:
            options["num_pages"] = FEW_PAGES[page_size]
        if rng.random() < 0.3:
            gib = (NUM_SLOTS + 0.5) * engine.model.page_bytes(page_size, engine.config.kv_cache_dtype) / 2**30  # type: ignore[arg-type]
            options |= {"swap_space": gib, "preemption_mode": "swap"}
        for name in ("async_scheduling", "enable_prefix_caching", "long_prefill_token_threshold"):
            seen.kinds[f"{name} {options[name]}"] += 1
        return another_engine(engine, **options)


# --- scores and decoding ---


def score_apart(family: families.Family, *, batch_invariant: bool, num_prompts: int = 6) -> float:
    """The largest distance of `llm.score` of a text from the log-probabilities that its decoding told, one text at a time."""
    options = {"block_size": 8, "max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 96, "use_tqdm_on_load": False}
    options |= {"decode_row_buckets": (1,), "prefill_tile_buckets": (4,), "num_gpu_blocks_override": 80}
    apart = 0.0
    with (
        tempfile.TemporaryDirectory() as folder,
        LLM(family.save(Path(folder)), skip_tokenizer_init=True, batch_invariant=batch_invariant, **options) as llm,
    ):
        for seed, prompt in enumerate(family.prompts(num_prompts)):
            params = SamplingParams(seed=seed, max_tokens=24, logprobs=0, prompt_logprobs=0)
            [output] = llm.generate(prompt, params, use_tqdm=False)
            [one] = output.outputs
            told = [*output.prompt_logprobs[1:], *one.logprobs]  # type: ignore[index, misc]
            text = [*prompt, *one.token_ids]
            told = [found[token_id].logprob for token_id, found in zip(text[1:], told, strict=True)]  # type: ignore[index]
            [score] = llm.score([text])
            apart = max(apart, float(np.max(np.abs(np.subtract(score.logprobs, told)))))
    return apart


# --- what `make fuzz` shows ---


def compositions(count: int, *, dtype: str = "float32", **options: Any) -> Seen:
    """So many compositions in two engines of other pages, tiles and steps than each other."""
    other = {"block_size": 16, "prefill_tile": 8, "prefill_tile_buckets": (8,), "decode_row_buckets": (3, 8)}
    with (
        new_engine(dtype=dtype, **options) as one,
        new_engine(dtype=dtype, num_gpu_blocks_override=70, **other, **options) as two,
    ):
        return Invariance([one, two]).compose(range(count))


def equal_compositions(count: int, dtype: str) -> int:
    """How many have been seen. Raises AssertionError when one bit of one request is another than alone."""
    seen = compositions(count, dtype=dtype, batch_invariant=True)
    kinds = ", ".join(f"{kind} {number:,}" for kind, number in sorted(seen.kinds.items()))
    print(f"  {seen.outputs:,} outputs, {seen.bytes:,} bytes, {len(seen.differ):,} differ; compositions: {kinds}")
    assert not seen.differ, seen.differ[:5]
    return seen.compositions


def other_bits(count: int, dtype: str) -> int:
    """How many outputs have other bits than alone without `batch_invariant`. Raises AssertionError when none has.

    By XLA: with C++ few have in float32, and in bfloat16 none.
    """
    seen = compositions(count, dtype=dtype, attention_backend="xla")
    print(f"  {len(seen.differ):,} of {seen.outputs:,} outputs differ")
    assert seen.differ
    return len(seen.differ)


def scores(count: int) -> int:
    """A table of so many families: how far scores are from decoding. Raises AssertionError for one bit if batch-invariant."""
    for family in families.FAMILIES[:count]:
        plain, invariant = (score_apart(family, batch_invariant=is_on) for is_on in (False, True))
        print(f"  {family.name:14} max |score - decode| {plain:.1e}, with batch_invariant {invariant:g}", flush=True)
        assert invariant == 0, family.name
    return len(families.FAMILIES[:count])
