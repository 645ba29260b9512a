"""Requests that no client of ours would send: valid ones, and what becomes of them when their grammar is broken somewhere.

A case is bytes for a socket. What is expected of every answer is in `judge`; see R32 and R47.
"""

from __future__ import annotations

import contextlib
import copy
import http.client
import io
import json
import os
import random
import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MESSAGES = [{"role": "user", "content": "Sort these words: pear, apple, fig"}]
TOOL = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}},
}
CHAT, COMPLETION, TOKENIZE, DETOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"


@dataclass(frozen=True)
class Case:
    """One request. `field` is what its error has to name where there is one; None where it may name any or none."""

    kind: str
    raw: bytes
    field: str | None = None
    must_fail: bool = False


def valid() -> list[tuple[str, dict[str, Any]]]:
    """60 requests, each served."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
    sampling: list[dict[str, Any]] = [
        *({}, {"temperature": 0}, {"temperature": 1.5, "seed": 7}, {"top_p": 0.5, "top_k": 4}, {"min_p": 0.1, "n": 2}),
        *({"presence_penalty": 1, "frequency_penalty": -1}, {"repetition_penalty": 1.2}, {"stop": ["a", "the"]}, {"stop": "x"}),
        *({"logit_bias": {"5": -100, "7": 3}}, {"stop_token_ids": [5, 9]}, {"bad_words": ["dog"]}, {"min_tokens": 2}),
        *({"allowed_token_ids": [5, 6, 7]}, {"ignore_eos": True}, {"priority": 3}, {"cache_salt": "mine"}, {"user": "me"}),
        *({"stream": True}, {"stream": True, "stream_options": {"include_usage": True}, "n": 2}, {"return_token_ids": True}),
        *({"structured_outputs": {"choice": ["yes", "no"]}}, {"response_format": {"type": "json_object"}}),
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
    ]
    found = [(COMPLETION, {"prompt": "One day", "max_tokens": 3, **one}) for one in sampling]
    found += [(CHAT, {"messages": MESSAGES, "max_tokens": 3, **one}) for one in sampling]
    found += [
        (COMPLETION, {"prompt": ["One day", "A dog"], "max_tokens": 2, "logprobs": 2}),
        (COMPLETION, {"prompt": [5, 6, 7], "max_tokens": 0, "echo": True, "logprobs": 1}),
        (COMPLETION, {"prompt": "One", "max_tokens": 2, "use_beam_search": True, "n": 2}),
        (COMPLETION, {"prompt": "One", "max_tokens": 2, "best_of": 2, "model": "demo", "prompt_logprobs": 1}),
        (CHAT, {"messages": MESSAGES, "max_tokens": 3, "logprobs": True, "top_logprobs": 2}),
        (CHAT, {"messages": MESSAGES, "max_tokens": 3, "tools": [TOOL], "tool_choice": "auto"}),
        (CHAT, {"messages": MESSAGES, "max_tokens": 3, "tools": [TOOL], "tool_choice": "required", "stream": True}),
        (CHAT, {"messages": [{"role": "system", "content": "x"}, *MESSAGES], "max_completion_tokens": 2, "model": "demo"}),
        (TOKENIZE, {"prompt": "One day", "return_token_strs": True}),
        (TOKENIZE, {"messages": MESSAGES}),
        (DETOKENIZE, {"tokens": [5, 6, 7]}),
        (TOKENIZE, {"prompt": "", "add_special_tokens": False}),
    ]
    return found


VALID = valid()

# Written into the JSON text, so that there may be what Python's writer does not write.
HOSTILE_VALUES = (
    *("null", "true", "false", "0", "-1", "1.5", "-0.0", "1e-320", "1e400", "-1e400", "NaN", "Infinity", "-Infinity"),
    *("9007199254740993", "18446744073709551616", "9" * 401, "9" * 5000, "[]", "{}", "[[]]", "[null]", "[true]", '[{"a":[]}]'),
    *(
        '""',
        '"\\u0000"',
        '"\\ud800"',
        '"x\\udfff\\ud800y"',
        '"5"',
        '"true"',
        '" "',
        '"' + "a" * 20_000 + '"',
        '"\\r\\nSet-Cookie: a"',
    ),
    *(
        '["", ""]',
        "[-1]",
        "[1.5]",
        "[99999999]",
        "[1,[2,[3]]]",
        '{"type":null}',
        '{"type":[]}',
        '{"type":"json_schema"}',
        "[" * 1500 + "]" * 1500,
    ),
    *('{"a":' * 1200 + "1" + "}" * 1200, '{"regex":"(a+)+$"}', '{"json":{"$ref":"#"}}', '{"type":"object","properties":[]}'),
    *(
        '{"choice":[]}',
        '{"grammar":"root ::= root"}',
        '[{"role":"user","content":[{"type":"text"}]}]',
        '[{"role":"user","content":{}}]',
    ),
    *('[{"type":"function","function":{"name":"a","parameters":{"$ref":"file:///x"}}}]', '[{"role":"tool","content":"x"}]'),
    *("[" + ",".join(["5"] * 3000) + "]", "[" + ",".join(['"a"'] * 200) + "]", '{"include_usage":1}', '"\\u2028\\ufeff\\u202e"'),
)
_MARK = "\u0001mark\u0001"


def request(
    path: str, body: bytes, *, method: str = "POST", headers: tuple[tuple[str, str], ...] = (), length: str | None = None
) -> bytes:
    """The bytes of one request."""
    lines = [f"{method} {path} HTTP/1.1", "Host: x", "Connection: close"]
    given = {name.lower() for name, _ in headers}
    if "content-type" not in given:
        lines.append("Content-Type: application/json")
    if "transfer-encoding" not in given:
        lines.append(f"Content-Length: {len(body) if length is None else length}")
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape") + body


def _text(value: Any) -> bytes:
    return json.dumps(value).encode()


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something is, at every depth."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, one in items:
        yield from _places(one, (*path, name))


def _swapped(rng: random.Random) -> Case:
    """Any value, at any depth, of any kind."""
    path, body = _pick(rng)
    place = rng.choice(list(_places(body)))
    if rng.random() < 0.3:  # a field that is not there yet
        place = (rng.choice(FIELDS),)
    owner = body
    for step in place[:-1]:
        owner = owner[step]
    owner[place[-1]] = _MARK
    value = rng.choice(HOSTILE_VALUES)
    text = json.dumps(body).replace(json.dumps(_MARK), value)
    return Case("value", request(path, text.encode("utf-8", "surrogatepass")), place[0])


def _missing(rng: random.Random) -> Case:
    path, body = _pick(rng)
    name = {CHAT: "messages", COMPLETION: "prompt", DETOKENIZE: "tokens"}.get(path) or next(
        name for name in ("prompt", "messages") if name in body
    )
    del body[name]
    return Case("missing", request(path, _text(body)), "prompt" if path == TOKENIZE else name, must_fail=True)


def _unknown(rng: random.Random) -> Case:
    path, body = _pick(rng)
    name = rng.choice(
        ["temprature", "x" * 5000, "__class__", "", "\x00", "max-tokens", "Prompt", "\ud800", "a\r\nb", "chat_template"]
    )
    body[name] = rng.choice([1, "x", None, [], {}])
    return Case("unknown", request(path, _text(body)), name[:64], must_fail=True)


def _twice(rng: random.Random) -> Case:
    path, body = _pick(rng)
    name = rng.choice(list(body))
    text = json.dumps(body)[:-1] + f", {json.dumps(name)}: {json.dumps(body[name])}}}"
    return Case("twice", request(path, text.encode()), name, must_fail=True)


def _broken(rng: random.Random) -> Case:
    """The text of the body is damaged."""
    path, body = _pick(rng)
    text = bytearray(_text(body))
    at = rng.randrange(1, len(text))
    kinds: dict[str, Callable[[], bytes]] = {
        "cut": lambda: bytes(text[:at]),
        "flipped": lambda: bytes(text[:at]) + bytes([text[at] ^ (1 << rng.randrange(8))]) + bytes(text[at + 1 :]),
        "zero": lambda: bytes(text[:at]) + b"\0" + bytes(text[at:]),
        "not UTF-8": lambda: bytes(text[:at]) + bytes([rng.randrange(0x80, 0x100)]) + bytes(text[at:]),
        "trailing": lambda: bytes(text) + rng.choice([b"x", b"{}", b"]", b"\0", b",", b"\xff"]),
        "mark": lambda: b"\xef\xbb\xbf" + bytes(text),
        "UTF-16": lambda: text.decode().encode("utf-16"),
        "nothing": lambda: rng.choice([b"", b" ", b"\n"]),
        "no object": lambda: rng.choice([b"null", b"5", b"[]", b'"x"', b"[{}]", b"true", b"1e999", b"NaN"]),
        "deep": lambda: rng.choice([b"[", b'{"a":', b'[{"prompt":']) * rng.randrange(1000, 60_000),
        "deep inside": lambda: b'{"prompt":"x","metadata":' + b'{"a":' * 3000 + b"1" + b"}" * 3001,
        "noise": lambda: rng.randbytes(rng.randrange(1, 2000)),
    }
    kind = rng.choice(list(kinds))
    return Case(kind, request(path, kinds[kind]()), must_fail=kind not in ("flipped", "zero"))


def _headed(rng: random.Random) -> Case:
    """A good body with a head that it does not fit."""
    path, body = _pick(rng)
    text = _text(body)
    chunked = (("Transfer-Encoding", "chunked"),)
    kinds: dict[str, Callable[[], bytes]] = {
        "type": lambda: request(
            path,
            text,
            headers=(("Content-Type", rng.choice(["text/plain", "multipart/form-data", "", "\x01", "application/xml"])),),
        ),
        "charset": lambda: request(
            path, text, headers=(("Content-Type", "application/json; charset=" + rng.choice(["latin-1", "utf-16", "x" * 300])),)
        ),
        "encoding": lambda: request(
            path, text, headers=(("Content-Encoding", rng.choice(["gzip", "br", "deflate", "zstd", "x"])),)
        ),
        "length": lambda: request(path, text, length=rng.choice(["-1", "x", "1e3", "+5", "0x10", "9" * 30, "", "1, 2"])),
        "short": lambda: request(path, text, length=str(rng.randrange(0, len(text)))),
        "long": lambda: request(path, text, length=str(len(text) + rng.randrange(1, 99))),
        "huge": lambda: request(path, text, length=str(2**40)),
        "two lengths": lambda: request(path, text, headers=(("Content-Length", str(len(text) + 1)),)),
        "both": lambda: request(path, text, headers=chunked).replace(b"Transfer-", b"Content-Length: 3\r\nTransfer-"),
        "chunks": lambda: request(
            path,
            rng.choice([b"zz\r\n", b"-1\r\n", b"5\r\nab", b"1" * 40 + b"\r\n", b"3\r\nabcdef\r\n0\r\n\r\n", text]),
            headers=chunked,
        ),
        "coding": lambda: request(
            path, text, headers=(("Transfer-Encoding", rng.choice(["gzip", "chunked, gzip", "x", "gzip, chunked"])),)
        ),
        "method": lambda: request(
            path,
            text,
            method=rng.choice(["PUT", "DELETE", "PATCH", "TRACE", "PROPFIND", "FOO", "post", "GET", "HEAD", "OPTIONS"]),
        ),
        "path": lambda: request(
            rng.choice(
                [
                    "/",
                    "//",
                    "/v1/../live",
                    "/%00",
                    "/%ff%fe",
                    "/v1/models/%0d%0a",
                    "*",
                    "http://a b/",
                    "/" + "a" * 9000,
                    "/v1/chat/completions/",
                    "/v1%2fcompletions",
                    "/\x7f",
                    "/\xff",
                ]
            ),
            text,
        ),
        "many headers": lambda: request(path, text, headers=tuple((f"X-{n}", "y" * 900) for n in range(90))),
        "long header": lambda: request(path, text, headers=(("X-Filler", "y" * 200_000),)),
        "odd header": lambda: request(
            path,
            text,
            headers=(
                rng.choice(
                    [
                        ("X-Request-Id", "a\x01b"),
                        ("X Y", "1"),
                        ("", "1"),
                        ("X\x00", "1"),
                        ("X", "a\x00b"),
                        ("Authorization", "\xff" * 50),
                        ("Host", "a/../b"),
                        (":path", "/"),
                    ]
                ),
            ),
        ),
        "expect": lambda: request(path, text, headers=(("Expect", rng.choice(["200-ok", "x"])),)),
        "upgrade": lambda: request(path, text, headers=(("Upgrade", rng.choice(["websocket", "h2c"])),)).replace(
            b"Connection: close", b"Connection: Upgrade, close"
        ),
        "no HTTP": lambda: rng.choice(
            [
                b"\x16\x03\x01\x02\x00\x01\x00",
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
                b"hello\r\n\r\n",
                b"GET\r\n\r\n",
                b"\0" * 99,
                b"GET / HTTP/9.9\r\n\r\n",
                b"POST /v1/completions HTTP/1.1\nHost: x\n folded\n\n",
                rng.randbytes(300),
            ]
        ),
        "two": lambda: (
            request(path, text).replace(b"Connection: close", b"X: y")
            + rng.choice([b"garbage\r\n\r\n", b"\0\0\0\0", b"GET / HTTP/1.1\r\nHost"])
        ),
    }
    kind = rng.choice(list(kinds))
    tolerated = ("short", "method", "path", "odd header", "expect", "upgrade", "two", "coding", "both", "charset", "type")
    return Case(kind, kinds[kind](), must_fail=kind not in tolerated)


def _pick(rng: random.Random) -> tuple[str, dict[str, Any]]:
    path, body = rng.choice(VALID)
    return path, copy.deepcopy(body)


FIELDS = sorted({name for _, body in VALID for name in body})
MAKERS = (_swapped, _swapped, _swapped, _swapped, _missing, _unknown, _twice, _broken, _broken, _headed, _headed)


def malformed(rng: random.Random) -> Case:
    """A request that is wrong somewhere, or nearly so."""
    return rng.choice(MAKERS)(rng)


# --- answers -------------------------------------------------------------------------------------------------------

# A field of a request -> fields that an error about it may name beside it, because they stand or fall together.
ALSO = {
    "logprobs": {"top_logprobs", "prompt_logprobs"},
    "top_logprobs": {"logprobs"},
    "prompt": {"messages"},
    "messages": {"prompt"},
    "n": {"best_of", "use_beam_search", "temperature"},
    "best_of": {"n", "use_beam_search"},
    "tools": {"tool_choice", "messages"},
    "tool_choice": {"tools"},
    "stream": {"stream_options"},
    "max_completion_tokens": {"max_tokens"},
    "min_tokens": {"max_tokens"},
    "max_tokens": {"max_completion_tokens", "min_tokens"},
    "use_beam_search": {"n", "temperature", "best_of"},
    "echo": {"max_tokens"},
}
LEAKS = re.compile(
    re.escape(os.fsencode(Path(__file__).parents[2]))
    + rb"|0x[0-9a-f]{6,}|/home|/tmp/|/usr/|site-packages|\.py\b|Traceback|line \d+, in |\b[A-Za-z]+(Error|Exception|Warning)\b"
    rb"|\b(jaxpaged|uvicorn|starlette|fastapi|pydantic|httptools|asyncio|tokenizers|jinja2|llguidance|numpy|jax)\.[a-z_]+"
    rb"|<[a-z_.]+ (object|function|method)|object at |NoneType|__main__"
)


def exchange(address: tuple[str, int], raw: bytes, timeout_s: float = 60.0) -> bytes:
    """All that the server says until it closes the connection."""
    with socket.create_connection(address, timeout_s) as client:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has heard enough; what it says may still be read
            client.sendall(raw)
        found = bytearray()
        with contextlib.suppress(ConnectionResetError):
            while piece := client.recv(1 << 16):
                found += piece
    return bytes(found)


class _Said:
    """For http.client: a socket of what was said."""

    def __init__(self, raw: bytes):
        self._file = io.BytesIO(raw)

    def makefile(self, *_: Any) -> Any:
        return self._file


def parsed(raw: bytes, method: str = "POST") -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the first answer."""
    answer = http.client.HTTPResponse(_Said(raw), method=method)  # type: ignore[arg-type]
    answer.begin()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()


def judge(case: Case, raw: bytes) -> int:
    """The status of an answer; raises AssertionError where it is not as every answer must be."""
    told = (case.kind, case.field, case.raw[:300], case.raw[-160:], raw[:600])
    assert raw, ("no answer", told)
    assert not (leak := LEAKS.search(raw)), (leak, told)
    status, headers, body = parsed(raw, "HEAD" if case.raw.startswith(b"HEAD") else "POST")
    assert 200 <= status < 300 or 400 <= status < 500, told
    if status < 400:
        assert not case.must_fail, told
        if headers["content-type"].startswith("text/event-stream"):
            assert body.endswith(b"data: [DONE]\n\n"), told
        return status
    assert headers["content-type"] == "application/json", told
    if case.raw.startswith(b"HEAD"):
        return status
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["code"] and error["type"], told
    assert 0 < len(error["message"]) <= 500 and error["message"].isprintable(), told
    if case.field is not None and error["code"] not in ("invalid_json", "too_large", "queue_full"):
        assert error["param"] == case.field or error["param"] in ALSO.get(case.field, ()), told
    return status
