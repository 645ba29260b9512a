"""How Linux shares CPUs between the threads of an engine; what is told of processes is asked of processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jaxpaged import cpu_threads

TASKS = Path("/proc/self/task")
_ENGINE = """
import os
from jaxpaged import LLM
with LLM(max_model_len=64, max_num_seqs=2) as llm:
    llm.generate("a", use_tqdm=False)
    policies = [os.sched_getscheduler(int(task)) for task in os.listdir("/proc/self/task")]
    assert len(policies) > 2  # XLA's among them
    assert set(policies) == {os.SCHED_BATCH}, policies
"""

needs_policies = pytest.mark.skipif(not (hasattr(os, "SCHED_BATCH") and TASKS.is_dir()), reason="this is not Linux")


@needs_policies
def test_all_threads_of_an_engine_on_a_cpu_take_turns() -> None:
    done = subprocess.run([sys.executable, "-c", _ENGINE], capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr


@needs_policies
def test_a_policy_that_somebody_has_chosen_is_kept() -> None:
    wants, is_set, may_end = threading.Event(), threading.Event(), threading.Event()
    found: dict[str, int] = {}

    def live(name: str, policy: int) -> None:
        os.sched_setscheduler(0, policy, os.sched_param(0))
        wants.set()
        is_set.wait(20)
        found[name] = os.sched_getscheduler(0)
        may_end.wait(20)
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # it ends soon, not when nothing else runs

    with ThreadPoolExecutor(2) as pool:
        pool.submit(live, "idle", os.SCHED_IDLE)
        assert wants.wait(20)
        wants.clear()
        pool.submit(live, "usual", os.SCHED_OTHER)
        assert wants.wait(20)
        cpu_threads.wake_in_turn()
        is_set.set()
        may_end.set()
    assert found == {"idle": os.SCHED_IDLE, "usual": os.SCHED_BATCH}


@needs_policies
def test_a_thread_that_has_ended_or_may_not_be_asked_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[int] = []

    def refuse(task: int, *_: object) -> int:
        asked.append(task)
        raise (ProcessLookupError if task == 2 else PermissionError)()

    for name in ("1", "2", "3"):
        (tmp_path / name).touch()
    monkeypatch.setattr(os, "sched_getscheduler", refuse)
    cpu_threads.wake_in_turn(tmp_path)
    assert sorted(asked) == [1, 2, 3]


def _without_policies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.delattr(os, "SCHED_BATCH", raising=False)
    return tmp_path


def _without_tasks(_: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    return tmp_path / "none"


@pytest.mark.parametrize("system", [_without_policies, _without_tasks])
def test_other_systems_are_left_as_they_are(
    system: Callable[[pytest.MonkeyPatch, Path], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "1").touch()
    tasks = system(monkeypatch, tmp_path)
    monkeypatch.setattr(os, "sched_getscheduler", lambda *_: pytest.fail("asked"), raising=False)
    monkeypatch.setattr(os, "sched_setscheduler", lambda *_: pytest.fail("set"), raising=False)
    cpu_threads.wake_in_turn(tasks)


@needs_policies
def test_the_bench_compares_both_and_leaves_the_threads_as_an_engine_has_them(capsys: pytest.CaptureFixture[str]) -> None:
    from jaxpaged.bench import cpu_threads as bench

    seen: list[set[int]] = []

    class Fake:
        model_config = type("Shape", (), {"vocab_size": 9})

        def __init__(self, *_: object, **__: object) -> None: ...
        def __enter__(self) -> Fake:
            return self

        def __exit__(self, *_: object) -> None: ...
        def reset_prefix_cache(self) -> None: ...
        def generate(self, prompts: list[object], *_: object, **__: object) -> None:
            assert len(prompts) == 6
            seen.append({os.sched_getscheduler(thread.native_id) for thread in threading.enumerate() if thread.native_id})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "LLM", Fake)
        assert bench.main(["--num-seqs", "3", "--requests-per-seq", "2", "--rounds", "2", "--json"]) == 0
        with pytest.raises(SystemExit):
            bench.main(["--rounds", "0"])
    assert seen == [{os.SCHED_OTHER}, {os.SCHED_BATCH}] * 3
    row = json.loads(capsys.readouterr().out.splitlines()[0])
    assert row["num_seqs"] == 3 and row["lowest"] <= row["ratio"] <= row["highest"]
