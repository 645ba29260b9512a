"""Batch files: every line is answered once, bad ones by themselves, whatever happens to the process in between."""

from __future__ import annotations

import asyncio
import io
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from jaxpaged.config import ConfigError
from jaxpaged.server.batch_file import MAX_LINE_BYTES, Counts, EngineGoneError, Line, Output, answer_all, call, read_lines

ANSWERS = {"input file": "x", "model": None}


def line(custom_id: Any, **changes: Any) -> bytes:
    value = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}
    return json.dumps({**value, **changes}).encode() + b"\n"


class App:
    """An ASGI application that answers with what it was asked, or as it is told."""

    def __init__(self, statuses: Iterator[int] | None = None):
        self.asked: list[dict[str, Any]] = []
        self.num_now = self.most = 0
        self._statuses = statuses

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        self.num_now += 1
        self.most = max(self.most, self.num_now)
        await asyncio.sleep(0)
        self.num_now -= 1
        status = next(self._statuses, 200) if self._statuses is not None else 200
        if status == 200:
            self.asked.append(json.loads(message["body"]))
        await send({"type": "http.response.start", "status": status, "headers": [(b"X-Request-Id", b"r")]})
        await send({"type": "http.response.body", "body": json.dumps({"path": scope["path"]}).encode()})


def answered(raw: bytes, path: Path, app: Any = None, **options: Any) -> tuple[Counts, list[dict[str, Any]]]:
    with Output(path, ANSWERS, **options) as output:
        lines = read_lines(io.BytesIO(raw))
        counts = asyncio.run(answer_all(app or App(), lines, output, max_concurrency=4, make_id=lambda: "id"))
        output.finish()
    return counts, [json.loads(one) for one in path.read_text().splitlines()]


def test_lines_become_answers(tmp_path: Path) -> None:
    bad = [
        (b"{nonsense\n", "the line is no JSON"),
        (b"[]\n", "expected an object"),
        (line(3), "custom_id: got 3"),
        (line("m", method="GET"), "method: got 'GET'"),
        (line("u", url="/v1/files"), "url: got '/v1/files'"),
        (line("b", body=[]), "body: got"),
        (line("s", body={"stream": True}), "body.stream"),
        (line("good"), "custom_id: 'good' has come before"),
        (b'{"custom_id": "nan", "body": {"x": NaN}}\n', "the line is no JSON"),
        (b"\xff\n", "the line is not UTF-8"),
        (b"[" * 100_000 + b"\n", "nested too deep"),
        (b" " * MAX_LINE_BYTES + b"  x\n", "more than 8,388,608 bytes"),
    ]
    app = App()
    counts, found = answered(line("good") + b"\n" + b"".join(raw for raw, _ in bad) + line("last").strip(), tmp_path / "out", app)
    assert (counts.answered, counts.failed) == (2, len(bad)) and len(app.asked) == 2
    good = {one["custom_id"]: one for one in found if one["error"] is None}
    assert good["good"]["response"] == {"status_code": 200, "request_id": "r", "body": {"path": "/v1/completions"}}
    assert good.keys() == {"good", "last"} and good["last"]["id"] == "batch_req_id"
    errors = sorted((one["error"]["line"], one["error"]["message"]) for one in found if one["error"] is not None)
    assert len(errors) == len(bad)
    for (number, message), (place, (_, problem)) in zip(errors, enumerate(bad, 3), strict=True):
        assert number == place and problem in message, (message, problem)
    assert not list(tmp_path.glob("*.part*"))


def test_refused_requests_are_answers_and_a_full_queue_is_waited_for(tmp_path: Path) -> None:
    app = App(iter([400, 429, 429, 200]))
    counts, found = answered(line("a") + line("b"), tmp_path / "out", app)
    assert (counts.answered, counts.failed) == (1, 1)
    assert sorted(one["response"]["status_code"] for one in found) == [200, 400]


@pytest.mark.parametrize("cut", [0, 1, 40])
def test_what_was_written_is_not_asked_again(tmp_path: Path, cut: int) -> None:
    """The engine goes after 30 of 100 lines, and the last line that was written is cut, as by a power failure."""
    raw = b"".join(line(f"id-{place}") for place in range(99)) + b"{bad\n"
    first = App(iter([200] * 30 + [503] * 9))
    with Output(tmp_path / "out", ANSWERS) as output, pytest.raises(EngineGoneError):
        asyncio.run(answer_all(first, read_lines(io.BytesIO(raw)), output, max_concurrency=4))
    part = tmp_path / "out.part"
    assert not (tmp_path / "out").exists() and len(part.read_bytes().splitlines()) == 30
    if cut:
        part.write_bytes(part.read_bytes()[:-cut])
    second = App()
    counts, found = answered(raw, tmp_path / "out", second)
    assert counts.done_before == 30 - (cut > 0) and len(second.asked) == 99 - counts.done_before
    assert sorted(str(one["custom_id"]) for one in found) == sorted(["None", *(f"id-{place}" for place in range(99))])


def test_a_part_of_something_else_is_left_alone(tmp_path: Path) -> None:
    with Output(tmp_path / "out", ANSWERS) as output:
        output.write({"custom_id": "a", "response": None, "error": None})
        with pytest.raises(ConfigError, match="another process writes"):
            Output(tmp_path / "out", ANSWERS)
    with pytest.raises(ConfigError, match="begun with another input file"):
        Output(tmp_path / "out", {**ANSWERS, "input file": "y"})
    counts, _ = answered(line("a"), tmp_path / "out", overwrite=True)
    assert counts.answered == 1 and counts.done_before == 0
    with pytest.raises(ConfigError, match="is there already"):
        Output(tmp_path / "out", ANSWERS)


def test_a_long_file_takes_little_memory(tmp_path: Path) -> None:
    """20,000 lines of 1 KB, of which one is held at a time: 16 bytes of each are kept, and what Python adds to them."""
    num, body = 20_000, b"x" * 1000

    class Lines(io.RawIOBase):
        place = 0

        def readline(self, size: Any = -1) -> bytes:
            self.place += 1
            if self.place > num:
                return b""
            return b'{"custom_id":"%d","url":"/v1/completions","body":{"prompt":"%s"}}\n' % (self.place, body)

    tracemalloc.start()
    try:
        count = sum(isinstance(one, Line) and one.body is not None for one in read_lines(Lines()))  # type: ignore[arg-type]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == num and peak < 6 * 2**20, peak

    app = App()
    raw = b"".join(line(place) if place % 2 else line(str(place)) for place in range(2000))
    answered(raw, tmp_path / "out", app)
    assert app.most <= 4  # as many as max_concurrency are asked, and no more read


def test_a_text_is_sent_in_the_bytes_that_it_has(tmp_path: Path) -> None:
    sizes: list[int] = []

    class Weighing(App):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            async def weighed() -> Any:
                message = await receive()
                sizes.append(len(message["body"]))
                return message

            await super().__call__(scope, weighed, send)

    body = {"prompt": "很久以前" * 1000, "stop": ["\ud800"]}
    raw = json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}, ensure_ascii=False)
    app = Weighing()
    answered(raw.encode("utf-8", "backslashreplace"), tmp_path / "out", app)
    assert app.asked == [body] and sizes[0] < 3 * 4000 + 100


def test_an_application_is_called_as_a_server_would() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http" and scope["method"] == "POST" and (await receive())["body"] == b"{}"
        with pytest.raises(TimeoutError):  # the client does not leave
            await asyncio.wait_for(receive(), 0.01)
        await send({"type": "http.response.start", "status": 201, "headers": [(b"A", b"b")]})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        await send({"type": "http.response.body", "body": b"y"})

    assert asyncio.run(call(app, "/p", b"{}")) == (201, {"a": "b"}, b"xy")
