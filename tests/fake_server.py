"""A server of OpenAI's API whose answers come when they are told to: what a client reports is then known beforehand."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Script:
    """What one answer does.

    Args:
      chunks: of each, seconds after the one before, and its tokens.
      has_counts: usage comes with each chunk, where it is asked for.
      status: another than 200 is an error of the code `code`.
      ends: done, cut (the connection closes before [DONE]), hangs, or error (an error event).
    """

    chunks: Sequence[tuple[float, int]] = ((0.0, 1),)
    has_counts: bool = True
    status: int = 200
    code: str = "queue_full"
    ends: str = "done"
    text: str = "word "


@dataclass
class Fake:
    """Answers requests by turns as the scripts say, the last one for ever."""

    scripts: list[Script]
    asked: list[dict[str, Any]] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    sent: list[list[float]] = field(default_factory=list)  # of each streamed request: when it came, then when each chunk went
    profiled: list[tuple[str, int]] | None = None  # what was asked of a profiler, and after how many requests; None has none
    num_left: int = 0
    url: str = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            self.num_left += 1
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except asyncio.IncompleteReadError:
            return False
        self.heads.append(head)
        if "GET /v1/models" in head:
            content = json.dumps({"object": "list", "data": [{"id": "demo"}]}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(content) + content)
            return True
        if "_profile HTTP" in head:
            status = 404 if self.profiled is None else 200
            if self.profiled is not None:
                self.profiled.append((head.split()[1], len(self.asked)))
            writer.write(b"HTTP/1.1 %d no\r\nContent-Length: 2\r\n\r\n{}" % status)
            return True
        length = next(int(line.split(":")[1]) for line in head.lower().splitlines() if line.startswith("content-length"))
        body = json.loads(await reader.readexactly(length))
        script = self.scripts[min(len(self.asked), len(self.scripts) - 1)]
        self.asked.append(body)
        self.sent.append([time.perf_counter()])
        if script.status != 200:
            content = json.dumps({"error": {"message": "no room", "type": "t", "param": None, "code": script.code}}).encode()
            writer.write(b"HTTP/1.1 %d no\r\nContent-Length: %d\r\n\r\n" % (script.status, len(content)) + content)
            return True
        return await self._stream(script, body, writer, self.sent[-1])

    async def _stream(self, script: Script, body: dict[str, Any], writer: asyncio.StreamWriter, sent: list[float]) -> bool:
        def send(data: str) -> None:
            event = f"data: {data}\r\n\r\n".encode()
            writer.write(b"%x\r\n%s\r\n" % (len(event), event))

        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n: hello\n\n\r\n"
        )
        options, num_tokens = body.get("stream_options", {}), 0
        for place, (after_s, count) in enumerate(script.chunks):
            await asyncio.sleep(after_s)
            num_tokens += count
            is_last = place == len(script.chunks) - 1
            text = script.text * count
            choice: dict[str, Any] = {"index": 0, "finish_reason": "length" if is_last and script.ends == "done" else None}
            choice |= {"delta": {"content": text}} if "messages" in body else {"text": text}
            value: dict[str, Any] = {"choices": [choice]}
            if script.has_counts and options.get("continuous_usage_stats"):
                value["usage"] = {"completion_tokens": num_tokens, "prompt_tokens": 7}
            sent.append(time.perf_counter())
            send(json.dumps(value))
            await writer.drain()
        if script.ends == "hangs":
            await asyncio.sleep(60)
        if script.ends == "cut":
            return False
        if script.ends == "error":
            send(json.dumps({"error": {"message": "the step failed", "code": "engine_step_failed"}}))
        elif options.get("include_usage"):
            send(json.dumps({"choices": [], "usage": {"completion_tokens": num_tokens, "prompt_tokens": 7}}))
        send("[DONE]")
        writer.write(b"0\r\n\r\n")
        return True


@contextmanager
def fake_server(*scripts: Script) -> Iterator[Fake]:
    """Served on a thread of its own until the block ends."""
    fake, is_up, loop = Fake(list(scripts)), threading.Event(), asyncio.new_event_loop()

    async def main() -> None:
        server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
        fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        is_up.set()
        await stop.wait()
        server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0.01)  # for connections to close

    stop = asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(main()))
    thread.start()
    is_up.wait(10)
    try:
        yield fake
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(20)
        loop.close()
