"""litellm as tools such as aider use it: `hosted_vllm/...`, streams, async, tools, JSON, its own exceptions."""

from __future__ import annotations

import asyncio
import json

import litellm
from checks import Checks, holds, same

run = Checks()
target = run.target
options = {"model": f"hosted_vllm/{target.model}", "api_base": target.base_url, "api_key": target.key, "temperature": 0}
options |= {"num_retries": 0, "timeout": 60}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "Get the time in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


with run.check("chat"):
    found = litellm.completion(messages=user("What is the capital of France?"), **options)
    same((found.choices[0].message.content, found.choices[0].finish_reason), ("The capital of France is Paris.", "stop"))
    same(found.usage.total_tokens, found.usage.prompt_tokens + found.usage.completion_tokens)

with run.check("stream"):
    chunks = list(litellm.completion(messages=user("Hello!"), stream=True, stream_options={"include_usage": True}, **options))
    same("".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices), "Hello! How can I help you?")
    rebuilt = litellm.stream_chunk_builder(chunks)
    same(rebuilt.choices[0].message.content, "Hello! How can I help you?")
    same(rebuilt.usage.completion_tokens, litellm.completion(messages=user("Hello!"), **options).usage.completion_tokens)

with run.check("async"):

    async def several() -> list[str]:
        asked = (litellm.acompletion(messages=user(f"What is {word} in German?"), **options) for word in ("bear", "sun", "tree"))
        return [found.choices[0].message.content for found in await asyncio.gather(*asked)]

    same(asyncio.run(several()), ["Bär", "Sonne", "Baum"])

with run.check("tools"):
    choice = litellm.completion(messages=user("Tell me the time in Paris."), tools=[TOOL], **options).choices[0]
    [call] = choice.message.tool_calls
    same((choice.finish_reason, call.function.name), ("tool_calls", "get_time"))
    same(json.loads(call.function.arguments), {"city": "Paris"})
    messages = [
        *user("Tell me the time in Paris."),
        choice.message.model_dump(),
        {"role": "tool", "tool_call_id": call.id, "content": "12:30"},
    ]
    same(litellm.completion(messages=messages, tools=[TOOL], **options).choices[0].message.content, "It is 12:30 in Paris.")

with run.check("JSON schema"):
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 3, "maximum": 5}}, "required": ["n"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    text = litellm.completion(messages=user("Hello!"), response_format=form, max_tokens=100, **options).choices[0].message.content
    holds(json.loads(text)["n"] in (3, 4, 5), text)

with run.check("text completion"):
    prompt = "One day Mia went to"
    same(litellm.text_completion(prompt=prompt, max_tokens=48, **options).choices[0].text, target.expected[prompt])

with run.check("exceptions"):
    for raised, change in (
        (litellm.BadRequestError, {"top_p": 7}),
        (litellm.AuthenticationError, {"api_key": "not-a-key-that-is-known"}),
        (litellm.NotFoundError, {"model": "hosted_vllm/no-such-model"}),
    ):
        try:
            litellm.completion(messages=user("Hello!"), **{**options, **change})
        except raised:
            continue
        raise AssertionError(f"{change} was taken")

run.finish()
