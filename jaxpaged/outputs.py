"""What a caller gets back: RequestOutput and what is in it. Names and meanings are vLLM's.

Knows how to show itself. Refuses to know how it came about.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Literal, NamedTuple

from jaxpaged.tools import ToolCall


@dataclass(frozen=True)
class RequestStateStats:
    """When things happened to one request, in seconds of the engine's monotonic clock; 0 for what has not happened yet."""

    arrival_time: float = 0.0
    first_token_ts: float = 0.0
    last_token_ts: float = 0.0
    num_generation_tokens: int = 0

    @property
    def first_token_latency(self) -> float:
        """From arrival to the first new token."""
        return max(0.0, self.first_token_ts - self.arrival_time)


class Logprob(NamedTuple):
    """How likely the model finds a token; `rank` 1 is the likeliest. `decoded_token` is None where no text is wanted."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


PositionLogprobs = dict[int, Logprob]
"""By token id: the token that is there, and the likeliest ones."""


@dataclass(frozen=True)
class CompletionOutput:
    """One generated text.

    `cumulative_logprob`, the sum over `token_ids`, is there for the results of a beam search, with `best_of` and with `logprobs`:
    then it is the model's own, whatever the temperature is and whatever top_k, top_p and min_p cut. So are `logprobs`, one entry
    for each of `token_ids`.

    `token_ids` hold the tokens that ended it, `text` does not unless include_stop_str_in_output is set. `stop_reason` is the
    entry of `stop` or `stop_token_ids` that ended it, None for the model's own end of sequence. `finish_reason` is "stop",
    "length", "abort" or "error", None while it still grows.

    Of a chat with a `tool_call_parser` the text is there as the model wrote it, and taken apart into `content` and `tool_calls`.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    content: str | None = None
    tool_calls: list[ToolCall] | None = None

    def finished(self) -> bool:
        """Whether nothing will be added."""
        return self.finish_reason is not None


@dataclass(frozen=True)
class RequestOutput:
    """A prompt and what came of it so far. `prompt` is None when the request brought token ids without their text."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestStateStats | None = None
    num_cached_tokens: int | None = None  # of the prompt, found in the prefix cache
    prompt_logprobs: list[PositionLogprobs | None] | None = None  # one for each token of the prompt; the first has none

    def _repr_html_(self) -> str:
        prompt = self.prompt if self.prompt is not None else f"{len(self.prompt_token_ids):,} token ids"
        rows = [("prompt", prompt, len(self.prompt_token_ids), "")]
        rows += [("text", one.text, len(one.token_ids), one.finish_reason or "running") for one in self.outputs]
        cells = "".join(
            f'<tr><th>{name}</th><td style="text-align:left;white-space:pre-wrap">{html.escape(text)}</td>'
            f"<td>{count:,}</td><td>{html.escape(reason)}</td></tr>"
            for name, text, count, reason in rows
        )
        head = f"<tr><th>request {html.escape(self.request_id)}</th><th></th><th>tokens</th><th>finish</th></tr>"
        return f"<table><thead>{head}</thead><tbody>{cells}</tbody></table>"


@dataclass(frozen=True)
class EmbeddingOutput:
    """A vector, its numbers those of float32."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """How many numbers."""
        return len(self.embedding)


@dataclass(frozen=True)
class EmbeddingRequestOutput:
    """A prompt and its vector."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    finished: bool = True


@dataclass(frozen=True)
class ScoreOutput:
    """How likely the model finds a given text: of each token but the first, after those before it."""

    token_ids: list[int]
    logprobs: list[float]

    @property
    def cumulative_logprob(self) -> float:
        """Of the whole text after its first token."""
        return sum(self.logprobs)


@dataclass(frozen=True)
class BeamSearchSequence:
    """One result of a beam search. `tokens` and `text` begin with the prompt; `cum_logprob` is that of what follows it.

    `tokens` end before the token that stopped it unless `include_stop_str_in_output` is set; `cum_logprob` counts it. `text`
    holds the special tokens, and is None without a tokenizer. `cum_logprob` is None when the search was aborted or failed.
    """

    tokens: list[int]
    cum_logprob: float | None
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True)
class BeamSearchOutput:
    """What came of one prompt: as many sequences as the search had beams, best first."""

    sequences: list[BeamSearchSequence]


@dataclass(frozen=True)
class Metric:
    """One number about an engine, under its Prometheus name."""

    name: str
    kind: Literal["counter", "gauge"]
    value: int | float
