"""OpenAI's batch files: a request a line, answered by the same application as over HTTP, a line for each of them.

Knows lines, and what of them is done already. Refuses to know what requests mean: that is the application's business.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from jaxpaged.config import ConfigError
from jaxpaged.host.checks import shown
from jaxpaged.server.bodies import dump_json, parse_json
from jaxpaged.server.errors import ApiError
from jaxpaged.server.ids import new_id

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
MAX_LINE_BYTES = 8 << 20
MAX_ID_LEN = 512
_RETRY_S = 0.1  # after the queue was full, which one request with many outputs can do


class EngineGoneError(Exception):
    """There is nobody to answer any more. What has been written stays."""


@dataclass(frozen=True)
class Line:
    """One line of the file. `key` is what it is known by: its custom_id, or where it has none its number."""

    number: int
    key: bytes
    custom_id: str | None
    url: str = ""
    body: dict[str, Any] | None = None
    problem: str = ""


def read_lines(file: BinaryIO) -> Iterator[Line]:
    """The lines that are not empty, the bad ones with what is wrong with them; a custom_id that comes again is wrong."""
    seen: set[bytes] = set()
    number = 0
    while raw := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
            while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield _bad(number, f"more than {MAX_LINE_BYTES:,} bytes")
        elif raw.strip():
            line = _parse(number, raw)
            if line.custom_id is not None and line.key in seen:
                line = _bad(number, f"custom_id: {shown(line.custom_id)} has come before")
            seen.add(line.key)
            yield line


def _parse(number: int, raw: bytes) -> Line:
    try:
        value = parse_json(raw)
    except ApiError as error:
        return _bad(number, str(error).replace("the body", "the line"))
    if not isinstance(value, dict):
        return _bad(number, "expected an object with custom_id, method, url and body")
    custom_id = value.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_ID_LEN:
        return _bad(number, f"custom_id: got {shown(custom_id)}, expected a text of 1 to {MAX_ID_LEN} characters")
    key, url, body = _key_of_id(custom_id), value.get("url"), value.get("body")
    problem = ""
    if value.get("method", "POST") != "POST":
        problem = f"method: got {shown(value['method'])}, expected POST"
    elif url not in URLS:
        problem = f"url: got {shown(url)}, expected one of {', '.join(URLS)}"
    elif not isinstance(body, dict):
        problem = f"body: got {shown(body)}, expected an object"
    elif body.get("stream"):
        problem = "body.stream: answers of a batch come whole"
    if problem:
        return Line(number, key, custom_id, problem=problem)
    return Line(number, key, custom_id, url, body)  # type: ignore[arg-type]


def _bad(number: int, problem: str) -> Line:
    return Line(number, _key_of_number(number), None, problem=problem)


def _key_of_id(custom_id: str) -> bytes:
    # Not the text itself: there may be very many, and long ones.
    return hashlib.blake2b(b"i" + custom_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _key_of_number(number: int) -> bytes:
    return hashlib.blake2b(b"n%d" % number, digest_size=16).digest()


class Output:
    """The file of answers, which is there under its name when it is whole, and before that as `NAME.part`.

    Invariant: a line that `write` has taken is in the part as a whole, whatever happens to this process afterwards; one that was
    cut by the end of a process is taken back by the next. One process writes at a time. Beside the part stands `NAME.part.of`,
    what it is an answer to.
    """

    def __init__(self, path: str | os.PathLike[str], answers: dict[str, Any], *, overwrite: bool = False):
        """`answers`: what the lines depend on; a part of something else is not gone on with.

        Raises:
          ConfigError: the output is there already, or is a part of something else, and `overwrite` is not set.
          OSError: the folder cannot be written to.
        """
        self.path = Path(path)
        self._part, self._of = (self.path.with_name(self.path.name + suffix) for suffix in (".part", ".part.of"))
        if self.path.exists() and not overwrite:
            raise ConfigError(f"output_file: {self.path} is there already (--overwrite replaces it)")
        self.done: set[bytes] = set()
        self._file = os.open(self._part, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._lock()
            if overwrite:
                os.truncate(self._file, 0)
            if os.fstat(self._file).st_size:
                self._check_same(answers)
            else:
                self._of.write_text(json.dumps(answers), encoding="utf-8")
            os.truncate(self._file, self._read())
            os.lseek(self._file, 0, os.SEEK_END)
        except BaseException:
            os.close(self._file)
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"output_file: another process writes {self._part}") from None

    def _check_same(self, answers: dict[str, Any]) -> None:
        try:
            found = json.loads(self._of.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {}
        different = [name for name in answers if not isinstance(found, dict) or found.get(name) != answers[name]]
        if different:
            names = ", ".join(different)
            raise ConfigError(f"output_file: {self._part} was begun with another {names} (--overwrite begins anew)")

    def _read(self) -> int:
        """Note what is done; how many bytes of it are whole lines."""
        num_bytes = 0
        with open(self._part, "rb") as file:
            for raw in file:
                try:
                    value = json.loads(raw) if raw.endswith(b"\n") else None
                except ValueError:
                    value = None
                if not isinstance(value, dict):
                    break
                custom_id, error = value.get("custom_id"), value.get("error")
                if isinstance(custom_id, str):
                    self.done.add(_key_of_id(custom_id))
                elif isinstance(error, dict):
                    self.done.add(_key_of_number(error.get("line", 0)))
                num_bytes += len(raw)
        return num_bytes

    def write(self, line: dict[str, Any]) -> None:
        """Add an answer."""
        raw = memoryview(dump_json(line) + b"\n")
        while raw:  # a full disk takes a part, then none: the error tells
            raw = raw[os.write(self._file, raw) :]

    def finish(self) -> None:
        """All is answered: the file gets its name."""
        os.fsync(self._file)
        os.replace(self._part, self.path)
        self._of.unlink(missing_ok=True)

    def close(self) -> None:
        """What is not finished stays, to be gone on with."""
        os.close(self._file)

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class Counts:
    """What became of the lines: of this run, and before it."""

    answered: int = 0
    failed: int = 0
    done_before: int = 0


async def answer_all(
    app: Any,
    lines: Iterator[Line],
    output: Output,
    *,
    max_concurrency: int,
    make_id: Callable[[], str] = new_id,
    on_end: Callable[[Counts], None] = lambda _: None,
) -> Counts:
    """Answer the lines that are not done, so many at a time; no more of the file than these is held.

    Args:
      app: from `build_app`.

    Raises:
      EngineGoneError: the engine has ended.
      OSError: an answer cannot be written.
    """
    counts, tasks = Counts(), set()
    places = asyncio.Semaphore(max_concurrency)

    async def one(line: Line) -> None:
        try:
            found = await _answer(app, line, make_id)
            output.write(found)
            response = found["response"]
            counts.answered += response is not None and response["status_code"] == 200
            counts.failed += response is None or response["status_code"] != 200
            on_end(counts)
        finally:
            places.release()

    try:
        for line in lines:
            if line.key in output.done:
                counts.done_before += 1
                on_end(counts)
                continue
            await places.acquire()
            _raise_of([task for task in tasks if task.done()])
            tasks = {task for task in tasks if not task.done()}
            tasks.add(asyncio.ensure_future(one(line)))
        while tasks:
            done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            _raise_of(list(done))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return counts


def _raise_of(done: list[asyncio.Task[None]]) -> None:
    for task in done:
        task.result()


async def _answer(app: Any, line: Line, make_id: Callable[[], str]) -> dict[str, Any]:
    """OpenAI's object for one line."""
    head = {"id": f"batch_req_{make_id()}", "custom_id": line.custom_id}
    if line.body is None:
        problem = f"line {line.number}: {line.problem}"
        return {**head, "response": None, "error": {"code": "invalid_line", "message": problem, "line": line.number}}
    raw = dump_json(line.body)
    while True:
        status, headers, content = await call(app, line.url, raw)
        if status != 429:
            break
        await asyncio.sleep(_RETRY_S)
    if status == 503:
        raise EngineGoneError(content.decode("utf-8", "replace"))
    response = {"status_code": status, "request_id": headers.get("x-request-id", ""), "body": json.loads(content)}
    return {**head, "response": response, "error": None}


async def call(app: Any, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
    """What an ASGI application answers to a POST of JSON: status, headers, body."""
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"host", b"localhost")]
    scope = {
        **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http"},
        **{"path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"", "headers": headers},
        **{"client": ("127.0.0.1", 0), "server": ("127.0.0.1", 0)},
    }
    status, found, pieces = 0, {}, []
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if waiting:
            return waiting.pop()
        await _for_ever()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
            found.update((name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in message["headers"])
        else:
            pieces.append(message.get("body", b""))

    await app(scope, receive, send)
    return status, found, b"".join(pieces)


def _for_ever() -> Awaitable[None]:
    return asyncio.get_running_loop().create_future()
