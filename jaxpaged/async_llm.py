"""Text in, text out, for many callers at once: an asyncio front to an engine on a thread of its own.

Knows what is refused, and which threads make prompts of what was sent. Refuses to know HTTP: see `jaxpaged.server`.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import threading
from collections.abc import AsyncGenerator, Callable, Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from jaxpaged.admission import Admission, QueueOptions, Ticket
from jaxpaged.embedder import Embedder, PoolingParams
from jaxpaged.engine import Engine
from jaxpaged.engine_thread import EngineThread, Observer
from jaxpaged.growing import GrowingRequest
from jaxpaged.host.request import RequestError, SamplingParams
from jaxpaged.loading import load
from jaxpaged.outputs import EmbeddingRequestOutput, RequestOutput
from jaxpaged.pacing import Pacer
from jaxpaged.prompts import Checked, Prompt, check, embedded
from jaxpaged.streams import ClosedError, DeadlineError, Stream
from jaxpaged.tokenizer import Tokenizer

_CHARACTERS_PER_TOKEN = 4  # a guess, for the time before a prompt is tokenised
_AT_ONCE = 16  # prompts that may be looked at on the loop before others have their turn
_SHORT_LEN = 256  # characters or ids: looking at them takes 0.1 ms, waking a thread for it no less

T = TypeVar("T")
LatePrompt = Prompt | Callable[[], Prompt]
"""A prompt, or a function that makes it, which is called on a thread where it holds nobody up."""


class AsyncLLM:
    """A language model that many tasks of asyncio ask at once; the name is vLLM's.

    Invariant: a request that nobody waits for is out of the engine after the step that runs. What goes wrong in one request ends
    that one alone, and whoever waits for it is told. The engine never waits for a text: prompts come to it checked.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer | None,
        *,
        default_params: SamplingParams | None = None,
        generation_defaults: dict[str, Any] | None = None,
        queue: QueueOptions | None = None,
    ):
        """Serve an engine that nobody else drives; it is closed with this. See `from_options`."""
        self.tokenizer, self.config, self.model_config = tokenizer, engine.config, engine.model
        self.default_params, self.generation_defaults = default_params or SamplingParams(), generation_defaults or {}
        self.queue = queue or QueueOptions()
        self.clock = engine.clock
        self.admission = Admission(self.queue.max_queued_requests, self.queue.max_queued_tokens, self.clock)
        threads = self.queue.num_text_threads
        self._texts = ThreadPoolExecutor(threads, "jaxpaged-text")
        self._grammars = ThreadPoolExecutor(threads, "jaxpaged-grammar")  # a grammar may take seconds, and no text waits for it
        self._embedding = ThreadPoolExecutor(1, "jaxpaged-embed")
        self._embedder = Embedder(engine)
        self._ids, self._num_quick = itertools.count(), itertools.count(1)
        self._is_draining = False
        self._pacer: Pacer | None = None
        self._engine = engine  # for what does not change; all else is the thread's
        self._thread = EngineThread(engine, stall_s=self.queue.stall_s)

    @classmethod
    def from_options(
        cls,
        model: str | os.PathLike[str] | None = None,
        *,
        queue: QueueOptions | None = None,
        use_tqdm_on_load: bool = True,
        **options: Any,
    ) -> AsyncLLM:
        """Load a model; arguments and errors are those of `LLM`."""
        found = load(model, use_tqdm=use_tqdm_on_load, **options)
        defaults = {"default_params": found.default_params, "generation_defaults": found.generation_defaults}
        return cls(found.engine, found.tokenizer, queue=queue, **defaults)  # type: ignore[arg-type]

    # --- requests ---

    def admit(self, num_outputs: int, num_tokens: int) -> Ticket:
        """A place in the queue, for `start`. Nothing has been made of the request yet.

        Raises:
          QueueFullError: too much waits.
          ClosedError: it is draining or closed.
        """
        if not self.is_ready:
            raise ClosedError("no further requests are taken")
        return self.admission.admit(num_outputs, num_tokens)

    async def start(
        self,
        prompt: LatePrompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        tenant: str = "",
        ticket: Ticket | None = None,
        timeout_s: float | None = None,
    ) -> Stream:
        """Check a request and queue it: what cannot be served is refused here, before anything is streamed.

        Args:
          prompt, sampling_params, priority, tenant: as for `LLM.generate`, for one prompt.
          request_id: no unfinished request may have it.
          ticket: from `admit`; it is released by whatever comes of this call.
          timeout_s: the longest it may take, from the ticket on: then it ends with a DeadlineError, to who iterates too.

        Raises:
          RequestError, QueueFullError, ClosedError, DeadlineError.
        """
        params = self.default_params if sampling_params is None else sampling_params
        if ticket is None:
            ticket = self.admit(getattr(params, "num_drawn", 1), guessed_len(prompt))
        try:
            async with asyncio.timeout(self._time_left(ticket, timeout_s)):
                checked = await self._checked(prompt, params, request_id or self._new_id(), priority, tenant)
            ticket.resize(len(checked.request.prompt_token_ids))
            live = GrowingRequest(checked.request, checked.prompt, self.tokenizer)
            how = {"pacer": self._pacer_here(), "interval": self.queue.stream_interval}
            stream = Stream(live, ticket=ticket, end=self._thread.end, **how)
            self._thread.add(stream)
            if timeout_s is not None:
                stream.expire_after(self._time_left(ticket, timeout_s) or 0.0, self._thread.expire)
            if self._thread.observer is not None:
                self._thread.observer.started(stream)
        except TimeoutError:
            ticket.release()
            raise DeadlineError() from None
        except BaseException:
            ticket.release()
            raise
        return stream

    async def generate(
        self,
        prompt: LatePrompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        **options: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """The outputs of one request while it grows; arguments and errors are those of `start`. Leaving it early ends it."""
        stream = await self.start(prompt, sampling_params, request_id=request_id, **options)
        try:
            async for output in stream:
                yield output
        finally:
            stream.close()

    async def embed(
        self,
        prompts: Seq[Prompt],
        pooling_params: PoolingParams | None = None,
        *,
        ticket: Ticket | None = None,
        timeout_s: float | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """See `LLM.embed`. What is served goes on meanwhile: prompts that are embedded take turns with each other alone.

        Args:
          ticket, timeout_s: as for `start`.

        Raises:
          RequestError, QueueFullError, ClosedError, DeadlineError.
        """
        ticket = ticket or self.admit(len(prompts), sum(map(guessed_len, prompts)))
        is_left = threading.Event()
        try:
            async with asyncio.timeout(self._time_left(ticket, timeout_s)):
                checked: list[Checked] = []
                for place, prompt in enumerate(prompts):
                    try:
                        name = f"embd-{next(self._ids)}"
                        checked.append(await self._checked(prompt, SamplingParams(max_tokens=1), name, 0, ""))
                    except RequestError as error:
                        raise RequestError(f"prompts[{place}]: {error}" if len(prompts) > 1 else str(error)) from None
                ids = [one.request.prompt_token_ids for one in checked]
                ticket.resize(sum(map(len, ids)))
                embed = functools.partial(self._embedder.embed, ids, pooling_params, is_wanted=lambda: not is_left.is_set())
                vectors = await self._in_pool(self._embedding, embed)
        except TimeoutError:
            raise DeadlineError() from None
        finally:
            is_left.set()
            ticket.release()
        return [embedded(one.request, vector) for one, vector in zip(checked, vectors, strict=True)]

    async def abort(self, request_id: str) -> None:
        """End a request; who iterates over it gets its end. Nothing where there is none."""
        stream = self._thread.find(request_id)
        if stream is not None:
            stream.close()

    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """What a function gives that would hold the loop up, from a thread for texts. Raises ClosedError."""
        return await self._in_pool(self._texts, functools.partial(function, *arguments))

    async def reset_prefix_cache(self) -> None:
        """See `Engine.reset_prefix_cache`. Raises ClosedError."""
        await self.between_steps(lambda engine: engine.reset_prefix_cache())

    def observe(self, observer: Observer) -> None:
        """Have somebody told of every request, in place of whoever was."""
        self._thread.observer = observer

    async def stats(self) -> dict[str, int | float]:
        """See `Engine.stats`; with what has no token yet. Raises ClosedError."""
        found = await self.between_steps(lambda engine: engine.stats())
        return {**found, "num_queued_requests": self.admission.num_outputs, "num_queued_tokens": self.admission.num_tokens}

    async def between_steps(self, look: Callable[[Engine], T]) -> T:
        """What a function of the engine gives between two steps, on the engine's thread. Raises ClosedError."""
        return await self._thread.call(look)

    def _new_id(self) -> str:
        """An id that no unfinished request has, those that callers chose included."""
        return next(name for name in (f"req-{number}" for number in self._ids) if self._thread.find(name) is None)

    async def _in_pool(self, pool: ThreadPoolExecutor, function: Callable[[], T]) -> T:
        """What a function gives on a thread of a pool. Raises ClosedError where this is closed before it has."""
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, function)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not self._thread.is_closed or (task is not None and task.cancelling()):
                raise
        except (RuntimeError, RequestError):  # the pool takes nothing any more, or the engine is closed
            if not self._thread.is_closed:
                raise
        raise ClosedError("closed before the request had begun")

    def _time_left(self, ticket: Ticket, timeout_s: float | None) -> float | None:
        return None if timeout_s is None else max(0.0, ticket.at_s + timeout_s - self.clock())

    def _pacer_here(self) -> Pacer:
        loop = asyncio.get_running_loop()
        if self._pacer is None or self._pacer.loop is not loop:
            self._pacer = Pacer(loop, self.queue.max_stream_events_per_s)
        return self._pacer

    async def _checked(self, prompt: LatePrompt, params: SamplingParams, request_id: str, priority: int, tenant: str) -> Checked:
        def checked() -> Checked:
            found = prompt() if callable(prompt) else prompt
            return check(self._engine, self.tokenizer, found, params, request_id=request_id, priority=priority, tenant=tenant)

        has_grammar = getattr(params, "structured_outputs", None) is not None
        if not has_grammar and _is_quick(prompt, params):
            if not next(self._num_quick) % _AT_ONCE:
                await asyncio.sleep(0)
            return checked()
        pool = self._grammars if has_grammar else self._texts
        return await self._in_pool(pool, checked)

    # --- its life ---

    @property
    def num_unfinished(self) -> int:
        """Requests that have been queued and have not ended."""
        return self._thread.num_unfinished

    @property
    def is_ready(self) -> bool:
        """Whether it takes requests."""
        return not self._is_draining and not self._thread.is_closed

    def check_health(self) -> None:
        """Whether the engine lives: its own thread says so, step by step.

        Raises:
          StalledError, ClosedError: why not.
        """
        self._thread.check()

    def stop_taking(self) -> None:
        """Refuse what comes from now on; what has been taken goes on."""
        self._is_draining = True

    async def drain(self, timeout_s: float) -> bool:
        """Refuse what comes, and wait for what has been taken; whether all of it has ended in time."""
        self.stop_taking()
        deadline = self.clock() + timeout_s
        while self.num_unfinished or self.admission.num_outputs:
            if self.clock() >= deadline:
                return False
            await asyncio.sleep(0.02)
        return True

    def shutdown(self) -> None:
        """End what runs, with an error to who waits for it, and give the engine's memory back. Twice is nothing."""
        self.stop_taking()
        self._thread.close()
        self._texts.shutdown(wait=False, cancel_futures=True)
        self._grammars.shutdown(wait=False, cancel_futures=True)
        self._embedding.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> AsyncLLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()


def _sent(prompt: LatePrompt) -> Any:
    """The text or the ids of a prompt, as far as it has the shape of one."""
    return (prompt.get("prompt_token_ids") or prompt.get("prompt") or "") if isinstance(prompt, Mapping) else prompt


def _is_quick(prompt: LatePrompt, params: SamplingParams) -> bool:
    """Whether a prompt is checked so fast that a thread is not worth it: it is short, and so is what else is looked at."""
    sent = _sent(prompt)
    is_short = not callable(sent) and hasattr(sent, "__len__") and len(sent) <= _SHORT_LEN
    return is_short and isinstance(params, SamplingParams) and not (params.bad_words or params.changes_logits)


def guessed_len(prompt: LatePrompt) -> int:
    """Tokens of a prompt that has not been tokenised."""
    sent = _sent(prompt)
    if isinstance(sent, str):
        return max(1, len(sent) // _CHARACTERS_PER_TOKEN)
    return len(sent) if hasattr(sent, "__len__") else 1
