"""The runner's own parts: nothing that is compared may be overlooked, nothing that failed may be called a pass."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx2", reason="the extra `test` is not installed")
sys.path.insert(0, str(Path(__file__).parent))
from checks import Checks, Target, holds, same
from environments import ENVIRONMENTS
from parity import report
from parity_cases import CASES, Case
from parity_compare import LOGPROB_TOLERANCE, Difference, compare, put_together
from parity_meant import MEANT, Meant
from run import CLIENTS, Client, Outcome, choose, run_client
from serving import Served
from tables import markdown

CASE = Case("one", "/v1/completions", {})


def answer(told: Any, status: int = 200) -> dict[str, Any]:
    return {"status": status, "media_type": "application/json", "choices": None, "json": told}


@pytest.mark.parametrize(
    ("theirs", "ours", "place"),
    [
        ({"a": 1}, {"a": 2}, "a"),
        ({"a": 1}, {"b": 1, "a": 1}, "field b"),
        ({"a": 1, "b": None}, {"a": 1}, "null field b"),
        ({"choices": [{"text": "x"}]}, {"choices": [{"text": "y"}]}, "choices.text"),
        ({"choices": [{"text": "x"}]}, {"choices": [{"text": "x"}, {"text": "y"}]}, "length of choices"),
        ({"token_ids": [1, 2]}, {"token_ids": [1, 3]}, "token_ids"),
        ({"token_ids": [1, 2]}, {"token_ids": [1]}, "token_ids"),
        ({"p": [None, -0.5]}, {"p": [None, -0.5 - 2 * LOGPROB_TOLERANCE]}, "p"),
        ({"p": [None, -0.5]}, {"p": [-0.1, -0.5]}, "p"),
        ({"finish_reason": "stop"}, {"finish_reason": "length"}, "finish_reason"),
        ({"id": "a"}, {}, "field id"),
        ({"token": "", "bytes": []}, {"token": "\ufffd", "bytes": []}, "token, part of a character"),
        ({"token": "a", "bytes": []}, {"token": "b", "bytes": []}, "token"),
    ],
)
def test_every_difference_is_found(theirs: Any, ours: Any, place: str) -> None:
    assert [one.place for one in compare(CASE, answer(theirs), answer(ours))] == [place]
    assert not compare(CASE, answer(theirs), answer(theirs))


def test_what_is_a_servers_own_is_no_difference() -> None:
    assert not compare(CASE, answer({"id": "a", "p": [-0.5]}), answer({"id": "b", "p": [-0.5 + LOGPROB_TOLERANCE / 2]}))
    assert [one.place for one in compare(CASE, answer({}, 400), answer({}))] == ["status"]


def test_what_is_drawn_is_compared_by_its_form_and_its_repetition() -> None:
    drawn = Case("one", "/v1/completions", {}, is_drawn=True)
    theirs, ours = answer({"text": "x", "n": 1}), answer({"text": "y", "n": 1})
    assert not compare(drawn, {**theirs, "is_repeated": True}, {**ours, "is_repeated": True})
    found = compare(drawn, {**theirs, "is_repeated": True}, {**answer({"text": "y", "n": 2}), "is_repeated": False})
    assert [one.place for one in found] == ["is_repeated", "n"]


def test_a_stream_is_compared_as_the_whole_that_it_makes() -> None:
    def stream(*texts: str, reason: str = "stop") -> dict[str, Any]:
        events: list[Any] = [{"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]} for text in texts]
        events[-1]["choices"][0]["finish_reason"] = reason
        return {"status": 200, "media_type": "text/event-stream", "choices": None, "events": [*events, "[DONE]"]}

    assert put_together(stream("ab", "c")["events"])["choices"]["0"] == {
        "index": 0,
        "delta": {"content": "abc"},
        "finish_reason": "stop",
    }
    assert not compare(CASE, stream("ab", "c"), stream("a", "b", "c"))
    assert [one.place for one in compare(CASE, stream("ab"), stream("ac"))] == ["choices.delta.content"]
    assert [one.place for one in compare(CASE, stream("ab"), stream("ab", reason="length"))] == ["choices.finish_reason"]
    cut = stream("ab")
    cut["events"] = [*cut["events"][:-1], cut["events"][0]]
    assert "last event" in [one.place for one in compare(CASE, stream("ab"), cut)]


def test_metrics_are_compared_by_name_and_kind() -> None:
    case = Case("metrics", "/metrics", is_text=True)
    theirs = {"status": 200, "text": "# TYPE vllm:a counter\n# TYPE vllm:b gauge\n# TYPE python_info gauge\n"}
    ours = {"status": 200, "text": "# TYPE jaxpaged:a gauge\n# TYPE jaxpaged:b gauge\n"}
    assert [one.place for one in compare(case, theirs, ours)] == ["metric a"]
    ours["text"] = theirs["text"] + "# TYPE jaxpaged:c gauge\n"
    assert [one.place for one in compare(case, theirs, ours)] == ["further metric c"]
    theirs["text"] += 'vllm:a{x="1"} 2\nvllm:h_bucket{le="1"} 0\nvllm:h_bucket{le="+Inf"} 0\n'
    ours["text"] = theirs["text"].replace('x="', 'y="').replace('le="1"', 'le="1.0"')
    assert [one.place for one in compare(case, theirs, ours)] == ["label x of a", "label y of a"]
    ours["text"] = theirs["text"].replace('le="1"', 'le="2"')
    assert [one.place for one in compare(case, theirs, ours)] == ["label le of h_bucket"]


def test_a_difference_that_is_not_listed_and_an_entry_that_is_stale_both_fail(capsys: pytest.CaptureFixture[str]) -> None:
    one = Difference("a case", "usage.x", "1", "2")
    assert report([one], [Meant("a *", "usage.*", "why")]) == 0
    assert report([one], []) == 1 and "a case" in capsys.readouterr().out
    assert report([one], [Meant("a *", "usage.*", "why"), Meant("b", "*", "why")]) == 1
    assert report([one], [Meant("b", "*", "why")]) == 1
    capsys.readouterr()
    assert report([Difference("b", "status", "200", "404")], [Meant("b", "x", "why"), Meant("c", "x", "why")]) == 1
    assert next(line for line in capsys.readouterr().out.splitlines() if "any more" in line).endswith("c, x")
    assert all(each.reason for each in MEANT) and len({case.name for case in CASES}) == len(CASES) >= 60


@pytest.mark.parametrize(
    ("script", "is_good", "failed"),
    [
        ("run = Checks()\nwith run.check('a'): same(1, 1)\nrun.finish()", True, []),
        ("run = Checks()\nwith run.check('a'): same(1, 2)\nwith run.check('b'): holds(True)\nrun.finish()", False, ["a"]),
        ("run = Checks()\nrun.finish()", False, ["script"]),
        ("import nothing_of_that_name", False, ["script"]),
        ("run = Checks()\nwith run.check('a'): same(1, 1)\nimport os; os._exit(0)", False, ["script"]),
    ],
)
def test_a_client_passes_only_when_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, is_good: bool, failed: list[str]
) -> None:
    monkeypatch.setattr("run.HERE", tmp_path)
    monkeypatch.setattr("run.ROOT", tmp_path)
    head = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom checks import Checks, holds, same\n"
    (tmp_path / "client_one.py").write_text(head + script)
    outcome = Outcome("one", "1.0")
    served = Served("http://127.0.0.1:1", "key", tmp_path / "log")
    run_client(Client("one", "openai", "client_one.py"), Path(sys.executable), served, tmp_path / "out", outcome)
    assert outcome.is_good == is_good and sorted(outcome.failed) == failed
    assert outcome.cells[2] == ("pass" if is_good else "FAIL")


def test_clients_are_chosen_by_parts_of_their_names(tmp_path: Path) -> None:
    assert [one.name for one in choose(CLIENTS, "litellm,vllm")] == ["litellm", "vllm bench serve"]
    assert choose(CLIENTS, None) == list(CLIENTS)
    with pytest.raises(SystemExit, match="openay"):
        choose(CLIENTS, "openay")
    assert all(one.environment in ENVIRONMENTS and (Path(__file__).parent / one.script).is_file() for one in CLIENTS)


def test_a_table_keeps_its_form_and_a_failed_check_says_both_values(tmp_path: Path) -> None:
    lines = markdown(("a", "b"), [("x|y", "two\nlines"), ("", "z")]).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1 and "x\\|y" in lines[2]
    Target("http://x", "key", "demo", "dir", {}, str(tmp_path)).save(tmp_path / "target.json")
    run = Checks(["script", str(tmp_path / "target.json")])
    with run.check("sums"):
        same(1 + 1, 3)
    with pytest.raises(SystemExit) as ended:
        run.finish()
    assert ended.value.code == 1 and json.loads((tmp_path / "report.json").read_text())["failed"] == {
        "sums": "AssertionError: got 2, expected 3"
    }
    with pytest.raises(AssertionError, match="why"):
        holds(False, "why")
