"""Which fields requests have, as JSON schemas: OpenAI's, and vLLM's beside them.

Knows names and forms. What a field of sampling may be is the business of `SamplingParams`, which has the same names.
"""

from __future__ import annotations

from typing import Any

from jaxpaged.server.bodies import Body

_BOOLEAN, _STRING, _NUMBER, _INTEGER = ({"type": name} for name in ("boolean", "string", "number", "integer"))
_OBJECT, _ARRAY = {"type": "object"}, {"type": "array"}
_TOKEN_IDS = {"type": "array", "items": _INTEGER}

# Names that `SamplingParams` has too, with the same meaning.
SAMPLING: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"), _NUMBER),
    **dict.fromkeys(("n", "top_k", "seed", "max_tokens", "min_tokens", "prompt_logprobs"), _INTEGER),
    **dict.fromkeys(("ignore_eos", "skip_special_tokens", "include_stop_str_in_output", "use_beam_search"), _BOOLEAN),
    **dict.fromkeys(("stop_token_ids", "allowed_token_ids"), _TOKEN_IDS),
    "bad_words": {"type": "array", "items": _STRING},
    "stop": {"anyOf": [_STRING, {"type": "array", "items": _STRING}]},
    "logit_bias": {"type": "object", "additionalProperties": _NUMBER},
    "structured_outputs": _OBJECT,
    "length_penalty": _NUMBER,
    "early_stopping": {"anyOf": [_BOOLEAN, _STRING]},
}

# Taken, since clients send them, and not read: they change nothing about an answer.
IGNORED: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("user", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"), _STRING),
    **dict.fromkeys(("reasoning_effort", "verbosity"), _STRING),
    "metadata": _OBJECT,
    "store": _BOOLEAN,
}

_COMMON: dict[str, dict[str, Any]] = {
    **SAMPLING,
    **IGNORED,
    "model": _STRING,
    "stream": _BOOLEAN,
    "stream_options": _OBJECT,
    "response_format": _OBJECT,
    "priority": _INTEGER,
    "cache_salt": _STRING,
    "timeout": _NUMBER,
    "request_id": _STRING,
    "return_token_ids": _BOOLEAN,
    "return_tokens_as_token_ids": _BOOLEAN,
}

_CONVERSATION: dict[str, dict[str, Any]] = {
    "messages": {"type": "array", "items": _OBJECT},
    "tools": {"type": "array", "items": _OBJECT},
    "add_generation_prompt": _BOOLEAN,
    "continue_final_message": _BOOLEAN,
    "chat_template_kwargs": _OBJECT,
}

_TEXT_OR_OBJECT = {"anyOf": [_STRING, _OBJECT]}
_PROMPT = {"anyOf": [_STRING, _TOKEN_IDS]}

CHAT = Body(
    {
        **_COMMON,
        **_CONVERSATION,
        "max_completion_tokens": _INTEGER,
        "logprobs": _BOOLEAN,
        "top_logprobs": _INTEGER,
        "tool_choice": {"anyOf": [_STRING, _OBJECT]},
        "parallel_tool_calls": _BOOLEAN,
    },
    required=("messages",),
)
COMPLETION = Body(
    {
        **_COMMON,
        "prompt": {"anyOf": [*_PROMPT["anyOf"], {"type": "array", "items": _PROMPT}]},
        "best_of": _INTEGER,
        "logprobs": _INTEGER,
        "echo": _BOOLEAN,
        "suffix": _STRING,
        "add_special_tokens": _BOOLEAN,
    },
    required=("prompt",),
)
RESPONSE = Body(
    {
        **{
            name: SAMPLING[name]
            for name in ("temperature", "top_p", "top_k", "min_p", "seed", "ignore_eos", "stop", "min_tokens")
        },
        **{name: SAMPLING[name] for name in ("presence_penalty", "frequency_penalty", "repetition_penalty")},
        **IGNORED,
        "input": {"anyOf": [_STRING, {"type": "array", "items": _OBJECT}]},
        "instructions": _STRING,
        "model": _STRING,
        "max_output_tokens": _INTEGER,
        "stream": _BOOLEAN,
        "stream_options": _OBJECT,
        "text": _OBJECT,
        "parallel_tool_calls": _BOOLEAN,
        "priority": _INTEGER,
        "cache_salt": _STRING,
        "timeout": _NUMBER,
        # Known, so that they can be refused by name where they ask for something.
        "conversation": _TEXT_OR_OBJECT,
        "tool_choice": _TEXT_OR_OBJECT,
        **dict.fromkeys(("prompt", "reasoning"), _OBJECT),
        **dict.fromkeys(("tools", "include"), _ARRAY),
        **dict.fromkeys(("max_tool_calls", "top_logprobs"), _INTEGER),
        "previous_response_id": _STRING,
        "background": _BOOLEAN,
        "truncation": _STRING,
    },
    required=("input",),
)
EMBEDDING = Body(
    {
        "input": {"anyOf": [*_PROMPT["anyOf"], {"type": "array", "items": _PROMPT}]},
        "model": _STRING,
        "encoding_format": _STRING,
        "dimensions": _INTEGER,
        "user": _STRING,
        "pooling_type": _STRING,
        "normalize": _BOOLEAN,
        "timeout": _NUMBER,
    },
    required=("input",),
)
TOKENIZE = Body(
    {"model": _STRING, "prompt": _STRING, **_CONVERSATION, "add_special_tokens": _BOOLEAN, "return_token_strs": _BOOLEAN}
)
DETOKENIZE = Body({"model": _STRING, "tokens": _TOKEN_IDS}, required=("tokens",))
