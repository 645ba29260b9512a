"""How much gets done when much is asked at once, in this process: vLLM's `bench throughput`.

Knows requests and counts of tokens. Who answers is a `Side`: an engine of ours, driven in one way or another.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from jaxpaged.bench.datasets import Ask

if TYPE_CHECKING:
    from jaxpaged.async_llm import AsyncLLM
    from jaxpaged.host.request import SamplingParams
    from jaxpaged.llm import LLM


@dataclass(frozen=True)
class Done:
    """What came of one request. `num_output` is of all its outputs together."""

    num_prompt: int
    num_output: int


class Side(Protocol):
    """Whoever answers requests, all of them at once."""

    name: str

    def run(self, asks: Sequence[Ask], on_end: Callable[[], object]) -> list[Done]:
        """Answer all. `on_end` is called for each that has ended."""
        ...

    def close(self) -> None:
        """Give its memory back."""
        ...


class Offline:
    """`LLM.stream`, which is what `LLM.generate` does."""

    name = "jaxpaged"

    def __init__(self, llm: LLM, params_of: Callable[[Ask], SamplingParams]):
        """`params_of` has output_kind FINAL_ONLY: nothing is made of texts that nobody reads."""
        self._llm, self._params_of = llm, params_of

    def run(self, asks: Sequence[Ask], on_end: Callable[[], object]) -> list[Done]:
        """See `Side.run`."""
        params = [self._params_of(ask) for ask in asks]
        found = []
        for output in self._llm.stream([_given(ask) for ask in asks], params):
            found.append(_done(output))
            on_end()
        return found

    def close(self) -> None:
        """See `Side.close`."""
        self._llm.close()


class Online:
    """`AsyncLLM`, a task for each request: the engine on a thread of its own, as behind a server."""

    name = "jaxpaged, async"

    def __init__(self, llm: AsyncLLM, params_of: Callable[[Ask], SamplingParams]):
        """As for `Offline`. Its queue has room for all requests."""
        self._llm, self._params_of = llm, params_of

    def run(self, asks: Sequence[Ask], on_end: Callable[[], object]) -> list[Done]:
        """See `Side.run`."""

        async def one(ask: Ask) -> Done:
            last = None
            async for output in self._llm.generate(_given(ask), self._params_of(ask)):
                last = output
            on_end()
            return _done(last)

        async def main() -> list[Done]:
            return list(await asyncio.gather(*(one(ask) for ask in asks)))

        return asyncio.run(main())

    def close(self) -> None:
        """See `Side.close`."""
        self._llm.shutdown()


def _given(ask: Ask) -> str | list[int]:
    return ask.prompt if isinstance(ask.prompt, str) else list(ask.prompt)


def _done(output: Any) -> Done:
    return Done(len(output.prompt_token_ids), sum(len(one.token_ids) for one in output.outputs))


def measure(
    side: Side,
    asks: Sequence[Ask],
    *,
    clock: Callable[[], float] = time.perf_counter,
    on_end: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """One run: see `numbers_of`."""
    started = clock()
    done = side.run(asks, on_end)
    return numbers_of(done, clock() - started)


def numbers_of(done: Sequence[Done], seconds: float) -> dict[str, Any]:
    """What was done in so many seconds under vLLM's keys, with the tokens of prompts and outputs told apart."""
    seconds = max(seconds, 1e-9)
    num_prompt, num_output = sum(one.num_prompt for one in done), sum(one.num_output for one in done)
    return {
        "elapsed_time": seconds,
        "num_requests": len(done),
        "total_num_tokens": num_prompt + num_output,
        "requests_per_second": len(done) / seconds,
        "tokens_per_second": (num_prompt + num_output) / seconds,
        "total_input_tokens": num_prompt,
        "total_output_tokens": num_output,
        "output_tokens_per_second": num_output / seconds,
    }


def table(numbers: dict[str, Any]) -> str:
    """The numbers for a reader; the first line is vLLM's."""
    speeds = (numbers["requests_per_second"], numbers["tokens_per_second"], numbers["output_tokens_per_second"])
    return (
        "Throughput: {:.2f} requests/s, {:.2f} total tokens/s, {:.2f} output tokens/s\n".format(*speeds)
        + f"Total num prompt tokens:  {numbers['total_input_tokens']}\n"
        + f"Total num output tokens:  {numbers['total_output_tokens']}\n"
        + f"Elapsed time:             {numbers['elapsed_time']:.2f} s"
    )
