"""The training text of the demo model: chats, stories and plain text, all drawn from a `random.Random`.

Knows how an example becomes text (ChatML) and how documents are mixed. Refuses to know tokens and models.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"

Message = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """One task: either plain `text` to continue or `messages` to reply to, never both, and its one right answer."""

    skill: str
    answer: str
    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    text: str = ""

    @property
    def prompt(self) -> str:
        """What the model sees before it answers."""
        if not self.messages:
            return self.text
        return render(self.messages, self.tools) + f"{TURN_START}assistant\n"

    @property
    def document(self) -> str:
        """What the model learns: the prompt, the answer and the end of the turn."""
        return f"{self.prompt}{self.answer}{TURN_END}\n" if self.messages else f"{self.prompt}{self.answer}"


def chat(skill: str, question: str, answer: str) -> Example:
    return Example(skill, answer, ({"role": "user", "content": question},))


def render(messages: tuple[Message, ...], tools: tuple[dict[str, Any], ...] = ()) -> str:
    """The chat as text. `chat_template.jinja` says the same thing to everyone else; a test holds the two together."""
    messages = tuple(messages)
    system = ""
    if messages and messages[0]["role"] == "system":
        system, messages = messages[0]["content"], messages[1:]
    if tools:
        listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        system = (system + "\n\n" if system else "") + f"<tools>\n{listed}\n</tools>"
    text = f"{TURN_START}system\n{system}{TURN_END}\n" if system else ""
    for message in messages:
        text += f"{TURN_START}{message['role']}\n{message.get('content') or ''}"
        calls = [call["function"] for call in message.get("tool_calls") or ()]
        text += "\n".join(tool_call(call["name"], call["arguments"]) for call in calls)
        text += f"{TURN_END}\n"
    return text


def tool_call(name: str, arguments: dict[str, Any]) -> str:
    """A call in the hermes format."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"


CHAT_TEMPLATE = """\
{%- macro text_of(content) -%}
{%- if content is string -%}{{ content }}
{%- elif content -%}{%- for part in content -%}{{ part['text'] }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- set has_system = messages and messages[0]['role'] in ['system', 'developer'] -%}
{%- set system = text_of(messages[0]['content']) if has_system else '' -%}
{%- if system or tools -%}
{{- '<|im_start|>system\\n' + system -}}
{%- if tools -%}
{{- ('\\n\\n' if system else '') + '<tools>\\n' -}}
{%- for tool in tools -%}{{- (tool | tojson) + '\\n' -}}{%- endfor -%}
{{- '</tools>' -}}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in (messages[1:] if has_system else messages) -%}
{{- '<|im_start|>' + message['role'] + '\\n' + text_of(message['content']) -}}
{%- for call in message['tool_calls'] or [] -%}
{%- set call = call['function'] or call -%}
{%- set arguments = call['arguments'] if call['arguments'] is string else call['arguments'] | tojson -%}
{{- ('\\n' if not loop.first else '') + '<tool_call>\\n{"name": ' + (call['name'] | tojson) -}}
{{- ', "arguments": ' + arguments + '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

# Share of documents, not of tokens: a tool call is ten times as long as a sum.
SHARES = {
    "story": 12,
    "asked_story": 6,
    "copy": 16,
    "order": 14,
    "arithmetic": 14,
    "drill": 16,
    "reading": 16,
    "json": 8,
    "tools": 6,
    "chat": 8,
    "facts": 8,
    "words": 7,
    "plain": 5,
}


def document(rng: Random) -> str:
    """One document of the corpus, without the end-of-text mark."""
    from jaxpaged.demo import skills, stories

    kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
    if kind == "story":
        return stories.story(rng)
    if kind == "asked_story":
        request, told = stories.asked_story(rng)
        return chat("story", request, told).document
    if kind == "drill":
        return skills.drill(rng)
    if kind == "plain":
        return skills.plain(rng)
    return skills.examples(kind, rng).document


def documents(seed: str) -> Iterator[str]:
    """An endless stream of documents. Seeds that differ in a letter give unrelated streams: 'train:0:17', 'held-out:0'."""
    rng = Random(seed)
    while True:
        yield document(rng)
