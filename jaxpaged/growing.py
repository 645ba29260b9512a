"""Requests in an engine as their caller sees them: text, log-probabilities and times that grow event by event.

Knows texts, and where they end. Refuses to know engines: whoever feeds it the events ends what it finds to be over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from jaxpaged.host.request import FinishReason, Likelihood, Request, TokenEvent
from jaxpaged.outputs import CompletionOutput, Logprob, PositionLogprobs, RequestOutput, RequestStateStats
from jaxpaged.stop_strings import StopFinder
from jaxpaged.tokenizer import Detokenizer, Tokenizer

_IS_WHOLE = (None, FinishReason.STOP, FinishReason.LENGTH)


class GrowingText:
    """The text of one output, which ends where a string of `stop` ends in it.

    Tokens become text when it is asked for or they are the last, all that have come since at once: most answers are told whole,
    or several tokens at a time. Only a `stop` has to see each of them as it comes.

    Law: however the text came, it is that of the same ids without `stop`, cut at the string that ended it; and what `shown` gave
    at any time is the beginning of it.
    """

    def __init__(
        self, detokenizer: Detokenizer, stop: tuple[str, ...] = (), *, is_stop_included: bool = False, min_tokens: int = 0
    ):
        """No string ends it that ends in the text of its first `min_tokens` tokens."""
        self._detokenizer = detokenizer
        self._new_ids: list[int] = []  # no text yet
        self._finder = StopFinder(stop) if stop else None
        self._is_stop_included = is_stop_included
        self._min_tokens, self._num_tokens = min_tokens, 0
        self._num_taken = 0  # characters that the finder has seen
        self._num_kept = 0  # characters that are there when a string has ended it
        self.stop_string: str | None = None

    def add(self, token_ids: Iterable[int], *, is_last: bool) -> None:
        """Take further tokens; after a string has been found they change nothing."""
        if self._finder is None:
            self._new_ids += token_ids
            if is_last:
                self._settle(self._detokenizer.finish)
            return
        for token_id in token_ids:
            self._num_tokens += 1
            self._take(self._detokenizer.add(token_id))
        if is_last:
            self._take(self._detokenizer.finish())

    def _take(self, piece: str) -> None:
        if self._finder is None or self.stop_string is not None:
            return
        found = self._finder.add(piece, is_exempt=self._num_tokens <= self._min_tokens)
        if found is not None:
            self.stop_string, place = found
            self._num_kept = self._num_taken + place - (0 if self._is_stop_included else len(self.stop_string))
        self._num_taken += len(piece)

    def shown(self, *, is_over: bool) -> int:
        """How many characters of `text` can be shown: those of which it is certain that they stay."""
        if self.stop_string is not None:
            return self._num_kept
        if self._new_ids:
            self._settle(self._detokenizer.add)
        num_held = 0 if is_over or self._finder is None or self._is_stop_included else self._finder.num_open
        return len(self._detokenizer.text) - num_held

    def _settle(self, take: Callable[..., str]) -> None:
        new_ids, self._new_ids = self._new_ids, []
        take(*new_ids)

    def text(self, start: int, end: int) -> str:
        """Characters [start, end), of those that were shown."""
        return self._detokenizer.text[start:end]


@dataclass(eq=False)
class GrowingOutput:
    """One output of a request so far. `text` is None when none is wanted, `logprobs` likewise."""

    index: int
    text: GrowingText | None
    num_wanted: int | None = None  # log-probabilities of so many likeliest tokens beside each new one
    tokenizer: Tokenizer | None = None  # for the tokens' names
    is_stop_included: bool = False
    stop_ids: frozenset[int] = frozenset()
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    cumulative_logprob: float | None = None
    num_tokens_told: int = 0
    num_characters_told: int = 0

    def record(self, event: TokenEvent) -> bool:
        """Take what is new; whether its text has come to an end that the engine does not know of."""
        self.finish_reason, self.stop_reason = event.finish_reason, event.stop_reason
        if event.cumulative_logprob is not None:
            self.cumulative_logprob = event.cumulative_logprob
        elif event.likelihood is not None:
            self.cumulative_logprob = (self.cumulative_logprob or 0.0) + event.likelihood.logprob
        new_ids: tuple[int, ...] = () if event.token_id is None else (event.token_id,)
        token_ids: tuple[int, ...] = event.token_ids or new_ids
        self.token_ids += token_ids
        if self.num_wanted is not None and event.likelihood is not None and event.token_id is not None:
            self.logprobs.append(named(event.token_id, event.likelihood, self.tokenizer))
        if self.text is None:
            return False
        # The token that stops a request is no part of its text, as in vLLM. One that completes a grammar is.
        is_stop = event.finish_reason is FinishReason.STOP and not self.stop_ids.isdisjoint(token_ids[-1:])
        is_cut = is_stop and not self.is_stop_included
        self.text.add(token_ids[:-1] if is_cut else token_ids, is_last=event.finish_reason is not None)
        if self.text.stop_string is not None and event.finish_reason in _IS_WHOLE:
            self.finish_reason, self.stop_reason = FinishReason.STOP, self.text.stop_string
        return event.finish_reason is None and self.finish_reason is not None

    def completion(self, index: int, *, is_delta: bool = False) -> CompletionOutput:
        """What there is, or what no delta has told yet."""
        first_token, first_character = (self.num_tokens_told, self.num_characters_told) if is_delta else (0, 0)
        num_shown = self.text.shown(is_over=self.finish_reason is not None) if self.text is not None else 0
        if is_delta:
            self.num_tokens_told, self.num_characters_told = len(self.token_ids), max(num_shown, first_character)
        return CompletionOutput(
            index=index,
            text=self.text.text(first_character, num_shown) if self.text is not None else "",
            token_ids=self.token_ids[first_token:],
            cumulative_logprob=self.cumulative_logprob,
            logprobs=self.logprobs[first_token:] if self.num_wanted is not None else None,
            finish_reason=self.finish_reason.value if self.finish_reason else None,
            stop_reason=self.stop_reason,
        )


class GrowingRequest:
    """A request in the engine, and its outputs so far. `tokenizer` is None when there is no text."""

    def __init__(self, request: Request, prompt: str | None, tokenizer: Tokenizer | None):
        params = request.params
        self.request, self.prompt = request, prompt
        self.tokenizer = tokenizer if params.detokenize else None
        self.outputs = [self._output(index) for index in range(params.num_drawn)]
        self._num_open = len(self.outputs)
        self._prompt_token_ids = list(request.prompt_token_ids)  # shared by all that is told of it
        self.prompt_logprobs: list[PositionLogprobs | None] | None = None
        self.num_events = 0
        self.first_token_s = self.last_token_s = 0.0
        self.num_cached_tokens = 0
        self._ended: set[int] = set()  # outputs whose end a delta has told
        self._is_prompt_told = False

    def _output(self, index: int) -> GrowingOutput:
        params, text = self.request.params, None
        if self.tokenizer is not None:
            detokenizer = self.tokenizer.detokenizer(skip_special_tokens=params.skip_special_tokens)
            stop: tuple[str, ...] = params.stop  # type: ignore[assignment]
            rules = {"is_stop_included": params.include_stop_str_in_output, "min_tokens": params.min_tokens}
            text = GrowingText(detokenizer, stop, **rules)  # type: ignore[arg-type]
        options = {"is_stop_included": params.include_stop_str_in_output, "tokenizer": self.tokenizer}
        options["stop_ids"] = self.request.stop_ids
        options["cumulative_logprob"] = 0.0 if params.wants_logprobs else None
        return GrowingOutput(index, text, params.logprobs, **options)

    @property
    def is_finished(self) -> bool:
        """Whether all outputs have ended."""
        return not self._num_open

    @property
    def has_untold_end(self) -> bool:
        """Whether an output has ended since `news` was asked for."""
        return any(output.finish_reason is not None and output.index not in self._ended for output in self.outputs)

    @property
    def num_generated(self) -> int:
        """Tokens of all outputs."""
        return sum(len(output.token_ids) for output in self.outputs)

    def record(self, event: TokenEvent, now: float) -> bool:
        """Take an event; whether the output is over for a reason that the engine does not know: see `Engine.stop`."""
        self.num_events += 1
        if event.token_id is not None or event.token_ids:
            self.first_token_s, self.last_token_s = self.first_token_s or now, now
            self.num_cached_tokens = event.num_cached_tokens
            if self.request.params.prompt_logprobs is not None and self.prompt_logprobs is None and not event.index:
                places = zip(self.request.prompt_token_ids[1:], event.prompt_likelihoods, strict=True)
                self.prompt_logprobs = [None, *(named(*place, self.tokenizer) for place in places)]
        # A step may bring more tokens after the one with which the text of an output has come to its end.
        output = self.outputs[event.index]
        if output.finish_reason is not None:
            return False
        is_ended = output.record(event)
        self._num_open -= output.finish_reason is not None
        return is_ended

    def end(self, now: float) -> None:
        """Someone else took it out of the engine."""
        for output in self.outputs:
            if output.finish_reason is None:
                self.record(TokenEvent(self.request.request_id, None, FinishReason.ABORT, index=output.index), now)

    def _returned(self) -> list[GrowingOutput]:
        """The outputs that the caller gets, in their order."""
        params = self.request.params
        if not params.is_ranked:
            return self.outputs
        # What was cut short has a high sum and is no answer. The sort is stable: of equal outputs the first is the better one.
        ranked = sorted(self.outputs, key=lambda one: (one.finish_reason not in _IS_WHOLE, -(one.cumulative_logprob or 0.0)))
        return ranked[: params.n]

    def output(self) -> RequestOutput:
        """Everything so far."""
        completions = [output.completion(index) for index, output in enumerate(self._returned())]
        return self._around(completions, self.prompt_logprobs)

    def news(self) -> RequestOutput:
        """What is new since the last call: of the outputs that have a new token or have ended."""
        completions = []
        for index, output in enumerate(self._returned()):
            has_ended = output.finish_reason is not None and output.index not in self._ended
            if has_ended or len(output.token_ids) > output.num_tokens_told:
                completions.append(output.completion(index, is_delta=True))
            if has_ended:
                self._ended.add(output.index)
        prompt_logprobs = None if self._is_prompt_told else self.prompt_logprobs
        self._is_prompt_told = prompt_logprobs is not None or self._is_prompt_told
        return self._around(completions, prompt_logprobs)

    def _around(
        self, completions: list[CompletionOutput], prompt_logprobs: list[PositionLogprobs | None] | None
    ) -> RequestOutput:
        return RequestOutput(
            request_id=self.request.request_id,
            prompt=self.prompt,
            prompt_token_ids=self._prompt_token_ids,
            outputs=completions,
            finished=self.is_finished,
            metrics=RequestStateStats(self.request.arrival_s, self.first_token_s, self.last_token_s, self.num_generated),
            num_cached_tokens=self.num_cached_tokens,
            prompt_logprobs=prompt_logprobs,
        )


def named(token_id: int, found: Likelihood, tokenizer: Tokenizer | None) -> PositionLogprobs:
    """A token and the likeliest ones by their ids, as in vLLM: the token first, with its rank among these if it is there."""
    logprobs = {token_id: (found.logprob, found.rank)}
    logprobs |= {one: (logprob, rank) for rank, (one, logprob) in enumerate(found.likeliest, 1)}

    def text(one: int) -> str | None:
        return tokenizer.decode([one], skip_special_tokens=False) if tokenizer is not None else None

    return {one: Logprob(*pair, text(one)) for one, pair in logprobs.items()}
