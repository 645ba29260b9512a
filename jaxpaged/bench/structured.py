"""What outputs of a given form cost, and whether they are of it, on the bundled model:

    python -m jaxpaged.bench.structured            all of it
    python -m jaxpaged.bench.structured masks      schemas and prompts: outputs that `jsonschema` judges, and the time of a mask
    python -m jaxpaged.bench.structured plain      steps of a batch without grammars: a step that keeps its logits for them or not
    python -m jaxpaged.bench.structured forced     tokens a second with and without those that a schema leaves no choice about
    python -m jaxpaged.bench.structured hostile    plain requests while another thread gives grammars that are meant to harm

Times are medians and ratios on this machine as busy as it was; turns alternate.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np

from jaxpaged.bench.forms import hostile, problem, schema
from jaxpaged.host.request import RequestError, SamplingParams
from jaxpaged.host.structured import StructuredOutputsParams
from jaxpaged.llm import LLM
from jaxpaged.structured.matchers import Matchers

PROMPTS = ("One day", "Sort these words: dog cat", "Who is the owner?", "Give me JSON.", "3 + 4 =")
SMALL = {"use_tqdm_on_load": False, "max_num_seqs": 16, "decode_row_buckets": (1, 2, 4, 8, 16), "prefill_tile_buckets": (4,)}


def percentile(values: list[float], share: float) -> float:
    """Of at least one value."""
    return float(np.quantile(values, share))


def masks(llm: LLM, *, num_schemas: int, max_tokens: int = 900) -> Iterator[str]:
    """Outputs of random schemas, judged; and how long each mask took."""
    rng, seconds, checked, found = random.Random(0), [], [], Counter()
    fill = Matchers.fill

    def timed(self: Matchers, *arguments: Any) -> int:
        started = time.perf_counter()
        count = fill(self, *arguments)
        seconds.extend([(time.perf_counter() - started) / count] * count)
        return count

    for number in range(num_schemas):
        options: dict[str, Any] = ({}, {"disable_any_whitespace": True}, {"whitespace_pattern": " ?"})[number % 3]
        form = StructuredOutputsParams(json=schema(rng), **options)
        started = time.perf_counter()
        llm.engine.matchers.grammars.find(form)  # type: ignore[union-attr]
        checked.append(time.perf_counter() - started)
        params = [
            SamplingParams(temperature=1.0 if place % 2 else 0.0, seed=number, max_tokens=max_tokens, structured_outputs=form)
            for place in range(len(PROMPTS))
        ]
        with mock.patch.object(Matchers, "fill", timed):
            outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        for output in outputs:
            one = output.outputs[0]
            wrong = problem(form, one.text) if one.finish_reason == "stop" else None
            found["invalid" if wrong else one.finish_reason] += 1
            if wrong:
                yield wrong
    cases = f"{num_schemas} schemas x {len(PROMPTS)} prompts"
    yield f"{cases}: {dict(found)}; 'stop' is valid, 'length' was cut at {max_tokens} tokens"
    times = ", ".join(f"{name} {percentile(seconds, share) * 1e6:,.0f} us" for name, share in (("median", 0.5), ("p99", 0.99)))
    yield f"a mask: {times}, of {len(seconds):,}"
    again = StructuredOutputsParams(json=schema(random.Random(0)))
    llm.engine.matchers.grammars.find(again)  # type: ignore[union-attr]
    started = time.perf_counter()
    for _ in range(100):
        llm.engine.matchers.grammars.find(again)  # type: ignore[union-attr]
    kept = (time.perf_counter() - started) / 100
    new = f"median {statistics.median(checked) * 1e3:.1f} ms, p99 {percentile(checked, 0.99) * 1e3:.1f} ms"
    yield f"a schema, new: {new}; kept: {kept * 1e6:.1f} us"


def plain(llm: LLM, *, turns: int) -> Iterator[str]:
    """A B A B: plain requests in an engine that nobody has asked for a form, and in the same one that somebody has."""
    params = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
    matchers, taken = llm.engine.matchers, {False: [], True: []}
    for turn in range(2 * turns + 2):
        matchers.is_used = bool(turn % 2)  # type: ignore[union-attr]
        started = time.perf_counter()
        llm.generate(list(PROMPTS) * 3, params, use_tqdm=False)
        if turn >= 2:
            taken[bool(turn % 2)].append(time.perf_counter() - started)
    ratios = [late / early for early, late in zip(taken[False], taken[True], strict=True)]
    yield f"plain requests once forms are in use: {statistics.median(ratios):.3f} of the time before (median of {turns} pairs)"


def forced(llm: LLM, *, turns: int) -> Iterator[str]:
    """A B A B: a schema of long fixed keys, one request and several."""
    names = ["identification_number", "date_of_last_measurement", "location_of_the_station", "temperature_in_degrees"]
    properties = {name: {"type": "integer", "minimum": 0, "maximum": 999} for name in names}
    fixed = {"type": "object", "properties": properties, "required": names, "additionalProperties": False}
    form = StructuredOutputsParams(json=fixed, disable_any_whitespace=True)
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=300, structured_outputs=form)
    for count in (1, 2, 4, 8, 16):
        taken: dict[bool, list[float]] = {False: [], True: []}
        texts = {}
        for turn in range(2 * turns + 2):
            with without_forced(llm, is_on=bool(turn % 2)):
                started = time.perf_counter()
                outputs = llm.generate([PROMPTS[place % 5] for place in range(count)], params, use_tqdm=False)
            seconds = time.perf_counter() - started
            num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
            if turn >= 2:
                taken[bool(turn % 2)].append(num_tokens / seconds)
            texts[bool(turn % 2)] = [output.outputs[0].token_ids for output in outputs]
        if texts[False] != texts[True]:
            yield "the tokens differ"
        slow, fast = (statistics.median(taken[one]) for one in (False, True))
        ratio = statistics.median(one / other for one, other in zip(taken[True], taken[False], strict=True))
        yield f"{count:2} requests of long fixed keys: {slow:,.0f} tokens/s, with forced tokens {fast:,.0f}, {ratio:.2f} times"


def without_forced(llm: LLM, *, is_on: bool) -> Any:
    """A context in which no tokens are told beforehand; none when `is_on`."""
    if is_on:
        return mock.patch.object(Matchers, "forced", Matchers.forced)
    return mock.patch.object(Matchers, "forced", lambda *_: ())


def attacked(llm: LLM, *, count: int, seconds: float) -> Iterator[str]:
    """Plain requests, one after the other, while nobody else is there and while others try hostile grammars."""
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    grammars = llm.engine.matchers.grammars  # type: ignore[union-attr]

    def serve(is_over: Callable[[], bool]) -> list[float]:
        taken = []
        while not is_over() or not taken:
            started = time.perf_counter()
            llm.generate(PROMPTS[0], params, use_tqdm=False)
            taken.append(time.perf_counter() - started)
        return taken

    given = list(itertools.islice(hostile(random.Random(0)), count))  # to think of them is no part of serving
    deadline = time.monotonic() + seconds
    quiet = serve(lambda: time.monotonic() > deadline)
    found: Counter[str] = Counter()

    def attack() -> None:
        for options in given:
            try:
                grammars.find(StructuredOutputsParams(**options))
                found["harmless"] += 1
            except RequestError as error:
                found[getattr(error, "code", "refused")] += 1
                if "\n" in str(error) or len(str(error)) > 300:
                    found["unclear"] += 1

    thread = threading.Thread(target=attack)
    started = time.perf_counter()
    thread.start()
    busy = serve(lambda: not thread.is_alive())
    took = time.perf_counter() - started
    yield f"{count:,} hostile grammars in {took:.1f} s: {dict(found)}"
    for name, share in (("median", 0.5), ("p99", 0.99)):
        before, after = percentile(quiet, share) * 1e3, percentile(busy, share) * 1e3
        yield f"a plain request beside them: {name} {after:.1f} ms, alone {before:.1f} ms, {after / before:.2f} times"


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=["masks", "plain", "forced", "hostile", []], default=[])
    parser.add_argument("--share", type=float, default=1.0, help="of the cases")
    arguments = parser.parse_args(argv)
    share = arguments.share
    with LLM(**SMALL, seed=0) as llm:
        every: dict[str, Callable[[], Iterator[str]]] = {
            "plain": lambda: plain(llm, turns=max(3, round(12 * share))),
            "masks": lambda: masks(llm, num_schemas=max(1, round(200 * share))),
            "forced": lambda: forced(llm, turns=max(3, round(8 * share))),
            "hostile": lambda: attacked(llm, count=max(34, round(1000 * share)), seconds=20 * share),
        }
        for name in arguments.what or every:
            for line in every[name]():
                print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
