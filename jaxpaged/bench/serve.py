"""A server measured from outside: requests that come when they come, whatever has become of those before them.

Knows schedules, and what was seen of each request. Refuses to know what is asked, and what the numbers mean together: see
`serve_report.py`.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxpaged.bench.datasets import Ask
from jaxpaged.client.connection import Answer, HttpError
from jaxpaged.client.http import Client, dump
from jaxpaged.client.openai import CHAT_PATH, COMPLETION_PATH, DONE, EventReader, check_status, event_value, text_of
from jaxpaged.simulate.arrivals import Ramp, arrival_times

PATHS = {"openai": COMPLETION_PATH, "openai-chat": CHAT_PATH}  # by backend, vLLM's names
_BEAT_S = 0.01  # how often the client looks whether it is late itself


@dataclass
class Seen:
    """What became of one request, in seconds of the client's clock. `error` is None for a whole answer."""

    num_prompt: int
    due_s: float
    sent_s: float = 0.0
    late_s: float = 0.0  # how much later it was sent than it should have been; not the wait for max_concurrency
    end_s: float = 0.0
    tokens: list[tuple[float, int]] = field(default_factory=list)  # when a chunk came, and its tokens
    num_output: int = 0
    is_counted: bool = False  # whether the server said how many tokens each chunk has
    text: str = ""
    error: str | None = None
    message: str = ""

    @property
    def ttft_s(self) -> float:
        """From sending to the first token."""
        return self.tokens[0][0] - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        """Between the chunks that brought tokens."""
        return [after[0] - before[0] for before, after in itertools.pairwise(self.tokens)]


@dataclass
class Run:
    """A whole measurement. `beats_s` are how late the client's own loop was, again and again."""

    seen: list[Seen]
    started_s: float
    ended_s: float
    beats_s: list[float]
    num_asked: int
    is_interrupted: bool = False


@dataclass(frozen=True, kw_only=True)
class Offer:
    """How requests are sent.

    Args:
      body: fields of every request, beside prompt and length.
      request_rate, burstiness, seed: see `jaxpaged.simulate.arrivals.arrival_times`.
      max_concurrency: requests at a time; those that are due wait, and their time begins when they are sent.
      has_counts: ask for the number of tokens with every chunk (continuous_usage_stats).
    """

    backend: str
    path: str
    model: str
    body: Mapping[str, Any]
    request_rate: float | Ramp
    burstiness: float
    max_concurrency: int | None
    timeout_s: float
    has_counts: bool
    seed: int
    has_texts: bool = False

    def due_s(self, num_prompts: int) -> list[float]:
        """When each is sent, in seconds from the start. Gaps at a constant rate are scaled so that the last is sent when it would
        be without chance, as vLLM does it: whatever the seed, the rate is what was asked for.
        """
        times = list(arrival_times(num_prompts, self.request_rate, self.burstiness, random.Random(f"gaps {self.seed}")))
        if isinstance(self.request_rate, Ramp) or not any(times):
            return times
        factor = (num_prompts - 1) / self.request_rate / times[-1]
        return [one * factor for one in times]

    def request(self, ask: Ask) -> bytes:
        """The body of one request."""
        options: dict[str, Any] = {"include_usage": True}
        if self.has_counts:
            options["continuous_usage_stats"] = True
        given: dict[str, Any] = {"model": self.model}
        if self.backend == "openai-chat":
            given |= {"messages": [{"role": "user", "content": ask.prompt}], "max_completion_tokens": ask.num_output}
        else:
            given |= {"prompt": ask.prompt, "max_tokens": ask.num_output}
        return dump({**given, "stream": True, "stream_options": options, **self.body})


async def measure(client: Client, asks: Sequence[Ask], offer: Offer, *, on_end: Callable[[Seen], None] = lambda _: None) -> Run:
    """Send all of them by their schedule. When it is cancelled, it gives what there is: what has not ended is left out."""
    times = offer.due_s(len(asks))
    places = asyncio.Semaphore(offer.max_concurrency) if offer.max_concurrency else None
    clock = client.clock
    run = Run([], clock(), 0.0, [], len(asks))
    tasks: set[asyncio.Task[None]] = set()

    async def one(ask: Ask, due_s: float) -> None:
        seen = Seen(ask.num_prompt, due_s)
        if places is None:
            await _send(client, ask, offer, seen)
        else:
            if places.locked():
                await places.acquire()
                seen.due_s = clock()
            else:
                await places.acquire()
            try:
                await _send(client, ask, offer, seen)
            finally:
                places.release()
        run.seen.append(seen)
        on_end(seen)

    beating = asyncio.ensure_future(_beat(run.beats_s, clock))
    try:
        for place, (ask, after_s) in enumerate(zip(asks, times, strict=True), 1):
            due_s = run.started_s + after_s
            if (wait_s := due_s - clock()) > 0:
                await asyncio.sleep(wait_s)
            elif place % 64 == 0:
                await asyncio.sleep(0)  # so that answers are read while many are sent
            task = asyncio.ensure_future(one(ask, due_s))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        while tasks:
            await asyncio.wait(tasks)
    except asyncio.CancelledError:
        run.is_interrupted = True
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    finally:
        beating.cancel()
    run.ended_s = clock()
    return run


async def _send(client: Client, ask: Ask, offer: Offer, seen: Seen) -> None:
    """One request to its end; what goes wrong is noted."""
    body = offer.request(ask)
    answer: Answer | None = None
    seen.sent_s = client.clock()  # a connection that has to be made first is part of what a caller waits for
    seen.late_s = seen.sent_s - seen.due_s
    try:
        async with asyncio.timeout(offer.timeout_s):
            answer = await client.ask("POST", offer.path, body)
            await check_status(answer)
            await answer.whole()
        _read(answer, seen, has_text=offer.has_texts)
    except TimeoutError:
        seen.error, seen.message = "timeout", f"no whole answer in {offer.timeout_s:g} s"
    except HttpError as error:
        seen.error, seen.message = error.reason, str(error)
    finally:
        if answer is not None:
            answer.close()
    if seen.error is not None:
        seen.end_s = client.clock()


def _read(answer: Answer, seen: Seen, *, has_text: bool) -> None:
    """What the events of a whole answer say, each at the time at which its bytes came. Raises HttpError.

    Read when all of it is there: while others come, the client has little to do, and its times are right.
    """
    reader, texts, usage = EventReader(), [], {}
    num_counted, is_counted, is_done, spoken = 0, True, False, []
    for at_s, piece in answer.pieces:
        for data in reader.add(piece):
            if data == DONE:
                is_done = True
                continue
            value = event_value(data)
            usage = value["usage"] if isinstance(value.get("usage"), dict) else usage
            choices = value.get("choices")
            if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
                continue
            seen.end_s, choice = at_s, choices[0]
            text = text_of(choice)
            texts.append(text)
            spoken.append(at_s)
            num_now = _count(value.get("usage"), choice, num_counted)
            is_counted = is_counted and num_now is not None
            num_new = int(bool(text)) if num_now is None else num_now - num_counted
            num_counted += num_new
            if num_new > 0:
                seen.tokens.append((at_s, num_new))
    if not is_done:
        raise HttpError("cut short", "the answer ended before [DONE]")
    if not spoken:
        raise HttpError("no tokens", "the answer has no chunk")
    total = usage.get("completion_tokens")
    seen.num_output = total if isinstance(total, int) else num_counted
    if not seen.tokens:  # chunks whose tokens are neither counted nor seen: parts of characters, or nothing but an end
        seen.tokens, is_counted = [(at_s, 1) for at_s in spoken], False
    seen.is_counted = is_counted and num_counted == seen.num_output
    if isinstance(usage.get("prompt_tokens"), int):
        seen.num_prompt = usage["prompt_tokens"]
    if has_text:
        seen.text = "".join(texts)
    answer.pieces.clear()


def _count(usage: Any, choice: dict[str, Any], num_before: int) -> int | None:
    """Tokens up to and with this chunk; None where nobody says."""
    if isinstance(usage, dict) and isinstance(usage.get("completion_tokens"), int):
        return usage["completion_tokens"]
    ids = choice.get("token_ids")
    return num_before + len(ids) if isinstance(ids, list) else None


async def _beat(beats_s: list[float], clock: Callable[[], float]) -> None:
    while True:
        due_s = clock() + _BEAT_S
        await asyncio.sleep(_BEAT_S)
        beats_s.append(clock() - due_s)
