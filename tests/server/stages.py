"""R10: eight requests at once, and something of ours that raises in one of them, wherever requests are by themselves.

The fault knows its request by a mark that the client has put into it. `trials` raises when a law is broken and returns how many
it has seen.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent))
from hostile import CHAT, LEAKS
from running import Running
from storm import asked, at_once, settled

from jaxpaged import adjuster
from jaxpaged.growing import GrowingRequest
from jaxpaged.prompts import chat_prompt
from jaxpaged.server import chat
from jaxpaged.server.answers import Usage
from jaxpaged.server.calls import _Parsed
from jaxpaged.structured.grammars import Grammars
from jaxpaged.tokenizer import Tokenizer

MARK, SEED, NUM_TOP = "qqmarkqq", 987_654_321, 3
TOOL = {"type": "function", "function": {"name": MARK, "parameters": {"type": "object", "properties": {}}}}


def crowd(number: int) -> dict[str, Any]:
    """One of the eight, always the same."""
    words = " ".join(random.Random(number).choices(["pear", "apple", "fig", "plum", "kiwi"], k=3 + number))
    body = {"messages": [{"role": "user", "content": f"Sort these words: {words}"}], "max_tokens": 6 + number}
    body |= {"temperature": number % 2 * 0.8, "seed": number, "logprobs": True, "top_logprobs": 2, "stream": number % 3 == 0}
    body |= {"stop": ["zzz"]} if number % 2 else {"frequency_penalty": 0.5}
    return body


def _raising(inner: Callable[..., Any], is_marked: Callable[..., bool]) -> Callable[..., Any]:
    def run(*arguments: Any, **options: Any) -> Any:
        if is_marked(*arguments, **options):
            raise ZeroDivisionError("/home/secret 0x7fffdeadbeef")
        return inner(*arguments, **options)

    return run


def _in_text(part: str) -> Callable[..., Any]:
    """Makes what takes the text of a marked request raise at its third token."""
    begin = GrowingRequest.__init__

    def begun(self: GrowingRequest, request: Any, prompt: Any, tokenizer: Any) -> None:
        begin(self, request, prompt, tokenizer)
        if request.params.seed == SEED:
            for output in self.outputs:
                owner = getattr(output.text, part)
                count = iter(range(10**6))
                broken = mock.Mock(wraps=owner)
                broken.add = _raising(owner.add, lambda *_, count=count, **__: next(count) == 2)
                broken.text = ""
                setattr(output.text, part, broken)

    return begun


# Where it raises -> what the marked request has more than the one whose place it takes, and what is put in place of what.
STAGES: dict[str, tuple[dict[str, Any], Any, str, Callable[..., Any]]] = {
    "sampling": ({"user": MARK}, chat, "chat_sampling", _raising(chat.chat_sampling, lambda body, _: body.get("user") == MARK)),
    "template": (
        {"user": MARK, "chat_template_kwargs": {"mark": MARK}},
        chat,
        "chat_prompt",
        _raising(chat_prompt, lambda *_, **more: MARK in str(more.get("chat_template_kwargs"))),
    ),
    "tokenise": (
        {"messages": [{"role": "user", "content": MARK}]},
        Tokenizer,
        "encode",
        _raising(Tokenizer.encode, lambda _, text, *__, **___: MARK in text),
    ),
    "grammar": (
        {"structured_outputs": {"choice": [MARK]}},
        Grammars,
        "find",
        _raising(Grammars.find, lambda _, params, *__: MARK in str(params.choice)),
    ),
    "logits": (
        {"seed": SEED, "min_tokens": 2},
        adjuster,
        "rules",
        _raising(adjuster.rules, lambda chunk, *_: chunk.sequence.request.params.seed == SEED),
    ),
    "detokenise": ({"seed": SEED}, GrowingRequest, "__init__", _in_text("_detokenizer")),
    "stop": ({"seed": SEED, "stop": ["zzz"]}, GrowingRequest, "__init__", _in_text("_finder")),
    "tools": ({"tools": [TOOL]}, _Parsed, "take", _raising(_Parsed.take, lambda *_, **__: True)),
    "logprobs": (
        {"top_logprobs": NUM_TOP},
        chat,
        "chat_logprobs",
        _raising(chat.chat_logprobs, lambda *given: given[2] == NUM_TOP),
    ),
    "usage": (
        {"messages": [{"role": "user", "content": MARK}]},
        Usage,
        "add",
        _raising(Usage.add, lambda _, __, output: MARK in (output.prompt or "")),
    ),
}


def told(server: Running, body: dict[str, Any]) -> tuple[int, Any, bytes]:
    """What a client makes of an answer: its status, all it says but ids and times, and its bytes."""
    status, headers, content = asked(server, CHAT, body)
    if not headers["content-type"].startswith("text/event-stream"):
        found = json.loads(content)
        return status, found.get("choices", found), content
    events = content.decode().removesuffix("\n\n").split("\n\n")
    assert events[-1] == "data: [DONE]", content[-200:]
    whole: dict[str, Any] = {"text": "", "logprobs": [], "end": None, "error": None}
    for one in events[:-1]:
        found = json.loads(one.removeprefix("data: "))
        assert whole["error"] is None, "an event after the error"
        whole["error"] = found.get("error")
        for choice in found.get("choices", ()):
            whole["text"] += choice["delta"].get("content") or ""
            whole["logprobs"] += (choice["logprobs"] or {}).get("content", [])
            whole["end"] = choice["finish_reason"]
    return status, whole, content


def _together(server: Running, bodies: list[dict[str, Any]]) -> list[tuple[int, Any, bytes]]:
    found: dict[int, tuple[int, Any, bytes]] = {}

    def one(number: int) -> Callable[[], None]:
        return lambda: found.__setitem__(number, told(server, bodies[number]))

    at_once([one(number) for number in range(len(bodies))], len(bodies))
    return [found[number] for number in range(len(bodies))]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("jaxpaged")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # each of these faults is logged with its traceback, as it should be
    try:
        yield
    finally:
        logger.setLevel(level)


def trials(server: Running, seeds: Iterable[int]) -> int:
    """One fault each, in every stage in turn, in any of the eight, streamed or not."""
    bodies = [crowd(number) for number in range(8)]
    wanted = [answer[:2] for answer in _together(server, bodies)]
    assert all(status == 200 for status, _ in wanted)
    count, thread = 0, server.llm._thread._thread.ident
    with _quiet():
        for seed in seeds:
            name = list(STAGES)[seed % len(STAGES)]
            more, owner, attribute, faulty = STAGES[name]
            place = random.Random(seed).randrange(8)
            some = [*bodies[:place], bodies[place] | more | {"stream": seed // len(STAGES) % 2 == 0}, *bodies[place + 1 :]]
            with mock.patch.object(owner, attribute, faulty):
                found = _together(server, some)
            for number, (status, answer, raw) in enumerate(found):
                where = f"trial {seed}, {name} in {place}: request {number}: {status} {raw[:500]}"
                if number != place:
                    assert (status, answer) == wanted[number], f"{where}\nexpected {wanted[number]}"
                    continue
                error = answer["error"]
                assert status == 500 or (status == 200 and some[place]["stream"]), where
                assert error is not None and raw.count(b'"error"') == 1, where
                assert error["code"] == ("engine_step_failed" if name == "logits" else "internal_error"), where
                assert set(error) == {"message", "type", "param", "code"}, where
                assert not LEAKS.search(raw) and b"secret" not in raw, where
            settled(server)
            count += 1
    assert server.llm._thread._thread.ident == thread and server.llm.is_ready
    server.llm.check_health()
    return count
