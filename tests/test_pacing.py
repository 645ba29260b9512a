"""Laws of pacing: nobody waits longer than the longest pause, nor the first and the last time; many are told less often."""

from __future__ import annotations

import asyncio

import pytest

from jaxpaged.pacing import MAX_PAUSE_S, Pacer


class Sleeper:
    def __init__(self) -> None:
        self.due_s = 0.0
        self.is_over = False
        self.has_news_since: float | None = None
        self.num_woken, self.longest_s = 0, 0.0

    def wake(self) -> None:
        assert self.has_news_since is not None or self.is_over, "woken for nothing"
        now = asyncio.get_running_loop().time()
        self.longest_s = max(self.longest_s, now - (self.has_news_since or now))
        self.has_news_since = None
        self.num_woken += 1


@pytest.mark.parametrize(("num", "max_per_s"), [(1, 2500), (64, 0), (64, 2500), (400, 1000)])
def test_all_are_told_within_the_longest_pause_and_not_too_often(num: int, max_per_s: int) -> None:
    sleepers = [Sleeper() for _ in range(num)]
    num_steps, step_s = 40, 0.004

    async def task() -> float:
        loop = asyncio.get_running_loop()
        pacer, started = Pacer(loop, max_per_s), loop.time()
        for step in range(num_steps):
            for one in sleepers:
                one.has_news_since = one.has_news_since or loop.time()
            pacer.take(sleepers)
            if not step:
                assert all(one.num_woken for one in sleepers), "the first has to wait"
            await asyncio.sleep(step_s)
        seconds = loop.time() - started
        for one in sleepers[::2]:
            one.is_over, before = True, one.num_woken
            pacer.take([one])
            assert one.num_woken == before + 1, "the last has to wait"
        await asyncio.sleep(2 * MAX_PAUSE_S)
        assert not any(one.has_news_since for one in sleepers), "forgotten"
        return seconds

    seconds = asyncio.run(task())
    num_woken = sum(one.num_woken for one in sleepers)
    if num == 1 or not max_per_s:
        assert num_woken >= num * num_steps
    else:
        assert num_woken <= num * 3 + seconds * max(max_per_s, num / MAX_PAUSE_S)
        assert max(one.longest_s for one in sleepers) < MAX_PAUSE_S + 1.0  # of a machine that has other things to do
