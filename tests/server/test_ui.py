"""The live page: what it is told is what the pool holds, and what a person sees in a browser is what it is told.

The browser's tests skip where there is no Chromium. Their engine is real; the device is the fake runner's, but for the chat.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import random
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxpaged.async_llm import AsyncLLM
from jaxpaged.server.options import ServerOptions

for name in ("fastapi", "uvicorn", "httptools", "httpx2"):
    pytest.importorskip(name, reason="the extra `serve` is not installed")
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "observe"))
sys.path.insert(0, str(Path(__file__).parent))
from browser import Browser  # noqa: E402
from busy import new_engine  # noqa: E402
from running import Running, is_empty, running, wait_until  # noqa: E402
from test_async_llm import Gated, params  # noqa: E402
from test_async_llm import new_llm as new_fake_llm  # noqa: E402

from jaxpaged.server.service import Service  # noqa: E402
from jaxpaged.server.ui import live as live_module  # noqa: E402
from jaxpaged.server.ui.live import Live, take  # noqa: E402
from jaxpaged.server.ui.page_map import CACHED, FIRST_GROUP, FREE, SHARED, PageMaps, changes, value_of, whole  # noqa: E402

KEY = "a-key-of-at-least-16"
LIVE = "document.getElementById('status')?.textContent === 'live'"


# --- the map -----------------------------------------------------------------------------------------------------------


def applied(values: np.ndarray, runs: list[int]) -> np.ndarray:
    """What a page makes of changes."""
    found = values.copy()
    for place, length, value in zip(runs[::3], runs[1::3], runs[2::3], strict=True):
        found[place : place + length] = value
    return found


def decoded(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<u2")


def test_the_map_is_what_the_pool_says_page_by_page() -> None:
    engine, maps, rng = new_engine(), PageMaps(), random.Random(0)
    pool, seen = engine.pool, set()
    before = np.zeros(pool.num_usable, np.uint16)
    for step in range(300):
        if rng.random() < 0.3:
            prompt = [rng.randint(1, 2)] * rng.randint(1, 60)
            engine.add_request(prompt, params(rng.randint(1, 30), n=rng.choice((1, 1, 3)), temperature=1.0))
        engine.step()
        taken = take(engine)
        after = maps.add(taken.refcounts, taken.known, taken.owned)
        owners: dict[int, set[int]] = {}
        for sequence in engine.scheduler.running:
            for page in sequence.owned_pages:
                owners.setdefault(page, set()).add(sequence.number)
        named = {value: group for group, value in maps.groups.items()}
        for page, value in enumerate(after.tolist(), 1):
            if not pool.num_owners(page):
                assert value == (CACHED if page in pool.cache else FREE)
            elif pool.num_owners(page) == 1:
                assert value == value_of(*owners[page])
            else:
                assert value >= FIRST_GROUP and named[value] == tuple(sorted(owners[page]))
            seen.add(min(value, 3) if value < FIRST_GROUP else FIRST_GROUP)
        assert (after == CACHED).sum() == pool.num_cached and (after > CACHED).sum() == pool.num_used
        runs = changes(before, after)
        assert np.array_equal(applied(before, runs) if runs is not None else decoded(whole(after)), after), step
        before = after
    assert seen == {FREE, CACHED, 3, FIRST_GROUP}


def test_changes_are_no_longer_than_the_whole() -> None:
    rng = np.random.default_rng(0)
    for share in (0.0, 0.001, 0.05, 0.5, 1.0):
        before = rng.integers(0, 9, 10_000).astype(np.uint16)
        after = np.where(rng.random(10_000) < share, rng.integers(0, 2**16, 10_000), before).astype(np.uint16)
        runs = changes(before, after)
        assert (runs is None) == (share >= 0.5)
        if runs is not None:
            assert np.array_equal(applied(before, runs), after) and len(json.dumps(runs)) < 1.4 * len(whole(after))
    assert changes(before, before) == []


def test_more_shares_than_can_be_told_apart_are_shared_all_the_same() -> None:
    pages = list(range(1, 1001))
    owned = [(number, pages) for number in range(30)]
    found = PageMaps().add([0] + [30] * 1000, [], owned)
    assert set(found.tolist()) == {SHARED}


def test_a_look_costs_the_engine_microseconds_for_a_hundred_thousand_pages() -> None:
    """The best of some, which a busy machine leaves alone: 1.4 ms were measured with all pages cached, 0.4 ms with few."""
    engine = new_engine(100_001)
    for number in range(16):
        engine.add_request([number + 1] * 40, params(100))
    for _ in range(8):
        engine.step()
    seconds = []
    for _ in range(20):
        begun = time.perf_counter()
        take(engine)
        seconds.append(time.perf_counter() - begun)
    assert min(seconds) < 0.005


# --- what the page is told -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fake() -> Iterator[tuple[AsyncLLM, Gated]]:
    llm, runner = new_fake_llm(Gated(200))
    yield llm, runner
    llm.shutdown()


def test_the_page_says_nothing_and_runs_nothing_else(fake: tuple[AsyncLLM, Gated]) -> None:
    with running(fake[0], api_key=KEY) as one, one.client() as client:
        answer = client.get("/ui")
        head = client.head("/ui")
        assert [client.get(path).status_code for path in ("/ui/state", "/ui/", "/ui/x", "/ui?a", "/UI")] == [
            401,
            401,
            401,
            200,
            401,
        ]
        assert client.post("/ui").status_code == 405
    assert (answer.status_code, head.status_code, head.content) == (200, 200, b"")
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        assert policy[directive] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'" and policy["require-trusted-types-for"] == "'script'"
    # Nothing but names of XML is an address, and no attribute is a script or a style.
    assert set(re.findall(r"https?://[^\s'\"]+", answer.text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<[^>]+\s(on\w+|style|src|href=\"(?!data:))=", answer.text.split("<script>")[0])
    assert "innerHTML" not in answer.text and KEY not in answer.text


def test_whoever_has_seen_a_map_is_told_what_is_new(fake: tuple[AsyncLLM, Gated], monkeypatch: pytest.MonkeyPatch) -> None:
    llm, runner = fake
    for name, seconds in (("INTERVAL_S", 0.01), ("ENGINE_SHARE", 1.0)):  # whatever a look on a busy machine takes
        monkeypatch.setattr(f"jaxpaged.server.looks.{name}", seconds)
    monkeypatch.setattr(live_module, "_PATIENCE_S", 15.0)

    async def task() -> None:
        live = Live(Service(llm, ServerOptions()))
        runner.pause_s = 0.002
        streams = [await llm.start([number % 2 + 1] * 40, params(150)) for number in range(4)]
        first = json.loads(await live.answer("nobody-1"))["look"]["map"]
        values, name = decoded(first["whole"]).copy(), first["name"]
        for _ in range(12):
            answers = await asyncio.gather(*(live.answer(since) for since in (name, "", name)))
            new, all_of_it, again = (json.loads(answer)["look"]["map"] for answer in answers)
            assert new == again
            assert new["since"] == name and new["name"] == all_of_it["name"] != name
            values, name = applied(values, new["changes"]), new["name"]
            assert np.array_equal(values, decoded(all_of_it["whole"]))
        for stream in streams:
            stream.close()
        old = json.loads(await live.answer(first["name"]))["look"]["map"]
        assert "whole" in old, "a map of long ago is not kept"

    asyncio.run(asyncio.wait_for(task(), 20))
    runner.pause_s = 0.0
    wait_until(lambda: is_empty(llm))


def test_a_step_that_does_not_end_is_told(fake: tuple[AsyncLLM, Gated], monkeypatch: pytest.MonkeyPatch) -> None:
    llm, runner = fake
    monkeypatch.setattr(live_module, "_PATIENCE_S", 0.1)

    async def task() -> list[dict[str, Any]]:
        live = Live(Service(llm, ServerOptions()))
        runner.gate.clear()
        stream = await llm.start([1, 2, 3], params(5))
        while not llm._engine.scheduler.running:
            await asyncio.sleep(0.001)
        early = json.loads(await live.answer(""))
        runner.gate.set()
        while live._look.held_up_s:  # the step that was told ends, and the look that waited for it
            await asyncio.sleep(0.001)
        while (late := json.loads(await live.answer("")))["look"] is None:
            assert late["now"]["problem"] is None, "a look is put off, no step is long"
        stream.close()
        return [early, late]

    early, late = asyncio.run(asyncio.wait_for(task(), 10))
    assert "A step has taken" in early["now"]["problem"] and early["look"] is None
    assert late["now"]["problem"] is None and late["now"]["look_age_s"] < 1
    wait_until(lambda: is_empty(llm))


# --- what a person sees ----------------------------------------------------------------------------------------------------


class Asking:
    """Requests of token ids that run while the block does."""

    def __init__(self, server: Running, runner: Gated, prompts: list[list[int]]):
        self._runner = runner
        bodies = [{"prompt": prompt, "max_tokens": 400, "ignore_eos": True} for prompt in prompts]
        self._threads = [threading.Thread(target=self._ask, args=(server, body)) for body in bodies]
        self._server = server

    def _ask(self, server: Running, body: dict[str, Any]) -> None:
        with server.client() as client:
            client.post("/v1/completions", json=body)

    def __enter__(self) -> None:
        self._runner.pause_s = 0.02
        for thread in self._threads:
            thread.start()

    def __exit__(self, *_: object) -> None:
        self._runner.pause_s = 0.0
        for thread in self._threads:
            thread.join(20)
        wait_until(lambda: is_empty(self._server.llm))


OVERFLOWING = """[...document.querySelectorAll("body *")].filter((node) => {
  const style = getComputedStyle(node);
  const isCut = node.scrollWidth > node.clientWidth + 1 && node.clientWidth > 0;
  return isCut && style.overflowX !== "visible" && style.textOverflow !== "ellipsis" && !node.matches(".hidden");
}).map((node) => node.className || node.id || node.tagName)"""


def test_the_page_shows_the_pages_of_what_runs_and_frees_them(browser: Browser, fake: tuple[AsyncLLM, Gated]) -> None:
    llm, runner = fake
    with running(llm) as one, browser.page() as page:
        page.open(f"{one.url}/ui")
        page.until(LIVE)
        page.until(lambda: page.number("#count-free") + page.number("#count-cached") == 199)
        assert (
            not page.run("document.getElementById('no-rows').hidden")
            and page.run("document.querySelectorAll('#rows tr').length") == 0
        )
        with Asking(one, runner, [[7] * 48, [8] * 48]):
            page.until("document.querySelectorAll('#rows tr[data-state=decoding]').length === 2")
            page.until(lambda: page.number("#count-one") >= 6)
            (first, *_), names = llm._engine.scheduler.running[0].pages, [page.text("#rows tr"), page.text("#rows tr + tr")]
            # By keyboard: to the first page, then on to one that somebody owns.
            page.run("document.getElementById('map').focus()")
            page.press("Home")
            for _ in range(first - 1):
                page.press("ArrowRight")
            told = page.text("#page-told")
            assert re.fullmatch(rf"Page {first}: owned by (req-\d+)", told), told
            assert any(name.startswith(told.split()[-1]) for name in names)
            for width, height in ((390, 844), (1280, 800), (760, 900)):
                page.resize(width, height)
                page.until("document.documentElement.scrollWidth <= innerWidth")
                assert page.run(OVERFLOWING) == []
            # Who has the keyboard on a row keeps it when another row goes.
            page.run("document.querySelector('#rows tr + tr').focus()")
            last = llm._engine.scheduler.running[1].request.request_id
            llm._thread.find(llm._engine.scheduler.running[0].request.request_id).close()
            page.until("document.querySelectorAll('#rows tr').length === 1")
            assert page.run("document.activeElement.textContent").startswith(last)
        page.until(lambda: page.number("#count-one") + page.number("#count-shared") == 0)
        page.until("document.querySelectorAll('#rows tr').length === 0")
        assert page.number("#count-cached") == llm._engine.pool.num_cached > 0
        assert page.problems == [] and all(url.startswith(one.url) or url.startswith("data:") for url in page.requests)


def test_a_key_is_asked_for_and_a_wrong_one_is_told(browser: Browser, fake: tuple[AsyncLLM, Gated]) -> None:
    with running(fake[0], api_key=KEY) as one, browser.page() as page:
        page.open(f"{one.url}/ui")
        page.until("document.getElementById('key-dialog')?.open")
        page.type("#key", "a-key-that-is-not-known")
        page.press("Enter")
        page.until("document.getElementById('key-told').textContent.includes('does not know')")
        page.type("#key", "no key at all")
        page.press("Enter")
        page.until("document.getElementById('key-told').textContent.includes('no spaces')")
        page.type("#key", KEY)
        page.press("Enter")
        page.until(LIVE)
        assert not page.run("document.getElementById('key-dialog')?.open")
        page.open(f"{one.url}/ui")  # it stays in the tab
        page.until(LIVE)
        assert not any(KEY in url for url in page.requests) and page.run("document.cookie + localStorage.length") == "0"
        assert all("401" in problem for problem in page.problems)
        page.run("document.getElementById('forget').click()")
        page.until("document.getElementById('key-dialog')?.open")


def test_who_waits_for_a_page_that_goes_waits_for_the_next(browser: Browser, fake: tuple[AsyncLLM, Gated]) -> None:
    never_at_first = "sessionStorage.again ? 'the next' : (sessionStorage.again = 1, location.reload(), new Promise(() => {}))"
    with running(fake[0]) as one, browser.page() as page:
        page.open(f"{one.url}/ui")
        assert page.until(never_at_first) == "the next"
        with pytest.raises(RuntimeError, match="ReferenceError"):  # what is wrong stays wrong
            page.until("no_such_name")


def test_a_server_that_ends_and_comes_back_is_told(browser: Browser, fake: tuple[AsyncLLM, Gated]) -> None:
    with browser.page() as page:
        with running(fake[0]) as one:
            page.open(f"{one.url}/ui")
            page.until(LIVE)
        page.until("document.getElementById('status').textContent === 'no answer'")
        assert "has not answered for" in page.text("#banner")
        with running(fake[0], port=int(one.url.rpartition(":")[2])) as again:
            page.until(LIVE)
            assert again.url == one.url and "was restarted" in page.text("#banner")
            assert page.run("document.body.className") == ""


def test_a_chat_that_is_refused_says_why(browser: Browser, fake: tuple[AsyncLLM, Gated]) -> None:
    """`test_server` has one that is answered."""
    with running(fake[0]) as one, browser.page() as page:
        page.open(f"{one.url}/ui")
        page.until(LIVE)
        page.type("#prompt", "<b>Good day</b>")
        page.press("Enter")
        page.until("document.querySelector('.message.failed p') !== null")
        page.until("document.getElementById('send').textContent === 'Send'")
        assert "this server knows no text" in page.text(".message.failed p")
        assert page.text("[data-role=user] p") == "<b>Good day</b>"
        assert page.run("document.querySelectorAll('#messages b').length") == 0
