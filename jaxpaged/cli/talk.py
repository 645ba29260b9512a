"""Answers that are shown while they grow, from a server or from a model in this process: for `chat` and `complete`.

Knows lines of input and pieces of output. Where they come from is a `Source`.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterator
from contextlib import closing
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from jaxpaged.cli.generate import LEFT_OUT, SAMPLING_TITLE, counted, open_llm, with_defaults
from jaxpaged.cli.options import Parser, UsageError, add_fields, add_verbose, given_fields, set_up_logging
from jaxpaged.cli.server_flags import add_headers, headers
from jaxpaged.cli.terminal import harmless, said
from jaxpaged.client.connection import HttpError
from jaxpaged.client.http import Client
from jaxpaged.client.openai import CHAT_PATH, COMPLETION_PATH, Delta, deltas, models
from jaxpaged.config import EngineConfig
from jaxpaged.host.request import RequestError, RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from jaxpaged.llm import LLM

# One answer at a time needs few rows, so few compiled steps: a quick start.
_OPTIONS = {"max_num_seqs": 8, "max_num_batched_tokens": 512, "decode_row_buckets": (8,)}
_SERVER_FLAGS = ("model_name", "api_key_file", "header")

Messages = list[dict[str, str]]
T = TypeVar("T")


class Source(Protocol):
    """Where answers come from. Closing the iterator ends the answer."""

    def chat(self, messages: Messages) -> Generator[Delta, None, None]:
        """The assistant's next message. Raises RequestError or HttpError."""
        ...

    def complete(self, prompt: str) -> Generator[Delta, None, None]:
        """What follows a text. Raises RequestError or HttpError."""
        ...

    def close(self) -> None:
        """Nothing more will be asked."""
        ...


class InProcess:
    """A model in this process."""

    def __init__(self, llm: LLM, params: SamplingParams):
        self._llm, self._params = llm, dataclasses.replace(params, output_kind=RequestOutputKind.DELTA)

    def chat(self, messages: Messages) -> Generator[Delta, None, None]:
        """See `Source.chat`."""
        return self._deltas(self._llm.chat_prompt(messages))

    def complete(self, prompt: str) -> Generator[Delta, None, None]:
        """See `Source.complete`."""
        return self._deltas(prompt)

    def close(self) -> None:
        """See `Source.close`."""
        self._llm.close()

    def _deltas(self, prompt: Any) -> Generator[Delta, None, None]:
        num_output = 0
        with closing(self._llm.stream(prompt, self._params)) as outputs:
            for output in outputs:
                for one in (one for one in output.outputs if not one.index):
                    num_output += len(one.token_ids)
                    usage = {"prompt_tokens": len(output.prompt_token_ids), "completion_tokens": num_output}
                    yield Delta(one.text, one.finish_reason, usage)


class Remote:
    """A server.

    The client's loop has a thread of its own, where no signal comes: Ctrl-C ends the wait for a piece, here, and the answer
    is left by a call of its own. In a loop on the main thread the interrupt surfaces between any two callbacks.
    """

    def __init__(self, url: str, sent: dict[str, str], model: str | None, body: dict[str, Any]):
        """Raises ConfigError for an address that is none, UsageError where no server answers."""
        self._client, self._body = Client(url, headers=sent, bounded=True), body
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="jaxpaged-client", daemon=True)
        self._thread.start()
        try:
            name = model or self._wait(models, self._client)[0]["id"]
        except BaseException as error:
            self.close()
            if isinstance(error, HttpError):
                raise UsageError(f"--url: {url}: {error}") from None
            raise
        self._body = {"model": name, **body}

    def chat(self, messages: Messages) -> Generator[Delta, None, None]:
        """See `Source.chat`."""
        return self._deltas(CHAT_PATH, {**self._body, "messages": messages})

    def complete(self, prompt: str) -> Generator[Delta, None, None]:
        """See `Source.complete`."""
        return self._deltas(COMPLETION_PATH, {**self._body, "prompt": prompt})

    def close(self) -> None:
        """See `Source.close`."""

        async def close() -> None:
            self._client.close()
            await asyncio.sleep(0)  # for the connections to end

        self._wait(close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _deltas(self, path: str, body: dict[str, Any]) -> Generator[Delta, None, None]:
        found = deltas(self._client, path, body)
        try:
            while (delta := self._wait(_next, found)) is not None:
                yield delta
        finally:
            self._wait(_end, found)

    def _wait(self, work: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> T:
        ended: SimpleQueue[asyncio.Task[T]] = SimpleQueue()  # a future's lock may break where an interrupt comes
        self._loop.call_soon_threadsafe(lambda: self._loop.create_task(work(*args)).add_done_callback(ended.put))
        return ended.get().result()


async def _next(found: AsyncGenerator[Delta, None]) -> Delta | None:
    return await anext(found, None)


async def _end(found: AsyncGenerator[Delta, None]) -> None:
    # Where the wait for a piece was given up, its task still holds the generator.
    waiting = asyncio.all_tasks() - {asyncio.current_task()}
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await found.aclose()


# --- flags ---


def add_flags(parser: Parser, quick: str, max_tokens: str) -> None:
    """The flags of a command that answers, from a server or in this process."""
    parser.add_argument("model_path", nargs="?", metavar="MODEL", help="the same as --model")
    parser.add_argument("-q", "--quick", metavar="TEXT", help=quick)
    parser.add_argument("--stats", action="store_true", help="tokens and times of each answer, on stderr")
    add_verbose(parser)
    group = parser.add_argument_group("server, instead of a model in this process")
    group.add_argument("--url", metavar="URL", help="such as http://127.0.0.1:8000; it has OpenAI's API")
    group.add_argument("--model-name", metavar="NAME", help="asked for (default: the first that the server names)")
    add_headers(group)
    add_fields(parser, SamplingParams, SAMPLING_TITLE, leave_out=LEFT_OUT, defaults={"max_tokens": max_tokens})
    add_fields(
        parser, EngineConfig, "model and engine (of these, only --seed goes with --url)", leave_out=("skip_tokenizer_init",)
    )


def open_source(arguments: argparse.Namespace, max_tokens: int | None) -> Source:
    """The source that the flags name. What can be refused is refused before anything is loaded.

    Args:
      max_tokens: where neither a flag nor the model says anything.
    """
    sampling = given_fields(arguments, SamplingParams, leave_out=LEFT_OUT)
    SamplingParams(**sampling)
    engine = given_fields(arguments, EngineConfig)
    if arguments.model_path is not None:
        if "model" in engine:
            raise UsageError("MODEL: given twice, also as --model")
        arguments.model = engine["model"] = arguments.model_path
    set_up_logging(arguments)
    if arguments.url is None:
        if wrong := next((name for name in _SERVER_FLAGS if getattr(arguments, name)), None):
            raise UsageError(f"--{wrong.replace('_', '-')}: only with --url")
        llm = open_llm(arguments, **({} if engine.keys() & _OPTIONS.keys() else _OPTIONS))
        return InProcess(llm, with_defaults(llm, sampling, max_tokens))
    if wrong := next((name for name in engine if name != "seed"), None):
        raise UsageError(f"--{wrong.replace('_', '-')}: not with --url, whose server has its own")
    body = _body(sampling) | engine
    if max_tokens is not None:
        body.setdefault("max_tokens", max_tokens)
    return Remote(arguments.url, headers(arguments), arguments.model_name, body)


def _body(sampling: dict[str, Any]) -> dict[str, Any]:
    """Sampling flags as the fields of a request: their names are the same."""
    found = dict(sampling)
    if "logit_bias" in found:
        found["logit_bias"] = {str(token_id): bias for token_id, bias in found["logit_bias"]}
    if "structured_outputs" in found:
        form = dataclasses.asdict(found["structured_outputs"])
        found["structured_outputs"] = {name: value for name, value in form.items() if value not in (None, False)}
    return found


# --- talking ---


def lines(sign: str = "> ") -> Iterator[str]:
    """What the user types, without empty lines; the prompt sign goes to stderr, so that stdout holds answers alone."""
    while True:
        if sys.stdin.isatty():
            print(sign, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def show(ask: Callable[[], Generator[Delta, None, None]], *, has_stats: bool) -> str:
    """Print an answer while it grows; its text. Ctrl-C ends the answer where someone sits there, else the program.

    Args:
      ask: makes the answer; it may refuse itself.
    """
    text, usage, first_s, started_s = "", None, 0.0, time.perf_counter()
    try:
        with closing(ask()) as answer:
            for delta in answer:
                usage = delta.usage or usage
                if delta.text:
                    first_s = first_s or time.perf_counter() - started_s
                    text += delta.text
                    print(said(delta.text), end="", flush=True)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        print(" [stopped]", end="", file=sys.stderr)
    except HttpError:
        if text:
            print(flush=True)
        raise
    print(flush=True)
    if has_stats:
        _report(usage or {}, first_s, time.perf_counter() - started_s)
    return text


def try_show(ask: Callable[[], Generator[Delta, None, None]], *, has_stats: bool, hint: str = "") -> str | None:
    """`show`, for the middle of a conversation: None where the answer was refused, which has been said then."""
    try:
        return show(ask, has_stats=has_stats)
    except (RequestError, HttpError) as error:
        print(f"jaxpaged: error: {harmless(' '.join(str(error).split()))}{hint}", file=sys.stderr)
        return None


def quick(ask: Callable[[], Generator[Delta, None, None]], *, has_stats: bool) -> int:
    """One answer; the exit code. Raises RequestError, UsageError."""
    try:
        show(ask, has_stats=has_stats)
    except HttpError as error:
        raise UsageError(harmless(str(error))) from None
    return 0


def _report(usage: dict[str, Any], first_s: float, seconds: float) -> None:
    num_output, num_prompt = usage.get("completion_tokens") or 0, usage.get("prompt_tokens") or 0
    later_s = seconds - first_s
    speed = f", then {(num_output - 1) / later_s:,.1f} tokens/s" if num_output > 1 and later_s > 0 else ""
    what = f"{counted(num_prompt, 'token')} in, {counted(num_output, 'token')} out in {seconds:.2f} s"
    print(f"jaxpaged: {what}: the first after {first_s:.3f} s{speed}", file=sys.stderr)
