"""The choice of how many tokens to propose, in a world whose rates and seconds are known.

Its law: in the long run never more than 5% slower than without proposals, and near the best fixed number wherever that is faster.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from jaxpaged.speculative.adaptive import PAUSES, PLAIN_STEPS, TRIAL, Adaptive


class Text:
    """A sequence of the world: what it is proposed is accepted, token by token, with `rate`, if there is a proposal at all."""

    def __init__(self, rate: float, found: float = 1.0):
        self.rate, self.found = rate, found


@dataclass
class World:
    """Steps take `base_s` and `row_s` for each row of their bucket; one that waits for its proposals `late_s` more."""

    texts: list[Text]
    most: int = 5
    base_s: float = 1.0
    row_s: float = 0.0
    late_s: float = 0.2
    token_s: float = 0.0  # of a token of the longest proposal
    noise: float = 0.1
    num_cold: int = 0  # steps at first whose times say nothing
    sizes: tuple[int, ...] = (1, 4, 9, 16, 64, 144)
    seed: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)

    def size(self, num_rows: int) -> int:
        return next(size for size in self.sizes if size >= num_rows)

    def seconds(self, num_rows: int) -> float:
        return self.base_s + self.row_s * self.size(num_rows)

    def timed(self, seconds: float) -> float:
        """What a clock says of it: now and then something else has the machine."""
        self.num_cold -= 1
        cold = self.rng.uniform(1, 6) if self.num_cold >= 0 else 1.0
        return (
            cold
            * seconds
            * (1 + self.noise * self.rng.uniform(-1, 1))
            * (6.0 if self.noise and self.rng.random() < 0.01 else 1.0)
        )

    def num_accepted(self, text: Text, num_proposed: int) -> int:
        return next((index for index in range(num_proposed) if self.rng.random() >= text.rate), num_proposed)

    def fixed(self, count: int, num_steps: int = 1000) -> float:
        """Tokens per second with so many proposed wherever there are some; 0 is without speculation."""
        tokens = seconds = 0.0
        for _ in range(num_steps):
            lengths = [count if self.rng.random() < text.found else 0 for text in self.texts]
            tokens += sum(1 + self.num_accepted(text, length) for text, length in zip(self.texts, lengths, strict=True))
            seconds += self.seconds(len(self.texts) + sum(lengths))
            seconds += (self.late_s + self.token_s * max(lengths)) if count else 0.0
        return tokens / seconds

    def adaptive(self, controller: Adaptive, num_steps: int) -> float:
        """Tokens per second with a controller."""
        tokens = seconds = 0.0
        for _ in range(num_steps):
            count, num = len(self.texts), 0
            if not controller.is_wanted(count):
                took, num = self.seconds(count), count
                controller.ran_plainly(count, self.timed(took))
            else:
                available = {text: self.most for text in self.texts if self.rng.random() < text.found}
                lengths = controller.choose(available, count)
                assert all(0 < length <= self.most for length in lengths.values()) and lengths.keys() <= available.keys()
                for text in self.texts:
                    accepted = self.num_accepted(text, lengths.get(text, 0))
                    if text in lengths:
                        controller.judged(text, lengths[text], accepted)
                    num += 1 + accepted
                longest = max(lengths.values(), default=0)
                num_rows, proposing = count + sum(lengths.values()), self.token_s * longest
                took = self.seconds(num_rows) + self.late_s + proposing
                controller.ran(count, num_rows, num, self.timed(took), self.timed(proposing), longest)
            tokens, seconds = tokens + num, seconds + took
        return tokens / seconds


def settled(world: World, num_steps: int = 2000) -> tuple[float, float, float]:
    """Tokens per second in the steady state, without speculation, and with the best fixed number."""
    controller = Adaptive(world.sizes, is_free=not world.token_s)
    world.adaptive(controller, 2000)
    return world.adaptive(controller, num_steps), world.fixed(0), max(map(world.fixed, range(1, world.most + 1)))


WORLDS = [
    World([Text(rate) for _ in range(count)], most=most, row_s=row_s, late_s=late_s, token_s=token_s)
    for rate in (0.0, 0.1, 0.3, 0.6, 0.9)
    for count, most in ((1, 3), (1, 8), (16, 8))
    for row_s, late_s, token_s in ((0.0, 0.2, 0.0), (0.02, 0.2, 0.0), (0.3, 0.0, 0.0), (0.02, 0.1, 0.15), (0.0, 0.05, 0.6))
]


@pytest.mark.parametrize(
    "number", [pytest.param(number, marks=[pytest.mark.slow] if number % 4 else []) for number in range(len(WORLDS))]
)
def test_never_much_slower_than_without_and_near_the_best_fixed_number(number: int) -> None:
    world = WORLDS[number]
    found, plain, best = settled(world)
    assert found > 0.95 * plain, f"{found / plain:.3f} of plain"
    assert found > 0.9 * max(best, plain), f"{found / max(best, plain):.3f} of the best"


@pytest.mark.parametrize(("rate", "row_s", "late_s"), [(0.7, 0.25, 0.5), (0.8, 0.12, 0.5), (0.6, 0.05, 0.5)])
def test_what_steps_took_on_a_cold_machine_is_forgotten(rate: float, row_s: float, late_s: float) -> None:
    for seed in range(6):
        sizes = tuple(range(1, 10))
        world = World([Text(rate)], most=8, row_s=row_s, late_s=late_s, sizes=sizes, num_cold=80, seed=seed)
        controller = Adaptive(sizes, is_free=True)
        world.adaptive(controller, 600)
        share = world.adaptive(controller, 2000) / max(map(world.fixed, range(world.most + 1)))
        assert share > 0.9, f"{share:.3f} of the best, seed {seed}"


def test_a_size_that_was_slow_when_all_was_cold_is_tried_again() -> None:
    """Steps of any size take the same, and one with proposals longer than one without: no size is worse for its rows."""
    for seed in range(6):
        world = World([Text(0.7)], most=8, row_s=0.0, late_s=0.2, sizes=(1, 4, 9), num_cold=60, seed=seed)
        controller = Adaptive(world.sizes, is_free=True)
        world.adaptive(controller, 1000)
        share = world.adaptive(controller, 2000) / world.fixed(8)
        assert share > 0.9, f"{share:.3f} of the best, seed {seed}"


def test_a_number_of_sequences_that_comes_and_goes_is_timed() -> None:
    """Of two sizes the one that is never there for long has proposals too."""
    world, controller = World([Text(0.9)]), Adaptive((8, 32), is_free=True)
    num_wanted = 0
    for step in range(400):
        count = 8 if step % 4 < 2 else 9
        if controller.is_wanted(count):
            num_wanted += count == 9
            controller.ran(count, count, 2 * count, world.timed(1.2), 0.0, 1)
        else:
            controller.ran_plainly(count, world.timed(1.0))
    assert num_wanted > 50


def test_each_sequence_has_its_own_number() -> None:
    world = World([Text(0.95) for _ in range(4)] + [Text(0.05) for _ in range(12)], most=8, row_s=0.02)
    found, plain, best = settled(world)
    assert found > 1.2 * max(best, plain), "no better than one number for all"


def test_proposals_that_are_seldom_found() -> None:
    for found_share, is_worth_it in ((0.5, True), (0.03, False)):
        found, plain, _ = settled(World([Text(0.9, found_share)], most=4))
        assert found > 0.95 * plain and (found > 1.3 * plain) is is_worth_it


def test_a_text_that_turns_is_noticed() -> None:
    world = World([Text(0.0)])
    controller = Adaptive(world.sizes, is_free=True)
    world.adaptive(controller, 5000)
    assert controller.is_paused
    world.texts[0].rate = 0.9
    world.adaptive(controller, PAUSES[1] + TRIAL + PLAIN_STEPS)
    fast = world.adaptive(controller, 500)
    world.texts[0].rate = 0.0
    world.adaptive(controller, 500)
    assert fast > 2 * world.fixed(0) and controller.is_paused


def test_a_machine_that_turns_is_noticed() -> None:
    world = World([Text(0.7) for _ in range(8)], most=5)
    controller = Adaptive(world.sizes, is_free=True)
    world.adaptive(controller, 2000)
    fast = world.adaptive(controller, 500)
    assert fast > 1.5 * world.fixed(0)
    world.row_s = 0.5  # as when rows begin to cost what they compute
    world.adaptive(controller, 1500)
    assert world.adaptive(controller, 4000) > 0.95 * world.fixed(0)


def test_equal_reports_are_equal_choices() -> None:
    def rates() -> list[float]:
        world = World([Text(0.5), Text(0.8)], row_s=0.1)
        controller = Adaptive(world.sizes, is_free=False)
        return [world.adaptive(controller, 40) for _ in range(20)]

    assert rates() == rates()


def test_nothing_is_proposed_before_it_is_known_what_plain_steps_take() -> None:
    controller = Adaptive((1, 8), is_free=True)
    assert not controller.is_wanted(1)
    for _ in range(PLAIN_STEPS):
        controller.ran_plainly(1, 1.0)
    assert controller.is_wanted(1) and not controller.is_wanted(5), "plain steps of five sequences have not been seen"


def test_no_more_rows_than_there_are_and_they_go_to_the_likeliest() -> None:
    controller = Adaptive((1, 4, 8), is_free=True)
    for _ in range(PLAIN_STEPS):
        controller.ran_plainly(3, 1.0)
    sure, unsure, third = Text(1.0), Text(0.0), Text(0.0)
    for _ in range(30):
        controller.judged(sure, 3, 3)
        controller.judged(unsure, 3, 0)
    lengths = controller.choose({third: 5, unsure: 5, sure: 5}, 3)
    assert lengths[sure] == 5 and 3 + sum(lengths.values()) <= 8 and unsure not in lengths
