"""The log of a server: one clean line an event, whatever a client sends, and no prompt that nobody asked for."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

for name in ("fastapi", "uvicorn", "httptools", "httpx2", "prometheus_client"):
    pytest.importorskip(name, reason="the extra `serve` is not installed")
sys.path.insert(0, str(Path(__file__).parent))
from asgi import ask  # noqa: E402

from jaxpaged.async_llm import AsyncLLM  # noqa: E402
from jaxpaged.config import ConfigError  # noqa: E402
from jaxpaged.server.app import build_app  # noqa: E402
from jaxpaged.server.logs import MAX_TEXT_LEN, JsonLines, TextLines, clean, logging_to  # noqa: E402
from jaxpaged.server.options import ServerOptions  # noqa: E402

KEY = "a-key-of-some-length"
HOSTILE = 'x\n2026-11-22 admin: all is well\r\x1b[2J\x1b]0;title\x07\x00\u2028\u202e\x85{"a": "\\n"}'


def lines_of(llm: AsyncLLM, asked: Any, log_format: str = "json", **options: Any) -> list[str]:
    """The lines that a server writes while `asked(app)` runs."""
    stream = io.StringIO()
    with logging_to(stream, log_format=log_format):
        asyncio.run(asked(build_app(llm, ServerOptions(log_format=log_format, **options))))
    written = stream.getvalue()
    assert written.endswith("\n") or not written
    return written.split("\n")[:-1]


def completion(**more: Any) -> bytes:
    return json.dumps({"prompt": "the secret prompt", "max_tokens": 3, "ignore_eos": True, **more}).encode()


async def one_of_each(app: Any) -> None:
    key = {"authorization": f"Bearer {KEY}"}
    assert (await ask(app, "POST", "/v1/completions", completion(), {**key, "x-request-id": "mine"}))[0] == 200
    assert (await ask(app, "POST", "/v1/completions", completion(prompt=["a", "b"], n=2), key))[0] == 200
    assert (await ask(app, "GET", "/no/such/route", b"", key))[0] == 404
    assert (await ask(app, "GET", "/v1/models"))[0] == 401
    for path in ("/live", "/ready", "/health", "/version", "/metrics"):
        assert (await ask(app, "GET", path, b"", key))[0] == 200


def test_a_line_says_what_a_request_came_to(model: AsyncLLM):
    found = [json.loads(line) for line in lines_of(model, one_of_each, api_key=KEY)]
    assert [(one["route"], one["status"]) for one in found] == [
        *[("/v1/completions", 200)] * 2,
        *[("none", 404), ("none", 401)],
    ]
    first, second, missing, refused = found
    assert first["time"].endswith("Z") and first["level"] == "info" and first["logger"] == "jaxpaged.requests"
    assert first["request_id"] == "mine" and first["generation_tokens"] == 3 and first["finish_reason"] == "length"
    assert 0 <= first["queue_time_s"] <= first["time_to_first_token_s"] <= first["seconds"]
    assert second["num_prompts"] == 2 and second["generation_tokens"] == 12 and second["prompt_tokens"] == 2
    assert len(first["tenant"]) == 8 and first["tenant"] == second["tenant"] and "tenant" not in refused
    assert missing["path"] == "/no/such/route" and "path" not in first
    assert len({one["request_id"] for one in found}) == 4


def test_no_prompt_and_no_key_unless_asked_for(model: AsyncLLM):
    for log_format in ("text", "json"):
        written = "\n".join(lines_of(model, one_of_each, log_format, api_key=KEY))
        assert "POST /v1/completions" in written and "secret" not in written and KEY not in written
    told = lines_of(model, one_of_each, api_key=KEY, enable_log_requests=True, max_log_len=10)
    assert json.loads(told[0])["prompts"] == ["the secret"] and json.loads(told[1])["prompts"] == ["a", "b"]
    assert lines_of(model, one_of_each, api_key=KEY, access_log=False) == []


@pytest.mark.parametrize(
    ("log_format", "count"), [("text", 300), ("json", 300), pytest.param("json", 33_400, marks=pytest.mark.slow)]
)
def test_whatever_is_sent_a_line_is_a_line(model: AsyncLLM, log_format: str, count: int, monkeypatch: pytest.MonkeyPatch):
    """R48: three odd requests each."""
    monkeypatch.setattr("jaxpaged.server.logs._MAX_WAITING", 10**6)  # all are counted, also where the writer gets no time

    async def odd(app: Any) -> None:
        for number in range(count):
            nasty = f"{HOSTILE}{number}"
            await ask(app, f"GET{HOSTILE}" if number % 2 else "GET", f"/{nasty}{'y' * (number % 300) * 10}")
            await ask(app, "GET", f"/v1/models/{nasty}")
            headers = {"x-request-id": nasty, "user-agent": nasty, "traceparent": nasty}
            await ask(app, "POST", "/v1/completions", completion(model=nasty, prompt=nasty), headers)
        assert (await ask(app, "POST", "/v1/completions", completion(prompt=HOSTILE)))[0] == 200

    found = lines_of(model, odd, log_format, enable_log_requests=True)
    assert len(found) == 3 * count + 1  # one for each, and nothing a client wrote is one of its own
    assert all(line.isprintable() and len(line) < 1000 for line in found)
    if log_format == "json":
        assert all(json.loads(line)["logger"] == "jaxpaged.requests" for line in found)
    assert "admin" in found[0] and not any(line.startswith("2026") for line in found)


def test_clean_spells_out_what_is_not_for_printing():
    assert clean("plain ünï") == "plain ünï"
    assert clean("a\nb\x1b\u202e\u2028") == "a\\nb\\x1b\\u202e\\u2028"
    assert len(clean("x" * 10**6)) <= MAX_TEXT_LEN + 3


def test_an_exception_is_one_line_too():
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        record = logging.LogRecord("jaxpaged", logging.ERROR, __file__, 1, "A request %s", ("failed\nx",), sys.exc_info())
    text, told = TextLines().format(record), JsonLines().format(record)
    assert text.isprintable() and text.startswith("jaxpaged: error: A request failed\\nx (ValueError at ") and "admin" not in text
    assert told.isprintable() and "Traceback" in json.loads(told)["exception"]


def test_a_reader_who_does_not_read_holds_nobody_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("jaxpaged.server.logs._LAST_WORDS_S", 0.2)
    let_go = threading.Event()

    class Stuck(io.StringIO):
        def write(self, text: str) -> int:
            let_go.wait(20)
            return len(text)

    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        stack.callback(let_go.set)
        with logging_to(Stuck(), is_verbose=True):
            for number in range(11_000):
                logging.getLogger("jaxpaged").info("line %d", number)
        assert time.monotonic() - started < 15


def test_a_process_whose_log_nobody_reads_ends():
    """The pipe is full, the writer hangs in it, and Python's own end waits for neither."""
    code = """
import logging, sys
from jaxpaged.server.logs import logging_to
with logging_to(is_verbose=True):
    for number in range(3000):
        logging.getLogger("jaxpaged").info("line %d %s", number, "x" * 100)
sys.exit(7)
"""
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) as one:
        try:
            assert one.wait(30) == 7
        finally:
            one.kill()
        written = one.stderr.read()
    assert written.startswith(b"jaxpaged: line 0 x") and 2**15 < len(written) < 3000 * 100


def test_options_are_checked():
    for options in (
        *({"log_format": "xml"}, {"max_log_len": -1}, {"access_log": 1}, {"enable_log_requests": "yes"}),
        *({"otlp_traces_endpoint": "ftp://x"}, {"otlp_traces_endpoint": "http:///x y"}, {"metrics_namespace": "é"}),
    ):
        with pytest.raises(ConfigError, match=next(iter(options))):
            ServerOptions(**options)
