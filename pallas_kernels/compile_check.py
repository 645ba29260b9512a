"""Compile every Mosaic kernel to machine code for GPUs that are not there: `python -m pallas_kernels.compile_check`.

One process for each GPU compiles every operation's cases and reads what the assembler says. It is wrong when a kernel spills
registers or has a stack, when registers or shared memory do not fit the chip, when an instruction that the operation should use
(INSTRUCTIONS in its cases) is not there, or when an operation that works in place (DONATE) does not. What a kernel refuses to run
on a chip is listed with its reason. Needs jax's CUDA plugin; no driver and no GPU.

Exit code: 0 all right, 1 something is wrong, 2 nothing could be compiled.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np

from pallas_kernels import command, deviceless
from pallas_kernels.backends import MOSAIC_JAX
from pallas_kernels.command import RIGHT, WRONG, UsageError
from pallas_kernels.deviceless import GPUS, Kernel, Program
from pallas_kernels.operations import Operation
from pallas_kernels.target import Target

REGISTERS = 65536  # of one multiprocessor, on every chip from sm_80 on
# Worth a column: tensor cores, copies, conversions between shared memory and registers, the stack.
SHOWN = ("HGMMA", "QGMMA", "IGMMA", "HMMA", "IMMA", "QMMA", "UTMALDG", "UTMASTG", "UBLKCP", "LDGSTS", "LDSM", "USETMAXREG")
STACK = ("LDL", "STL")
# A program may need a little memory beside an array that it updates in place; a copy of the array is never a little.
TEMPORARY_SHARE, TEMPORARY_BYTES = 0.05, 1 << 20
HEADER = (
    "gpu",
    "operation",
    "case",
    "kernel",
    "registers",
    "threads",
    "spills",
    "stack",
    "shared KiB",
    "instructions",
    "verdict",
)


@dataclass
class Result:
    """One case compiled for one GPU, or why not."""

    gpu: str
    operation: str
    case: str
    status: str  # "compiled", "refused" by the operation, or "failed"
    reason: str = ""
    kernels: list[dict[str, Any]] = field(default_factory=list)
    temporary_bytes: int = 0
    alias_bytes: int = 0
    donated_bytes: int = 0
    problems: list[str] = field(default_factory=list)


# --- gates ---


def problems(program: Program, gpu: str, instructions: Any = (), donated_bytes: int = 0) -> list[str]:
    """What is wrong with a compiled program, a line each.

    Args:
      instructions: mnemonics that its kernels must have, "A|B" for either, or a mapping of GPUs to such.
      donated_bytes: of the arrays that its results are to take the memory of.
    """
    _, capability, num_sms, _ = GPUS[gpu]
    limit = Target(capability, num_sms).shared_memory_bytes
    found = [] if program.kernels else ["there is no Mosaic kernel in it"]
    for kernel in program.kernels:
        found += [f"{kernel.name}: {line}" for line in _kernel_problems(kernel, limit)]
    wanted = instructions.get(gpu, ()) if isinstance(instructions, dict) else instructions
    present = {name for kernel in program.kernels for name in kernel.instructions}
    if present:  # without nvdisasm there is none to look at
        found += [f"no {either} instruction" for either in wanted if not present & set(either.split("|"))]
    if donated_bytes:
        if program.alias_bytes < donated_bytes:
            found.append(f"not in place: {program.alias_bytes} of {donated_bytes} donated bytes are taken over")
        if program.temporary_bytes > max(TEMPORARY_SHARE * donated_bytes, TEMPORARY_BYTES):
            found.append(f"needs {program.temporary_bytes} bytes beside {donated_bytes} donated ones")
    return found


def _kernel_problems(kernel: Kernel, limit: int) -> Iterator[str]:
    if kernel.spill_bytes:
        yield f"spills {kernel.spill_bytes} bytes of registers"
    if kernel.stack_bytes:
        yield f"has a stack of {kernel.stack_bytes} bytes"
    used = -(-kernel.num_registers // 8) * 8 * kernel.num_threads  # registers are handed out in eights
    if used > REGISTERS:
        yield f"{kernel.num_registers} registers of {kernel.num_threads} threads are {used}, a multiprocessor has {REGISTERS}"
    if kernel.shared_bytes > limit:
        yield f"{kernel.shared_bytes} bytes of shared memory, the chip has {limit}"
    stack = [name for name in STACK if kernel.instructions.get(name)]
    if stack:
        yield f"local memory: {', '.join(f'{name} {kernel.instructions[name]} times' for name in stack)}"


# --- one GPU: this part runs in a process of its own ---


class _Blank(np.random.Generator):
    """Large arrays of random numbers are zeros: only their shapes matter here, and making them takes longer than compiling."""

    def _fill(self, method: str, size: Any, dtype: Any, *args: Any, **kwargs: Any) -> Any:
        if size is not None and np.prod(size) > 1 << 20:
            return np.zeros(size, dtype)
        return getattr(super(), method)(*args, **kwargs)

    def standard_normal(self, size: Any = None, dtype: Any = np.float64, out: Any = None) -> Any:
        return self._fill("standard_normal", size, dtype, size, dtype, out)

    def normal(self, loc: Any = 0.0, scale: Any = 1.0, size: Any = None) -> Any:
        return self._fill("normal", size, np.float64, loc, scale, size)

    def uniform(self, low: Any = 0.0, high: Any = 1.0, size: Any = None) -> Any:
        return self._fill("uniform", size, np.float64, low, high, size)

    def integers(self, low: Any, high: Any = None, size: Any = None, dtype: Any = np.int64, endpoint: bool = False) -> Any:
        return self._fill("integers", size, dtype, low, high, size, dtype, endpoint)


def work(chosen: Sequence[Operation], substrings: Sequence[str]) -> list[tuple[Operation, Any]]:
    """Every operation's cases to compile."""
    cases = [(op, case) for op in chosen for case in getattr(op.cases, "COMPILE", op.cases.BENCH)]
    return [(op, case) for op, case in cases if command.matches(case, substrings)]


def compile_case(operation: Operation, case: Any, gpu: str, dump: Path) -> Result:
    """Compile a case in this process, whose environment `environment` made; no exception comes out."""
    result = Result(gpu, operation.name, str(case), "failed")
    try:
        with mock.patch("numpy.random.default_rng", lambda seed=None: _Blank(np.random.PCG64(seed))):
            call = operation.cases.make(case)
        shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in call.arrays.items()}
        donate = tuple(getattr(operation.cases, "DONATE", ()))
        result.donated_bytes = sum(call.arrays[name].nbytes for name in donate)
        function = partial(operation.function, **call.options, backend="mosaic")
        program = deviceless.program(function, shapes, gpu, dump, donate=donate)
    except Exception as error:  # the compilers' failures are findings
        if command.is_refusal(error):
            result.status, result.reason = "refused", command.first_line(error).removeprefix(f"{operation.name}: ")
        else:
            result.reason = f"{type(error).__name__}: {command.first_line(error)}"
    else:
        result.status = "compiled"
        result.kernels = [asdict(kernel) for kernel in program.kernels]
        result.temporary_bytes, result.alias_bytes = program.temporary_bytes, program.alias_bytes
        result.problems = problems(program, gpu, getattr(operation.cases, "INSTRUCTIONS", ()), result.donated_bytes)
    return result


def _child(chosen: Sequence[Operation], substrings: Sequence[str], gpu: str, start: int, folder: Path) -> int:
    """Compile from the case number `start` on; each result is a line of the report before the next case begins."""
    dump, report = folder / "dump", folder / "report"
    with report.open("a") as file:
        for operation, case in work(chosen, substrings)[start:]:
            print(json.dumps(asdict(compile_case(operation, case, gpu, dump))), file=file, flush=True)
    return 0


# --- all GPUs ---


def missing() -> str | None:
    """What has to be installed before anything can be compiled, or None."""
    version = jax.__version__
    if jax.__version_info__[:3] < MOSAIC_JAX:
        return f"it needs jax {'.'.join(map(str, MOSAIC_JAX))} or newer, this is {version} (pip install 'jax[cuda13]')"
    plugins = importlib.util.find_spec("jax_plugins")
    if plugins is None or not any(importlib.util.find_spec(f"jax_plugins.xla_cuda{major}") for major in (12, 13)):
        return (
            f"it needs jax's CUDA plugin, though no driver and no GPU: pip install 'jax[cuda13]=={version}', or only pip install "
            f"--no-deps jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version} nvidia-cuda-nvcc nvidia-nvvm "
            "nvidia-cuda-nvdisasm nvidia-cuda-runtime nvidia-cuda-crt"
        )
    return None


def environment(dump: Path) -> dict[str, str]:
    """Of a process that compiles for a GPU that is not there: what it inherits, and what jax only reads when it starts."""
    own = {"JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_TO": str(dump), "JAX_ENABLE_COMPILATION_CACHE": "false"}
    return os.environ.copy() | own


def check_gpu(gpu: str, chosen: Sequence[Operation], substrings: Sequence[str]) -> list[Result]:
    """Compile all cases for one GPU; a process that the compilers abort is replaced by one that begins after that case."""
    todo = work(chosen, substrings)
    results: list[Result] = []
    while len(results) < len(todo):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "dump").mkdir()
            (folder / "report").touch()
            names = [operation.name for operation in chosen]
            words = ["--child", name, "--start", str(len(results)), "--gpu", gpu, "--op", *names]
            if substrings:
                words += ["--case", *substrings]
            child = subprocess.run(
                [sys.executable, "-m", "pallas_kernels.compile_check", *words],
                env=environment(folder / "dump"),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
            results += [Result(**json.loads(line)) for line in (folder / "report").read_text().splitlines()]
        if len(results) < len(todo):
            operation, case = todo[len(results)]
            results.append(Result(gpu, operation.name, str(case), "failed", death(child.returncode, child.stderr)))
    return results


def death(code: int, said: str) -> str:
    """How a process ended that should not have, in a line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    telling = [line for line in lines if "LLVM ERROR" in line or "Check failed" in line or "Error" in line] or lines or [""]
    how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
    return f"the compiling process {how}: {telling[-1][:300]}"


def table(results: Sequence[Result]) -> str:
    """What was compiled as text: a line for each kernel."""
    lines = []
    for result in results:
        for kernel in result.kernels:
            counts = kernel["instructions"]
            shown = " ".join(f"{name} {counts[name]}" for name in (*SHOWN, *STACK) if counts.get(name)) or "-"
            numbers = [str(kernel[key]) for key in ("num_registers", "num_threads", "spill_bytes", "stack_bytes")]
            cells = (kernel["name"], *numbers, f"{kernel['shared_bytes'] / 1024:.0f}", shown)
            lines.append((result.gpu, result.operation, result.case, *cells, "wrong" if result.problems else "right"))
    return command.table(HEADER, lines, right="____rrrrr__")


def findings(results: Sequence[Result]) -> list[str]:
    """A line for each thing that is wrong."""
    lines = []
    for result in results:
        where = f"{result.gpu} {result.operation} {result.case}"
        lines += [f"{where}: failed: {result.reason}"] * (result.status == "failed")
        lines += [f"{where}: {problem}" for problem in result.problems]
    return lines


def refusals(results: Sequence[Result]) -> list[str]:
    """What was refused: a line for each reason of an operation on a GPU."""
    groups: dict[tuple[str, str, str], int] = {}
    for result in results:
        if result.status == "refused":
            key = (result.gpu, result.operation, result.reason)
            groups[key] = groups.get(key, 0) + 1
    return [f"{gpu} {operation}: {count} refused: {reason}" for (gpu, operation, reason), count in groups.items()]


def _command(argv: Sequence[str] | None) -> int:
    parser = command.Parser("compile_check", (__doc__ or "").split("\n\n")[0])
    command.add_choice(parser)
    parser.add_argument("--gpu", action="extend", nargs="+", default=[], help=f"of {', '.join(GPUS)} (default: all)")
    parser.add_argument(
        "--case", action="extend", nargs="+", default=[], metavar="TEXT", help="cases whose name holds one of these"
    )
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) // 2), help="GPUs at a time (%(default)s here)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here")
    parser.add_argument("--child", type=Path, help="(for its own processes) compile for the one GPU, and report in this folder")
    parser.add_argument("--start", type=int, default=0, help="(for its own processes) the first case")
    given = parser.parse(argv)
    chosen = command.chosen_operations(given.op)
    for gpu in given.gpu:
        if gpu not in GPUS:
            raise UsageError(command.not_one_of("--gpu", gpu, GPUS))
    if given.child:
        return _child(chosen, given.case, given.gpu[0], given.start, given.child)
    if reason := missing():
        raise UsageError(reason)
    if not work(chosen, given.case):
        raise UsageError(f"--case: no case holds {' or '.join(given.case)!r}")

    gpus = given.gpu or list(GPUS)
    with ThreadPoolExecutor(max(1, given.jobs)) as pool:
        results = [r for found in pool.map(lambda gpu: check_gpu(gpu, chosen, given.case), gpus) for r in found]
    print(f"jax {jax.__version__} for {', '.join(gpus)}")
    if any(result.kernels for result in results):
        print(table(results))
    for result in results:
        if result.status == "compiled" and result.donated_bytes:
            taken = f"{result.alias_bytes} of {result.donated_bytes} donated bytes in place, {result.temporary_bytes} beside them"
            print(f"{result.gpu} {result.operation} {result.case}: {taken}")
    wrong = [result for result in results if result.status == "failed" or result.problems]
    for line in (*refusals(results), *findings(results)):
        print(line)
    num_compiled = sum(result.status == "compiled" for result in results)
    num_refused = sum(result.status == "refused" for result in results)
    print(f"{num_compiled} programs compiled, {num_refused} refused, {len(wrong)} wrong")
    if given.json:
        given.json.write_text(json.dumps({"jax": jax.__version__, "results": [asdict(result) for result in results]}, indent=1))
    return WRONG if wrong else RIGHT


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    return command.main("compile_check", _command, argv)


if __name__ == "__main__":
    raise SystemExit(main())
