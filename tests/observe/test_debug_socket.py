"""The debug socket: true views under load and at rest, for this user alone, and never a step that waits."""

from __future__ import annotations

import json
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from busy import PAGE, FakeRunner, busy_day, new_engine

from jaxpaged import SamplingParams, cli
from jaxpaged.config import ConfigError
from jaxpaged.observe import RecordingError, debug_socket, snapshot
from jaxpaged.observe.debug_socket import ask
from jaxpaged.observe.snapshot import VIEWS


@pytest.fixture
def path() -> Iterator[str]:
    with TemporaryDirectory() as folder:  # a short name: a socket's path has at most 107 bytes
        yield str(Path(folder) / "s")


def check_view(found: dict) -> None:
    """What is true of any moment between two changes, and of hardly any torn view."""
    pool = found["pool"]
    assert pool["used"] + pool["cached"] + pool["free"] == pool["num_pages"]
    if found["view"] == "active-blocks":
        pages = [page for line in found["sequences"] for page in line["pages"]]
        assert len(set(pages)) == pool["used"] and len(pages) == sum(line["num_pages"] for line in found["sequences"])
        assert sum(int(owners) * count for owners, count in found["refcounts"].items()) == len(pages)
        assert sum(found["refcounts"].values()) == pool["num_pages"]
        assert found["allocated_places"] == pool["used"] * PAGE
        assert all(line["tokens"] <= line["num_pages"] * PAGE for line in found["sequences"])
    if found["view"] == "scheduler":
        assert len(found["running"]) == found["num_running"] and len(found["waiting"]) == found["num_waiting"]
        assert all(line["pages"] == 0 == line["computed"] for line in found["waiting"])
        assert all(line["computed"] <= min(line["tokens"] - 1, line["pages"] * PAGE) for line in found["running"])


def test_views_under_load_are_consistent(path: str) -> None:
    engine = new_engine(debug_socket=path)
    assert stat.S_IMODE(Path(path).stat().st_mode) == 0o600
    views: list[dict] = []
    is_over = threading.Event()

    def look() -> None:
        while not is_over.is_set():
            for view in VIEWS:
                views.append(ask(path, view))

    lookers = [threading.Thread(target=look) for _ in range(2)]
    for looker in lookers:
        looker.start()
    seed = 0
    while len(views) < 60 and seed < 2000:
        busy_day(engine, num_requests=30, seed=seed)
        seed += 1
    is_over.set()
    for looker in lookers:
        looker.join(20)
    engine.close()
    assert len(views) >= 60 and len({json.dumps(view) for view in views}) > 20
    for view in views:
        check_view(view)
    assert any(view["view"] == "active-blocks" and view["sequences"] for view in views)
    assert not Path(path).exists()


@pytest.mark.parametrize("view", VIEWS)
def test_an_engine_at_rest_answers(path: str, view: str) -> None:
    with new_engine(debug_socket=path) as engine:
        engine.add_request([1] * 50, SamplingParams(max_tokens=9))
        engine.step()
        assert ask(path, view) == snapshot(engine.scheduler, view)


def test_an_engine_that_is_long_in_a_step_answers(path: str) -> None:
    """A step that hangs in the device is when one looks."""
    is_running, may_end = threading.Event(), threading.Event()

    class Slow(FakeRunner):
        def submit(self, plan):
            is_running.set()
            assert may_end.wait(30)
            return super().submit(plan)

    with new_engine(debug_socket=path, runner=Slow(41, PAGE)) as engine:
        engine.add_request([1] * 50, SamplingParams(max_tokens=1), request_id="stuck")
        stepping = threading.Thread(target=engine.step)
        stepping.start()
        assert is_running.wait(10)
        found = ask(path, "scheduler")
        may_end.set()
        stepping.join(10)
    assert [line["request"] for line in found["running"]] == ["stuck"] and found["pool"]["used"] == 4


def test_a_state_that_changes_is_not_shown(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debug_socket, "_ANSWER_S", 0.2)
    with new_engine(debug_socket=path) as engine:
        engine._eyes.changing()
        with pytest.raises(RecordingError, match=r"did not stand still for 0\.2 s"):
            ask(path, "scheduler")
        engine._eyes._end()
        assert ask(path, "scheduler")["num_running"] == 0


def test_a_view_of_a_state_that_moved_is_thrown_away(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    num_looks = 0

    def moving(scheduler, view):
        nonlocal num_looks
        num_looks += 1
        found = snapshot(scheduler, view)
        if num_looks < 3:  # the engine's thread does something in the meantime
            engine._eyes._socket._wanted = None  # and has not seen the question
            engine.add_request([1] * 20) if num_looks == 1 else engine.step()
        if num_looks == 2:
            raise RuntimeError("deque mutated during iteration")
        return found

    with new_engine(debug_socket=path) as engine:
        monkeypatch.setattr(debug_socket, "snapshot", moving)
        assert ask(path, "scheduler") == snapshot(engine.scheduler, "scheduler")
        assert num_looks == 3 and len(engine.scheduler.running) == 1


def test_an_error_in_a_step_does_not_stop_the_answers(path: str) -> None:
    class Broken(FakeRunner):
        def submit(self, plan):
            raise OSError("gone")

    with new_engine(debug_socket=path, runner=Broken(41, PAGE)) as engine:
        engine.add_request([1] * 50)
        with pytest.raises(OSError, match="gone"):
            engine.step()
        found = ask(path, "scheduler")
        assert (found["num_running"], found["num_waiting"]) == (0, 1)  # it begins again


def test_clients_that_say_nothing_or_nonsense(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debug_socket, "_CLIENT_S", 2.0)
    with new_engine(debug_socket=path) as engine, socket.socket(socket.AF_UNIX) as silent:
        silent.connect(path)
        engine.add_request([1] * 20, SamplingParams(max_tokens=100, ignore_eos=True))
        started = time.perf_counter()
        for _ in range(20):
            engine.step()
        assert time.perf_counter() - started < 1.0, "a step waited for the client"
        check_view(ask(path, "active-blocks"))
        for line in (b"\n", b"[]\n", b"{}\n", b"x" * 10_000, b'{"view": "x"}\n', b'{"view": ["scheduler"]}\n', b"\xff\xfe\n"):
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(5)
                client.connect(path)
                client.sendall(line)
                assert "error" in json.loads(debug_socket._line(client, 10_000))
        check_view(ask(path, "scheduler"))


def test_the_command(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    with new_engine(debug_socket=path) as engine:
        engine.add_request([1] * 50, SamplingParams(max_tokens=9), request_id="mine")
        engine.step()
        assert cli.main(["inspect", "--active-blocks", "--socket", path]) == 0
        out = capsys.readouterr().out
        assert "40 pages of 16 tokens: 4 used" in out and "mine" in out and "1-4" in out
        assert cli.main(["debug", "--scheduler", "--socket", path, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["running"][0]["request"] == "mine"
    assert cli.main(["debug", "--scheduler", "--socket", path]) == 3
    assert capsys.readouterr().err.count("\n") == 1


def test_what_a_killed_engine_left_is_replaced(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(path)
    with new_engine(debug_socket=path) as engine:
        assert ask(path, "scheduler") == snapshot(engine.scheduler, "scheduler")


def test_a_path_that_is_taken_is_refused(path: str) -> None:
    with new_engine(debug_socket=path), pytest.raises(ConfigError, match=r"debug_socket: .*in use"):
        new_engine(debug_socket=path)
    Path(path).write_text("a file of somebody's")
    with pytest.raises(ConfigError, match=r"debug_socket: .*in use"):
        new_engine(debug_socket=path)
    assert Path(path).read_text() == "a file of somebody's"
    with pytest.raises(ConfigError, match=r"debug_socket: .*No such file"):
        new_engine(debug_socket=f"{path}-no/s")
    with pytest.raises(ConfigError, match=r"debug_socket: .*too long"):
        new_engine(debug_socket="x" * 200)


def test_an_output_that_had_ended_when_it_was_stopped_leaves_the_socket_answering(path: str) -> None:
    engine = new_engine(debug_socket=path)
    engine.add_request([1, 2, 3], SamplingParams(max_tokens=1), request_id="a")
    while engine.has_unfinished:
        engine.step()
    assert not engine.stop("a", 0)
    assert ask(path, "scheduler")["num_running"] == 0
