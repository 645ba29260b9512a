"""What a recording shows: the trace, the pool over time, the views and their tables; each against what really happened."""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from busy import PAGE, FakeRunner, busy_day, new_engine

from jaxpaged import SamplingParams, cli
from jaxpaged.engine import Engine
from jaxpaged.host.pages import PagePool
from jaxpaged.observe import Recording, RecordingError, Replay, draw_pool, picture, save_trace, snapshot
from jaxpaged.observe.records import Admission, Decision, Kind
from jaxpaged.observe.snapshot import VIEWS, num_wasted_places
from jaxpaged.observe.tables import as_text, shown_pages


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    engine = new_engine()
    busy_day(engine, num_requests=50)
    return engine


@pytest.fixture(scope="module")
def day(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return Recording.load(engine.save_recording(tmp_path_factory.mktemp("day") / "day.recording"))


@pytest.fixture(scope="module")
def late(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """One whose ring has dropped its beginning."""
    engine = new_engine(flight_recorder_bytes=2**17)
    busy_day(engine, num_requests=200)
    recording = Recording.load(engine.save_recording(tmp_path_factory.mktemp("late") / "late.recording"))
    assert Replay(recording).first_step > 0
    return recording


# --- the trace ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["day", "late"])
def test_the_trace_is_the_record(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    recording: Recording = request.getfixturevalue(which)
    events = json.loads(save_trace(recording, tmp_path / "trace.json").read_text())["traceEvents"]
    plans = [Decision.unpack(frame.payload) for frame in recording.frames if frame.kind is Kind.PLAN]
    tracks, names = defaultdict(list), {}
    for event in events:
        if event["ph"] == "X":
            assert event["dur"] >= 0 and event["ts"] >= 0
            tracks[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
        if event["ph"] == "M" and event["name"] == "thread_name":
            names[event["tid"]] = event["args"]["name"]
    for slices in tracks.values():
        slices.sort()
        assert all(end <= start + 1e-6 for (_, end), (start, _) in itertools.pairwise(slices)), "slices overlap"
    steps = [event for event in events if event["ph"] == "X" and event["name"].startswith("step ")]
    assert len(steps) == len(plans) == recording.num_steps
    assert [step["args"]["decodes"] for step in steps] == [len(plan.decodes) for plan in plans]
    works = Counter(event["name"] for event in events if event["ph"] == "X" and event["pid"] == 2)
    assert works["decode"] == sum(len(plan.decodes) for plan in plans)
    assert works["prefill"] == sum(len(plan.prefills) for plan in plans)
    pages = [event["args"] for event in events if event["ph"] == "C" and event["name"] == "pages"]
    assert pages == [{"free": plan.num_free - plan.num_cached, "cached": plan.num_cached} for plan in plans]
    admitted = {Admission.unpack(frame.payload).name for frame in recording.frames if frame.kind is Kind.ADMIT}
    assert admitted <= set(names.values()) and len(names) == len(set(names.values()))
    assert not any(name.startswith("row ") for name in names.values())


def test_the_trace_of_one_request(tmp_path: Path) -> None:
    engine = new_engine()
    engine.add_request([1] * 20, SamplingParams(max_tokens=3, ignore_eos=True), request_id="only")
    while engine.has_unfinished:
        engine.step()
    recording = Recording.load(engine.save_recording(tmp_path / "one.recording"))
    events = json.loads(save_trace(recording, tmp_path / "t.json").read_text())["traceEvents"]
    mine = [event for event in events if event["pid"] == 2 and event["ph"] in "Xi"]
    assert [event["name"] for event in mine] == ["waiting", "prefill", "decode", "decode", "length"]
    assert mine[1]["args"] == {"tokens": "[0, 20)", "pages": [1, 2]}
    assert mine[2]["args"] == {"tokens": "[20, 21)", "pages": [2]}


def test_the_trace_command(day: Recording, tmp_path: Path, capsys) -> None:
    out = tmp_path / "trace.json"
    assert cli.main(["replay", day.path, "--perfetto", str(out)]) == 0
    assert len(json.loads(out.read_text())["traceEvents"]) > day.num_steps
    assert cli.main(["replay", day.path, "--perfetto", str(tmp_path / "no" / "x")]) == 3
    assert capsys.readouterr().err.splitlines()[-1].endswith("No such file or directory")


# --- the pool over time ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["day", "late"])
def test_the_timeline_has_the_owners_that_the_pool_had(which: str, request: pytest.FixtureRequest) -> None:
    """The record alone, against the pool of a replay, page by page and step by step."""
    recording: Recording = request.getfixturevalue(which)
    replay = Replay(recording)
    timeline = picture.PoolTimeline(recording)
    num_seen = 0
    later = timeline.steps()
    for _ in range(recording.num_steps - sum(1 for _ in Replay(recording).steps())):
        next(later)  # what the ring holds of the segment that lost its beginning
    for _, _ in zip(replay.steps(), later, strict=True):
        pool = replay.scheduler.pool
        for page in range(1, pool.num_pages):
            assert timeline.owners[page] == pool.num_owners(page), (replay.num_steps, page)
        column = timeline.column()
        assert column.count(picture.FREE) == pool.num_free and len(column) == pool.num_usable
        assert column.count(picture.SHARED) == sum(pool.num_owners(page) > 1 for page in range(1, pool.num_pages))
        num_seen += 1
    assert num_seen > 100


def test_long_recordings_are_sampled(day: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture, "_MAX_CELLS", 25)
    steps, columns, plans = picture.sample(day)
    assert len(steps) == len(columns) == len(plans) <= 25 and all(len(column) <= 25 for column in columns)
    assert steps[0] == 0 and steps[-1] > day.num_steps * 0.9


def test_the_picture(day: Recording, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = draw_pool(day)
    above = figure.axes[0].images[0].get_array()
    _, columns, _ = picture.sample(day)
    assert above.shape == (len(columns[0]), len(columns))
    assert [[cell == 0 for cell in row] for row in above.tolist()] == [
        [column[page] == picture.FREE for column in columns] for page in range(len(columns[0]))
    ]
    assert cli.main(["replay", day.path, "--picture", str(tmp_path / "pool.png")]) == 0
    assert (tmp_path / "pool.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_without_matplotlib_or_steps(day: Recording, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    for name in ("matplotlib", "matplotlib.colors", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["replay", day.path, "--picture", str(tmp_path / "pool.png")]) == 3
    assert "needs matplotlib: pip install 'jaxpaged[notebooks]'" in capsys.readouterr().err
    assert not (tmp_path / "pool.png").exists()


# --- views -------------------------------------------------------------------------------------------------------------


def test_only_what_ran_is_set_back_when_a_step_fails(tmp_path: Path) -> None:
    class Flaky(FakeRunner):
        def submit(self, plan):
            if is_failing:
                raise OSError("gone")
            return super().submit(plan)

    is_failing = False
    engine = new_engine(runner=Flaky(41, PAGE))
    engine.add_request([1] * 20, SamplingParams(max_tokens=2, ignore_eos=True), request_id="over")
    while engine.has_unfinished:
        engine.step()
    engine.add_request([2] * 20, SamplingParams(max_tokens=9, ignore_eos=True), request_id="running")
    engine.step()
    is_failing = True
    with pytest.raises(OSError, match="gone"):
        engine.step()
    is_failing = False
    while engine.has_unfinished:
        engine.step()
    recording = Recording.load(engine.save_recording(tmp_path / "failed.recording"))
    events = json.loads(save_trace(recording, tmp_path / "trace.json").read_text())["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert [names[event["tid"]] for event in events if event["name"] == "set back"] == ["running"]
    waits = [names[event["tid"]] for event in events if event["name"] == "waiting"]
    assert sorted(waits) == ["over", "running", "running"]


def working(num_steps: int = 30, **options) -> Engine:
    """In the middle of a busy day."""
    engine, steps = new_engine(**options), 0
    step = engine.step

    class Enough(Exception):
        pass

    def counted():
        nonlocal steps
        steps += 1
        if steps > num_steps:
            raise Enough
        return step()

    engine.step = counted  # type: ignore[method-assign]
    try:
        busy_day(engine, with_faults=False)
    except Enough:
        del engine.step
    return engine


def test_the_views_are_true() -> None:
    engine = working()
    pool, running = engine.pool, engine.scheduler.running
    blocks = snapshot(engine.scheduler, "active-blocks")
    assert blocks["pool"] == {"num_pages": 40, "page_size": PAGE, "used": pool.num_used, "cached": pool.num_cached,
                              "free": 40 - pool.num_used - pool.num_cached}  # fmt: skip
    assert [line["pages"] for line in blocks["sequences"]] == [sequence.pages for sequence in running]
    assert len({page for line in blocks["sequences"] for page in line["pages"]}) == pool.num_used
    assert sum(int(owners) * count for owners, count in blocks["refcounts"].items()) == sum(len(s.pages) for s in running)
    view = snapshot(engine.scheduler, "scheduler")
    assert [(line["tokens"], line["computed"]) for line in view["running"]] == [(len(s.tokens), s.num_computed) for s in running]
    assert view["num_waiting"] == len(engine.scheduler.waiting) == len(view["waiting"])
    cache = snapshot(engine.scheduler, "prefix-cache")
    assert cache["num_known_pages"] == len(pool.cache) and cache["num_hit_tokens"] == pool.cache.num_hit_tokens > 0
    assert cache["shared_prefixes"], "a busy day shares"
    for prefix in cache["shared_prefixes"]:
        assert all(pool.num_owners(page) == prefix["num_owners"] for page in prefix["pages"])
    for view in VIEWS:
        found = snapshot(engine.scheduler, view)
        assert json.loads(json.dumps(found)) == found
        assert all(len(line) < 200 for line in as_text(found).splitlines())
    with pytest.raises(ValueError, match="view: got 'x', expected one of scheduler"):
        snapshot(engine.scheduler, "x")


def test_long_lists_are_cut() -> None:
    engine = working()
    num_running, num_waiting = len(engine.scheduler.running), len(engine.scheduler.waiting)
    found = snapshot(engine.scheduler, "scheduler", max_lines=2)
    assert len(found["running"]) == 2 and found["left_out"] == num_running - 2 + max(0, num_waiting - 2) > 0
    assert f"... and {found['left_out']} more" in as_text(found)


@pytest.mark.parametrize("command", [["inspect", "--active-blocks"], ["debug", "--scheduler"], ["debug", "--prefix-cache"]])
def test_a_recording_is_inspected_at_any_step(command: list[str], tmp_path: Path, capsys) -> None:
    engine = working(30, async_scheduling=False)
    path = str(engine.save_recording(tmp_path / "a.recording"))
    expected = snapshot(engine.scheduler, command[1].removeprefix("--"))
    assert cli.main([*command, "--recording", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == expected
    engine = working(12, async_scheduling=False)
    expected = snapshot(engine.scheduler, command[1].removeprefix("--"))
    assert cli.main([*command, "--recording", path, "--step", str(engine.num_steps), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    # After a plan, before its commit: pages are there, the tokens of the step are not computed yet.
    assert shown["pool"] == expected["pool"]
    assert cli.main([*command, "--recording", path]) == 0
    assert f"40 pages of {PAGE} tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "code", "problem"),
    [
        (["inspect"], 2, "--url URL of a server, --socket PATH of a running engine, --recording FILE"),
        (["debug", "--recording", "x"], 2, "expected one of --scheduler, --prefix-cache"),
        (["inspect", "--socket", "x", "--api-key-file", "keys"], 2, "--api-key-file: only with --url"),
        (["inspect", "--url", "http://127.0.0.1:9", "--header", "x"], 2, "--header: "),
        (["inspect", "--url", "http://127.0.0.1:9", "--api-key-file", "/nonexistent/x"], 2, "No such file"),
        (["inspect", "--url", "ftp://127.0.0.1"], 3, "expected an address such as http://"),
        (["inspect", "--url", "http://127.0.0.1:9"], 3, "no server answers there (127.0.0.1:9: Connect"),
        (["debug", "--scheduler", "--prefix-cache", "--socket", "x"], 2, "expected one of --scheduler, --prefix-cache"),
        (["debug", "--scheduler", "--socket", "x", "--recording", "y"], 2, "expected one of --url"),
        (["debug", "--scheduler", "--socket", "x", "--step", "3"], 2, "--step: only with --recording"),
        (["inspect", "--active-blocks", "--socket", "/nonexistent/x"], 3, "no engine answers on this socket"),
        (["inspect", "--active-blocks", "--recording", "DAY", "--step", "9999999"], 3, "ends after step"),
        (["inspect", "--active-blocks", "--recording", "LATE", "--step", "1"], 3, "begins after step"),
    ],
)
def test_what_cannot_be_shown_is_one_line(argv, code, problem, day: Recording, late: Recording, capsys) -> None:
    argv = [{"DAY": day.path, "LATE": late.path}.get(word, word) for word in argv]
    assert cli.main(argv) == code
    err = capsys.readouterr().err
    assert problem in err and err.startswith("jaxpaged: error: ") and err.count("\n") == 1


def test_page_numbers_as_runs() -> None:
    assert shown_pages([3, 4, 5, 9, 1]) == "3-5 9 1" and shown_pages([]) == ""
    assert shown_pages(list(range(0, 40, 2))).endswith("10 ...")


# --- numbers -----------------------------------------------------------------------------------------------------------


def test_tail_waste_by_hand() -> None:
    engine = new_engine(max_num_batched_tokens=256, async_scheduling=False)
    for number, num_prompt in enumerate((16, 17, 40)):
        engine.add_request([number + 1] * num_prompt, SamplingParams(max_tokens=5, ignore_eos=True))
    engine.step()
    # 16 in 1 page, 17 in 2 and 40 in 3: 6 pages, 96 places, 73 hold a token.
    assert num_wasted_places(engine.scheduler.running, PAGE) == 96 - 73
    assert engine.stats()["kv_tail_waste_perc"] == pytest.approx(23 / 96)


def test_a_tail_that_is_shared_is_wasted_once() -> None:
    engine = new_engine()
    engine.add_request([7] * 20, SamplingParams(max_tokens=5, ignore_eos=True, n=3))
    engine.step()
    while len(engine.scheduler.running) < 3:
        engine.step()
    used = {page for sequence in engine.scheduler.running for page in sequence.pages}
    held = {  # (page, place) of every token
        (sequence.pages[position // PAGE], position % PAGE)
        for sequence in engine.scheduler.running
        for position in range(sequence.num_computed)
    }
    assert num_wasted_places(engine.scheduler.running, PAGE) == len(used) * PAGE - len(held)


def test_scatter_lifetime_and_reuse_by_hand() -> None:
    pool = PagePool(10)
    pages = pool.allocate(9)
    assert pages is not None and pool.num_free_runs() == 0
    pool.step = 4
    pool.free(pages[:2] + pages[4:5])  # pages 1, 2 and 5 after 4 steps
    assert pool.num_free_runs() == 2 and (pool.num_released, pool.owned_steps) == (3, 12)
    assert (pool.num_reused, pool.idle_steps) == (0, 0)
    pool.step = 10
    pool.allocate(1)
    assert (pool.num_reused, pool.idle_steps) == (1, 6)
    pool.share([pages[3]])  # an owned page: nothing begins
    pool.free([pages[3]])
    assert (pool.num_released, pool.num_reused) == (3, 1)
    pool.step = 11
    pool.free([pages[3]])
    assert (pool.num_released, pool.owned_steps) == (4, 12 + 11)


def test_every_page_that_was_taken_was_given_back_or_is_owned() -> None:
    engine = working(40)
    pool = engine.pool
    assert engine.stats()["prefix_cache_hits"] > 0
    num_first_uses = sum(since >= 0 for since in pool._since)
    assert pool.num_reused + num_first_uses == pool.num_released + pool.num_used
    # A page is owned or idle, never both, from its first use on; the state that it is in now is not counted yet.
    assert pool.owned_steps + pool.idle_steps <= engine.num_steps * num_first_uses


def test_the_stats_of_a_day(engine: Engine) -> None:
    stats = engine.stats()
    assert stats["num_blocks_released"] > 100 and 1 < stats["kv_block_lifetime_steps"] < engine.num_steps
    assert 0 < stats["kv_block_reuse_gap_steps"] < engine.num_steps
    assert stats["num_blocks_copied"] == engine.scheduler.num_copies > 0
    assert stats["prefix_cache_evictions"] == engine.pool.cache.num_evictions > 0  # type: ignore[union-attr]
    assert stats["kv_tail_waste_perc"] == 0.0 and 0.0 <= stats["kv_free_scatter_perc"] <= 1.0
    assert new_engine().stats()["kv_free_scatter_perc"] == 0.0


def test_a_recording_without_steps_has_no_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(RecordingError, match="holds no step"):
        draw_pool(Recording.load(new_engine().save_recording(tmp_path / "x")))
