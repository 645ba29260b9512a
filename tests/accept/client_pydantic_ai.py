"""pydantic-ai: an agent that talks, one that calls a function of ours and goes on, one whose output has a form, streams."""

from __future__ import annotations

import asyncio
from typing import Literal

from checks import Checks, holds, same
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Person(BaseModel):
    name: str
    age: int
    city: Literal["Oslo", "Paris"]


run = Checks()
target = run.target
model = OpenAIChatModel(target.model, provider=OpenAIProvider(base_url=target.base_url, api_key=target.key))
settings = {"temperature": 0, "max_tokens": 200, "timeout": 60}

with run.check("an agent talks"):
    found = Agent(model, model_settings=settings).run_sync("What is the capital of France?")
    same(found.output, "The capital of France is Paris.")
    holds(found.usage.input_tokens > 5 and found.usage.output_tokens > 5, found.usage)

with run.check("it remembers"):
    agent = Agent(model, model_settings=settings, system_prompt="You are Nora.")
    first = agent.run_sync("My name is Kofi.")
    same(agent.run_sync("What is my name?", message_history=first.all_messages()).output, "Your name is Kofi.")

with run.check("it calls a function and goes on"):
    cities: list[str] = []

    def get_time(city: str) -> str:
        """Get the time in a city"""
        cities.append(city)
        return "12:30"

    agent = Agent(model, model_settings=settings, tools=[get_time], retries=0)
    same(agent.run_sync("Tell me the time in Paris.").output, "It is 12:30 in Paris.")
    same(cities, ["Paris"])

with run.check("output of a form, by schema"):
    agent = Agent(model, output_type=NativeOutput(Person, strict=True), model_settings=settings, retries=0)
    found = agent.run_sync("Write as JSON with the keys name, age and city: Dan is 34 years old and lives in Oslo.").output
    same((found.name, found.age, found.city), ("Dan", 34, "Oslo"))

with run.check("output of a form, by a function that must be called"):
    agent = Agent(model, output_type=Person, model_settings=settings, retries=0)
    found = agent.run_sync("Write as JSON with the keys name, age and city: Dan is 34 years old and lives in Oslo.").output
    holds(isinstance(found.age, int) and found.city in ("Oslo", "Paris"), found)

with run.check("a stream"):

    async def streamed() -> list[str]:
        async with Agent(model, model_settings=settings).run_stream("What is PagedAttention?") as answer:
            return [piece async for piece in answer.stream_text(delta=True, debounce_by=None)]

    pieces = asyncio.run(streamed())
    holds("".join(pieces).startswith("PagedAttention stores the keys and values of a sequence in pages"), pieces)
    holds(len(pieces) > 10, len(pieces))

run.finish()
