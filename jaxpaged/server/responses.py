"""/v1/responses: OpenAI's newer form of a conversation, text in and text out. Nothing is kept here between two requests."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Any

from jaxpaged.host.checks import shown
from jaxpaged.host.request import RequestError
from jaxpaged.outputs import RequestOutput
from jaxpaged.prompts import chat_prompt
from jaxpaged.server.answers import check_ending
from jaxpaged.server.bodies import dump_json
from jaxpaged.server.errors import ApiError
from jaxpaged.server.protocol import SAMPLING
from jaxpaged.server.sampling import chat_sampling, is_streamed
from jaxpaged.server.service import Asked, Service
from jaxpaged.server.streaming import EventStream, merged, whole
from jaxpaged.streams import Stream

_ROLES = ("system", "developer", "user", "assistant")
_TEXT_PARTS = ("input_text", "output_text", "text")
# Fields of OpenAI's that are known here and cannot be served, each with the values that ask for nothing.
UNSERVED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("previous_response_id", "conversation", "prompt", "reasoning", "max_tool_calls"), (None,)),
    **dict.fromkeys(("tools", "include"), ([],)),
    **dict.fromkeys(("background", "store"), (False,)),
    "tool_choice": ("auto", "none"),
    "truncation": ("disabled",),
    "top_logprobs": (0,),
}


async def answer(service: Service, asked: Asked) -> Any:
    """The answer to one request: an object, or an `EventStream`. Raises what `as_api_error` knows."""
    body, llm = asked.body, service.llm
    model = service.model_meant(body)
    for name, allowed in UNSERVED.items():
        # Of the same type too: to Python false is 0.
        if name in body and (type(body[name]), body[name]) not in [(type(value), value) for value in allowed]:
            raise RequestError(f"{name}: got {shown(body[name])}, which is not served here")
    messages = _messages(body)
    tokenizer = service.tokenizer
    params = chat_sampling(_as_chat(body), llm)
    salt, timeout_s = service.salt(asked), service.timeout_s(body)
    ticket = llm.admit(1, max(1, asked.num_bytes // 4))

    def prompt() -> dict[str, Any]:
        found = chat_prompt(tokenizer, messages)
        return found if salt is None else {**found, "cache_salt": salt}

    options = {"priority": body.get("priority", 0), "tenant": asked.tenant, "timeout_s": timeout_s}
    stream = await llm.start(prompt, params, ticket=ticket, **options)
    shape = _Shape(service, body, model, params.temperature, params.top_p)
    if is_streamed(body):
        events = _Events(shape)
        return EventStream(events.of(stream), [stream], asked.as_error, last=b"", told=events.error)
    return await whole(asked.receive, [stream], _whole(shape, stream))


def _messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The conversation as a chat has it."""
    found = [{"role": "system", "content": body["instructions"]}] if body.get("instructions") else []
    given = body["input"]
    if isinstance(given, str):
        return [*found, {"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise RequestError(f"input: got {shown(given)}, expected a text, or a list of messages with at least one")
    for place, item in enumerate(given):
        kind = item.get("type", "message") if isinstance(item, dict) else None
        if kind != "message":
            raise RequestError(f"input[{place}].type: got {shown(kind)}, expected message: nothing else is served here")
        if item.get("role") not in _ROLES:
            raise RequestError(f"input[{place}].role: got {shown(item.get('role'))}, expected one of {', '.join(_ROLES)}")
        found.append({"role": item["role"], "content": _text(item.get("content"), f"input[{place}].content")})
    return found


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where}: got {shown(content)}, expected a text or a list of parts")
    for place, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            raise RequestError(
                f"{where}[{place}]: got the type {shown(kind)}, expected one of {', '.join(_TEXT_PARTS)}, with text"
            )
    return "".join(part["text"] for part in content)


def _as_chat(body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of sampling by the names that a chat has for them."""
    found = {name: body[name] for name in (*SAMPLING, "stream", "stream_options") if name in body}
    if "max_output_tokens" in body:
        found["max_tokens"] = body["max_output_tokens"]
    form = body.get("text", {}).get("format")
    if form is not None and not isinstance(form, dict):
        raise RequestError(f"text.format: got {shown(form)}, expected an object")
    if form is not None:
        is_schema = form.get("type") == "json_schema"
        found["response_format"] = {"type": "json_schema", "json_schema": form} if is_schema else form
    return found


class _Shape:
    """What all objects of one answer say."""

    def __init__(self, service: Service, body: Mapping[str, Any], model: str, temperature: float, top_p: float):
        self.id, self.item_id = f"resp_{service.make_id()}", f"msg_{service.make_id()}"
        self._head = {
            **{"id": self.id, "object": "response", "created_at": service.now(), "model": model, "error": None},
            **{"instructions": body.get("instructions"), "max_output_tokens": body.get("max_output_tokens")},
            **{"temperature": temperature, "top_p": top_p, "metadata": body.get("metadata", {}), "user": body.get("user")},
            **{"text": body.get("text") or {"format": {"type": "text"}}, "truncation": "disabled", "store": False},
            **{"background": False, "previous_response_id": None, "reasoning": {"effort": None, "summary": None}},
            **{"tools": [], "tool_choice": body.get("tool_choice", "auto"), "parallel_tool_calls": False},
        }

    def response(self, status: str, output: list[dict[str, Any]], last: RequestOutput | None = None) -> dict[str, Any]:
        """OpenAI's object. `last` is the whole answer, or the last of its pieces."""
        is_cut = status == "incomplete"
        found = {**self._head, "status": status, "output": output, "usage": None}
        found["incomplete_details"] = {"reason": "max_output_tokens"} if is_cut else None
        if last is not None:
            num_input, num_output = len(last.prompt_token_ids), last.metrics.num_generation_tokens if last.metrics else 0
            found["usage"] = {
                "input_tokens": num_input,
                "input_tokens_details": {"cached_tokens": last.num_cached_tokens or 0, "cache_write_tokens": 0},
                "output_tokens": num_output,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": num_input + num_output,
            }
        return found

    def item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        """The message that the answer is."""
        return {"id": self.item_id, "type": "message", "role": "assistant", "status": status, "content": content}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _status(output: RequestOutput) -> str:
    check_ending(output.outputs[0])
    return "completed" if output.outputs[0].finish_reason == "stop" else "incomplete"


async def _whole(shape: _Shape, stream: Stream) -> dict[str, Any]:
    last = None
    async for _, output in merged([stream]):
        last = output
    if last is None:
        raise RuntimeError("a stream without an output")
    status = _status(last)
    return shape.response(status, [shape.item(status, [_part(last.outputs[0].text)])], last)


class _Events:
    """The named and numbered events of one answer."""

    def __init__(self, shape: _Shape):
        self._shape, self._num = shape, 0

    def _event(self, name: str, **said: Any) -> bytes:
        told = dump_json({"type": name, **said, "sequence_number": self._num})
        self._num += 1
        return b"event: %b\ndata: %b\n\n" % (name.encode(), told)

    def error(self, error: ApiError) -> bytes:
        """That it ends here."""
        return self._event("error", code=error.code, message=error.body["error"]["message"], param=error.param)

    async def of(self, stream: Stream) -> AsyncGenerator[bytes, None]:
        """All of them. An answer that was cut short ends with response.incomplete, as OpenAI's do."""
        shape, texts, last = self._shape, [], None
        begun = shape.response("in_progress", [])
        place = {"item_id": shape.item_id, "output_index": 0, "content_index": 0}
        yield b"".join(
            (
                self._event("response.created", response=begun),
                self._event("response.in_progress", response=begun),
                self._event("response.output_item.added", output_index=0, item=shape.item("in_progress", [])),
                self._event("response.content_part.added", **place, part=_part("")),
            )
        )
        async for _, last in merged([stream]):
            if last.outputs and last.outputs[0].text:
                texts.append(last.outputs[0].text)
                yield self._event("response.output_text.delta", **place, delta=texts[-1], logprobs=[])
        if last is None:
            raise RuntimeError("a stream without an output")
        text, status = "".join(texts), _status(last)
        item = shape.item(status, [_part(text)])
        yield b"".join(
            (
                self._event("response.output_text.done", **place, text=text, logprobs=[]),
                self._event("response.content_part.done", **place, part=_part(text)),
                self._event("response.output_item.done", output_index=0, item=item),
                self._event(f"response.{status}", response=shape.response(status, [item], last)),
            )
        )
