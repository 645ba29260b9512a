"""The tools for people who compare kernels: what they find, what they say, and that they can be wrong."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import bench, check, command, compile_check, deviceless, goals, gpu_check, operations, peers, timing
from pallas_kernels.deviceless import Kernel, Program
from pallas_kernels.operations import Call, Cost
from pallas_kernels.paged_decode_attention.cases import Case
from pallas_kernels.timing import Floors, Row

DECODE, PREFILL = (operations.operation(f"paged_{name}_attention") for name in ("decode", "prefill"))
SMALL = Case(4, 2, 64)
FLOORS = Floors(1e12, {"float32": 1e13, "bfloat16": 1e14})


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip()


# --- check ---


def test_check_finds_every_backend_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main(["--op", "paged_decode_attention", "--backend", "reference", "xla", "--shape", "H80", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {(line["backend"], line["output"], line["verdict"]) for line in found["lines"]} == {
        (backend, output, "right") for backend in ("reference", "xla") for output in ("out", "lse")
    }
    assert all(line["max_error"] <= line["allowed"] and line["first_wrong"] is None for line in found["lines"])


def wrong_at(index: tuple[int, ...]):
    """The operation with a number of its result off by a hundredth."""

    def function(*args, **kwargs):
        out, lse = DECODE.function(*args, **kwargs)
        return out.at[index].add(0.01), lse

    return dataclasses.replace(DECODE, name="planted", function=function)


def test_check_finds_a_planted_error_and_where_it_is() -> None:
    operation, call = wrong_at((3, 0, 2, 17)), DECODE.cases.make(SMALL)
    out, lse = check.lines(operation, "case", call, "xla", check.Truth(operation, call))
    assert (out.verdict, out.first_wrong, lse.verdict) == ("wrong", (3, 0, 2, 17), "right")
    assert out.max_error == pytest.approx(0.01, rel=1e-3)
    assert out.ulp is not None and out.ulp > 1000


def test_check_says_what_a_backend_died_of_and_goes_on() -> None:
    def function(*args, **kwargs):
        raise RuntimeError("no such instruction\nmore")

    operation, call = dataclasses.replace(DECODE, name="dying", function=function), DECODE.cases.make(SMALL)
    (line,) = check.lines(operation, "case", call, "xla", check.Truth(operation, call))
    assert (line.verdict, line.is_right) == ("RuntimeError: no such instruction", False)


def test_check_notices_that_a_second_run_has_other_bits() -> None:
    runs = []

    class Restless(operations.Operation):
        def run(self, call, backend):
            out, lse = DECODE.run(call, backend)
            runs.append(backend)
            return np.nextafter(out, len(runs), dtype=out.dtype), lse

    operation, call = Restless(DECODE.name, DECODE.function, DECODE.cases), DECODE.cases.make(SMALL)
    call = Call({**call.arrays}, call.options)
    lines = check.lines(operation, "case", call, "xla", check.Truth(operation, call), is_repeated=True)
    assert len(runs) == 2
    assert lines[0].verdict == "wrong: a second run has other bits"


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a CPU has no mosaic")
def test_a_backend_that_cannot_run_is_listed_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--op", "paged_decode_attention", "--shape", "H80", "H96"]
    assert check.main([*flags, "--backend", "mosaic", "xla"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("mosaic did not run 2 cases: backend 'mosaic' cannot run here") == 1
    assert check.main([*flags, "--backend", "mosaic"]) == 2
    assert "no backend could run anything" in said(capsys)


@pytest.mark.parametrize(
    ("dtype", "exact", "got", "ulps"),
    [
        ("float32", 1.0, 1.0 + 2**-23, 1.0),
        ("bfloat16", 3.0, 3.0 + 2**-5, 2.0),
        ("float16", 0.0, 2**-24, 1.0),  # below the smallest normal number all units are the same
        ("float32", np.inf, np.inf, 0.0),
    ],
)
def test_ulp(dtype: str, exact: float, got: float, ulps: float) -> None:
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    assert check.ulp(np.array([got, 1.0], kind), np.array([exact, 1.0])) == ulps


@pytest.mark.parametrize("case", [case for case in DECODE.cases.CHECK if "H64" in str(case)][-3:], ids=str)
def test_a_saved_call_is_replayed(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = DECODE.cases.make(case)
    operations.save(tmp_path / "call.npz", DECODE.name, call)
    operation, loaded = operations.load(tmp_path / "call.npz")
    assert operation is DECODE and loaded.options == dict(call.options)
    for name, x in call.arrays.items():
        assert (loaded.arrays[name].dtype, loaded.arrays[name].tobytes()) == (x.dtype, x.tobytes())
    assert check.main(["--case", str(tmp_path / "call.npz"), "--backend", "xla"]) == 0
    assert "call.npz" in capsys.readouterr().out


def test_a_saved_call_without_lse_is_replayed(tmp_path: Path) -> None:
    call = DECODE.cases.make(SMALL)
    operations.save(tmp_path / "call.npz", DECODE.name, Call(call.arrays, {**call.options, "return_lse": False}))
    assert check.main(["--case", str(tmp_path / "call.npz"), "--backend", "xla"]) == 0


def damaged_files(folder: Path) -> list[Path]:
    operations.save(folder / "whole.npz", DECODE.name, DECODE.cases.make(SMALL))
    whole = (folder / "whole.npz").read_bytes()
    (folder / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (folder / "flipped.npz").write_bytes(whole[:3000] + bytes(x ^ 255 for x in whole[3000:3050]) + whole[3050:])
    (folder / "text.npz").write_text("hello")
    (folder / "empty.npz").write_text("")
    np.savez(folder / "foreign.npz", a=np.zeros(3))
    np.savez(folder / "unknown.npz", call=np.array(json.dumps({"operation": "conv", "options": {}, "dtypes": {}})))
    with (folder / "array.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    return [*sorted(set(folder.iterdir()) - {folder / "whole.npz"}), folder / "absent.npz", folder]


def test_a_damaged_or_foreign_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in damaged_files(tmp_path):
        assert check.main(["--case", str(path)]) == 2, path
        line = said(capsys)
        assert line.startswith(f"check: --case: {path}: "), line
        assert "\n" not in line


BAD_USAGE = [
    (check, ["--op", "paged_decode"], "check: --op: got 'paged_decode', expected one of paged_decode_attention, "),
    (check, ["--op", "paged_decode"], "; did you mean 'paged_decode_attention'?"),
    (check, ["--backend", "mosaik"], "did you mean 'mosaic'?"),
    (check, ["--backends", "xla"], "check: flag: got '--backends', "),
    (check, ["--dtype", "bfloat"], "did you mean 'bfloat16'?"),
    (check, ["--shape", "H77"], "check: no case holds 'H77'"),
    (check, ["--case", "a.npz", "--op", "paged_decode_attention"], "leave --op, --dtype and --shape out"),
    (bench, ["--case", "nothing"], "bench: --case: no timed case holds 'nothing'"),
    (bench, ["--repeats", "0"], "bench: --repeats: got 0, expected 1 or more"),
    (bench, ["--repeats", "many"], "bench: --repeats: invalid int value: 'many'"),
    (compile_check, ["--gpu", "sm_90"], "did you mean 'sm_90a'?"),
    (gpu_check, [], "gpu_check: the following arguments are required: --out"),
    (gpu_check, ["--out", "x", "--minutes", "0"], "expected more than nothing"),
]


@pytest.mark.parametrize(("tool", "flags", "line"), BAD_USAGE)
def test_bad_usage_is_one_line_and_code_2(tool, flags: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(flags) == 2
    printed = said(capsys)
    assert line in printed
    assert "\n" not in printed


# --- timing and bench ---


def row(name: str, median_us: float, case: str = "case", operation: str = DECODE.name, *, is_peer: bool = False) -> Row:
    num_bytes, num_flops = 10**9, 10**9
    least, bound = FLOORS.least_us(Cost(num_bytes, num_flops), "float32")
    return Row(operation, case, name, is_peer, median_us, median_us, median_us, num_bytes, num_flops, bound, least, 1, 0.0)


def test_the_floor_is_the_larger_of_bytes_and_arithmetic() -> None:
    assert FLOORS.least_us(Cost(num_bytes=10**9, num_flops=0), "float32") == (1000.0, "memory")
    assert FLOORS.least_us(Cost(num_bytes=1000, num_flops=10**11), "float32") == (10_000.0, "compute")
    assert FLOORS.least_us(Cost(num_bytes=1000, num_flops=10**11), "float16") == (1000.0, "compute")
    assert row("xla", 2000.0).share == 0.5
    assert row("xla", 2000.0).speed == "500 GB/s"


def test_ratios_are_to_the_comparison_of_the_case() -> None:
    printed = bench.table([row("native", 500.0), row("xla", 1000.0), row("gather", 2000.0, is_peer=True)]).splitlines()
    assert [line.split()[-2:] for line in printed[1:]] == [["4.00x", "gather"], ["2.00x", "gather"], ["1.00x", "gather"]]


class Stub:
    """Something to time that takes a second by its own clock."""

    def __init__(self, name: str, log: list[str]):
        self.name, self.num_calls, self._log = name, 2, log

    def start(self) -> None:
        self._log.append(self.name)

    def finish(self) -> None:
        pass


def test_candidates_are_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(len(log)))
    times = timing.in_turn([Stub("a", log), Stub("b", log)], repeats=3)
    assert log == ["a", "b", *"ababab"]
    assert times["a"] == timing.Times(500_000.0, 500_000.0, 500_000.0)  # two calls a pass, one pass a second


@pytest.mark.parametrize("as_one_program", [False, True])
def test_what_works_in_place_gets_its_own_results_back(as_one_program: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Donated arrays are used up at each pass; the arrays of the call are never written to."""
    pool = np.zeros((64, 16), np.float32)
    if as_one_program:
        monkeypatch.setattr(timing.jax, "default_backend", lambda: "gpu")

    def add(pool: jax.Array, x: jax.Array) -> jax.Array:
        return pool.at[0].add(x)

    copies = timing.Copies(Call({"pool": pool, "x": np.ones(16, np.float32)}, {}), ("pool",), num_copies=3)
    runner = timing.Candidate("add", add, copies)
    for _ in range(4):
        runner.start()
    runner.finish()
    assert runner.outputs[0][0, 0] == 1
    assert [float(each[0][0, 0]) for each in runner._results] == [5.0] * 3
    assert not pool.any()


def test_a_wrong_candidate_is_not_timed() -> None:
    def nonsense(call: Call):
        out, lse = DECODE.function(**call.arrays, **call.options, backend="xla")
        return out + 1, lse

    case = dataclasses.replace(SMALL, lens=(40,) * 3)
    cases = type(DECODE.cases)("cases")
    vars(cases).update({**vars(DECODE.cases), "PEERS": {"nonsense": nonsense}})
    operation = dataclasses.replace(DECODE, cases=cases)
    rows, reasons = timing.time_case(operation, case, cases.make(case), ["xla", "mosaic"], FLOORS, repeats=1)
    assert [each.name for each in rows] == ["xla"]
    assert "its outputs differ from those of xla" in reasons["nonsense"]
    if jax.default_backend() == "cpu":
        assert reasons["mosaic"].startswith("backend 'mosaic' cannot run here")


def test_padding_queries_do_not_count_as_differences() -> None:
    case = Case(4, 2, 64, T=16, lens=(100,) * 2, is_prefill=True)
    call = PREFILL.cases.make(case)
    out, lse = PREFILL.run(call, "xla")
    other = out.copy()
    other[0, 8:] = 7.0  # the first tile is filled to half
    counts = PREFILL.cases.counts(call)
    assert timing.difference((other, lse), (out, lse), counts) == 0
    assert timing.difference((other, lse), (out, lse), None) > 0.5
    assert timing.difference((np.array([1, 2]),), (np.array([1, 3]),), None) == 0.5


def test_every_timed_case_has_a_cost_and_every_donated_array_is_an_argument() -> None:
    for operation in map(operations.operation, operations.NAMES):
        assert all(operation.cases.cost(case).num_bytes > 0 for case in operation.cases.BENCH)
        call = operation.cases.make(operation.cases.CHECK[0])
        assert set(getattr(operation.cases, "DONATE", ())) <= set(call.arrays)


def test_bench_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "measure_floors", partial(timing.measure_floors, repeats=1, is_small=True))
    monkeypatch.setattr(DECODE.cases, "BENCH", (dataclasses.replace(SMALL, lens=(64,) * 2),) * 1)
    file = tmp_path / "rows.json"
    assert bench.main(["--op", DECODE.name, "--backend", "xla", "--repeats", "1", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [each["name"] for each in rows] == ["xla", *DECODE.cases.PEERS]
    assert f"{rows[0]['median_us']:.1f}" in capsys.readouterr().out


# --- compile_check ---

PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'k' for 'sm_90a'
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 2 barriers, 1 bytes smem
"""
SASS = """        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0020*/             @UP0 UTMALDG.5D [UR8], [UR4] ;
        /*0030*/                   STL [R1], R5 ;
"""


def dump(folder: Path, stem: str, body: str, shared: int = 0) -> list[Path]:
    """What Mosaic writes before the assembler runs."""
    (folder / f"{stem}.after_layout_inference.txt").write_text(f'module {{basename = "{stem}"}} {body}')
    (folder / f"{stem}.resources.txt").write_text(f"Resources(smem_scratch_bytes={shared}, tmem_scratch_cols=0)")
    return list(folder.iterdir())


def assemble(folder: Path, stem: str) -> list[Path]:
    """What is written when it has run."""
    for suffix, text in ((".ptxas", PTXAS), (".sass_ctrl", SASS), (".ptx", ".entry k(\n)\n.maxntid 128, 3, 1\n{")):
        (folder / f"{stem}{suffix}").write_text(text)
    return list(folder.iterdir())


def test_what_the_assembler_says_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deviceless, "_SEEN", {})
    dump(tmp_path, "decode_3", "body", shared=32768)
    (kernel,) = deviceless._kernels(set(assemble(tmp_path, "decode_0")))  # the two number their files apart
    assert dataclasses.replace(kernel, instructions={}) != kernel
    assert (kernel.name, kernel.num_registers, kernel.num_threads, kernel.shared_bytes) == ("decode", 168, 384, 32768)
    assert (kernel.spill_bytes, kernel.stack_bytes) == (20, 16)
    assert kernel.instructions == {"LDC": 1, "HGMMA": 1, "UTMALDG": 1, "STL": 1}
    before = set(tmp_path.iterdir())
    again = set(dump(tmp_path, "decode_4", "body", shared=32768)) - before  # a twin is not assembled again
    assert deviceless._kernels(again) == (kernel,)


GOOD = Kernel("k", 168, 0, 0, 64 * 1024, 384, {"HGMMA": 4})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, ""),
        ({"spill_bytes": 8}, "k: spills 8 bytes of registers"),
        ({"stack_bytes": 16}, "k: has a stack of 16 bytes"),
        ({"num_threads": 512}, "k: 168 registers of 512 threads are 86016, a multiprocessor has 65536"),
        ({"shared_bytes": 228 * 1024}, "bytes of shared memory, the chip has 232448"),
        ({"instructions": {"HGMMA": 1, "LDL": 2}}, "k: local memory: LDL 2 times"),
        ({"instructions": {"FFMA": 1}}, "no HGMMA|HMMA instruction"),
    ],
)
def test_gates_of_a_kernel(change: dict, problem: str) -> None:
    program = Program((dataclasses.replace(GOOD, **change),), 0, 0)
    found = compile_check.problems(program, "sm_90a", {"sm_90a": ("HGMMA|HMMA",), "sm_80": ("LDGSTS",)})
    assert (problem in " ".join(found)) if problem else not found


def test_gates_of_a_program() -> None:
    assert compile_check.problems(Program((), 0, 0), "sm_80") == ["there is no Mosaic kernel in it"]
    pool = 1 << 30
    assert not compile_check.problems(Program((GOOD,), 4096, pool), "sm_90a", donated_bytes=pool)
    (line,) = compile_check.problems(Program((GOOD,), 4096, 0), "sm_90a", donated_bytes=pool)
    assert line.startswith("not in place: 0 of")
    (line,) = compile_check.problems(Program((GOOD,), pool, pool), "sm_90a", donated_bytes=pool)
    assert line.startswith(f"needs {pool} bytes beside")


def test_a_compiler_that_aborts_costs_one_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies on the second of three cases; the next one begins with the third."""
    case = dataclasses.replace(SMALL, lens=(64,))
    cases = [dataclasses.replace(case, H=H) for H in (32, 64, 96)]
    monkeypatch.setattr(DECODE.cases, "BENCH", tuple(cases))
    monkeypatch.delattr(DECODE.cases, "COMPILE", raising=False)
    starts = []

    def run(words: list[str], **_):
        flags = dict(itertools.pairwise(words))
        start, report = int(flags["--start"]), Path(flags["--child"]) / "report"
        starts.append(start)
        done = [compile_check.Result("sm_80", DECODE.name, str(each), "compiled") for each in cases[start : start + 1]]
        report.write_text("".join(json.dumps(dataclasses.asdict(each)) + "\n" for each in done))
        return subprocess.CompletedProcess(words, -6 if start == 0 else 0, "", "noise\nLLVM ERROR: Cannot select: x\nstack dump")

    monkeypatch.setattr(compile_check.subprocess, "run", run)
    results = compile_check.check_gpu("sm_80", [DECODE], [])
    assert starts == [0, 2]
    assert [result.status for result in results] == ["compiled", "failed", "compiled"]
    assert results[1].case == str(cases[1])
    assert results[1].reason == "the compiling process was killed by signal 6: LLVM ERROR: Cannot select: x"


def test_large_random_arrays_are_not_made_to_be_compiled() -> None:
    rng = compile_check._Blank(np.random.PCG64(0))
    assert not rng.standard_normal((2048, 1024), np.float32).any()
    assert rng.standard_normal((8, 8), np.float32).any()
    assert rng.integers(0, 5, (2048, 1024), np.int8).dtype == np.int8
    assert sorted(rng.permutation(5)) == [0, 1, 2, 3, 4]


@pytest.mark.skipif(compile_check.missing() is None, reason="the CUDA plugin is here")
def test_without_the_plugin_one_line_says_what_to_install(capsys: pytest.CaptureFixture[str]) -> None:
    assert compile_check.main([]) == 2
    line = said(capsys)
    assert "jax[cuda13]" in line and "\n" not in line


# --- gpu_check ---


def test_goals_are_about_cases_that_are_timed() -> None:
    for goal in goals.GOALS:
        timed = [
            (op.name, case, op.cases.cost(case)) for op in map(operations.operation, operations.NAMES) for case in op.cases.BENCH
        ]
        if set(goal.operations) <= set(operations.NAMES):
            assert any(goal.takes(name, str(case), cost.num_bytes) for name, case, cost in timed), goal.what
        assert (goal.goal < goal.must) == (goal.unit == "us")


def test_a_goal_is_held_to_the_worst_of_its_cases() -> None:
    goal = goals.Goal("x", (DECODE.name,), "case", "bandwidth", 0.5, 0.8)
    rows = [row("mosaic", 1100.0, "case1"), row("mosaic", 1600.0, "case2"), row("xla", 9000.0, "case1")]
    assert goal.measured(rows, "mosaic") == pytest.approx(1000 / 1600)
    assert [goal.verdict(value) for value in (0.9, 0.6, 0.4, None)] == ["goal", "must", "below", "not measured"]
    assert goals.Goal("x", (DECODE.name,), "case", "us", 55, 42).verdict(50.0) == "must"


def test_gpu_check_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if jax.default_backend() == "cpu":
        assert gpu_check.main(["--out", str(tmp_path)]) == 2
        assert said(capsys) == "gpu_check: it needs an NVIDIA GPU, jax's default backend here is cpu"
    case = dataclasses.replace(SMALL, dtype="bfloat16", lens=(100,) * 2)
    monkeypatch.setattr(DECODE.cases, "CHECK", DECODE.cases.CHECK[:2])
    monkeypatch.setattr(DECODE.cases, "BENCH", (case,))
    monkeypatch.setattr(gpu_check, "LAST_S", 0.0)
    flags = ["--anywhere", "--op", DECODE.name, "--backend", "xla", "reference", "--repeats", "1", "--minutes", "1"]
    assert gpu_check.main(["--out", str(tmp_path), *flags]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert {line["case"] for line in found["checked"]} == {str(case) for case in DECODE.cases.CHECK}
    names = [each["name"] for each in found["timed"]["rows"]]
    assert names[:2] == ["xla", "reference"]
    assert ("torch_sdpa" in names) == (importlib.util.find_spec("torch") is not None)
    assert any("flashinfer: " in note for note in found["notes"]) or "flashinfer" in names
    assert "| decode, one row of 1k |" in (tmp_path / "summary.md").read_text()


def test_gpu_check_keeps_what_it_has_when_the_time_is_up(tmp_path: Path) -> None:
    flags = ["--anywhere", "--op", DECODE.name, "--backend", "xla", "--repeats", "1", "--minutes", "0.001"]
    assert gpu_check.main(["--out", str(tmp_path), *flags]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert len(found["checked"]) == 2  # both outputs of the first case
    assert any("the time was up" in note for note in found["notes"])


PROMPT = Case(4, 2, 64, T=16, dtype="bfloat16", lens=tuple(range(16, 129, 16)), is_prefill=True)
CHUNK = dataclasses.replace(PROMPT, lens=PROMPT.lens[4:])


@pytest.mark.parametrize(
    ("operation", "case", "peer"),
    [
        (DECODE, dataclasses.replace(SMALL, dtype="bfloat16", lens=(100,) * 3), partial(peers.cudnn, implementation="xla")),
        (PREFILL, PROMPT, partial(peers.cudnn, implementation="xla")),
        (DECODE, dataclasses.replace(SMALL, dtype="bfloat16", lens=(100,) * 3), peers.torch_sdpa),
        (PREFILL, PROMPT, peers.torch_sdpa),
        (PREFILL, CHUNK, peers.torch_sdpa),
    ],
)
def test_peers_are_given_the_same_keys_and_values(operation: operations.Operation, case: Case, peer) -> None:
    if peer is peers.torch_sdpa:
        pytest.importorskip("torch")
    call = operation.cases.make(case)
    runner = peer(timing.Copies(call, (), 2))
    runner.start()
    runner.finish()
    assert timing.difference(runner.outputs, operation.run(call, "xla"), operation.cases.counts(call)) < 1e-2


def test_a_peer_refuses_what_it_cannot_take() -> None:
    for case in (SMALL, dataclasses.replace(SMALL, window=24, lens=(64,))):
        with pytest.raises(NotImplementedError):
            peers.dense(DECODE.cases.make(case))


# --- the commands as commands ---


def test_help_says_what_the_command_is_for() -> None:
    words = [sys.executable, "-m", "pallas_kernels.check", "--help"]
    printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert printed.startswith("usage: python -m pallas_kernels.check")
    assert "float64" in printed


def test_a_table_is_aligned() -> None:
    assert command.table(("a", "bb"), [("xyz", "1"), ("x", "22")], right="_r") == "a    bb\nxyz   1\nx    22"
