"""instructor: objects of pydantic from answers, by schema, by JSON mode and by tool; in pieces; several."""

from __future__ import annotations

from typing import Literal

import instructor
import openai
from checks import Checks, holds, same
from pydantic import BaseModel, ConfigDict, Field


# "forbid" is said in the schema: where nothing is said, JSON Schema allows further properties, and a model may think of some.
class Person(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    age: int
    city: Literal["Oslo", "Paris"]


class Numbered(BaseModel):
    model_config = ConfigDict(extra="forbid")
    n: int = Field(ge=3, le=5)


run = Checks()
target = run.target
base = openai.OpenAI(base_url=target.base_url, api_key=target.key, max_retries=0, timeout=180)
options = {"model": target.model, "temperature": 0, "max_retries": 0, "max_tokens": 200}
ASKED = "Write as JSON with the keys name, age and city: Dan is 34 years old and lives in Oslo."


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


with run.check("JSON_SCHEMA"):
    client = instructor.from_openai(base, mode=instructor.Mode.JSON_SCHEMA)
    for text in ("Hello!", "What is 2 + 3?", "Tell me a story about Mia and a fox."):
        holds(client.chat.completions.create(messages=user(text), response_model=Numbered, **options).n in (3, 4, 5))
    found = client.chat.completions.create(messages=user(ASKED), response_model=Person, **options)
    holds(found.city in ("Oslo", "Paris"), found)

with run.check("JSON_SCHEMA, with what was said beside it"):
    found, raw = client.chat.completions.create_with_completion(messages=user(ASKED), response_model=Person, **options)
    same(Person.model_validate_json(raw.choices[0].message.content).model_dump(), found.model_dump())
    same(raw.usage.total_tokens, raw.usage.prompt_tokens + raw.usage.completion_tokens)

with run.check("TOOLS: a function that must be called"):
    called = instructor.from_openai(base, mode=instructor.Mode.TOOLS)
    found = called.chat.completions.create(messages=user(ASKED), response_model=Person, **options)
    holds(isinstance(found.age, int) and found.city in ("Oslo", "Paris"), found)

with run.check("partial objects of a stream"):
    seen = list(client.chat.completions.create_partial(messages=user(ASKED), response_model=Person, **options))
    holds(len(seen) > 2 and seen[-1].city in ("Oslo", "Paris"), seen)

with run.check("a list of choices"):

    class Several(BaseModel):
        model_config = ConfigDict(extra="forbid")
        items: list[Numbered] = Field(min_length=2, max_length=2)

    found = client.chat.completions.create(messages=user("Hello!"), response_model=Several, **{**options, "max_tokens": 600})
    same(len(found.items), 2)

run.finish()
