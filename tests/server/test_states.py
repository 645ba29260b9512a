"""What the engine holds, over HTTP: the same as it holds, to those with a key, at a rate that the engine does not notice.

The engine is real, the device is the fake runner's.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxpaged.async_llm import AsyncLLM
from jaxpaged.cli import main
from jaxpaged.observe.snapshot import VIEWS, snapshot
from jaxpaged.observe.tables import as_text
from jaxpaged.streams import ClosedError

for name in ("fastapi", "uvicorn", "httptools", "httpx2"):
    pytest.importorskip(name, reason="the extra `serve` is not installed")
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from running import Running, is_empty, running, wait_until  # noqa: E402
from test_async_llm import Gated, new_llm, params  # noqa: E402

from jaxpaged.server.looks import ENGINE_SHARE, INTERVAL_S, SharedLook  # noqa: E402

KEYS = ("a-key-of-at-least-16", "another-key-of-16-and-more")
COMMANDS = {
    "active-blocks": ["inspect"],
    "scheduler": ["debug", "--scheduler"],
    "prefix-cache": ["debug", "--prefix-cache"],
}


@pytest.fixture(scope="module")
def model() -> Iterator[tuple[AsyncLLM, Gated]]:
    llm, runner = new_llm(Gated(200))
    yield llm, runner
    llm.shutdown()


@pytest.fixture(scope="module")
def server(model: tuple[AsyncLLM, Gated]) -> Iterator[Running]:
    with running(model[0], api_key=KEYS) as one:
        yield one


def headers(key: str = KEYS[0]) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


class Busy:
    """Requests of two tenants that run while the block does. Of four, the first and the third share pages."""

    def __init__(self, server: Running, runner: Gated, num_requests: int = 4):
        self._server, self._runner, self._num = server, runner, num_requests
        self._threads = [threading.Thread(target=self._ask, args=(place,)) for place in range(num_requests)]

    def _ask(self, place: int) -> None:
        body = {"prompt": [5] * 40 if place < 3 else [9] * 20, "max_tokens": 400, "ignore_eos": True}
        with self._server.client(**headers(KEYS[place % 2])) as client:
            self._answer = client.post("/v1/completions", json=body)

    def __enter__(self) -> Busy:
        self._runner.pause_s = 0.01
        running = self._server.engine.scheduler.running
        self._threads[0].start()  # the others find its pages
        wait_until(lambda: bool(running) and running[0].num_computed >= 40)
        for thread in self._threads[1:]:
            thread.start()
        wait_until(lambda: len(self._server.engine.scheduler.running) == self._num)
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.pause_s = 0.0
        for thread in self._threads:
            thread.join(20)
        wait_until(lambda: is_empty(self._server.llm))


def get(server: Running, path: str, status: int = 200, **given: str) -> Any:
    with server.client(**(given or headers())) as client:
        answer = client.get(path)
    assert answer.status_code == status, answer.text
    return answer.json()


# --- views -----------------------------------------------------------------------------------------------------------


def test_a_view_is_what_the_engine_holds(server: Running, model: tuple[AsyncLLM, Gated]) -> None:
    with Busy(server, model[1]):
        blocks, found = get(server, "/state/active-blocks"), get(server, "/state/scheduler")
        assert found["num_running"] == 4 and len(blocks["sequences"]) == 4
        size = found["pool"]["page_size"]
        for line in blocks["sequences"]:
            assert -(-line["tokens"] // size) <= line["num_pages"] == len(line["pages"])
        owned = [page for line in blocks["sequences"] for page in line["pages"]]
        assert len(set(owned)) == blocks["pool"]["used"] < len(owned), "two prompts are the same"
    # Nothing moves now: it is equal to the last number.
    for view in VIEWS:
        expected = snapshot(server.engine.scheduler, view)
        assert get(server, f"/state/{view}") == json.loads(json.dumps(expected))


def test_no_view_tells_a_prompt_or_a_tenant(server: Running, model: tuple[AsyncLLM, Gated]) -> None:
    with Busy(server, model[1]):
        tenants = {sequence.request.tenant for sequence in server.engine.scheduler.running}
        salts = {sequence.request.cache_salt for sequence in server.engine.scheduler.running}
        assert len(salts) == 2 and all(salts)
        for view in VIEWS:
            text = json.dumps(get(server, f"/state/{view}"))
            assert not any(secret in text for secret in (*salts, *filter(None, tenants), *KEYS))
            assert "[5, 5, 5" not in text and "[9, 9, 9" not in text


def test_there_is_no_view_without_a_key(server: Running) -> None:
    for path in (*(f"/state/{view}" for view in VIEWS), "/state/x"):
        for wrong in ({}, headers(KEYS[0][:-1]), {"Authorization": KEYS[0]}):
            with server.client(**wrong) as client:
                assert client.get(path).status_code == 401
    assert get(server, "/state/x", 404)["error"]["param"] == "view"


def test_the_commands_show_what_the_server_says(
    server: Running, model: tuple[AsyncLLM, Gated], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "keys").write_text(f"{KEYS[1]}\n{KEYS[0]}\n")
    (tmp_path / "wrong").write_text("a-key-that-nobody-knows\n")
    where = ["--url", f"{server.url}/", "--api-key-file", str(tmp_path / "keys")]
    with Busy(server, model[1], 1):
        assert main([*COMMANDS["active-blocks"], *where]) == 0
        assert f"pages of {server.engine.config.block_size} tokens" in (out := capsys.readouterr().out) and "req-" in out
    for view, command in COMMANDS.items():
        expected = snapshot(server.engine.scheduler, view)
        assert main([*command, *where]) == 0
        assert capsys.readouterr().out == as_text(expected) + "\n"
        assert main([*command, "--json", *where]) == 0
        assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(expected))
    for more, problem in (([], "without one of its keys"), (["--api-key-file", str(tmp_path / "wrong")], "does not know")):
        assert main(["inspect", "--url", server.url, *more]) == 3
        told = capsys.readouterr().err
        assert problem in told and told.count("\n") == 1 and "nobody-knows" not in told


def test_a_server_that_shows_nothing_says_so(model: tuple[AsyncLLM, Gated], capsys: pytest.CaptureFixture[str]) -> None:
    with running(model[0], show_state=False) as one:
        for path in ("/state/scheduler", "/ui/state", "/ui"):
            assert get(one, path, 404)["error"]["code"] == "not_found"
        assert main(["inspect", "--url", one.url]) == 3
        assert "show_state" in capsys.readouterr().err


# --- looks -----------------------------------------------------------------------------------------------------------


class Counted:
    """A look that takes so long and says how many there have been, and when each began."""

    def __init__(self, llm: AsyncLLM, seconds: float = 0.0):
        self.llm, self.seconds, self.times = llm, seconds, []
        self.look = SharedLook(llm, self._take, lambda number: number)

    def _take(self, engine: Any) -> int:
        self.times.append(self.llm.clock())
        time.sleep(self.seconds)
        return len(self.times)


def test_a_hundred_who_ask_at_once_cost_one_look_and_nobody_none(model: tuple[AsyncLLM, Gated]) -> None:
    async def task() -> list[int]:
        counted = Counted(model[0])
        first = await asyncio.gather(*(counted.look.get() for _ in range(100)))
        await asyncio.sleep(2 * INTERVAL_S)
        assert len(counted.times) == 1
        return first

    assert asyncio.run(task()) == [1] * 100


def test_what_is_got_was_looked_at_after_it_was_asked_for(model: tuple[AsyncLLM, Gated]) -> None:
    async def task() -> None:
        counted = Counted(model[0])

        async def asker(wait_s: float) -> None:
            await asyncio.sleep(wait_s)
            asked_s = model[0].clock()
            number = await counted.look.get()
            assert counted.times[number - 1] >= asked_s

        await asyncio.gather(*(asker(place * 0.01) for place in range(60)))
        assert len(counted.times) <= 0.6 / INTERVAL_S + 2

    asyncio.run(task())


def test_dear_looks_are_rare(model: tuple[AsyncLLM, Gated]) -> None:
    async def task() -> None:
        counted = Counted(model[0], seconds=0.003)
        for _ in range(2):
            await counted.look.get()
        assert counted.times[1] - counted.times[0] >= 0.003 / ENGINE_SHARE

    asyncio.run(task())


def test_a_look_that_fails_is_told_to_all_and_the_next_may_not() -> None:
    llm, _ = new_llm()
    numbers = iter((1 / 2, 0))

    async def task() -> None:
        look = SharedLook(llm, lambda engine: 1 / next(numbers), lambda value: value)
        assert await asyncio.gather(look.get(), look.get()) == [2, 2]
        found = await asyncio.gather(look.get(), look.get(), return_exceptions=True)
        assert [type(error) for error in found] == [ZeroDivisionError] * 2
        llm.shutdown()
        with pytest.raises(ClosedError):
            await look.get()

    asyncio.run(task())


def test_who_leaves_while_the_engine_is_in_a_step_ends_nobody_elses_look() -> None:
    llm, runner = new_llm()

    async def task() -> None:
        counted = Counted(llm)
        runner.gate.clear()
        stream = await llm.start([1, 2, 3], params(20))
        while not llm._engine.scheduler.running:
            await asyncio.sleep(0.001)
        waiting = [asyncio.ensure_future(counted.look.get()) for _ in range(3)]
        await asyncio.sleep(0.05)
        waiting[0].cancel()
        assert not counted.times
        runner.gate.set()
        assert await asyncio.gather(*waiting[1:]) == [1, 1]
        stream.close()

    try:
        asyncio.run(asyncio.wait_for(task(), 10))
    finally:
        runner.gate.set()
        llm.shutdown()
