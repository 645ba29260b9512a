"""/v1/completions: prompts in, what follows them out, whole or piece by piece."""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator
from typing import Any

from jaxpaged.async_llm import LatePrompt
from jaxpaged.host.request import RequestError, SamplingParams
from jaxpaged.outputs import CompletionOutput, RequestOutput
from jaxpaged.prompts import Prompt
from jaxpaged.server.answers import FINGERPRINT, TextLogprobs, Usage, check_ending, prompt_places
from jaxpaged.server.prompt_lists import listed
from jaxpaged.server.sampling import check_outputs, completion_sampling, is_streamed
from jaxpaged.server.service import Asked, Service
from jaxpaged.server.streaming import Events, EventStream, event, merged, whole
from jaxpaged.streams import Stream


async def answer(service: Service, asked: Asked) -> Any:
    """The answer to one request: an object, or an `EventStream`. Raises what `as_api_error` knows."""
    body, llm = asked.body, service.llm
    model = service.model_meant(body)
    prompts = listed("prompt", body["prompt"], service.options.max_prompts)
    params = completion_sampling(body, llm)
    check_outputs(len(prompts), params, service.options.max_outputs)
    salt, timeout_s = service.salt(asked), service.timeout_s(body)
    lengths = [max(1, len(prompt) // 4) if isinstance(prompt, str) else len(prompt) for prompt in prompts]
    # One ticket lets all of them in or none; each of them then has its own, so that its first token lets others in.
    tickets = llm.admission.split(llm.admit(params.num_drawn * len(prompts), sum(lengths)), lengths)
    streams: list[Stream] = []
    try:
        for place, prompt in enumerate(prompts):
            late = _late(service, prompt, body.get("add_special_tokens", True), salt)
            try:
                options = {"priority": body.get("priority", 0), "tenant": asked.tenant, "timeout_s": timeout_s}
                streams.append(await llm.start(late, params, ticket=tickets[place], **options))
            except RequestError as error:
                if len(prompts) > 1 and str(error).startswith("prompt"):
                    raise RequestError(f"prompt[{place}]: {error}") from None
                raise
    except BaseException:
        for one in (*streams, *tickets):
            one.close() if isinstance(one, Stream) else one.release()
        raise
    shape = _Shape(f"cmpl-{service.make_id()}", service.now(), model, body, params, service)
    if is_streamed(body):
        return EventStream(_events(shape, streams), streams, asked.as_error)
    return await whole(asked.receive, streams, _whole(shape, streams))


def _late(service: Service, prompt: Prompt, add_special_tokens: bool, salt: str | None) -> LatePrompt:
    whole: dict[str, Any] = {"prompt": prompt} if isinstance(prompt, str) else {"prompt_token_ids": prompt}
    if salt is not None:
        whole["cache_salt"] = salt
    if not isinstance(prompt, str) or add_special_tokens:
        return whole
    return lambda: {**whole, "prompt_token_ids": service.tokenizer.encode(prompt, add_special_tokens=False)}


class _Shape:
    """What all objects of one answer say."""

    def __init__(self, id: str, created: int, model: str, body: dict[str, Any], params: SamplingParams, service: Service):
        self.head = {"id": id, "object": "text_completion", "created": created, "model": model}
        self.head["system_fingerprint"] = FINGERPRINT
        self.body, self.params, self._service = body, params, service
        self.has_echo, self.is_prompt_alone = body.get("echo", False), body.get("echo", False) and body.get("max_tokens") == 0
        self._logprobs: dict[tuple[int, int], TextLogprobs] = {}
        self._of_prompts: dict[int, list[Any]] = {}
        self._has_begun: set[tuple[int, int]] = set()

    def choice(self, place: int, output: RequestOutput, one: CompletionOutput) -> dict[str, Any]:
        """What is said of one output, for the first time with what comes before it."""
        check_ending(one)
        key, is_first = (place, one.index), (place, one.index) not in self._has_begun
        self._has_begun.add(key)
        text = "" if self.is_prompt_alone else one.text
        token_ids, places = ([], []) if self.is_prompt_alone else (one.token_ids, one.logprobs or [])
        names: dict[int, str] = {}
        if self.has_echo and is_first:
            prompt_ids = output.prompt_token_ids
            text = (output.prompt if output.prompt is not None else self._service.tokenizer.decode(prompt_ids, False)) + text
            if self.params.logprobs is not None:
                names = {prompt_ids[0]: self._service.tokenizer.decode(prompt_ids[:1], False)}
                token_ids, places = [*prompt_ids, *token_ids], [*(self._prompt_logprobs(place, output)), *places]
        logprobs = None
        if self.params.logprobs is not None:
            growing = self._logprobs.setdefault(key, TextLogprobs(self.params.logprobs, self._as_id))
            logprobs = growing.take(token_ids, places, names)
        found = {"index": self.index(place, one), "text": text, "logprobs": logprobs, "finish_reason": one.finish_reason}
        if one.finish_reason is not None:
            found["stop_reason"] = one.stop_reason
        if is_first and not self.has_echo and output.prompt_logprobs is not None:
            found["prompt_logprobs"] = prompt_places(output.prompt_logprobs)
        if self.body.get("return_token_ids"):
            found |= {"token_ids": one.token_ids, "prompt_token_ids": output.prompt_token_ids if is_first else None}
        return found

    def index(self, place: int, one: CompletionOutput) -> int:
        """Of a choice, over all prompts."""
        return place * self.params.n + one.index

    def is_text_alone(self, place: int, one: CompletionOutput) -> bool:
        """Whether a choice says nothing but more text: most of a stream does."""
        has_more = self.params.logprobs is not None or self.is_prompt_alone or self.body.get("return_token_ids")
        return not has_more and one.finish_reason is None and (place, one.index) in self._has_begun

    @property
    def _as_id(self) -> bool:
        return self.body.get("return_tokens_as_token_ids", False)

    def _prompt_logprobs(self, place: int, output: RequestOutput) -> list[Any]:
        """Those of the prompt, which come with the first of a stream's outputs alone."""
        if output.prompt_logprobs is not None:
            self._of_prompts[place] = output.prompt_logprobs
        return self._of_prompts[place]


async def _whole(shape: _Shape, streams: list[Stream]) -> dict[str, Any]:
    usage, last = Usage(), {}
    async for place, output in merged(streams):
        usage.add(place, output)
        last[place] = output
    choices = [shape.choice(place, last[place], one) for place in range(len(streams)) for one in last[place].outputs]
    return {**shape.head, "choices": choices, "usage": usage.json()}


async def _events(shape: _Shape, streams: list[Stream]) -> AsyncGenerator[bytes, None]:
    options = shape.body.get("stream_options", {})
    has_usage, is_continuous = options.get("include_usage", False), options.get("continuous_usage_stats", False)
    usage, unused = Usage(), {"usage": None} if has_usage else {}
    plain: dict[int, Events] = {}

    def of_text(index: int, text: str) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": None, "finish_reason": None}
        return {**shape.head, "choices": [choice], **unused}

    async for place, output in merged(streams):
        usage.add(place, output)
        pieces = []
        for one in output.outputs:
            if not is_continuous and shape.is_text_alone(place, one):
                index = shape.index(place, one)
                if index not in plain:
                    plain[index] = Events(functools.partial(of_text, index))
                pieces.append(plain[index](one.text))
            else:
                told = {"usage": usage.json()} if is_continuous and has_usage else unused
                pieces.append(event({**shape.head, "choices": [shape.choice(place, output, one)], **told}))
        if pieces:
            yield b"".join(pieces)
    if has_usage:
        yield event({**shape.head, "choices": [], "usage": usage.json()})
