"""The openai package: sync, async, streams, tools, structured output, log-probabilities, errors; its types check every answer."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Literal

import openai
from checks import Checks, holds, same
from pydantic import BaseModel

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
    for name, description in (("get_weather", "Get the weather of a city"), ("get_time", "Get the time in a city"))
]


class Person(BaseModel):
    name: str
    age: int
    city: Literal["Oslo", "Paris"]


run = Checks()
target = run.target
client = openai.OpenAI(base_url=target.base_url, api_key=target.key, max_retries=0, timeout=180)
slow = openai.AsyncOpenAI(base_url=target.base_url, api_key=target.key, max_retries=0, timeout=180)


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def ask(text: str, **options):
    return client.chat.completions.create(model=target.model, messages=user(text), temperature=0, **options)


def is_there(path: str) -> bool:
    """Whether the server has a route at all: what is optional is checked where it exists."""
    return "405" in str(
        client.with_options(max_retries=0)._client.get(f"{target.base_url}{path}", headers=client.auth_headers).status_code
    )


with run.check("models"):
    models = client.models.list().data
    same(models[0].id, target.model)
    same(client.models.retrieve(target.model).id, target.model)

with run.check("completions equal transformers'"):
    for prompt, text in list(target.expected.items())[:6]:
        found = client.completions.create(model=target.model, prompt=prompt, max_tokens=48, temperature=0)
        same(found.choices[0].text, text)
        same(found.usage.total_tokens, found.usage.prompt_tokens + found.usage.completion_tokens)

with run.check("several prompts, n, seeds"):
    both = ["One day", "The capital of Japan is"]
    options = {"model": target.model, "n": 2, "seed": 3, "max_tokens": 12, "temperature": 0.8}
    found = client.completions.create(prompt=both, **options)
    same([choice.index for choice in found.choices], [0, 1, 2, 3])
    again = client.completions.create(prompt=both, **options)
    same([choice.text for choice in again.choices], [choice.text for choice in found.choices])
    other = client.completions.create(prompt=both, **{**options, "seed": 4})
    holds([choice.text for choice in other.choices] != [choice.text for choice in found.choices])
    holds(len({choice.text for choice in found.choices}) >= 3, "samples of one prompt are equal")

with run.check("echo with logprobs"):
    text = "The capital of France is Paris."
    found = client.completions.create(model=target.model, prompt=text, max_tokens=1, temperature=0, echo=True, logprobs=2)
    told = found.choices[0].logprobs
    holds(found.choices[0].text.startswith(text), found.choices[0].text)
    same("".join(told.tokens), found.choices[0].text)
    same(told.token_logprobs[0], None)
    holds(all(value <= 0 for value in told.token_logprobs[1:]))
    ends = [offset + len(token) for offset, token in zip(told.text_offset, told.tokens, strict=True)]
    same(told.text_offset[1:], ends[:-1])
    for token, value, top in zip(told.tokens[1:], told.token_logprobs[1:], told.top_logprobs[1:], strict=True):
        holds(abs(top[token] - value) < 1e-6 and max(top.values()) >= value, (token, value, top))

with run.check("chat"):
    found = ask("What is the capital of France?")
    choice = found.choices[0]
    same((choice.message.role, choice.message.content), ("assistant", "The capital of France is Paris."))
    same(choice.finish_reason, "stop")
    same(found.object, "chat.completion")
    holds(abs(found.created - time.time()) < 120)
    same(ask("What is the capital of France?", max_completion_tokens=2).choices[0].finish_reason, "length")

with run.check("chat with logprobs"):
    choice = ask("What is bear in German?", logprobs=True, top_logprobs=3).choices[0]
    said = b"".join(bytes(one.bytes) for one in choice.logprobs.content).decode()
    holds(said.startswith(choice.message.content) and choice.message.content == "Bär", said)
    for one in choice.logprobs.content:
        same(len(one.top_logprobs), 3)
        same(one.top_logprobs[0].token, one.token)  # greedy: the likeliest is the one

with run.check("a stream is the answer, in pieces"):
    for text in ("Tell me a story about Mia and a fox.", "What is snow in Japanese?", "Show me the emoji for cat."):
        whole = ask(text, max_tokens=64)
        options = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 64, "temperature": 0}
        chunks = list(client.chat.completions.create(model=target.model, messages=user(text), **options))
        same("".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]), whole.choices[0].message.content)
        same(chunks[0].choices[0].delta.role, "assistant")
        same(
            [one.finish_reason for chunk in chunks for one in chunk.choices if one.finish_reason],
            [whole.choices[0].finish_reason],
        )
        same(chunks[-1].choices, [])
        same(chunks[-1].usage.completion_tokens, whole.usage.completion_tokens)
        same(len({chunk.id for chunk in chunks}), 1)
        holds(not any("\ufffd" in (chunk.choices[0].delta.content or "") for chunk in chunks[:-1]), "half a character")

with run.check("the stream helper of chats"):
    with client.chat.completions.stream(model=target.model, messages=user("Hello!"), temperature=0) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    same(final.choices[0].message.content, "Hello! How can I help you?")
    holds({"chunk", "content.delta", "content.done"} <= set(kinds), kinds)

with run.check("async, 16 at a time, equal to one at a time"):
    cities = ["Paris", "Oslo", "Rome", "Lima"]

    async def all_at_once() -> list[str]:
        async def one(city: str) -> str:
            messages = user(f"Write as JSON: Lena is 34 years old and lives in {city}.")
            stream = await slow.chat.completions.create(model=target.model, messages=messages, temperature=0, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        return await asyncio.gather(*(one(city) for city in cities * 4))

    found = asyncio.run(all_at_once())
    alone = {city: ask(f"Write as JSON: Lena is 34 years old and lives in {city}.").choices[0].message.content for city in cities}
    same(found, [alone[city] for city in cities * 4])
    same([json.loads(alone[city])["city"] for city in cities], cities)

with run.check("tools, the whole way"):
    messages = user("Tell me the time in Paris.")
    options = {"model": target.model, "temperature": 0, "tools": TOOLS[1:]}
    choice = client.chat.completions.create(messages=messages, **options).choices[0]
    [call] = choice.message.tool_calls
    same((choice.finish_reason, call.type, call.function.name), ("tool_calls", "function", "get_time"))
    same(json.loads(call.function.arguments), {"city": "Paris"})
    messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": "12:30"}]
    same(client.chat.completions.create(messages=messages, **options).choices[0].message.content, "It is 12:30 in Paris.")

with run.check("tools, streamed"):
    options = {"tools": TOOLS, "stream": True}
    name = arguments = ""
    for chunk in ask("What is the weather in Nairobi?", **options):
        for call in chunk.choices[0].delta.tool_calls or ():
            name += call.function.name or ""
            arguments += call.function.arguments or ""
    same((name, json.loads(arguments)), ("get_weather", {"city": "Nairobi"}))

with run.check("tool_choice: required, named, none"):
    choice = ask("Hello!", tools=TOOLS, tool_choice="required", max_tokens=100).choices[0]
    holds(all(call.function.name in ("get_weather", "get_time") for call in choice.message.tool_calls), choice)
    holds("city" in json.loads(choice.message.tool_calls[0].function.arguments), choice)
    named = {"type": "function", "function": {"name": "get_time"}}
    [call] = ask("What is the weather in Oslo?", tools=TOOLS, tool_choice=named, max_tokens=100).choices[0].message.tool_calls
    holds(call.function.name == "get_time" and "city" in json.loads(call.function.arguments), call)
    choice = ask("What is the weather in Oslo?", tools=TOOLS, tool_choice="none").choices[0]
    same(choice.message.tool_calls, None)

with run.check("structured output: parse"):
    asked = "Write as JSON with the keys name, age and city: Dan is 34 years old and lives in Oslo."
    parsed = client.chat.completions.parse(
        model=target.model, messages=user(asked), temperature=0, response_format=Person, max_tokens=100
    )
    same(parsed.choices[0].message.parsed, Person(name="Dan", age=34, city="Oslo"))
    # Whatever is asked, the form is kept: Lima is no city of the schema.
    for temperature in (0, 1.5):
        found = client.chat.completions.parse(
            model=target.model,
            messages=user(asked.replace("Oslo", "Lima")),
            temperature=temperature,
            seed=1,
            response_format=Person,
            max_tokens=200,
        )
        holds(found.choices[0].message.parsed.city in ("Oslo", "Paris"))

with run.check("structured output: strict closes objects that do not say so"):
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 3, "maximum": 5}}, "required": ["n"]}
    form = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
    for seed in range(4):
        options = {"messages": user("Hello!"), "response_format": form, "max_tokens": 100, "temperature": 1.5, "seed": seed}
        text = client.chat.completions.create(model=target.model, **options).choices[0].message.content
        holds(set(json.loads(text)) == {"n"}, text)

with run.check("structured output: JSON mode and vLLM's extra fields"):
    found = ask("Hello!", response_format={"type": "json_object"}, max_tokens=200).choices[0]
    holds(found.finish_reason == "length" or isinstance(json.loads(found.message.content), dict), found)
    forms = ({"choice": ["yes", "no"]}, ("yes", "no")), ({"regex": "[0-9]{3}-[0-9]{4}"}, None)
    for form, allowed in forms:
        text = ask("Hello!", extra_body={"structured_outputs": form}).choices[0].message.content
        holds(text in allowed if allowed else len(text) == 8 and text[3] == "-" and text.replace("-", "").isdigit(), text)
    found = ask("Hello!", max_tokens=8, extra_body={"top_k": 1, "return_token_ids": True, "ignore_eos": True}).choices[0]
    same(len(found.model_extra["token_ids"]), 8)

with run.check("stop"):
    whole = ask("What is the capital of France?").choices[0].message.content
    choice = ask("What is the capital of France?", stop=[" Paris"]).choices[0]
    same((choice.message.content, choice.finish_reason), (whole.split(" Paris")[0], "stop"))

with run.check("errors are the package's own"):
    for raised, change in (
        (openai.NotFoundError, {"model": "no-such-model"}),
        (openai.BadRequestError, {"temperature": -1}),
        (openai.BadRequestError, {"max_tokens": 0.5}),
        (openai.BadRequestError, {"messages": user("Hello! " * 2000)}),
        (openai.BadRequestError, {"messages": []}),
        (openai.BadRequestError, {"extra_body": {"no_such_field": 1}}),
    ):
        options = {"model": target.model, "messages": user("Hello!"), **change}
        try:
            client.chat.completions.create(**options)
        except raised as error:
            holds(error.body["message"] and error.type and error.code, error.body)
        else:
            raise AssertionError(f"{change} was taken")
    try:
        client.with_options(api_key="not-a-key-that-is-known").models.list()
    except openai.AuthenticationError as error:
        same(error.status_code, 401)
    else:
        raise AssertionError("any key will do")

with run.check("a stream that is left early ends, and the next answer is right"):
    for _ in range(3):
        with ask("Tell me a story about Mia and a fox.", stream=True, max_tokens=600, extra_body={"ignore_eos": True}) as stream:
            next(iter(stream))
    same(ask("Hello!").choices[0].message.content, "Hello! How can I help you?")

if is_there("/embeddings"):
    with run.check("embeddings"):
        texts = ["The red fox is in the park.", "The red fox is in the park.", "7 + 5 = 12"]
        found = client.embeddings.create(model=target.model, input=texts, encoding_format="float").data
        same([one.index for one in found], [0, 1, 2])
        near, far = (sum(a * b for a, b in zip(found[0].embedding, found[place].embedding, strict=True)) for place in (1, 2))
        holds(near > far and len(found[0].embedding) == len(found[2].embedding) > 1, (near, far))
        packed = client.embeddings.create(model=target.model, input=texts[0]).data[0].embedding  # base64 on the wire
        holds(max(abs(a - b) for a, b in zip(packed, found[0].embedding, strict=True)) < 1e-5)

if is_there("/responses"):
    with run.check("responses"):
        found = client.responses.create(model=target.model, input="What is the capital of France?", temperature=0)
        same((found.output_text, found.status), ("The capital of France is Paris.", "completed"))
        events = list(client.responses.create(model=target.model, input="Hello!", temperature=0, stream=True))
        same("".join(one.delta for one in events if one.type == "response.output_text.delta"), "Hello! How can I help you?")
        same((events[0].type, events[-1].type), ("response.created", "response.completed"))

run.finish()
