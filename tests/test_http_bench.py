"""The bench of HTTP: its client knows where an answer ends however it is cut, and its ratios are of neighbours in time."""

from __future__ import annotations

import socket
import threading
import time

import pytest

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")

from jaxpaged.bench import http, http_client

BODY = b'{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":7,"total_tokens":10}}'
WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
CHUNK = b"data: " + BODY + b"\n\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(CHUNK), CHUNK)
REFUSED = WHOLE.replace(b"200 OK", b"429 No")


def serve(listening: socket.socket, answer: bytes, cut: int) -> None:
    def one(connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection:
            while asked := connection.recv(1 << 16):
                assert asked.startswith(b"POST /v1/completions HTTP/1.1\r\n") and asked.endswith(b"{}")
                connection.sendall(answer[:cut])
                time.sleep(0.002)
                connection.sendall(answer[cut:])

    while True:
        try:
            connection, _ = listening.accept()
        except OSError:
            return
        threading.Thread(target=one, args=(connection,), daemon=True).start()


@pytest.mark.parametrize("answer", [WHOLE, CHUNKED, REFUSED])
@pytest.mark.parametrize("cut", [1, 20, 48, -6, -3, -1])
def test_the_client_knows_where_an_answer_ends(answer: bytes, cut: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, args=(listening, answer, cut), daemon=True).start()
        job = {"path": "/v1/completions", "bodies": ["{}"] * 10, "num_connections": 3}
        if answer is REFUSED:
            with pytest.raises(RuntimeError, match="status 429"):
                http_client.run(*listening.getsockname(), **job)
            return
        found = http_client.run(*listening.getsockname(), **job)
    assert found["num_tokens"] == 70 and 0 < found["seconds"] < 10


def test_ratios_are_of_neighbours_in_time() -> None:
    """A machine that becomes ten times as slow for everybody changes no ratio."""
    speeds = iter([1.0] * 8 + [10.0] * 100)

    def turn(share: float):
        def run() -> dict[str, float]:
            seconds = next(speeds)
            return {"tokens_per_s": 100 * share / seconds, "server_cpu_s": seconds / share}

        return run

    row = http.compare({"offline": turn(1.0), "half": turn(0.5)}, 9)[0]
    assert (row["way"], row["ratio"], row["cpu_ratio"]) == ("half", 0.5, 0.5)


def test_prompts_share_no_beginning() -> None:
    prompts, params = http.prompts_of(64, 24), http.params_of(64, 128)
    assert len({prompt.split()[0] for prompt in prompts}) == 64
    assert all(64 < (one.max_tokens or 0) <= 128 for one in params) and len({one.max_tokens for one in params}) > 30
