"""From the fields of a request to SamplingParams: what OpenAI calls otherwise, and what its formats mean as grammars.

Refuses to know prompts and answers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from jaxpaged.async_llm import AsyncLLM
from jaxpaged.host.checks import check_int, shown
from jaxpaged.host.request import RequestError, RequestOutputKind, SamplingParams
from jaxpaged.server.errors import ApiError
from jaxpaged.server.protocol import SAMPLING

COMPLETION_MAX_TOKENS = 16  # where neither the request nor the model says anything; OpenAI's
_FORMATS = ("text", "json_object", "json_schema", "structural_tag")


def chat_sampling(body: Mapping[str, Any], llm: AsyncLLM) -> SamplingParams:
    """Those of a chat; its answer is as long as the model's limit allows where it says nothing. Raises RequestError, ApiError."""
    changes: dict[str, Any] = {}
    if "max_completion_tokens" in body:
        if body.get("max_tokens", body["max_completion_tokens"]) != body["max_completion_tokens"]:
            raise RequestError("max_completion_tokens: is not max_tokens, its older name: give one of them")
        changes["max_tokens"] = body["max_completion_tokens"]
    if body.get("logprobs"):
        changes["logprobs"] = body.get("top_logprobs", 0)
        check_int("top_logprobs", changes["logprobs"], 0, llm.config.max_logprobs)
    elif "top_logprobs" in body:
        raise RequestError("top_logprobs: only with logprobs true")
    return _sampling(body, llm, changes, max_tokens=None)


def completion_sampling(body: Mapping[str, Any], llm: AsyncLLM) -> SamplingParams:
    """Those of a completion. Raises RequestError, ApiError."""
    changes = {name: body[name] for name in ("best_of", "logprobs") if name in body}
    if body.get("suffix"):
        raise RequestError("suffix: this model completes at the end alone")
    if body.get("echo"):
        if body.get("max_tokens", 1) == 0 and not isinstance(body.get("max_tokens"), bool):
            changes["max_tokens"] = 1  # one has to be computed; it is not shown
        if "logprobs" in body:
            changes["prompt_logprobs"] = body["logprobs"]
    return _sampling(body, llm, changes, max_tokens=COMPLETION_MAX_TOKENS)


def with_format(params: SamplingParams, response_format: Any) -> SamplingParams:
    """Parameters whose output is of a `response_format`."""
    if response_format is None:
        return params
    kind = response_format.get("type")
    if kind not in _FORMATS:
        raise RequestError(f"response_format.type: got {shown(kind)}, expected one of {', '.join(_FORMATS)}")
    if kind == "text":
        return params
    if params.structured_outputs is not None:
        raise RequestError("response_format: not with structured_outputs, or with a tool_choice that says what comes")
    if kind == "json_object":
        form: dict[str, Any] = {"json_object": True}
    elif kind == "json_schema":
        # All objects of OpenAI's strict schemas are closed; one that does not say so means it.
        form = _schema(response_format)
    else:
        form = {"structural_tag": json.dumps({name: one for name, one in response_format.items() if name != "type"})}
    return dataclasses.replace(params, structured_outputs=form)  # type: ignore[arg-type]


def is_streamed(body: Mapping[str, Any]) -> bool:
    """Whether the answer is to come in pieces."""
    if "stream_options" in body and not body.get("stream"):
        raise RequestError("stream_options: only with stream true")
    for name, value in body.get("stream_options", {}).items():
        if name not in ("include_usage", "continuous_usage_stats", "include_obfuscation"):
            raise RequestError(f"stream_options.{name[:32]}: unknown, expected include_usage or continuous_usage_stats")
        if not isinstance(value, bool):
            raise RequestError(f"stream_options.{name}: got {shown(value)}, expected true or false")
    return body.get("stream", False)


def _sampling(body: Mapping[str, Any], llm: AsyncLLM, changes: dict[str, Any], *, max_tokens: int | None) -> SamplingParams:
    base = llm.default_params
    if body.get("use_beam_search"):  # the model recommends how to draw tokens, and a search draws none
        base = SamplingParams(max_tokens=base.max_tokens)
    # One replacing for all: each checks every field anew.
    given: dict[str, Any] = {} if "max_new_tokens" in llm.generation_defaults else {"max_tokens": max_tokens}
    given |= {name: body[name] for name in SAMPLING if name in body}
    if "logit_bias" in given:
        given["logit_bias"] = _biases(given["logit_bias"])
    kind = RequestOutputKind.DELTA if is_streamed(body) else RequestOutputKind.FINAL_ONLY
    params = dataclasses.replace(base, **{**given, **changes, "output_kind": kind})
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(params, name) is not None:
            check_int(name, getattr(params, name), 0, llm.config.max_logprobs)
    return with_format(params, body.get("response_format"))


def _biases(given: Mapping[str, Any]) -> dict[int, Any]:
    """OpenAI's token ids are names of an object."""
    found = {}
    for name, value in given.items():
        if not name.isascii() or not name.isdigit() or len(name) > 12:
            raise RequestError(f"logit_bias: got {shown(name)}, expected token ids as names")
        found[int(name)] = value
    if len(found) < len(given):
        raise RequestError("logit_bias: a token id is in it twice")
    return found


def _schema(response_format: Mapping[str, Any]) -> dict[str, Any]:
    told = response_format.get("json_schema")
    if not isinstance(told, dict):
        raise RequestError("response_format.json_schema: expected an object with name and schema")
    schema = told.get("schema")
    if not isinstance(schema, dict):
        raise RequestError("response_format.json_schema.schema: expected a JSON schema")
    strict = told.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise RequestError(f"response_format.json_schema.strict: got {shown(strict)}, expected true or false")
    return {"json": schema, "disable_additional_properties": bool(strict)}


def check_outputs(num_prompts: int, params: SamplingParams, limit: int) -> None:
    """Refuse a request that asks for too many outputs. Raises ApiError."""
    if num_prompts * params.num_drawn > limit:
        name = "best_of" if params.best_of is not None else "n"
        what = f"{num_prompts} prompts x {params.num_drawn}" if num_prompts > 1 else str(params.num_drawn)
        raise ApiError(400, f"{name}: {what} outputs, the limit is {limit} (max_outputs)", param=name)
