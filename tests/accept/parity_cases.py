"""The requests that two servers of the same model are asked, in this order. Knows no answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """One request.

    Args:
      body: sent as JSON; bytes are sent as they are; None is a GET.
      is_drawn: what tokens come is chance, which differs; forms are compared, and that a second answer is the same.
      headers: over those that every request has; an empty text leaves one out.
    """

    name: str
    path: str
    body: Mapping[str, Any] | bytes | None = None
    is_drawn: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)
    is_text: bool = False  # an answer that is no JSON


CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
STORIES = (
    "One day Mia went to",
    "Once upon a time there was a",
    "Hello, my name is",
    "12 + 30 = 42\n25 + 31 =",
    "Björn und das 猫 🐱",
)
QUESTIONS = ("What is PagedAttention?", "What is bear in German?", "Count from 7 to 15.", "Show me the emoji for cat.")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "city": {"enum": ["Oslo", "Paris"]}},
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}
ASK_JSON = "Write as JSON with the keys name, age and city: Dan is 34 years old and lives in Oslo."


def _tool(name: str, description: str) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = [_tool("get_weather", "Get the weather of a city"), _tool("get_time", "Get the time in a city")]


def user(text: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def _chat(name: str, text: Any, **more: Any) -> Case:
    is_drawn = more.pop("is_drawn", False)
    messages = more.pop("messages", None) or user(text)
    return Case(name, CHAT, {"model": "demo", "messages": messages, "temperature": 0, "max_tokens": 40, **more}, is_drawn)


def _complete(name: str, prompt: Any, **more: Any) -> Case:
    is_drawn = more.pop("is_drawn", False)
    return Case(name, COMPLETION, {"model": "demo", "prompt": prompt, "temperature": 0, "max_tokens": 32, **more}, is_drawn)


def _without(case: Case, *names: str) -> Case:
    """The same without some fields."""
    assert isinstance(case.body, Mapping)
    return Case(case.name, case.path, {name: value for name, value in case.body.items() if name not in names}, case.is_drawn)


ANSWERED = (
    *(_complete(f"story {place}", prompt, return_token_ids=True) for place, prompt in enumerate(STORIES)),
    *(_chat(f"question {place}", text, return_token_ids=True) for place, text in enumerate(QUESTIONS)),
    _complete("token ids", [743, 364, 757, 377, 297], return_token_ids=True),
    _complete("several prompts", list(STORIES[:3])),
    _complete("several prompts of token ids", [[743, 364, 757], [922, 923, 266]]),
    _complete("logprobs", STORIES[0], logprobs=3),
    _complete("logprobs 0", STORIES[0], logprobs=0),
    _complete("echo", STORIES[0], echo=True, max_tokens=8),
    _complete("echo with logprobs", STORIES[0], echo=True, logprobs=2, max_tokens=4),
    _complete("echo with logprobs alone", STORIES[0], echo=True, logprobs=1, max_tokens=0),
    _complete("prompt_logprobs", STORIES[0], prompt_logprobs=1, max_tokens=4),
    _complete("tokens as ids", STORIES[0], logprobs=1, return_tokens_as_token_ids=True, max_tokens=4),
    _complete("stop", STORIES[0], stop=["She"], max_tokens=64),
    _complete("stop that is kept", STORIES[0], stop=["She"], include_stop_str_in_output=True, max_tokens=64),
    _complete("stop_token_ids", STORIES[0], stop_token_ids=[16], max_tokens=64),
    _complete("min_tokens and ignore_eos", "The capital of France is", min_tokens=30, ignore_eos=True),
    _complete("logit_bias", STORIES[0], logit_bias={"277": -100}),
    _complete("allowed_token_ids", STORIES[0], allowed_token_ids=[277, 858, 16], max_tokens=6),
    _complete("bad_words", STORIES[0], bad_words=["station"]),
    _complete("penalties", STORIES[1], presence_penalty=1.5, frequency_penalty=0.5, repetition_penalty=1.2),
    _complete("n", STORIES[0], n=2, max_tokens=12),
    _complete("n and seed, drawn", STORIES[0], n=2, seed=3, temperature=0.9, max_tokens=12, is_drawn=True),
    _complete("top_k 1, drawn", STORIES[0], temperature=1.0, top_k=1),
    _complete("top_p and min_p, drawn", STORIES[0], temperature=1.0, top_p=0.5, min_p=0.1, seed=1, is_drawn=True),
    _without(_complete("max_tokens of its own", STORIES[0]), "max_tokens"),
    _complete("stream", STORIES[0], stream=True),
    _complete("stream with usage", STORIES[0], stream=True, stream_options={"include_usage": True}, logprobs=1),
    _complete("regex", "Call ", structured_outputs={"regex": "[0-9]{3}-[0-9]{4}"}),
    _complete("choice", "The sky is ", structured_outputs={"choice": ["green", "seven"]}),
    _chat("chat with logprobs", QUESTIONS[1], logprobs=True, top_logprobs=2),
    _chat("chat streamed", QUESTIONS[0], stream=True),
    _chat("chat streamed with usage", QUESTIONS[3], stream=True, stream_options={"include_usage": True}, logprobs=True),
    _chat("chat, n", "Hello!", n=2),
    _chat("chat, max_completion_tokens", QUESTIONS[0], max_completion_tokens=3, max_tokens=3),
    _chat("chat, parts of text", [{"type": "text", "text": "Hello!"}]),
    _chat("chat, stop", QUESTIONS[0], stop=" keys"),
    _chat("chat, seed, drawn", "Tell me a story about Mia and a fox.", temperature=0.8, seed=5, max_tokens=16, is_drawn=True),
    _chat("chat, a system's word", "", messages=[{"role": "system", "content": "You are Nora."}, *user("What is your name?")]),
    _chat("chat, JSON schema", ASK_JSON, response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}),
    _chat("chat, its message goes on", "", messages=[*user("Hello!"), {"role": "assistant", "content": "Hello! How"}],
          add_generation_prompt=False, continue_final_message=True),
    _chat("a tool, by itself", "Tell me the time in Paris.", tools=TOOLS[1:]),
    _chat("a tool, streamed", "Tell me the time in Paris.", tools=TOOLS[1:], stream=True),
    _chat("a tool, named", "What is the weather in Oslo?", tools=TOOLS,
          tool_choice={"type": "function", "function": {"name": "get_time"}}),
    _chat("a tool, none", "Tell me the time in Paris.", tools=TOOLS[1:], tool_choice="none"),
    _chat("a tool's answer", "", tools=TOOLS[1:], messages=[
        *user("Tell me the time in Paris."),
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "get_time", "arguments": '{"city": "Paris"}'}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "12:30"},
    ]),
)  # fmt: skip

REFUSED = (
    Case("no JSON", COMPLETION, b'{"prompt": '),
    Case("no object", COMPLETION, b"[1, 2]"),
    _complete("unknown model", "One day", model="no-such-model"),
    _without(_complete("no prompt", ""), "prompt"),
    Case("no messages", CHAT, {"model": "demo"}),
    _chat("empty messages", "", messages=[{}]),
    _complete("empty prompt", ""),
    _complete("empty list of prompts", []),
    _complete("token ids out of range", [1, 10**6]),
    _complete("negative temperature", "One day", temperature=-1),
    _complete("temperature of text", "One day", temperature="warm"),
    _complete("top_p above 1", "One day", top_p=1.5),
    _complete("top_k below -1", "One day", top_k=-5),
    _complete("n of 0", "One day", n=0),
    _complete("penalty out of range", "One day", presence_penalty=3),
    _complete("max_tokens of 0", "One day", max_tokens=0),
    _complete("max_tokens below 0", "One day", max_tokens=-1),
    _complete("max_tokens beyond the model's", "The capital of France is", max_tokens=100_000),
    _complete("min_tokens above max_tokens", "One day", min_tokens=40),
    _complete("prompt too long", "One day " * 1024),
    _chat("chat too long", "One day " * 1024),
    _complete("logprobs beyond max_logprobs", "One day", logprobs=21),
    _complete("logit_bias of no token", "One day", logit_bias={"99999999": 1}),
    _complete("a regex that is none", "One day", structured_outputs={"regex": "("}),
    _complete("two forms at once", "One day", structured_outputs={"regex": "a", "choice": ["a"]}),
    _complete("stream_options without stream", "One day", stream_options={"include_usage": True}),
    _complete("an unknown field", "One day", no_such_field=1),
    _chat("unknown role", "", messages=[{"role": "wizard", "content": "Hello!"}]),
    _chat("top_logprobs without logprobs", "Hello!", top_logprobs=2),
    _chat("unknown response_format", "Hello!", response_format={"type": "xml"}),
    _chat(
        "a schema that is none",
        "Hello!",
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "cat"}}},
    ),
    _chat("tool_choice without tools", "Hello!", tool_choice="required"),
    _chat("tool_choice of no tool", "Hello!", tools=TOOLS, tool_choice={"type": "function", "function": {"name": "fly"}}),
    Case("no key", "/v1/models", headers={"Authorization": ""}),
    Case("a wrong key", "/v1/models", headers={"Authorization": "Bearer not-a-key-that-is-known"}),
    Case("no such route", "/v1/no-such-route"),
    Case("a method that is not taken", COMPLETION),
    Case("a body of another type", COMPLETION, b"prompt=hello", headers={"Content-Type": "application/x-www-form-urlencoded"}),
)

STATES = (
    Case("models", "/v1/models"),
    Case("version", "/version"),
    Case("health", "/health", is_text=True),
    Case("tokenize", "/tokenize", {"model": "demo", "prompt": "One day Björn saw 猫 🐱."}),
    Case("tokenize with names", "/tokenize", {"prompt": "One day", "return_token_strs": True}),
    Case("tokenize a chat", "/tokenize", {"model": "demo", "messages": user("Hello!"), "tools": TOOLS}),
    Case("tokenize nothing", "/tokenize", {"model": "demo"}),
    Case("detokenize", "/detokenize", {"model": "demo", "tokens": [743, 364, 757, 377, 297, 2]}),
    Case("detokenize no token", "/detokenize", {"model": "demo", "tokens": [10**6]}),
    Case("tokenizer_info", "/tokenizer_info"),
    Case("reset_prefix_cache", "/reset_prefix_cache", b"", is_text=True),
    Case("metrics", "/metrics", is_text=True),
)

CASES = (*ANSWERED, *REFUSED, *STATES)
