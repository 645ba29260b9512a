"""The flight recorder and its replay: equal means equal, the first difference is found where it was made, the ring is bounded."""

from __future__ import annotations

import functools
import gzip
import json
import logging
import os
import pickle
import random
import stat
from collections import Counter
from pathlib import Path

import pytest
from busy import MODEL, PAGE, VOCAB_SIZE, FakeRunner, busy_day, new_engine
from text_model import FAST, write_text_model

from jaxpaged import LLM, SamplingParams, cli
from jaxpaged.config import SCHEDULING_POLICIES, ConfigError, EngineConfig
from jaxpaged.engine import Engine
from jaxpaged.host.pages import PagePool
from jaxpaged.host.policies import POLICIES
from jaxpaged.host.request import RequestError
from jaxpaged.host.scheduler import Scheduler
from jaxpaged.observe import Difference, Recording, RecordingError, Replay, picture, recording, save_trace, state
from jaxpaged.observe.records import FRAME, Decision, Kind, describe, note_names, pack_request, unpack_request, words


@pytest.fixture(scope="module")
def day(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """A busy day with preemptions, prefix hits, forks, copies, aborts and resets."""
    engine = new_engine()
    busy_day(engine)
    stats = engine.stats()
    assert stats["num_preemptions"] > 10 and stats["prefix_cache_hits"] > 100 and stats["num_blocks_copied"] > 10
    recording = Recording.load(engine.save_recording(tmp_path_factory.mktemp("day") / "day.recording"))
    kinds = {frame.kind for frame in recording.frames}
    assert {Kind.ADD, Kind.ABORT, Kind.RESET, Kind.ADMIT, Kind.PREEMPT, Kind.FINISH} <= kinds
    assert recording.num_steps == engine.num_steps
    return recording


def saved(engine: Engine, folder: Path) -> Recording:
    return Recording.load(engine.save_recording(folder / "a.recording"))


def test_the_record_is_what_was_decided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, plan = new_engine(), Scheduler.plan
    decided = []

    def watched(self, *drafts):
        found = plan(self, *drafts)
        if found is not None:
            free = self.pool.num_free, self.pool.num_cached, len(self.running), len(self.waiting)
            works = []
            for chunk in (*found.decodes, *found.prefills):
                sequence = chunk.sequence
                name = f"{sequence.request.request_id}#{sequence.index}" if sequence.index else sequence.request.request_id
                pages = [sequence.pages[position // PAGE] for position in range(chunk.start, chunk.end)]
                works.append((name, chunk.start, chunk.num_tokens, chunk.samples, tuple(dict.fromkeys(pages))))
            decided.append((free, found.copies, len(found.decodes), works))
        return found

    monkeypatch.setattr(Scheduler, "plan", watched)
    busy_day(engine)
    recorded, names = [], {}
    for frame in saved(engine, tmp_path).frames:
        note_names(frame, names)
        if frame.kind is Kind.PLAN:
            found = Decision.unpack(frame.payload)
            free = found.num_free, found.num_cached, found.num_running, found.num_waiting
            works = [
                (names[work.row], work.start, work.num_tokens, work.samples, work.pages)
                for work in (*found.decodes, *found.prefills)
            ]
            recorded.append((free, found.copies, len(found.decodes), works))
    assert recorded == decided
    assert any(copies for _, copies, _, _ in decided)


# --- equal -------------------------------------------------------------------------------------------------------------


def test_a_replay_is_equal_and_ends_in_the_same_state(day: Recording) -> None:
    replay = Replay(day)
    assert replay.run(check=True) is None
    assert (replay.first_step, replay.num_steps) == (0, day.num_steps)
    assert not replay.scheduler.has_unfinished and replay.scheduler.pool.num_used == 0
    assert replay.now == day.frames[-1].time_s  # the virtual clock is the recorded one


@pytest.mark.parametrize("seed", range(6))
def test_any_day_replays_equal(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    options = {"enable_prefix_caching": rng.random() < 0.7, "max_num_batched_tokens": rng.choice((16, 64, 256))}
    engine = new_engine(rng.choice((24, 41, 200)), long_prefill_token_threshold=rng.choice((0, 7)), **options)
    busy_day(engine, seed=seed, num_requests=40)
    replay = Replay(saved(engine, tmp_path))
    assert replay.run() is None and replay.num_steps == engine.num_steps
    assert replay.scheduler.num_preemptions == engine.scheduler.num_preemptions


@pytest.mark.parametrize("policy", SCHEDULING_POLICIES)
def test_every_policy_replays_equal_from_the_beginning_and_from_the_middle(policy: str, tmp_path: Path) -> None:
    options = {"scheduling_policy": policy, "ageing_steps": 30, "batch_merge_window": 2, "max_num_partial_prefills": 2}
    for limit in (2**26, 2**17):
        engine = new_engine(flight_recorder_bytes=limit, **options)
        busy_day(engine, num_requests=200)
        replay = Replay(saved(engine, tmp_path))
        assert replay.run(check=True) is None
        assert (replay.first_step > 0) == (limit == 2**17) and replay.num_steps == engine.num_steps
        assert replay.scheduler.num_preemptions == engine.scheduler.num_preemptions > 10


def longest_first(candidate, situation):
    """A policy of one's own."""
    return -candidate.num_tokens


@pytest.mark.parametrize("is_long", [False, True])
def test_a_policy_of_ones_own_is_passed_in_again(is_long: bool, tmp_path: Path) -> None:
    engine = new_engine(scheduling_policy=longest_first, flight_recorder_bytes=2**17)
    busy_day(engine, num_requests=250 if is_long else 30)
    recording = saved(engine, tmp_path)
    with pytest.raises(RecordingError, match="its scheduling_policy is a function"):
        Replay(recording)
    replay = Replay(recording, policy=longest_first)
    assert replay.run() is None and replay.num_steps == engine.num_steps and (replay.first_step > 0) == is_long
    if not is_long:
        assert Replay(recording, policy=POLICIES["sjf"]).run() is not None


def test_a_recording_in_the_middle_of_work(tmp_path: Path) -> None:
    engine = new_engine()
    for number in range(8):
        engine.add_request([number] * 50, SamplingParams(max_tokens=30))
    for _ in range(9):
        engine.step()
    replay = Replay(saved(engine, tmp_path))
    assert replay.run(check=True) is None
    assert [s.tokens for s in replay.scheduler.running] == [s.tokens for s in engine.scheduler.running]
    assert [s.pages for s in replay.scheduler.running] == [s.pages for s in engine.scheduler.running]


def test_a_request_that_was_refused_is_not_in_the_recording(tmp_path: Path) -> None:
    engine = new_engine()
    engine.add_request([1, 2, 3], request_id="a")
    with pytest.raises(RequestError, match="already in use"):
        engine.add_request([1, 2, 3], request_id="a")
    assert engine.abort("b") in (None, [])
    busy_day(engine, num_requests=3, with_faults=False)
    assert Replay(saved(engine, tmp_path)).run() is None


def test_every_field_of_a_request_comes_back() -> None:
    engine = new_engine()
    params = SamplingParams(temperature=0.25, top_k=3, seed=-5, stop_token_ids=[9, 4], max_tokens=7)
    request = engine.check_request([5, 6, VOCAB_SIZE - 1], params, request_id="é😀", cache_salt="tenant")
    assert unpack_request(pack_request(request)) == request


def test_the_real_model_with_preemption_abort_and_prefix_hits(tmp_path: Path) -> None:
    options = {**FAST, "block_size": 8, "num_gpu_blocks_override": 17, "max_model_len": 96}
    with LLM(str(write_text_model(tmp_path / "model")), **options) as llm:
        engine, shared = llm.engine, list(range(40, 64))
        for number in range(12):
            params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, n=2 if number == 5 else 1)
            engine.add_request([*shared, number], params, request_id=str(number))
        while engine.has_unfinished:
            engine.step()
            if engine.num_steps in (6, 20):
                engine.abort(str(engine.num_steps // 3))
        stats = engine.stats()
        assert stats["num_preemptions"] > 0 and stats["prefix_cache_hits"] > 0
        replay = Replay(saved(engine, tmp_path))
        assert replay.run(check=True) is None and replay.num_steps == engine.num_steps > 30


# --- different ---------------------------------------------------------------------------------------------------------


def planted(monkeypatch: pytest.MonkeyPatch, at: int, change) -> None:
    """Another scheduler, which makes one mistake: before the `at`-th plan."""
    plan, count = Scheduler.plan, 0

    def other(self, *drafts):
        nonlocal count
        count += 1
        if count == at:
            change(self)
        return plan(self, *drafts)

    monkeypatch.setattr(Scheduler, "plan", other)


@pytest.mark.parametrize("at", [5, 40, 111])
def test_a_planted_preemption_is_found_at_its_step(day: Recording, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    num_idle = sum(frame.kind is Kind.IDLE for frame in day.frames)
    assert num_idle == 0, "plans and steps are counted as one below"
    planted(monkeypatch, at, lambda scheduler: scheduler._preempt(scheduler.running[-1]))
    replay = Replay(day)
    difference = replay.run()
    assert difference is not None and difference.step == at and replay.num_steps == at - 1
    assert any(line.startswith("preempt") for line in difference.replayed)
    assert difference.recorded != difference.replayed


def test_other_pages_are_found_at_the_first_step_that_takes_one(day: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    free, num_taken = [], []  # before each step: free pages that hold nothing; in it: pages taken
    plan, allocate = Scheduler.plan, PagePool.allocate

    def watched_plan(self, *drafts):
        free.append(len(self.pool._free))
        num_taken.append(0)
        return plan(self, *drafts)

    def watched_allocate(self, count):
        num_taken[-1] += count
        return allocate(self, count)

    with monkeypatch.context() as patch:
        patch.setattr(Scheduler, "plan", watched_plan)
        patch.setattr(PagePool, "allocate", watched_allocate)
        Replay(day).run()
    at = next(index for index in range(20, len(free)) if free[index] > 1 and not num_taken[index])
    first = next(index for index in range(at, len(free)) if num_taken[index])
    planted(monkeypatch, at + 1, lambda scheduler: scheduler.pool._free.rotate(1))
    difference = Replay(day).run()
    assert difference is not None and difference.step == first + 1 > at + 1


def test_a_scheduler_that_raises_is_a_difference(day: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, 30, lambda scheduler: scheduler.pool.free([1, 1, 1, 1, 1, 1, 1, 1, 1]))
    difference = Replay(day).run()
    assert difference is not None and difference.step == 30
    assert difference.replayed[-1].startswith("raised") and "PoolError" in difference.replayed[-1]


def test_a_broken_count_is_found_by_check_alone(day: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(scheduler):
        scheduler.pool._free[-1] = scheduler.pool._free[-2]  # the end of the line: nobody misses the page for a while

    planted(monkeypatch, 3, lose)
    unchecked = Replay(day).run()
    assert unchecked is not None and unchecked.step > 4
    planted(monkeypatch, 3, lose)
    checked = Replay(day).run(check=True)
    assert checked is not None and checked.step <= 4 and "PoolError" in checked.replayed[-1]


def test_the_command_prints_both_decisions(day, monkeypatch, capsys) -> None:
    assert cli.main(["replay", day.path, "--check"]) == 0
    assert f"{day.num_steps:,} steps replayed" in capsys.readouterr().out
    planted(monkeypatch, 40, lambda scheduler: scheduler._preempt(scheduler.running[-1]))
    assert cli.main(["replay", day.path]) == 1
    out = capsys.readouterr().out
    assert "step 40 " in out and "--- recorded" in out and "+++ replayed" in out
    assert any(line.startswith("+preempt") for line in out.splitlines())
    assert any(line.startswith("-state") for line in out.splitlines())


def test_the_command_as_json(day, capsys) -> None:
    assert cli.main(["replay", day.path, "--json", "--until", "12"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["is_equal"] and found["num_equal_steps"] == 12 and found["difference"] is None


# --- the ring ----------------------------------------------------------------------------------------------------------


def test_the_ring_is_bounded_and_replays_from_what_is_left(tmp_path: Path) -> None:
    limit = 2**17
    engine = new_engine(flight_recorder_bytes=limit)
    recorder = engine._eyes._recorder
    assert recorder is not None
    step = engine.step

    def watched_step():
        events = step()
        assert recorder.num_bytes == sum(map(len, recorder._segments)) <= limit
        return events

    engine.step = watched_step  # type: ignore[method-assign]
    busy_day(engine, num_requests=250)
    assert recorder.num_dropped_bytes > limit
    recording = saved(engine, tmp_path)
    assert sum(FRAME.size + len(frame.payload) for frame in recording.frames) == recorder.num_bytes > limit // 2
    replay = Replay(recording)
    assert replay.run(check=True) is None
    assert 0 < replay.first_step < replay.num_steps == engine.num_steps
    assert replay.scheduler.num_preemptions == engine.scheduler.num_preemptions
    assert replay.scheduler.pool._free == engine.pool._free


def test_a_difference_is_found_behind_a_dropped_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = new_engine(flight_recorder_bytes=2**17)
    busy_day(engine, num_requests=250)
    recording = saved(engine, tmp_path)
    planted(monkeypatch, 20, lambda scheduler: scheduler._preempt(scheduler.running[-1]))
    replay = Replay(recording)
    difference = replay.run()
    assert difference is not None and difference.step == replay.first_step + 20


def test_a_state_that_cannot_be_written_down_is_said(tmp_path: Path) -> None:
    engine = new_engine(flight_recorder_bytes=2**17)
    engine.pool.whim = lambda: 0  # type: ignore[attr-defined]
    busy_day(engine, num_requests=250)
    with pytest.raises(
        RecordingError, match=r"a\.recording: cannot be replayed: the ring has dropped the beginning, and .*state"
    ) as e:
        Replay(saved(engine, tmp_path))
    assert "\n" not in str(e.value)


def test_another_pool_is_said(tmp_path: Path) -> None:
    class OwnPool(PagePool):
        pass

    engine = new_engine(pool=OwnPool(41))
    with pytest.raises(RecordingError, match=r"its pages came from .*OwnPool, not from jaxpaged\.host"):
        Replay(saved(engine, tmp_path))


def test_a_prompt_larger_than_the_ring_begins_it_anew(tmp_path: Path) -> None:
    engine = new_engine(flight_recorder_bytes=2**17)
    recorder = engine._eyes._recorder
    assert recorder is not None
    engine.add_request([1] * 400)
    recorder._put(Kind.ADD, bytes(2**16))  # as of a prompt of 16,384 tokens
    recorder._settle()
    assert recorder.num_bytes <= 2**17
    busy_day(engine, num_requests=5)
    replay = Replay(saved(engine, tmp_path))
    assert replay.run() is None and replay.num_steps == engine.num_steps


def test_the_recorder_can_be_off() -> None:
    engine = new_engine(flight_recorder_bytes=0)
    busy_day(engine, num_requests=3)
    with pytest.raises(ConfigError, match="flight_recorder_bytes is 0"):
        engine.save_recording("x")
    with pytest.raises(ConfigError, match="flight_recorder_bytes: got 1000"):
        EngineConfig(flight_recorder_bytes=1000)


# --- failures ----------------------------------------------------------------------------------------------------------


class Flaky(FakeRunner):
    """Raises at some runs."""

    def __init__(self, *args, at: set[int]):
        super().__init__(*args)
        self.at, self.count = at, 0

    def submit(self, plan):
        self.count += 1
        if self.count in self.at:
            raise OSError("the device is gone")
        return super().submit(plan)


def test_a_failed_step_leaves_its_recording(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "failures"
    engine = new_engine(runner=Flaky(41, PAGE, at={7}), recording_dir=str(folder))
    with pytest.raises(OSError, match="device is gone") as raised:
        busy_day(engine)
    (path,) = folder.iterdir()
    assert raised.value.__notes__ == [f"recording: {path}"] and str(path) in caplog.text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    recording = Recording.load(path)
    assert json.loads(recording.frames[-1].payload) == {"stage": "run", "error": "OSError: the device is gone"}
    replay = Replay(recording)
    assert replay.run() is None and replay.num_steps == 7


def test_a_recording_that_cannot_be_written_hides_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    engine = new_engine(runner=Flaky(41, PAGE, at={2}), recording_dir=str(tmp_path / "file"))
    with pytest.raises(OSError, match="device is gone"):
        busy_day(engine)
    assert "The recording of the step that failed is lost" in caplog.text


def test_work_goes_on_after_a_failed_step(tmp_path: Path) -> None:
    engine = new_engine(runner=Flaky(41, PAGE, at={3, 9, 10}))
    for number in range(6):
        engine.add_request([number] * 20, SamplingParams(max_tokens=12, ignore_eos=True))
    num_failed = 0
    while engine.has_unfinished:
        try:
            engine.step()
        except OSError:
            num_failed += 1
    assert num_failed == 3
    assert Replay(saved(engine, tmp_path)).run(check=True) is None


def test_who_is_singled_out_after_a_failed_step_is_recorded(tmp_path: Path) -> None:
    engine = new_engine(runner=Flaky(41, PAGE, at={9}))
    for number in range(6):
        engine.add_request([number] * 20, SamplingParams(max_tokens=12, ignore_eos=True), request_id=f"r{number}")
    only: list[frozenset[str] | None] = [frozenset({"r0", "r1"}), frozenset({"r1"}), None]
    while engine.has_unfinished:
        try:
            engine.step()
        except OSError:
            engine.single_out(only.pop(0))
        else:
            if len(only) < 3 and only and engine.num_steps % 3 == 0:
                engine.single_out(only.pop(0))
    assert not only
    recording = saved(engine, tmp_path)
    assert sum(frame.kind is Kind.ONLY for frame in recording.frames) == 3
    assert Replay(recording).run(check=True) is None
    assert [line for frame in recording.frames for line in describe(frame, {}) if line.startswith("only")][1:] == [
        "only     r1",
        "only     all",
    ]


@pytest.mark.parametrize("method", ["plan", "commit"])
def test_a_bug_of_the_scheduler_is_reproduced(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    original, count = getattr(Scheduler, method), 0

    def broken(self, *args):
        nonlocal count
        count += self.has_unfinished  # an idle engine's plans are not recorded
        if count == 15:
            raise RuntimeError("pages went missing")
        return original(self, *args)

    monkeypatch.setattr(Scheduler, method, broken)
    engine = new_engine(recording_dir=str(tmp_path))
    with pytest.raises(RuntimeError, match="went missing"):
        busy_day(engine)
    (path,) = tmp_path.iterdir()
    count = 0
    replay = Replay(Recording.load(path))
    assert replay.run() is None and replay.failure == "RuntimeError: pages went missing"
    count = 0
    assert cli.main(["replay", str(path)]) == 0 and "as it did when it was recorded" in capsys.readouterr().out
    monkeypatch.undo()
    difference = Replay(Recording.load(path)).run()  # the bug is mended: what it did is not what is done now
    assert difference is not None
    assert difference.recorded == [f"failed in {method}: RuntimeError: pages went missing"] != difference.replayed


# --- files -------------------------------------------------------------------------------------------------------------


def test_a_file_is_whole_private_and_replaces_the_last(tmp_path: Path) -> None:
    engine, path = new_engine(), tmp_path / "a.recording"
    first = engine.save_recording(path).read_bytes()
    busy_day(engine, num_requests=3)
    assert engine.save_recording(path).read_bytes() != first
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and list(tmp_path.iterdir()) == [path]
    with pytest.raises(RecordingError, match=r"missing.*No such file"):
        engine.save_recording(tmp_path / "missing" / "a")


def small(tmp_path: Path) -> Path:
    engine = new_engine()
    busy_day(engine, num_requests=4, with_faults=False)
    return engine.save_recording(tmp_path / "small.recording")


def test_damage_is_one_clear_line(tmp_path: Path, capsys) -> None:
    path = small(tmp_path)
    whole, rng = path.read_bytes(), random.Random(0)
    frames = Recording.load(path).frames
    for _ in range(150):
        damaged = bytearray(whole)
        if rng.random() < 0.5:
            del damaged[rng.randrange(len(whole)) :]
        else:
            damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            assert Recording.load(path).frames == frames  # gzip's head has bits that say nothing
        except RecordingError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    path.write_bytes(whole[:-9])
    assert cli.main(["replay", str(path)]) == 3
    err = capsys.readouterr().err
    assert err.startswith(f"jaxpaged: error: {path}: damaged: ") and err.count("\n") == 1


def test_what_passes_the_checksum_is_still_not_trusted(tmp_path: Path) -> None:
    """Files that were written by something else: whatever they hold, the answer is a difference, or one line."""
    path, rng = small(tmp_path), random.Random(1)
    header, body = recording._read(path)
    seen = set()
    for _ in range(300):
        other = bytearray(body)
        for _ in range(rng.randint(1, 3)):
            other[rng.randrange(len(other))] ^= 1 << rng.randrange(8)
        recording.write(path, header, bytes(other[: rng.choice((len(other), rng.randrange(len(other))))]))
        uses = (lambda found: Replay(found).run(), picture.sample, lambda found: save_trace(found, tmp_path / "trace.json"))
        for use in uses:
            try:
                seen.add(type(use(Recording.load(path))))
            except RecordingError as error:
                assert "\n" not in str(error)
                seen.add(RecordingError)
    assert seen == {type(None), Difference, RecordingError, tuple, type(path)}, "equal, different, refused; pictures and traces"


@pytest.mark.parametrize("content", [b"", b"hello", gzip.compress(b"hello", mtime=0), b"\x1f\x8b"])
def test_what_is_no_recording(content: bytes, tmp_path: Path, capsys) -> None:
    path = tmp_path / "x"
    path.write_bytes(content)
    for command in (["replay"], ["inspect", "--active-blocks", "--recording"], ["debug", "--scheduler", "--recording"]):
        assert cli.main([*command, str(path)]) == 3
        assert capsys.readouterr().err.count("\n") == 1
    assert cli.main(["replay", str(tmp_path / "none")]) == 3
    assert "none: No such file" in capsys.readouterr().err


class Evil:
    """A pickle that calls what it likes."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_a_recording_cannot_run_code(tmp_path: Path) -> None:
    path, target = small(tmp_path), tmp_path / "made"
    header, _ = recording._read(path)
    head = json.dumps({"is_beginning": False, "num_steps": 1, "rows": []}).encode()
    calls = [
        Evil(os.mkdir, str(target)),
        Evil(functools.partial, os.mkdir, str(target)),
        Evil(getattr, PagePool, "__init__"),
        Evil(eval, "1"),
        Evil(logging.getLogger, "x"),
        Evil(state._method, 5, "bit_length"),
        Evil(state._method, [], "append"),
        Evil(state._method, Counter(), "update"),
    ]
    for call in calls:
        payload = words(len(head)) + head + pickle.dumps((call, 1))
        recording.write(path, header, FRAME.pack(Kind.SEGMENT, len(payload), 0.0) + payload)
        with pytest.raises(RecordingError, match="is no part of a scheduler's state"):
            Replay(Recording.load(path))
    reached = [("jaxpaged.host.pages", "PagePool.check.__globals__"), ("jaxpaged.host.prefix_cache", "hashlib"), ("os", "system")]
    for names in reached:
        short = b"".join(b"\x8c" + bytes([len(name)]) + name.encode() for name in names)
        with pytest.raises(pickle.UnpicklingError, match="no part"):
            state.load(b"\x80\x04" + short + b"\x93.")
    assert not target.exists()


def test_a_state_comes_back_with_its_methods() -> None:
    engine = new_engine()
    engine.add_request([1, 2, 3])
    engine.step()
    scheduler, check = state.load(state.dump((engine.scheduler, engine.scheduler.check)))
    check()
    assert check.__self__ is scheduler and scheduler is not engine.scheduler
    assert [s.tokens for s in scheduler.running] == [s.tokens for s in engine.scheduler.running]


def test_the_options_are_in_the_header(day: Recording) -> None:
    assert day.header["options"]["max_num_seqs"] == 16 and day.header["limits"]["page_size"] == PAGE
    assert day.header["num_pages"] == 41 and MODEL.vocab_size == VOCAB_SIZE
