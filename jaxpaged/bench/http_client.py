"""A client that costs little, in a process of its own: `python -m jaxpaged.bench.http_client < job.json`.

So many connections at once, each sends its next request when the answer to the last is whole. While the clock runs nothing is
looked at but where an answer ends; what the answers say is counted afterwards. Knows sockets. Refuses to know the server.
"""

from __future__ import annotations

import json
import selectors
import socket
import sys
import time
from typing import Any

_READ_BYTES = 1 << 18
_HEAD_END = b"\r\n\r\n"


class _Connection:
    """One socket, and what has come of the answer that it waits for."""

    def __init__(self, address: tuple[str, int]):
        self.socket = socket.create_connection(address)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.received = bytearray()
        self.num_reads = 0
        self._num_expected: int | None = None

    def send(self, request: bytes) -> None:
        """Ask. The socket has room for a request: the last one was taken."""
        self.received, self._num_expected = bytearray(), None
        self.socket.sendall(request)

    def take(self) -> bool:
        """Read what is there; whether the answer is whole. Raises ConnectionError."""
        piece = self.socket.recv(_READ_BYTES)
        if not piece:
            raise ConnectionError("the server has closed the connection")
        self.num_reads += 1
        self.received += piece
        if self._num_expected is None:
            end = self.received.find(_HEAD_END)
            if end < 0:
                return False
            head = bytes(self.received[:end]).lower()
            _, name, value = head.partition(b"content-length:")
            self._num_expected = end + 4 + int(value.split(b"\r\n")[0]) if name else 0
        if self._num_expected:
            return len(self.received) >= self._num_expected
        return self.received.endswith(b"0\r\n\r\n")  # the last chunk


def run(host: str, port: int, path: str, bodies: list[str], num_connections: int) -> dict[str, Any]:
    """Send all bodies; seconds, seconds of this process's CPU, reads, and tokens as the answers' usage counts them.

    Raises:
      RuntimeError: an answer is no success, or has no usage.
    """
    head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\nContent-Length: "
    requests = [f"{head}{len(body.encode())}\r\n\r\n{body}".encode() for body in reversed(bodies)]
    answers: list[bytearray] = []
    num_reads = 0
    with selectors.DefaultSelector() as selector:
        connections = [_Connection((host, port)) for _ in range(min(num_connections, len(requests)))]
        started, cpu = time.perf_counter(), time.process_time()
        for one in connections:
            selector.register(one.socket, selectors.EVENT_READ, one)
            one.send(requests.pop())
        while selector.get_map():
            for key, _ in selector.select():
                one: _Connection = key.data
                if not one.take():
                    continue
                answers.append(one.received)
                if requests:
                    one.send(requests.pop())
                else:
                    selector.unregister(one.socket)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        for one in connections:
            num_reads += one.num_reads
            one.socket.close()
    num_tokens = sum(_num_tokens(bytes(answer)) for answer in answers)
    return {"seconds": seconds, "client_cpu_s": cpu, "num_reads": num_reads, "num_tokens": num_tokens}


def _num_tokens(answer: bytes) -> int:
    head, _, rest = answer.partition(_HEAD_END)
    status = head.split(b" ", 2)[1]
    place = rest.rfind(b'"completion_tokens":')
    if status != b"200" or place < 0:
        raise RuntimeError(f"an answer with status {status.decode()}: {rest[:300].decode('utf-8', 'replace')}")
    return int(rest[place:].split(b":", 1)[1].split(b",", 1)[0])


def main() -> int:
    """The command: a job as JSON on stdin, what came of it as JSON on stdout."""
    json.dump(run(**json.load(sys.stdin)), sys.stdout)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
