"""jaxpaged beside other engines: the same token ids, in turn, again and again; what counts are the ratios of one round.

Knows contenders, rounds and numbers. Refuses to know what a contender is: an engine in this process or a process of its own.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from jaxpaged.bench import throughput
from jaxpaged.bench.ratios import spread
from jaxpaged.host.request import SamplingParams
from jaxpaged.version import __version__

if TYPE_CHECKING:
    from jaxpaged.llm import LLM

PAUSE_S = 0.3  # between two turns: threads of a pool that still wait for work spin for up to 0.2 s (OpenMP's)


class Contender(Protocol):
    """One engine with one type of weights. Greedy; the end of text is ignored, and no prompt is remembered."""

    name: str
    seconds: float  # of the last `tokens`
    loaded: dict[str, Any]  # what it said about itself when it was loaded

    def load(self) -> None:
        """Be ready. What is loaded stays so."""
        ...

    def tokens(self, prompts: list[list[int]], num_outputs: list[int]) -> list[list[int]]:
        """All requests at once; each one's tokens, exactly as many as it asks for."""
        ...

    def trace(self, prompt: list[int], num_output: int) -> tuple[list[float], list[int]]:
        """One request alone: seconds from its start to each of its tokens, and these."""
        ...

    def close(self) -> None:
        """Give its memory back. It can be loaded again where it is another process."""
        ...


class Ours:
    """An `LLM` of this process."""

    def __init__(self, llm: LLM, *, clock: Callable[[], float] = time.perf_counter):
        self._llm, self._clock = llm, clock
        self.seconds = 0.0
        quantization = getattr(llm.config, "quantization", None)
        self.dtype = str(llm.config.dtype)
        self.name = f"jaxpaged:{self.dtype}{f'+{quantization}' if quantization else ''}"
        versions = {"jaxpaged": __version__, **{name: metadata.version(name) for name in ("jax", "jaxlib")}}
        self.loaded: dict[str, Any] = {"versions": versions, "dtype": self.dtype, "quantization": quantization}

    def load(self) -> None:
        """See `Contender.load`."""

    def tokens(self, prompts: list[list[int]], num_outputs: list[int]) -> list[list[int]]:
        """See `Contender.tokens`."""
        started = self._clock()
        found = self._llm.generate(prompts, [self._params(num) for num in num_outputs], use_tqdm=False)
        self.seconds = self._clock() - started
        return [list(one.outputs[0].token_ids) for one in found]

    def trace(self, prompt: list[int], num_output: int) -> tuple[list[float], list[int]]:
        """See `Contender.trace`."""
        times: list[float] = []
        tokens: list[int] = []
        started = self._clock()
        for output in self._llm.stream([prompt], self._params(num_output)):
            new = output.outputs[0].token_ids[len(tokens) :]
            times += [self._clock() - started] * len(new)
            tokens += new
        return times, tokens

    def close(self) -> None:
        """See `Contender.close`."""
        self._llm.close()

    @staticmethod
    def _params(num_output: int) -> SamplingParams:
        return SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, max_tokens=num_output)


# One turn of a contender: its numbers, and the tokens that it made.
Turn = Callable[[Contender], tuple[dict[str, Any], list[list[int]]]]


def throughput_turn(prompts: list[list[int]], num_outputs: list[int]) -> Turn:
    """All requests at once."""

    def turn(one: Contender) -> tuple[dict[str, Any], list[list[int]]]:
        tokens = one.tokens(prompts, num_outputs)
        done = [throughput.Done(len(ids), len(made)) for ids, made in zip(prompts, tokens, strict=True)]
        return throughput.numbers_of(done, one.seconds), tokens

    return turn


def latency_turn(prompt: list[int], num_output: int, num_iters: int) -> Turn:
    """One request alone, so often; medians in seconds. TPOT is of the tokens behind the first."""

    def turn(one: Contender) -> tuple[dict[str, Any], list[list[int]]]:
        found, tokens = [], []
        for _ in range(num_iters):
            times, tokens = one.trace(prompt, num_output)
            found.append({"ttft": times[0], "tpot": (times[-1] - times[0]) / max(1, len(times) - 1), "latency": times[-1]})
        return {key: statistics.median(each[key] for each in found) for key in found[0]}, [tokens]

    return turn


def in_turn(
    contenders: Sequence[Contender],
    turn: Turn,
    *,
    rounds: int,
    num_warmup: int = 1,
    is_together: bool = True,
    say: Callable[[str], object] = lambda line: None,
    sleep: Callable[[float], object] = time.sleep,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, Any]]:
    """Name -> the numbers of each round and what was loaded. A B A B ..., the first being ours.

    Args:
      num_warmup: turns of each after its loading that do not count.
      is_together: all stay loaded; else each but the first is loaded for its turn and closed behind it.
    """
    found: dict[str, dict[str, Any]] = {one.name: {"rounds": []} for one in contenders}
    first: list[list[int]] = []
    ready: set[str] = set()
    for number in range(rounds):
        for one in contenders:
            mine = found[one.name]
            if one.name not in ready:
                say(f"{one.name}: loading and warming up")
                started = clock()
                one.load()
                loaded = clock()
                for _ in range(num_warmup):
                    turn(one)
                mine |= {"loaded": one.loaded, "load_s": loaded - started, "warm_up_s": clock() - loaded}
                ready.add(one.name)
            sleep(PAUSE_S)
            numbers, tokens = turn(one)
            mine["rounds"].append(numbers)
            say(f"{one.name}: round {number + 1} of {rounds}: {_line(numbers)}")
            if number == 0:
                first = first or tokens
                mine["same_tokens"] = same_tokens(first, tokens)
            if not is_together and one is not contenders[0]:
                one.close()
                ready.discard(one.name)
    return found


def same_tokens(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """The share of tokens in front of the first difference of each request. 1 on the same weights in float32; less where
    rounding decides between two tokens."""
    same = 0
    for mine, other in zip(ours, theirs, strict=True):
        pairs = enumerate(zip(mine, other, strict=False))
        same += next((place for place, (a, b) in pairs if a != b), min(len(mine), len(other)))
    return same / max(1, sum(map(len, ours)))


def summary(found: dict[str, dict[str, Any]], keys: Sequence[str]) -> dict[str, Any]:
    """A section for each side with its medians, and ours over each peer's in every round: median, quartiles, ends.

    Args:
      keys: whose ratios are told. Of speeds more than 1 is better, of seconds less.
    """
    names = list(found)
    sides = {
        name: {**{key: statistics.median(one[key] for one in side["rounds"]) for key in side["rounds"][0]}, **side}
        for name, side in found.items()
    }
    mine = found[names[0]]["rounds"]
    ratios = {
        name: {
            key: spread([a[key] / max(b[key], 1e-12) for a, b in zip(mine, found[name]["rounds"], strict=True)]) for key in keys
        }
        for name in names[1:]
    }
    return {"ours": names[0], "sides": sides, "ratios": ratios}


def machine() -> dict[str, Any]:
    """What the numbers were taken on; the load is the kernel's mean of the last minute."""
    import psutil

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    except OSError:  # not Linux
        cpu = platform.processor() or platform.machine()
    memory = psutil.virtual_memory().total / 2**30
    found = {"cpu": cpu, "cores": _num_cores(), "memory_gib": round(memory, 1), "python": platform.python_version()}
    return {**found, "load_average": round(os.getloadavg()[0], 2)}


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _line(numbers: dict[str, Any]) -> str:
    if "tpot" in numbers:
        return f"{numbers['tpot'] * 1e3:.2f} ms a token, {numbers['ttft'] * 1e3:.1f} ms to the first"
    return f"{numbers['output_tokens_per_second']:.1f} output tokens/s"
