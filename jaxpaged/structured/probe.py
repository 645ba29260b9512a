"""The process in which grammars are tried out: whatever one of them does to it, it does to a child of this process alone.

Native code that works on what a user sends may take for ever, fill the memory or overrun its stack. So each grammar is compiled,
and some ways through it walked, in a child of its own that is forked from here with limits on its time and memory, and dies of
them. What it was does not matter to anybody: a grammar that has passed is compiled once more where it is used, with the same
limits of llguidance. Nothing is written to any disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import resource
import select
import signal
import sys
import time
from typing import TYPE_CHECKING, Any, BinaryIO

import psutil

from jaxpaged.framed import HEAD
from jaxpaged.structured.limits import Limits
from jaxpaged.structured.source import grammar_text
from jaxpaged.structured.vocabulary import load_vocabulary

if TYPE_CHECKING:
    import llguidance

MAX_REPLY = 4 << 20
_NOT_ZERO = re.compile(rb"[^\0]")
# In what llguidance says of a grammar that is one, but a large one.
_COMPLEX = ("too complex", "too many", "max is", "too large", "too big", "limit", "fuel", "exceed", "size")


def write_frame(file: BinaryIO, value: Any) -> None:
    """A value of JSON, and its length before it."""
    body = json.dumps(value).encode()
    file.write(HEAD.pack(len(body)) + body)
    file.flush()


def read_frame(file: BinaryIO) -> Any:
    """Inverse of `write_frame`; None at the end of the file."""
    head = file.read(HEAD.size)
    if len(head) < HEAD.size:
        return None
    (num_bytes,) = HEAD.unpack(head)
    body = file.read(num_bytes)
    return json.loads(body) if len(body) == num_bytes else None


def main() -> None:
    """Serve until stdin ends: first a tokenizer and limits, then grammars, one at a time."""
    asks, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a library prints is no answer
    os.nice(10)  # who waits for a grammar waits; who waits for tokens does not
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    hello = read_frame(asks)
    if hello is None:
        return
    limits = Limits(**hello["limits"])
    try:
        vocabulary = load_vocabulary(hello["tokenizer"])
    except Exception as error:
        write_frame(answers, {"error": _one_line(error)})
        return
    try_out(vocabulary, {"regex": "a|b"}, limits)  # what is set up once is set up here, not in every child
    write_frame(answers, {"ok": True})
    least = in_child(vocabulary, {"regex": "a|b"}, limits).get("num_bytes", 0)  # pages that any child makes its own
    while (given := read_frame(asks)) is not None:
        answer = in_child(vocabulary, given, limits)
        if "num_bytes" in answer:
            answer["num_bytes"] = max(0, answer["num_bytes"] - least)
        write_frame(answers, answer)


def in_child(vocabulary: llguidance.LLTokenizer, given: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """What comes of trying it out, or what its child died of."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        with contextlib.suppress(BaseException):
            _limit(limits)
            body = json.dumps(try_out(vocabulary, given, limits)).encode()
            with os.fdopen(writing, "wb") as file:
                file.write(body)
        os._exit(0)
    os.close(writing)
    body = b""
    with os.fdopen(reading, "rb", buffering=0) as file:
        # Its own alarm kills it, so that it ends even when nobody is here any more; this is for a system without one.
        while select.select([file], [], [], limits.wall_s + 1)[0] and (piece := file.read(1 << 16)):
            body += piece
            if len(body) > MAX_REPLY:
                break
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    with contextlib.suppress(ValueError):
        return json.loads(body)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM:
        return {"too_complex": f"compiling it takes more than {limits.wall_s:g} s"}
    return {"too_complex": f"compiling it takes more than {limits.memory_bytes / 2**20:g} MiB, or more stack than there is"}


def _limit(limits: Limits) -> None:
    """End this process when it takes too much, whatever it is doing then."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, limits.wall_s)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        num_bytes = psutil.Process().memory_info().vms + limits.memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))


def try_out(vocabulary: llguidance.LLTokenizer, given: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """Compile it and walk some random ways: {"grammar", "num_bytes"}, or "error" or "too_complex" with the reason."""
    from llguidance import LLMatcher

    num_before = psutil.Process().memory_info().rss
    try:
        grammar = grammar_text(given)
    except MemoryError:
        raise
    except Exception as error:
        return {"error": _one_line(error)}
    matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=limits.of_parser())
    problem = matcher.get_error()
    rng = random.Random(0)
    for walk in range(limits.walks):
        one = matcher.deep_copy()
        for place in range(limits.walk_len):
            started = time.process_time()
            token_id = _any_of(one.compute_bitmask(), vocabulary.eos_token, rng)
            if problem := problem or one.get_error():
                if problem.startswith("NoExtension"):  # a rule that needs itself first, for one
                    return {"error": "no text is of this form"}
                return {"too_complex" if any(word in problem for word in _COMPLEX) else "error": _one_line(problem)}
            if token_id is None:
                if not walk and not place:
                    return {"error": "no text but the empty one is of this form"}
                break
            one.consume_token(token_id)
            if time.process_time() - started > limits.step_s:
                return {"too_complex": f"a token of it takes more than {limits.step_s:g} s"}
            if one.is_stopped() and not one.is_error():
                break
    return {"grammar": grammar, "num_bytes": max(0, psutil.Process().memory_info().rss - num_before)}


def _any_of(mask: bytes, end: int, rng: random.Random) -> int | None:
    """One of the tokens that may come next, other than the end of the grammar."""
    found = bytearray(mask)
    found[end // 8] &= ~(1 << end % 8)
    place = _NOT_ZERO.search(found, rng.randrange(len(found))) or _NOT_ZERO.search(found)
    if place is None:
        return None
    byte = found[place.start()]
    return place.start() * 8 + rng.choice([bit for bit in range(8) if byte >> bit & 1])


def _one_line(error: object, limit: int = 160) -> str:
    text = " ".join(str(error).replace("<non-verbose/>", "").split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


if __name__ == "__main__":
    main()
