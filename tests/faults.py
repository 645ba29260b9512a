"""Rows that are not finite (R12): a real model one of whose tokens has an embedding of NaN, put into any place of any request.

`sick_crowds` raises when a law is broken and returns how many places it has made sick. test_faults.py does a part, `make fuzz`
all.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Iterable

import jax.numpy as jnp
import numpy as np
from bits import Bits, KeepingRunner, new_engine, new_runner, serve
from driving import Ask

from jaxpaged.host.request import FinishReason, SamplingParams

FAMILY = "qwen2-window"
SICK = 95  # the last of the vocabulary
PAGE, TILE, NUM_PAGES = 8, 16, 40


@functools.cache
def runner() -> KeepingRunner:
    """One for the life of the process, with the sick token among its weights."""
    one = new_runner(FAMILY, PAGE, tile=TILE, tiles=2, num_pages=NUM_PAGES + 1)
    one.weights = dataclasses.replace(one.weights, embed=one.weights.embed.at[SICK].set(jnp.nan))
    return one


@functools.cache
def bank() -> tuple[Ask, ...]:
    """Requests that begin alike, some longer than a step, some with several outputs; the sick token is in none."""
    rng, asks = random.Random(0), []
    beginnings = [[rng.randrange(SICK) for _ in range(40)] for _ in range(3)]
    for _ in range(60):
        prompt = rng.choice(beginnings)[: rng.choice((0, 8, 17, 40))] + [rng.randrange(SICK) for _ in range(rng.randint(1, 40))]
        options = {"temperature": rng.choice((0.0, 1.0)), "max_tokens": rng.randint(2, 14), "seed": rng.getrandbits(40)}
        params = SamplingParams(ignore_eos=True, n=rng.choice((1, 1, 1, 3)), logit_bias={SICK: -100.0}, **options)
        asks.append(Ask(prompt, params))
    return tuple(asks)


@functools.cache
def alone(number: int) -> Bits:
    """The bits of one of them by itself."""
    return serve(new_engine(runner(), enable_prefix_caching=False, async_scheduling=False), [bank()[number]], first=number)


class Ward:
    """An engine of some requests of the bank, in one place of each of some of which a number becomes NaN when it is computed."""

    def __init__(self, numbers: list[int], places: dict[int, int], **options):
        self.places = places
        self.engine = new_engine(runner(), **options)
        self.numbers = numbers
        self.ill_since: dict[int, int] = {}  # request -> the step that computed its sick place
        self.ended: dict[tuple[str, int], FinishReason] = {}
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.owned: dict = {}  # pages of all that ran when the last step was committed
        self.step = 0
        self.engine.scheduler.commit = self.commit  # type: ignore[method-assign]

    def infected(self, pad):
        """`pad` that puts the sick token where it belongs."""

        def padded(plan, bucket, feed):
            found = pad(plan, bucket, feed)
            inputs, at = found.inputs, bucket.decode_rows
            for row, chunk in enumerate(plan.decodes):
                if self.is_sick(chunk, chunk.start):
                    inputs.tokens.token_ids[row], inputs.fed[row] = SICK, 0
            for chunk in plan.prefills:
                place = self.places.get(int(chunk.sequence.request.request_id), -1)
                if chunk.start <= place < chunk.end and self.is_sick(chunk, place):
                    inputs.tokens.token_ids[at + place - chunk.start] = SICK
                at += -(-chunk.num_tokens // TILE) * TILE
            return found

        return padded

    def is_sick(self, chunk, place: int) -> bool:
        """Of several outputs one has a place of its own; what they share of the prompt is sick for all."""
        number = int(chunk.sequence.request.request_id)
        is_here = self.places.get(number) == place and (place < chunk.sequence.num_prompt - 1 or not chunk.sequence.index)
        if is_here:
            self.ill_since.setdefault(number, self.step)
        return is_here

    def live(self) -> None:
        """To the end of the last request."""
        one: KeepingRunner = self.engine.runner  # type: ignore[assignment]
        pad = one._pad
        one._pad = self.infected(pad)  # type: ignore[method-assign]
        one.duel.is_sick = lambda key: int(key[0]) in self.ill_since  # type: ignore[union-attr, attr-defined]
        try:
            for number in self.numbers:
                self.engine.add_request(bank()[number].prompt, bank()[number].params, request_id=str(number))
            while self.engine.has_unfinished:
                self.owned = {}
                for event in self.engine.step():
                    self.take(event)
                self.look()
                self.step += 1
        finally:
            one._pad = pad  # type: ignore[method-assign]

    def take(self, event) -> None:
        key, number = (event.request_id, event.index), int(event.request_id)
        if event.token_id is not None:
            self.tokens.setdefault(key, []).append(event.token_id)
        if event.finish_reason is not None:
            self.ended[key] = event.finish_reason
        if event.finish_reason is FinishReason.ERROR:
            is_ahead = self.engine.config.async_scheduling
            assert self.step <= self.ill_since[number] + is_ahead, "a sick row goes on after its step"

    def commit(self, plan, *result):
        """What the scheduler does, and what all have when a failure becomes known."""
        self.owned = {sequence: sequence.owned_pages for sequence in self.engine.scheduler.running}
        return type(self.engine.scheduler).commit(self.engine.scheduler, plan, *result)

    def look(self) -> None:
        """What holds after every step."""
        scheduler, pool, cache = self.engine.scheduler, self.engine.pool, self.engine.runner.cache  # type: ignore[attr-defined]
        scheduler.check()
        pages = np.asarray(cache.k_pages), np.asarray(cache.v_pages)
        assert all(np.isfinite(one).all() for one in pages), "a number in the pool is not finite"
        layers = [one.reshape(-1, NUM_PAGES + 1, *one.shape[1:]) for one in pages]
        # One that gave way while its sick step ran has no pages any more; what those hold is finite all the same.
        of_others = {page for one, owned in self.owned.items() if one.finish_reason is not FinishReason.ERROR for page in owned}
        for sequence, owned in self.owned.items():
            if sequence.finish_reason is FinishReason.ERROR:
                mine = sorted({*owned} - of_others)
                assert not any(one[:, mine].any() for one in layers), "a page of a request that failed is not zeroed"
                assert not any(page in pool.cache for page in mine), "a page of a request that failed is found by others"
        known = [page for page in range(NUM_PAGES) if page in pool.cache]
        # A token that is not finite is zero from layer 0 on, and no other is.
        assert all(np.abs(one[0, known]).max(axis=(1, 3)).all() for one in layers), "what is sick is in the prefix cache"
        for number in self.ill_since:
            assert self.step <= self.ill_since[number] or self.is_over(number), "a sick request is not over"

    def is_over(self, number: int) -> bool:
        return (str(number), 0) in self.ended

    def judge(self) -> None:
        """The sick have what they had before, and the others the bits of a run alone."""
        found = self.engine.runner.duel.bits  # type: ignore[union-attr]
        for number in self.numbers:
            wanted, params, num_prompt = alone(number), bank()[number].params, len(bank()[number].prompt)
            for index in range(params.n):
                key, place = (str(number), index), self.places[number] if number in self.ill_since else None
                is_struck = place is not None and (place < num_prompt - 1 or not index)
                assert self.ended[key] is (FinishReason.ERROR if is_struck else FinishReason.LENGTH), key
                num_tokens = max(0, place - num_prompt + 1) if is_struck and place is not None else params.max_tokens
                assert len(self.tokens.get(key, [])) == num_tokens
                for end in range(num_prompt, num_prompt + num_tokens):  # type: ignore[operator]
                    assert found[(*key, end)].bits == wanted[(*key, end)].bits, f"{key} has other logits than alone"
        assert self.engine.pool.num_used == 0


def sick_crowds(seeds: Iterable[int]) -> int:
    """Crowds of ten, four of them sick somewhere."""
    count = 0
    for seed in seeds:
        rng = random.Random(seed)
        numbers = rng.sample(range(len(bank())), 10)
        places = {}
        for number in rng.sample(numbers, 4):
            num_prompt, max_tokens = len(bank()[number].prompt), bank()[number].params.max_tokens
            places[number] = rng.choice((rng.randrange(num_prompt), num_prompt - 1 + rng.randrange(max_tokens)))
        options = {"num_pages": rng.choice((20, NUM_PAGES)), "async_scheduling": seed % 2 == 0}
        options |= {"long_prefill_token_threshold": rng.choice((0, 5, 16)), "enable_prefix_caching": True}
        ward = Ward(numbers, places, **options)
        ward.live()
        ward.judge()
        count += len(ward.ill_since)
    return count
