"""Headless Chromium, driven over a pipe with the DevTools protocol: no driver, no package, nothing but the browser.

The browser may reach loopback addresses alone: it is started with a host map that sends all else nowhere.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--mute-audio", "--hide-scrollbars"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--remote-debugging-pipe",
)
# Puts two pipes where the browser looks for them, and becomes it.
_BECOME = """
import os, sys
there, here = os.dup(int(sys.argv[1])), os.dup(int(sys.argv[2]))
while min(there, here) <= 4:
    there, here = os.dup(there), os.dup(here)
os.dup2(there, 3)
os.dup2(here, 4)
if hasattr(os, "SCHED_OTHER"):  # not as the engine beside it
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
os.execv(sys.argv[3], sys.argv[3:])
"""
TIMEOUT_S = 30.0
# What Chromium says to who asks a page while another is put in its place.
_GOING = ("Inspected target navigated or closed", "Cannot find context with specified id", "Execution context was destroyed")


class GoingError(RuntimeError):
    """The page that was asked is on its way to another; the next one can be asked."""


def find_browser() -> str | None:
    """Where one is; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One process. Messages are JSON with a NUL between them, in on its file 3 and out on its file 4."""

    def __init__(self, folder: Path):
        there, self._in = os.pipe()
        self._out, here = os.pipe()
        command = [sys.executable, "-c", _BECOME, str(there), str(here), str(find_browser()), *_FLAGS]
        command += [f"--user-data-dir={folder}", "about:blank"]
        self._process = subprocess.Popen(
            command, pass_fds=(there, here), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        os.close(there)
        os.close(here)
        self._replies: dict[int, dict[str, Any]] = {}
        self._pages: dict[str, Page] = {}
        self._news = threading.Condition()
        self._number = 0
        self._is_over = False
        threading.Thread(target=self._read, daemon=True).start()

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """The result of a command; an error of the browser's is raised."""
        with self._news:
            self._number += 1
            number = self._number
        message = {"id": number, "method": method, "params": params, **({"sessionId": session} if session else {})}
        os.write(self._in, json.dumps(message).encode() + b"\0")
        with self._news:
            if not self._news.wait_for(lambda: number in self._replies or self._is_over, TIMEOUT_S):
                raise TimeoutError(f"{method}: no answer for {TIMEOUT_S:g} s")
            reply = self._replies.pop(number, {"error": "the browser has ended"})
        if "error" in reply:
            is_going = any(text in str(reply["error"]) for text in _GOING)
            raise (GoingError if is_going else RuntimeError)(f"{method}: {reply['error']}")
        return reply["result"]

    @contextmanager
    def page(self, width: int = 1280, height: int = 800, scale: float = 1, *, is_dark: bool = False) -> Iterator[Page]:
        """An empty page with a session storage of its own."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, session)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.call(f"{domain}.enable")
        page.resize(width, height, scale, is_dark=is_dark)
        try:
            yield page
        finally:
            self.call("Target.disposeBrowserContext", browserContextId=context)

    def close(self) -> None:
        try:
            self.call("Browser.close")
            self._process.wait(10)
        except (OSError, RuntimeError, TimeoutError, subprocess.TimeoutExpired):
            os.killpg(self._process.pid, 9)
            self._process.wait(10)
        os.close(self._in)

    def _read(self) -> None:
        rest = b""
        while part := os.read(self._out, 1 << 20):
            *messages, rest = (rest + part).split(b"\0")
            for text in messages:
                message = json.loads(text)
                with self._news:
                    if "id" in message:
                        self._replies[message["id"]] = message
                    elif message.get("sessionId") in self._pages:
                        self._pages[message["sessionId"]].take(message["method"], message["params"])
                    self._news.notify_all()
        with self._news:
            self._is_over = True
            self._news.notify_all()
        os.close(self._out)


class Page:
    """A page, what it asked for, and what went wrong in it."""

    def __init__(self, browser: Browser, session: str):
        self._browser, self._session = browser, session
        self.problems: list[str] = []  # of the console, the policy and scripts
        self.requests: list[str] = []
        self.is_loaded = False

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **params)

    def take(self, method: str, params: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Page.loadEventFired":
            self.is_loaded = True
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.problems.append(str([one.get("value") for one in params["args"]]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")

    def open(self, url: str) -> None:
        self.is_loaded = False
        self.call("Page.navigate", url=url)
        self.until(lambda: self.is_loaded, "the page is loaded")

    def resize(self, width: int, height: int, scale: float = 1, *, is_dark: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def run(self, script: str) -> Any:
        """The value of an expression."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"].get("exception", {}).get("description", script))
        return found["result"].get("value")

    def text(self, selector: str) -> str:
        return self.run(f"document.querySelector({json.dumps(selector)}).textContent")

    def number(self, selector: str) -> int:
        return int(self.text(selector).replace(",", ""))

    def until(self, holds: str | Callable[[], Any], what: str = "", seconds: float = TIMEOUT_S) -> Any:
        """Wait for an expression, or a function, to be true; of a page that comes in this one's place too."""
        deadline = time.monotonic() + seconds
        while True:
            with suppress(GoingError):
                if found := holds() if callable(holds) else self.run(holds):
                    return found
            assert time.monotonic() < deadline, f"waited in vain: {what or holds}; {self.problems}"
            time.sleep(0.03)

    def type(self, selector: str, text: str) -> None:
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        text = {"text": "\r"} if key == "Enter" else {}
        codes = {"Enter": 13, "Tab": 9, "ArrowRight": 39, "ArrowDown": 40, "Home": 36, "End": 35, "Escape": 27}
        for kind in ("keyDown", "keyUp"):
            options = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key], **(text if kind == "keyDown" else {})}
            self.call("Input.dispatchKeyEvent", type=kind, **options)

    def screenshot(self, path: Path, *, is_whole: bool = False) -> None:
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=is_whole)
        path.write_bytes(base64.b64decode(found["data"]))
