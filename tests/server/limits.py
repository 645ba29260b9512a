"""What is too large, too slow, too much at once or has no key: R33, R34, R36, R42 and R46.

Each function raises when a law is broken and returns how many cases it has seen.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from hostile import CHAT, COMPLETION, MESSAGES, exchange, parsed, request
from running import Running, wait_until
from storm import address, anonymous_bytes, asked, at_once, canary, settled

from jaxpaged.server.guard import OPEN_PATHS
from jaxpaged.tokenizer import Tokenizer

MIB = 2**20
KEYS = ("k" * 16, "another-key-of-20-chars")
SMALL = {"prompt": "One day", "max_tokens": 4, "temperature": 0}


def _code(raw: bytes) -> tuple[int, str]:
    status, _, body = parsed(raw)
    return status, json.loads(body)["error"]["code"] if status >= 400 else ""


# --- R33: size ---


def sizes(server: Running, *, num_chunks: int = 1_000_000, num_parallel: int = 64) -> int:
    """Bodies, heads and pieces without end."""
    limit, place = server.server._options.max_body_bytes, address(server)
    whole = b'{"prompt": "' + b"x" * limit + b'"}'
    assert _code(exchange(place, request(COMPLETION, whole))) == (413, "too_large")
    chunked = (("Transfer-Encoding", "chunked"),)
    with socket.create_connection(place, 20) as client:  # of which only the head comes: it is told at once
        client.sendall(request(COMPLETION, b"", length=str(2**40)))
        started = time.monotonic()
        assert client.recv(100).startswith(b"HTTP/1.1 413") and time.monotonic() - started < 0.9
    with socket.create_connection(place, 20) as client:  # without a length
        client.sendall(request(COMPLETION, b"", headers=chunked))
        num_sent, piece = 0, b"10000\r\n" + b" " * 65536 + b"\r\n"
        with contextlib.suppress(ConnectionError):
            while num_sent <= limit + 64 * MIB:
                client.sendall(piece)
                num_sent += 65536
        assert num_sent <= limit + 48 * MIB, "it goes on reading what it has refused"  # what sockets hold is among it

    before = anonymous_bytes()
    body = json.dumps(SMALL).encode()
    flood = b"".join(b"1\r\n%c\r\n" % byte for byte in body.ljust(num_chunks)) + b"0\r\n\r\n"
    started = time.monotonic()
    status, _, _ = parsed(exchange(place, request(COMPLETION, flood, headers=chunked)))
    assert status == 200 and time.monotonic() - started < 30
    for head in (b"X: " + b"y" * (70 << 10), b"\r\n".join(b"X-%d: yyyyyyyy" % n for n in range(9000))):
        assert _code(exchange(place, b"GET /live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + head + b"\r\n\r\n")) == (
            431,
            "headers_too_large",
        )
    with socket.create_connection(place, 20) as client:  # a header without an end
        client.sendall(b"GET /live HTTP/1.1\r\nX: ")
        num_sent = 0
        with contextlib.suppress(ConnectionError):
            while num_sent < 64 * MIB:
                client.sendall(b"y" * 65536)
                num_sent += 65536
        assert num_sent < 48 * MIB, "a header has no end"

    for rest in (b"0\r\n", b"0\r\nX: ", b"1;"):  # trailers without an end, one of them, an extension of a chunk
        for path in (COMPLETION, "/nothing"):  # which is answered before its body has come
            with socket.create_connection(place, 20) as client:
                client.sendall(request(path, b"2\r\n{}\r\n" + rest, headers=chunked))
                num_sent = 0
                with contextlib.suppress(ConnectionError):
                    while num_sent < 64 * MIB:
                        client.sendall(b"a:b\r\n" * 10_000 if rest == b"0\r\n" else b"y" * 50_000)
                        num_sent += 50_000
                assert num_sent < 48 * MIB, "what stands beside a body has no end"
    body = json.dumps(SMALL).encode()
    trailing = b"%x\r\n%b\r\n0\r\nX-Request-Id: theirs\r\nContent-Type: text/plain\r\n\r\n" % (len(body), body)
    status, headers, _ = parsed(exchange(place, request(COMPLETION, trailing, headers=chunked)))
    assert status == 200 and "theirs" not in str(headers), "a trailer was taken for a header"

    statuses: list[int] = []
    largest = request(COMPLETION, b'{"prompt": "One", "max_tokens": 2, "user": "' + b"x" * (limit - 100) + b'"}')
    peak, is_over = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not is_over.wait(0.01):
            peak = max(peak, anonymous_bytes())

    watching = threading.Thread(target=watch)
    watching.start()
    at_once([lambda: statuses.append(parsed(exchange(place, largest, 60))[0])] * num_parallel, num_parallel)
    is_over.set()
    watching.join()
    assert set(statuses) <= {200, 429} and 200 in statuses, statuses
    grown = (peak - before) / MIB
    print(
        f"    {num_parallel} bodies of {limit / MIB:.0f} MiB at once: {statuses.count(200)} served, {grown:+.0f} MiB", flush=True
    )
    assert peak - before < 5 * 16 * limit, "memory without a limit"  # of 16 bodies: bytes, text, what was read of them
    settled(server)
    return 14 + num_parallel


# --- R34: slowness ---


@contextlib.contextmanager
def _trickling(server: Running, count: int) -> Iterator[list[socket.socket]]:
    """Clients that never finish: without a byte, in the head, between requests, in the body, in pieces of a body."""
    beginnings = (
        b"",
        b"GET /li",
        b"\r\n",
        request(COMPLETION, b'{"pro', length="9"),
        request(COMPLETION, b"", headers=(("Transfer-Encoding", "chunked"),)),
    )
    clients = [socket.create_connection(address(server), 20) for _ in range(count)]
    is_over = threading.Event()

    def trickle() -> None:
        pieces = (b"", b"v", b"\r\n", b"", b"1\r\n \r\n")
        while not is_over.wait(0.2):
            for number, client in enumerate(clients):
                with contextlib.suppress(OSError):
                    client.send(pieces[number % 5])

    for number, client in enumerate(clients):
        client.sendall(beginnings[number % 5])
    thread = threading.Thread(target=trickle)
    thread.start()
    try:
        yield clients
    finally:
        is_over.set()
        thread.join()
        for client in clients:
            client.close()


def slow_senders(server: Running, count: int) -> int:
    """All of them are gone within the limit, and who does it well is served meanwhile."""
    limit = server.server._options.body_timeout_s

    def p99(seconds: float) -> float:
        taken, end = [], time.monotonic() + seconds
        while time.monotonic() < end:
            started = time.monotonic()
            assert asked(server, COMPLETION, SMALL)[0] == 200
            taken.append(time.monotonic() - started)
        return sorted(taken)[int(0.99 * (len(taken) - 1))]

    alone = p99(limit * 0.5)
    with _trickling(server, count):
        started = time.monotonic()
        beside = p99(limit * 0.5)
        wait_until(lambda: len(server.server.server_state.connections) == 0, limit + 5)
        gone_s = time.monotonic() - started
    print(
        f"    {count} slow clients gone after {gone_s:.1f} s, the limit is {limit:g} s; p99 beside them x{beside / alone:.2f}",
        flush=True,
    )
    assert gone_s < limit + 2
    settled(server)
    return count


def slow_readers(server: Running, count: int) -> int:
    """Who asks for much and never reads is given up, and the engine does not wait for it. `send_timeout_s` is small."""
    body = {"prompt": "One day", "max_tokens": 900, "ignore_eos": True, "stream": True, "logprobs": 20}
    raw, golden, before, clients = request(COMPLETION, json.dumps(body).encode()), canary(server), anonymous_bytes(), []
    for _ in range(count):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(address(server))
        client.sendall(raw)
        clients.append(client)
    wait_until(lambda: server.llm.num_unfinished == count)
    wait_until(lambda: not server.llm.num_unfinished, 120)
    assert canary(server) == golden
    grown = (anonymous_bytes() - before) / MIB
    wait_until(lambda: len(server.server.server_state.connections) == 0, 5 + server.server._options.send_timeout_s)
    for client in clients:
        client.close()
    print(f"    {count} clients that never read: {grown:+.0f} MiB while they were there", flush=True)
    assert grown < 40 * count
    settled(server)
    return count


# --- R36: fan-out ---


def fan_out(server: Running) -> int:
    """More outputs than may be are refused before a prompt is looked at."""
    looked = Tokenizer.encode
    Tokenizer.encode = None  # type: ignore[assignment, method-assign]
    cases = [(1, 65, None), (65, 1, None), (33, 2, None), (9, 8, None), (2, 2, 33), (1, 1, 65), (64, 64, None), (1, 10**9, None)]
    try:
        for num_prompts, n, best_of in cases:
            body = {"prompt": ["One day"] * num_prompts, "n": n, **({"best_of": best_of} if best_of else {})}
            status, _, content = asked(server, COMPLETION, body)
            error = json.loads(content)["error"]
            assert status == 400 and error["param"] in ("n", "best_of", "prompt"), (body, error)
        assert asked(server, CHAT, {"messages": MESSAGES, "n": 65})[0] == 400
    finally:
        Tokenizer.encode = looked  # type: ignore[method-assign]
    assert asked(server, COMPLETION, {**SMALL, "prompt": ["One day"] * 16, "n": 4, "temperature": 1})[0] == 200
    settled(server)
    return len(cases) + 2


# --- R42: one name for all ---


def same_id(server: Running, count: int, *, num_at_once: int = 100) -> int:
    """All with one X-Request-Id and one request_id: each gets its own answer."""
    prompts = [f"One day number {number}" for number in range(25)]
    wanted = {}
    for prompt in prompts:
        wanted[prompt] = json.loads(asked(server, COMPLETION, {**SMALL, "prompt": prompt})[2])["choices"][0]["text"]
    ids: set[str] = set()

    def one(number: int) -> None:
        prompt = prompts[number % 25]
        body = {**SMALL, "prompt": prompt, "request_id": "same"}
        while True:
            status, headers, content = asked(server, COMPLETION, body, ("X-Request-Id", "same"))
            assert headers["x-request-id"] == "same"
            if status != 429:
                break
            time.sleep(0.05)
        found = json.loads(content)
        assert status == 200 and found["choices"][0]["text"] == wanted[prompt], "somebody else's answer"
        ids.add(found["id"])

    at_once([lambda number=number: one(number) for number in range(count)], num_at_once)
    assert len(ids) == count
    settled(server)
    return count


# --- R46: keys ---


def keys(server: Running) -> int:
    """Every route that there is, and ways to name it, without a key, with wrong ones and odd methods; `server` has KEYS."""
    routes = sorted({route.path for route in server.server.config.app.routes if hasattr(route, "path")})
    assert len(routes) > 10
    bad = (
        *(
            (),
            (("Authorization", "Bearer wrong"),),
            (("Authorization", f"Bearer {KEYS[0][:-1]}"),),
            (("Authorization", KEYS[0]),),
        ),
        *(
            (("Authorization", f"Bearer {KEYS[1].upper()}"),),
            (("Authorization", f"Basic {KEYS[0]}"),),
            (("Authorization", "Bearer"),),
        ),
        (("Authorization", f"Bearer {KEYS[0]}x"), ("X-Api-Key", KEYS[0])),
        (("Cookie", f"Authorization=Bearer {KEYS[0]}"),),
    )
    count = 0
    jobs = []

    def one(path: str, method: str, headers: tuple, host: str) -> None:
        nonlocal count
        raw = request(path, b"{}", method=method, headers=headers).replace(b"Host: x", b"Host: " + host.encode(), 1)
        status = parsed(exchange(address(server), raw), method)[0]
        is_open = re.sub("^http://[^/]*", "", path.partition("?")[0]) in OPEN_PATHS
        allowed = {200, 405} if is_open else {400, 401}
        assert status in allowed, (path, method, headers, host, status)
        count += 1

    for path in (*routes, "/nowhere"):
        spelled = {
            path,
            "/" + path,
            path + "/",
            path + "?live",
            path.upper(),
            "/live/.." + path,
            path + "%00",
            "http://live" + path,
        }
        for number, name in enumerate(sorted(spelled - {"/live?live", "/LIVE"})):
            for place, headers in enumerate(bad):
                method = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PROPFIND")[(number + place) % 7]
                host = ("x", "x/live", "/live?", "127.0.0.1")[(number + place) % 4]
                if name.rstrip("/") != "/live" or name == "/live":
                    jobs.append(lambda name=name, method=method, headers=headers, host=host: one(name, method, headers, host))
    for name in ("/live", "/live?x=1", "http://x/live"):
        jobs.append(lambda name=name: one(name, "GET", (), "x"))
    at_once(jobs, 8)
    for key in KEYS:
        assert asked(server, COMPLETION, SMALL, ("Authorization", f"Bearer {key}"))[0] == 200
        assert asked(server, COMPLETION, SMALL, ("authorization", f"bearer  {key} "))[0] == 200
    return count
