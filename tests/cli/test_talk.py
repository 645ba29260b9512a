"""`chat` and `complete` with a server: what is sent, what is shown, and how an answer is stopped."""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_server import Script, fake_server

from jaxpaged import cli
from jaxpaged.cli.talk import InProcess
from jaxpaged.cli.terminal import harmless
from jaxpaged.client.openai import of_first, text_of
from jaxpaged.host.request import SamplingParams

pytestmark = pytest.mark.usefixtures("own_logger")


def test_a_terminal_is_told_nothing_that_it_would_obey() -> None:
    text = "a\x1b[31mred\x1b]0;title\x07 \x9b2J \u202eevil\r\n\ttab é 日本 😀\x7f"
    shown = harmless(text)
    assert shown == "a␛[31mred␛]0;title␇ �2J �evil␍\n\ttab é 日本 😀␡"
    assert harmless(shown) == shown


def test_a_conversation_with_a_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "key").write_text("\nsecret-key\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\nthree\n/reset\nfour\n/exit\nnever\n"))
    with fake_server(Script(text="yes"), Script(status=500, code="broken"), Script(text="no"), Script(text="so")) as fake:
        argv = ["chat", "--url", fake.url, "--api-key-file", str(tmp_path / "key"), "--system-prompt", "Be brief."]
        assert cli.main([*argv, "--stats", "--max-tokens", "9", "--seed", "3", "--stop", "x", "--logit-bias", "5:-1"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "yes\nno\nso\n"
    assert "error: HTTP 500: no room (/reset starts over)" in shown.err and "1 token out" in shown.err
    contents = [[message["content"] for message in body["messages"]] for body in fake.asked]
    # What was refused is not remembered.
    assert contents == [["Be brief.", *more] for more in (["one"], ["one", "yes", "two"], ["one", "yes", "three"], ["four"])]
    body = fake.asked[0]
    assert (body["model"], body["max_tokens"], body["seed"], body["stop"]) == ("demo", 9, 3, "x")
    assert body["logit_bias"] == {"5": -1.0} and body["stream"]
    assert all("authorization: Bearer secret-key" in head for head in fake.heads)


def test_completions_of_a_server(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("One day\n\nA dog\n"))
    with fake_server(Script([(0.0, 1), (0.0, 2)], text="go ")) as fake:
        assert cli.main(["complete", "--url", fake.url, "--model-name", "other"]) == 0
        assert capsys.readouterr().out == "go go go \n" * 2
        assert cli.main(["complete", "--url", fake.url, "-q", "Once"]) == 0
    assert [(body["prompt"], body["model"]) for body in fake.asked] == [
        *(("One day", "other"), ("A dog", "other"), ("Once", "demo")),
    ]
    assert fake.asked[0]["max_tokens"] == 128
    with fake_server(Script(ends="cut")) as fake:
        assert cli.main(["complete", "--url", fake.url, "-q", "Once"]) == cli.EXIT_USAGE
    assert "closed the connection" in capsys.readouterr().err


def test_of_several_outputs_the_first_is_told_alone() -> None:
    def piece(index: int, text: str, reason: str | None = None) -> SimpleNamespace:
        return SimpleNamespace(index=index, text=text, token_ids=[1], finish_reason=reason)

    pieces = [[piece(0, "a"), piece(1, "x")], [piece(1, "y")], [piece(1, "z"), piece(0, "b", "stop")], [piece(1, "w", "length")]]
    outputs = (SimpleNamespace(outputs=one, prompt_token_ids=[1]) for one in pieces)
    llm: Any = SimpleNamespace(stream=lambda *_: outputs)
    told = list(InProcess(llm, SamplingParams(n=2)).complete("One"))
    assert [one.text for one in told] == ["a", "b"] and told[-1].finish_reason == "stop"

    events = [
        *({"choices": [{"index": index, "text": text}]} for index, text in ((1, "x"), (0, "a"), (1, "y"), (0, "b"))),
        {"choices": [{"index": 1, "text": "z"}, {"index": 0, "text": "c"}]},
    ]
    assert [text_of(of_first(event)) for event in events] == ["", "a", "", "b", "c"]
    assert of_first({"choices": [{"text": "old"}]}) == {"text": "old"} and of_first({}) == of_first({"choices": [3]}) == {}


def test_ctrl_c_stops_the_answer_and_not_the_conversation() -> None:
    """On a terminal, where escape codes of a model must not reach it either."""
    controller, terminal = pty.openpty()
    with fake_server(Script([(0.0, 1)], ends="hangs", text="\x1b[31mred "), Script(text="fine")) as fake:
        argv = [sys.executable, "-m", "jaxpaged", "chat", "--url", fake.url]
        with subprocess.Popen(argv, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True) as process:
            os.close(terminal)
            seen = b""

            def read_until(wanted: str) -> None:
                nonlocal seen
                deadline = time.monotonic() + 60
                while wanted.encode() not in seen and time.monotonic() < deadline:
                    try:
                        seen += os.read(controller, 4096)
                    except OSError:  # the process has ended
                        break
                assert wanted.encode() in seen, seen

            read_until("> ")
            os.write(controller, b"first\n")
            read_until("red ")
            process.send_signal(signal.SIGINT)
            read_until("[stopped]")
            os.write(controller, b"second\n")
            read_until("fine")
            os.write(controller, b"/exit\n")
            assert process.wait(30) == 0
        os.close(controller)
    assert "␛[31mred ".encode() in seen and b"\x1b[31m" not in seen
    assert [message["content"] for message in fake.asked[1]["messages"]] == ["first", "\x1b[31mred ", "second"]
