"""Every figure of the page pool, the scheduler and the prefix cache, in full and as a table: `make fuzz`.

    python tests/show_figures.py --only R04 R09    those figures
    python tests/show_figures.py --share 0.01      a hundredth of the cases of those that are random

The random ones are the same in every run; each failure names its seed. Slow tests run most of this too, without the table.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "host"))
sys.path.insert(0, str(Path(__file__).parent / "tools"))

import bad_values
import faults
import figures
import fuzz
import invariance
import mixes
import reuse
import samplers
import speculation
import texts
import tool_texts

from jaxpaged.bench.forms import hostile
from jaxpaged.demo import MODEL_DIR
from jaxpaged.host.request import RequestError
from jaxpaged.host.structured import StructuredOutputsParams
from jaxpaged.structured.grammars import Grammars

Figure = tuple[str, str, Callable[[float], int]]


def some(count: int, share: float, first: int = 0) -> range:
    """A share of so many seeds, one at least."""
    return range(first, first + max(1, round(count * share)))


def operations(share: float, *, seeds: int = 240, each: int = 4200) -> int:
    """R01's."""
    lives = some(seeds, share)
    for seed in lives:
        fuzz.live(seed, each)
    return each * len(lives)


def crowds(share: float) -> int:
    """R02's on the real model, 500 requests at a time."""
    return sum(reuse.crowd(500, seed=seed) for seed in some(4, share))


def sick(share: float) -> int:
    """R12's: four places a crowd, all but those that the prefix cache has computed before."""
    return faults.sick_crowds(some(540, share))


def families_that_score_alike(share: float) -> int:
    """R20's and R22's."""
    return invariance.scores(len(some(10, share)))


def equal(share: float, dtype: str) -> int:
    """R22's."""
    return invariance.equal_compositions(len(some(1000, share)), dtype)


def hostile_grammars(share: float) -> int:
    """R16's: each is refused in a line or does no harm, and within its time."""
    grammars, options = Grammars((MODEL_DIR / "tokenizer.json").read_text), hostile(random.Random(0))
    cases = some(1000, share)
    for _, one in zip(cases, options, strict=False):
        started = time.monotonic()
        try:
            grammars.find(StructuredOutputsParams(**one))
        except RequestError as error:
            if "\n" in str(error) or len(str(error)) > 300:
                raise
        if time.monotonic() - started > 10:  # 2 s of its own, and a machine that is busy
            raise TimeoutError(f"{one!a}"[:300])
    grammars.close()
    return len(cases)


def draws(share: float) -> int:
    """S02's, 200,000 of each kind."""
    count = max(2000, round(200_000 * share))
    for name in samplers.KINDS:
        print(f"    {name}: p = {samplers.draws(name, count):.3f}", flush=True)
    return count * len(samplers.KINDS)


FIGURES: list[Figure] = [
    ("R01", "operations of pool, cache and tiers against a model, a full check after each", operations),
    ("R02", "requests on pages of token ids, equal to isolated runs", lambda x: figures.equal_to_isolated_runs(some(1000, x))),
    ("R02", "requests of a real model on poisoned pages, bits of each alone", crowds),
    ("R03", "families of siblings of a real model, bits of each alone", lambda x: reuse.siblings(range(17))),
    ("R03", "the same, pages of 16", lambda x: reuse.siblings(range(33), page_size=16)),
    ("R03", "beam searches of a real model, each beam as without shared pages", lambda x: reuse.beams(range(17))),
    ("R04", "prompt and cached length, pages of 4, bits of cold runs", lambda x: reuse.every_reuse(4, 16).total()),
    ("R04", "the same, pages of 16", lambda x: reuse.every_reuse(16, 16).total()),
    ("R05", "prompts around the limits of pools of 1 to 80 pages", lambda x: figures.pools_and_prompts(range(1, 81))),
    ("R06", "overload schedules, at most 8 preemptions each", lambda x: figures.overloads(some(10_000, x))),
    ("R07", "schedules by order of arrival, each end within its bound", lambda x: figures.queues(some(1000, x))),
    ("R07", "last in priority, ageing after 100 steps", lambda x: figures.unpopular(some(1000, x), ageing_steps=100)),
    ("R07", "last in priority, ageing by default: within 10,000 steps", lambda x: figures.unpopular(some(200, x))),
    ("R09", "aborts, at every moment of days of an engine", lambda x: figures.abort_everywhere(every=max(1, round(1 / x)))[0]),
    ("R13", "fields of token ids x bad ids, refused by name", lambda x: bad_values.bad_ids()),
    ("R14", "fields of numbers x odd numbers, served or refused by name", lambda x: bad_values.odd_numbers()),
    ("R15", "pairs of features, each as the plain path where it must be", lambda x: mixes.pairs()),
    ("R18", "sequences of tokens, all deltas together the whole", texts.all_streams),
    ("R19", "texts with stop strings in pieces, against looking everywhere", texts.all_stops),
    ("R20", "prompts in chunks, cached or not: log-probabilities complete and the same", lambda x: samplers.prompt_logprobs()),
    ("S01", "rows of hostile logits against the sorted definition in float64", lambda x: samplers.laws(some(700, x))),
    ("S02", "draws of the whole engine, chi-square for each kind of sampler", draws),
    ("R23", "requests that mix everything, no compilation", lambda x: mixes.no_compilations(max(30, round(5000 * x)))),
    ("R12", "places of a real model's requests that become NaN, each ends alone and leaves no trace", sick),
    (
        "R17",
        "texts with tool calls, right and wrong, in deltas and whole, against a slow oracle",
        lambda x: tool_texts.fuzz(some(10_000, x)),
    ),
    ("R16", "hostile grammars, refused in a line or harmless", hostile_grammars),
    ("R20", "families whose texts score as they were decoded, to the last bit if batch-invariant", families_that_score_alike),
    ("R21", "requests of a real model with drafts, tokens of each without", lambda x: speculation.crowds(some(20, x, 100))),
    ("R21", "draws with drafts, against the exact distribution", lambda x: speculation.chi_square(max(8000, round(200_000 * x)))),
    ("R22", "batches around requests that are batch-invariant, 0 bits different", lambda x: equal(x, "float32")),
    ("R22", "the same in bfloat16", lambda x: equal(x, "bfloat16")),
    ("R22", "outputs with other bits where it is off", lambda x: invariance.other_bits(len(some(100, x)), "float32")),
    ("R22", "the same in bfloat16", lambda x: invariance.other_bits(len(some(100, x)), "bfloat16")),
    ("R43", "requests whose pages are found by 4 bits of their keys", lambda x: figures.collisions(some(1000, x))[0]),
]


def rows(figures: list[Figure], names: list[str] | None, share: float) -> Iterator[tuple[str, bool]]:
    """A line for each figure, and whether it is right."""
    for name, title, count_cases in figures:
        if names and name not in names:
            continue
        started, computed = time.perf_counter(), time.process_time()
        try:
            count = f"{count_cases(share):,}"
        except Exception:
            traceback.print_exc()
            count = "-"
        seconds = f"{time.perf_counter() - started:8.1f} {time.process_time() - computed:8.1f}"
        yield f"{name} {count:>11} {seconds}  {'WRONG' if count == '-' else 'ok':5}  {title}", count != "-"


def main(figures: list[Figure] = FIGURES, about: str | None = __doc__) -> int:
    """Show them; 1 when one is wrong."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted({name for name, _, _ in figures}))
    parser.add_argument("--share", type=float, default=1.0)
    arguments = parser.parse_args()
    logging.getLogger("jaxpaged").setLevel(logging.ERROR)  # preemptions are what most of these are about
    is_well = True
    print(f"{'':3} {'cases':>11} {'seconds':>8} {'of cpu':>8}")
    for line, is_right in rows(figures, arguments.only, arguments.share):
        print(line, flush=True)
        is_well &= is_right
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
