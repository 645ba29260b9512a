"""The parts of the server by themselves: clients that trickle or never read, options, keys, the socket, and the command."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxpaged.cli import main
from jaxpaged.config import ConfigError
from jaxpaged.server.options import ServerOptions

for name in ("fastapi", "uvicorn", "httptools", "httpx2"):
    pytest.importorskip(name, reason="the extra `serve` is not installed")
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from asgi import ask  # noqa: E402
from hostile import exchange  # noqa: E402
from running import ENGINE, is_empty, running, wait_until  # noqa: E402
from test_async_llm import new_llm as new_fake_llm  # noqa: E402

from jaxpaged.server import calls  # noqa: E402
from jaxpaged.server.app import build_app  # noqa: E402
from jaxpaged.server.bodies import parse_json  # noqa: E402
from jaxpaged.server.errors import ApiError  # noqa: E402
from jaxpaged.server.run import bind  # noqa: E402

KEY = "a-key-of-at-least-16"


def scope(path: str = "/v1/completions", *headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {
        **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http"},
        **{"path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "client": None, "server": None},
        "headers": [(b"content-type", b"application/json"), *headers],
    }


async def never() -> dict[str, Any]:
    await asyncio.Event().wait()
    raise AssertionError


def receiving(*bodies: bytes, then: Callable[[], Any] = never) -> Callable[[], Any]:
    """A client that sends these pieces, the last of them with no more to come unless `then` says more."""
    left = [{"type": "http.request", "body": body, "more_body": True} for body in bodies]
    if then is never and left:
        left[-1]["more_body"] = False
    messages = iter(left)

    async def receive() -> dict[str, Any]:
        message = next(messages, None)
        return message if message is not None else await then()

    return receive


def test_a_body_that_does_not_end_is_a_408() -> None:
    llm, _ = new_fake_llm()
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def task() -> None:
        app = build_app(llm, ServerOptions(body_timeout_s=0.05))
        trickle = receiving(b'{"prompt":', b" [1,", then=lambda: never())
        await asyncio.wait_for(app(scope(), trickle, send), 5)

    try:
        asyncio.run(task())
    finally:
        llm.shutdown()
    assert sent[0]["status"] == 408 and json.loads(sent[1]["body"])["error"]["code"] == "timeout"


def test_a_client_that_never_reads_is_given_up_and_its_pages_come_back() -> None:
    llm, runner = new_fake_llm()
    num_sent = 0

    async def send(message: dict[str, Any]) -> None:
        nonlocal num_sent
        num_sent += 1
        if num_sent > 3:
            await never()

    async def task() -> None:
        app = build_app(llm, ServerOptions(send_timeout_s=0.1))
        body = json.dumps({"prompt": [1, 2, 3], "max_tokens": 450, "ignore_eos": True, "stream": True}).encode()
        runner.pause_s = 0.005  # it does not end while nobody looks
        runner.gate.clear()
        answer = asyncio.ensure_future(app(scope(), receiving(body), send))
        while not runner.num_steps:
            runner.gate.set()
            await asyncio.sleep(0.001)
        await asyncio.wait_for(answer, 5)
        while not is_empty(llm):
            await asyncio.sleep(0.005)

    try:
        asyncio.run(asyncio.wait_for(task(), 10))
    finally:
        llm.shutdown()
    assert 3 < num_sent < 10


@pytest.mark.parametrize("num_queued", [0, 1, 3])
@pytest.mark.parametrize("is_streamed", [True, False])
def test_who_leaves_with_more_requests_sent_ahead_leaves_nothing(is_streamed: bool, num_queued: int) -> None:
    llm, runner = new_fake_llm()
    body = json.dumps({"prompt": [1, 2, 3], "max_tokens": 450, "ignore_eos": True, "stream": is_streamed}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    runner.pause_s = 0.02  # nine seconds for all of it
    try:
        with running(llm) as one:
            with socket.create_connection((one.server.config.host, int(one.url.rpartition(":")[2])), 20) as client:
                client.sendall((head % len(body) + body) * (1 + num_queued))
                wait_until(lambda: runner.num_steps > 3)
            wait_until(lambda: is_empty(llm), 4.0)
            assert runner.num_steps < 300
            time.sleep(0.1)
            assert is_empty(llm), "one that was sent ahead has begun"
    finally:
        llm.shutdown()


def test_answers_to_requests_sent_ahead_come_in_their_order() -> None:
    llm, _ = new_fake_llm()
    raw = b"".join(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nX-Request-Id: number-%02d\r\n"
        b'%bContent-Length: 44\r\n\r\n{"prompt": [1], "max_tokens": %2d, "seed": 1}'
        % (n, b"Connection: close\r\n" * (n == 12), n)
        for n in range(1, 13)
    )
    try:
        with running(llm) as one:
            said = exchange((one.server.config.host, int(one.url.rpartition(":")[2])), raw)
    finally:
        llm.shutdown()
    assert re.findall(rb"x-request-id: (number-\d+)", said) == [b"number-%02d" % n for n in range(1, 13)]
    assert said.count(b"HTTP/1.1 200") == 12


@pytest.mark.parametrize("depth", [100, 150, 200, 201, 400, 960, 970, 980, 100_000])
@pytest.mark.parametrize("padding", [0, 70_000])  # the latter is read on a thread, whose stack is shorter
@pytest.mark.parametrize("field", ["temperature", "response_format", "metadata"])
def test_what_is_nested_is_refused_or_read_at_any_depth(field: str, padding: int, depth: int) -> None:
    llm, _ = new_fake_llm()
    value = "[" * (depth - 1) + "]" * (depth - 1)
    if field == "response_format":
        value = '{"type": "structural_tag", "x": ' + "[" * (depth - 2) + "]" * (depth - 2) + "}"
    raw = f'{{"prompt": [1], "max_tokens": 1, "{field}": {value}}}{" " * padding}'.encode()
    try:
        status, body = asyncio.run(ask(build_app(llm, ServerOptions()), "POST", "/v1/completions", raw))
    finally:
        llm.shutdown()
    assert status in ((200, 400) if depth <= 200 else (400,)), body
    assert (b"nested too deep" in body) == (depth > 200)


def test_arguments_of_calls_are_json_whatever_numbers_a_model_writes() -> None:
    whole = '[{"name": "f", "parameters": {"a": 1e2}}, {"name": "g", "parameters": {"a": %s}}]'
    for number in ("1e999", "-1e999", "NaN", "Infinity"):
        found = calls._ListedCalls(lambda: "id").take(whole % number, is_last=True)["tool_calls"]
        assert [one["function"] for one in found] == [{"name": "f", "arguments": '{"a": 100.0}'}]


@pytest.mark.parametrize("num_names", [40_000, 400_000])
def test_a_name_that_is_there_twice_is_found_in_time(num_names: int) -> None:
    names = ",".join(f'"{number}":0' for number in range(num_names))
    began = time.process_time()
    with pytest.raises(ApiError, match=f"{num_names - 1}' is in an object twice"):
        parse_json(f'{{{names},"{num_names - 1}":1}}'.encode())
    assert time.process_time() - began < 5  # comparing all with all would take minutes


@pytest.mark.parametrize("is_streamed", [True, False])
@pytest.mark.parametrize("given", [{"timeout": 0.1}, {}, {"timeout": 60}])
def test_a_request_that_takes_too_long_is_a_408_and_its_pages_come_back(is_streamed: bool, given: dict[str, float]) -> None:
    """The server's limit holds where the request asks for none, or for more."""
    llm, runner = new_fake_llm()
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def task() -> None:
        runner.pause_s = 0.005
        app = build_app(llm, ServerOptions(request_timeout_s=10.0 if given.get("timeout") == 0.1 else 0.1))
        asked = {"prompt": [1, 2, 3], "max_tokens": 450, "ignore_eos": True, "stream": is_streamed, **given}
        await asyncio.wait_for(app(scope(), receiving(json.dumps(asked).encode()), send), 5)
        while not is_empty(llm):
            await asyncio.sleep(0.005)

    try:
        asyncio.run(asyncio.wait_for(task(), 10))
    finally:
        llm.shutdown()
    body = b"".join(message.get("body", b"") for message in sent)
    assert b'"code":"deadline_exceeded"' in body
    assert sent[0]["status"] == (200 if is_streamed else 408)
    assert body.endswith(b"data: [DONE]\n\n") == is_streamed


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_client_that_has_left_already_gets_no_step_more(is_streamed: bool) -> None:
    llm, runner = new_fake_llm()

    async def left() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        pass

    async def task() -> None:
        body = json.dumps({"prompt": [1, 2, 3], "max_tokens": 450, "ignore_eos": True, "stream": is_streamed}).encode()
        pieces = iter([{"type": "http.request", "body": body}])

        async def receive() -> dict[str, Any]:
            return next(pieces, None) or await left()

        runner.gate.clear()
        await build_app(llm)(scope(), receive, send)
        runner.gate.set()
        while not is_empty(llm):
            await asyncio.sleep(0.001)

    try:
        asyncio.run(asyncio.wait_for(task(), 10))
    finally:
        llm.shutdown()
    assert runner.num_steps <= 2


def test_token_ids_need_no_tokenizer() -> None:
    """And what needs one is refused as long as there is none."""
    llm, _ = new_fake_llm()
    answers: list[tuple[int, dict[str, Any]]] = []

    async def ask(app: Any, path: str, body: dict[str, Any]) -> None:
        sent: list[dict[str, Any]] = []

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await app(scope(path), receiving(json.dumps(body).encode()), send)
        answers.append((sent[0]["status"], json.loads(sent[1]["body"])))

    async def task() -> None:
        app = build_app(llm)
        await ask(app, "/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 4, "return_token_ids": True})
        await ask(app, "/v1/completions", {"prompt": "text"})
        await ask(app, "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]})
        await ask(app, "/tokenize", {"prompt": "text"})

    try:
        asyncio.run(asyncio.wait_for(task(), 10))
    finally:
        llm.shutdown()
    assert [status for status, _ in answers] == [200, 400, 400, 400]
    assert len(answers[0][1]["choices"][0]["token_ids"]) == 4
    assert [body["error"]["param"] for _, body in answers[1:]] == ["prompt", "messages", "prompt"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("port", -1), ("port", 65_536), ("port", "80"), ("host", ""), ("host", 5), ("host", "0.0.0.0"), ("host", "::")),
        *(("host", "example.org"), ("api_key", ("short",)), ("api_key", (f"{KEY} x",)), ("api_key", (5,)), ("api_key", "")),
        *(("tool_call_parser", "hermess"), ("max_outputs", 0), ("max_body_bytes", True), ("drain_s", float("nan"))),
        *(("send_timeout_s", 0), ("request_timeout_s", -1), ("insecure_no_auth", "yes"), ("api_key_file", "/nowhere/keys")),
    ],
)
def test_options_are_checked(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}: "):
        ServerOptions(**{name: value}).all_keys()  # type: ignore[arg-type]


def test_keys_come_from_options_and_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{KEY}1\n\n  {KEY}2 \n")
    assert ServerOptions(host="0.0.0.0", api_key=KEY, api_key_file=str(file)).all_keys() == (KEY, f"{KEY}1", f"{KEY}2")
    for content in ("", "short\n"):
        file.write_text(content)
        with pytest.raises(ConfigError, match="api_key_file"):
            ServerOptions(api_key_file=str(file)).all_keys()
    assert ServerOptions(host="::1").is_local and ServerOptions(host="localhost").is_local


def test_the_socket_is_known_to_be_tcp_and_one_in_use_is_told() -> None:
    """asyncio sets TCP_NODELAY by the protocol; without it each answer takes 40 ms."""
    with bind("127.0.0.1", 0) as one:
        assert one.proto == socket.IPPROTO_TCP
        one.listen()
        with pytest.raises(ConfigError, match=r"port: 127\.0\.0\.1"):
            bind("127.0.0.1", one.getsockname()[1])
    with pytest.raises(ConfigError, match="port: "):
        bind("999.1.1.1", 80)


@pytest.mark.parametrize(
    ("argv", "code", "told"),
    [
        (["--host", "0.0.0.0"], 2, "without an api_key"),
        (["--prt", "5"], 2, "did you mean '--port'"),
        (["--port", "99999"], 2, "port: got 99999"),
        (["--api-key", "short"], 2, "api_key"),
        (["--max-queued-requests", "0"], 2, "max_queued_requests"),
        (["--max-num-seqs", "0"], 2, "max_num_seqs"),
        (["a", "--model", "b"], 2, "given twice"),
        (["/nowhere"], 3, "/nowhere"),
    ],
)
def test_the_command_refuses_in_one_line(argv: list[str], code: int, told: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *argv]) == code
    error = capfd.readouterr().err
    assert told in error and error.count("\n") == 1


def test_the_command_serves_and_ends_at_sigterm_with_0() -> None:
    import httpx2 as httpx

    flags = [f"--{name.replace('_', '-')}={str(value).strip('(),')}" for name, value in ENGINE.items()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "jaxpaged", "serve", "--port", "0", "--api-key", KEY, *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            line = process.stderr.readline()  # type: ignore[union-attr]
            assert "serving on http://127.0.0.1:" in line, line
            url, headers = line.split()[-1], {"authorization": f"Bearer {KEY}"}
            assert httpx.get(f"{url}/live", timeout=30).status_code == 200
            assert httpx.get(f"{url}/v1/models").status_code == 401
            answer = httpx.post(f"{url}/v1/completions", json={"prompt": "One day"}, headers=headers, timeout=30)
            assert answer.status_code == 200 and answer.json()["choices"][0]["text"]
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()
