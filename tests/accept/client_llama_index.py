"""llama-index-llms-openai-like: complete, chat, streams of both, async."""

from __future__ import annotations

import asyncio

from checks import Checks, holds, same
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike

run = Checks()
target = run.target
options = {"model": target.model, "api_base": target.base_url, "api_key": target.key, "temperature": 0, "max_retries": 0}
chatting = OpenAILike(**options, is_chat_model=True, is_function_calling_model=True, context_window=1024, max_tokens=48)
completing = OpenAILike(**options, is_chat_model=False, context_window=1024, max_tokens=48)
prompt = "One day Mia went to"
hello = [ChatMessage(role=MessageRole.USER, content="Hello!")]


def get_time(city: str) -> str:
    """Get the time in a city"""
    return "12:30"


with run.check("complete"):
    same(completing.complete(prompt).text, target.expected[prompt])

with run.check("complete, streamed"):
    pieces = list(completing.stream_complete(prompt))
    same(pieces[-1].text, target.expected[prompt])
    same("".join(piece.delta for piece in pieces), target.expected[prompt])

with run.check("chat"):
    found = chatting.chat(hello)
    same((found.message.role, found.message.content), (MessageRole.ASSISTANT, "Hello! How can I help you?"))
    same(found.raw.usage.total_tokens, found.raw.usage.prompt_tokens + found.raw.usage.completion_tokens)
    messages = [*hello, found.message, ChatMessage(role=MessageRole.USER, content="What is bear in German?")]
    same(chatting.chat(messages).message.content, "Bär")

with run.check("chat, streamed"):
    pieces = list(chatting.stream_chat(hello))
    same(pieces[-1].message.content, "Hello! How can I help you?")
    holds(len(pieces) > 3, len(pieces))

with run.check("async"):

    async def several() -> list[str]:
        found = await asyncio.gather(*(chatting.acomplete(f"What is {word} in German?") for word in ("bear", "sun", "tree")))
        streamed = [piece.delta async for piece in await chatting.astream_chat(hello)]
        return [*(one.text for one in found), "".join(streamed)]

    same(asyncio.run(several()), ["Bär", "Sonne", "Baum", "Hello! How can I help you?"])

with run.check("a tool is called"):
    made = FunctionTool.from_defaults(get_time, description="Get the time in a city")
    found = chatting.chat_with_tools([made], user_msg="Tell me the time in Paris.")
    calls = chatting.get_tool_calls_from_response(found)
    same([(call.tool_name, call.tool_kwargs) for call in calls], [("get_time", {"city": "Paris"})])

run.finish()
