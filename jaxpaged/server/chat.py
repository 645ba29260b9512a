"""/v1/chat/completions: a conversation in, the assistant's next message out, whole or piece by piece."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any

from jaxpaged.host.checks import shown
from jaxpaged.host.request import RequestError
from jaxpaged.outputs import CompletionOutput, RequestOutput
from jaxpaged.prompts import chat_prompt
from jaxpaged.server.answers import FINGERPRINT, Usage, chat_logprobs, check_ending, prompt_places
from jaxpaged.server.calls import Choice, Reader, choose, message_of
from jaxpaged.server.sampling import chat_sampling, check_outputs, is_streamed
from jaxpaged.server.service import Asked, Service
from jaxpaged.server.streaming import Events, EventStream, event, merged, whole
from jaxpaged.streams import Stream

ROLES = ("system", "developer", "user", "assistant", "tool", "function")


async def answer(service: Service, asked: Asked) -> Any:
    """The answer to one request: an object, or an `EventStream`. Raises what `as_api_error` knows."""
    body, llm = asked.body, service.llm
    model = service.model_meant(body)
    _check_messages(body["messages"])
    tokenizer = service.tokenizer
    params = chat_sampling(body, llm)
    choice = choose(body, params, tokenizer, service.options.tool_call_parser)
    params = choice.params
    check_outputs(1, params, service.options.max_outputs)
    salt, timeout_s = service.salt(asked), service.timeout_s(body)
    # The body's text is about the prompt's; what is not text in it makes the guess a little high.
    ticket = llm.admit(params.num_drawn, max(1, asked.num_bytes // 4))

    def prompt() -> dict[str, Any]:
        options = {name: body[name] for name in ("continue_final_message", "chat_template_kwargs") if name in body}
        tools = body.get("tools") if body.get("tool_choice") != "none" else None
        is_open = body.get("add_generation_prompt", not body.get("continue_final_message"))
        found = chat_prompt(tokenizer, body["messages"], add_generation_prompt=is_open, tools=tools, **options)
        return found if salt is None else {**found, "cache_salt": salt}

    options = {"priority": body.get("priority", 0), "tenant": asked.tenant, "ticket": ticket, "timeout_s": timeout_s}
    stream = await llm.start(prompt, params, **options)
    shape = _Shape(f"chatcmpl-{service.make_id()}", service.now(), model, body, choice, tokenizer.token_bytes)
    if is_streamed(body):
        return EventStream(_events(shape, stream), [stream], asked.as_error)
    return await whole(asked.receive, [stream], _whole(shape, stream))


def _check_messages(messages: list[Any]) -> None:
    if not messages:
        raise RequestError("messages: expected at least one")
    for place, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise RequestError(f"messages[{place}].role: got {shown(role)}, expected one of {', '.join(ROLES)}")
        if role == "assistant" and (message.get("tool_calls") or message.get("reasoning_content")):
            continue
        if not isinstance(message.get("content"), (str, list)):
            raise RequestError(
                f"messages[{place}].content: got {shown(message.get('content'))}, expected a text or a list of parts"
            )


class _Shape:
    """What all objects of one answer say."""

    def __init__(
        self,
        id: str,
        created: int,
        model: str,
        body: dict[str, Any],
        choice: Choice,
        token_bytes: Callable[[int], bytes | None],
    ):
        self.head = {"id": id, "created": created, "model": model, "system_fingerprint": FINGERPRINT}
        self.body, self.choice, self.token_bytes = body, choice, token_bytes
        self.as_id = body.get("return_tokens_as_token_ids", False)

    def logprobs(self, one: CompletionOutput) -> dict[str, Any] | None:
        if one.logprobs is None:
            return None
        num_top = self.body.get("top_logprobs", 0)
        return chat_logprobs(one.token_ids, one.logprobs, num_top, self.as_id, self.token_bytes)

    def finish_reason(self, one: CompletionOutput, reader: Reader) -> str | None:
        return "tool_calls" if reader.has_calls and one.finish_reason == "stop" else one.finish_reason

    def choice_of(self, one: CompletionOutput, reader: Reader, **said: Any) -> dict[str, Any]:
        found = {"index": one.index, **said, "logprobs": self.logprobs(one), "finish_reason": self.finish_reason(one, reader)}
        if one.finish_reason is not None:
            found["stop_reason"] = one.stop_reason
        return found | ({"token_ids": one.token_ids} if self.body.get("return_token_ids") else {})


async def _whole(shape: _Shape, stream: Stream) -> dict[str, Any]:
    usage, last = Usage(), None
    async for _, output in merged([stream]):
        last = output
    if last is None:
        raise RuntimeError("a stream without an output")
    usage.add(0, last)
    choices = []
    for one in last.outputs:
        check_ending(one)
        reader = shape.choice.reader()
        message = message_of(reader, one.text)
        choices.append(shape.choice_of(one, reader, message=message))
    found = {**shape.head, "object": "chat.completion", "choices": choices, "usage": usage.json()}
    return found | _of_prompt(shape, last)


def _of_prompt(shape: _Shape, output: RequestOutput) -> dict[str, Any]:
    """vLLM's fields about the prompt, where they are asked for."""
    found: dict[str, Any] = {}
    if output.prompt_logprobs is not None:
        found["prompt_logprobs"] = prompt_places(output.prompt_logprobs)
    if shape.body.get("return_token_ids"):
        found["prompt_token_ids"] = output.prompt_token_ids
    return found


async def _events(shape: _Shape, stream: Stream) -> AsyncGenerator[bytes, None]:
    options = shape.body.get("stream_options", {})
    has_usage, is_continuous = options.get("include_usage", False), options.get("continuous_usage_stats", False)
    head, usage = {**shape.head, "object": "chat.completion.chunk"}, Usage()
    readers: dict[int, Reader] = {}
    contents: dict[int, Events] = {}
    is_text_alone = not (is_continuous or shape.body.get("logprobs") or shape.body.get("return_token_ids"))

    def chunk(choices: list[dict[str, Any]], **more: Any) -> bytes:
        told = usage.json() if is_continuous or not choices else None
        return event({**head, "choices": choices, **more, **({"usage": told} if has_usage else {})})

    def plain(one: CompletionOutput, text: str) -> dict[str, Any]:
        return {"index": one.index, "delta": {"content": text}, "logprobs": None, "finish_reason": None}

    unused = {"usage": None} if has_usage else {}
    is_first = True
    async for _, output in merged([stream]):
        usage.add(0, output)
        more, is_first = _of_prompt(shape, output) if is_first else {}, False
        pieces = []
        for one in output.outputs:
            check_ending(one)
            if one.index not in readers:
                readers[one.index] = shape.choice.reader()
                delta = {"role": "assistant", "content": ""}
                pieces.append(chunk([{"index": one.index, "delta": delta, "logprobs": None, "finish_reason": None}], **more))
                more = {}
            reader = readers[one.index]
            delta = reader.take(one.text, is_last=one.finish_reason is not None)
            if is_text_alone and one.finish_reason is None and delta.keys() == {"content"}:
                if one.index not in contents:
                    contents[one.index] = Events(lambda text, one=one: {**head, "choices": [plain(one, text)], **unused})
                pieces.append(contents[one.index](delta["content"]))
            elif delta or one.finish_reason is not None or one.logprobs or shape.body.get("return_token_ids"):
                pieces.append(chunk([shape.choice_of(one, reader, delta=delta)]))
        if pieces:
            yield b"".join(pieces)
    if has_usage:
        yield chunk([])
