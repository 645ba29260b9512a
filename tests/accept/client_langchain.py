"""langchain-openai: messages, streams, batches, async, tools bound to a model, structured output, embeddings of token ids."""

from __future__ import annotations

import asyncio
from typing import Literal

from checks import Checks, holds, same
from langchain_core.messages import AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel


class Person(BaseModel):
    """A person."""

    name: str
    age: int
    city: Literal["Oslo", "Paris"]


@tool
def get_time(city: str) -> str:
    """Get the time in a city"""
    return "12:30"


run = Checks()
target = run.target
options = {"model": target.model, "base_url": target.base_url, "api_key": target.key, "temperature": 0, "max_retries": 0}
model = ChatOpenAI(**options, timeout=60)

with run.check("invoke"):
    found = model.invoke([HumanMessage("What is the capital of France?")])
    same(found.content, "The capital of France is Paris.")
    same(found.response_metadata["finish_reason"], "stop")
    usage = found.usage_metadata
    same(usage["total_tokens"], usage["input_tokens"] + usage["output_tokens"])
    holds(usage["output_tokens"] > 5, usage)

with run.check("a conversation"):
    messages = [SystemMessage("You are Nora."), HumanMessage("My name is Kofi.")]
    messages += [model.invoke(messages), HumanMessage("What is my name?")]
    same(model.invoke(messages).content, "Your name is Kofi.")

with run.check("stream"):
    whole = model.invoke("Tell me a story about Mia and a fox.", max_tokens=48)
    total = AIMessageChunk(content="")
    pieces = 0
    for chunk in model.stream("Tell me a story about Mia and a fox.", max_tokens=48, stream_usage=True):
        total, pieces = total + chunk, pieces + 1
    same(total.content, whole.content)
    same(total.usage_metadata["output_tokens"], whole.usage_metadata["output_tokens"])
    holds(pieces > 10, pieces)

with run.check("batch and async batch"):
    texts = [f"What is {word} in German?" for word in ("bear", "sun", "tree", "book")]
    expected = ["Bär", "Sonne", "Baum", "Buch"]
    same([one.content for one in model.batch(texts)], expected)
    same([one.content for one in asyncio.run(model.abatch(texts))], expected)

with run.check("tools"):
    bound = model.bind_tools([get_time])
    messages = [HumanMessage("Tell me the time in Paris.")]
    found = bound.invoke(messages)
    same([(call["name"], call["args"]) for call in found.tool_calls], [("get_time", {"city": "Paris"})])
    messages += [found, ToolMessage(get_time.invoke(found.tool_calls[0]["args"]), tool_call_id=found.tool_calls[0]["id"])]
    same(bound.invoke(messages).content, "It is 12:30 in Paris.")
    streamed = AIMessageChunk(content="")
    for chunk in bound.stream("Tell me the time in Paris."):
        streamed += chunk
    same([(call["name"], call["args"]) for call in streamed.tool_calls], [("get_time", {"city": "Paris"})])

with run.check("structured output"):
    asked = "Write as JSON with the keys name, age and city: Dan is 34 years old and lives in Oslo."
    same(model.with_structured_output(Person, method="json_schema").invoke(asked), Person(name="Dan", age=34, city="Oslo"))
    # As a function that must be called: the form is kept, whatever the model makes of it.
    called = ChatOpenAI(**options, max_tokens=200).with_structured_output(Person, method="function_calling").invoke(asked)
    holds(called is not None and called.city in ("Oslo", "Paris"), called)

with run.check("completions"):
    complete = OpenAI(**options, max_tokens=48)
    prompt = "One day Mia went to"
    same(complete.invoke(prompt), target.expected[prompt])
    same("".join(complete.stream(prompt)), target.expected[prompt])

with run.check("log-probabilities"):
    found = model.invoke("What is sun in German?", logprobs=True, top_logprobs=2)
    content = found.response_metadata["logprobs"]["content"]
    same("".join(one["token"] for one in content).removesuffix("<|im_end|>"), "Sonne")
    holds(all(one["logprob"] <= 0 and len(one["top_logprobs"]) == 2 for one in content), content)

run.finish()
