"""Pages that outputs of one prompt share: parallel sampling and beam search beside what the PagedAttention paper published.

Knows loads, counts of pages and the paper's figures. Refuses to know time of day and devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

from jaxpaged.config import ConfigError, EngineConfig, ModelConfig
from jaxpaged.simulate.arrivals import random_traffic
from jaxpaged.simulate.cost import CostModel
from jaxpaged.simulate.lengths import DATASETS
from jaxpaged.simulate.random_model import RandomModel
from jaxpaged.simulate.report import waste
from jaxpaged.simulate.run import build_scheduler, simulate

SAMPLING, BEAMS = "parallel sampling", "beam search"
SIZES = (2, 4, 6)
# (dataset, kind) -> the least and the most that was published for 2, 4 and 6 outputs. Kwon et al. 2023 (arXiv 2309.06180),
# section 6.3 and figure 15: OPT-13B on an A100 of 40 GB, blocks of 16 tokens; blocks saved over blocks without sharing.
PUBLISHED = {
    ("alpaca", SAMPLING): (0.061, 0.098),
    ("sharegpt", SAMPLING): (0.162, 0.305),
    ("alpaca", BEAMS): (0.376, 0.552),
    ("sharegpt", BEAMS): (0.443, 0.663),
}


@dataclass(frozen=True)
class Saving:
    """One load, served with `n` outputs of each prompt. Pages are means over the time of steps.

    Args:
      num_alone: pages that there would be if each output had all of its own, as far as it has come.
      num_owned: pages with an owner.
    """

    dataset: str
    kind: str
    n: int
    num_alone: float
    num_owned: float
    num_preemptions: int

    @property
    def saved(self) -> float:
        """The share of pages that sharing saves."""
        return waste(self.num_owned, self.num_alone)


def compare(
    config: EngineConfig,
    model: ModelConfig,
    cost: CostModel,
    *,
    num_pages: int,
    num_prompts: int,
    max_concurrency: int,
    seed: int,
    random_model: RandomModel,
    kinds: Iterable[str] = (SAMPLING, BEAMS),
    sizes: Seq[int] = SIZES,
) -> list[Saving]:
    """Each dataset's lengths with each kind and number of outputs, the same prompts every time. `config` is resolved.

    Args:
      max_concurrency: requests in the engine at a time. It matters where they do not fit: outputs that have given way come back
        one by one, and share less.

    Raises:
      ConfigError: the pool has no room for some of the requests.
    """
    max_len: int = config.max_model_len  # type: ignore[assignment]
    found = []
    for kind in kinds:
        for dataset in ("alpaca", "sharegpt"):
            for n in sizes:
                options = {"n": n, "use_beam_search": kind == BEAMS, "max_model_len": max_len, "seed": seed}
                arrivals = random_traffic(num_prompts, *DATASETS[dataset], **options)
                scheduler = build_scheduler(config, model, num_pages)
                run = simulate(
                    *(scheduler, arrivals, cost),
                    max_model_len=max_len,
                    max_concurrency=max_concurrency,
                    max_logprobs=config.max_logprobs,
                    random_model=random_model,
                )
                if run.refused:
                    raise ConfigError(f"{dataset}, {kind}: {len(run.refused):,} refused, the first: {run.refused[0]}")
                seconds = run.occupancy.seconds
                means = run.occupancy.lone_page_seconds / seconds, run.occupancy.page_seconds / seconds
                found.append(Saving(dataset, kind, n, *means, scheduler.num_preemptions))
    return found


def sensitivity(
    others: Iterable[RandomModel], *where, sizes: Seq[int] = SIZES, **options
) -> list[tuple[RandomModel, list[Saving]]]:
    """The beams' part of `compare` with other models than the one that was assumed."""
    return [(model, compare(*where, **options, random_model=model, kinds=[BEAMS], sizes=sizes)) for model in others]


def other_models(assumed: RandomModel) -> list[RandomModel]:
    """Models whose beams part more seldom, more often, forget sooner, and never forget."""
    pairs = ((round(assumed.open_share / 3, 6), assumed.kinship), (2 * assumed.open_share, assumed.kinship))
    pairs += ((assumed.open_share, 0.0), (assumed.open_share, 1.0))
    return [RandomModel(open_share=min(1.0, share), kinship=kinship, seed=assumed.seed) for share, kinship in pairs]


def as_json(savings: Seq[Saving], others: Seq[tuple[RandomModel, Seq[Saving]]]) -> dict[str, Any]:
    """All of it in plain values."""

    def plain(found: Saving) -> dict[str, Any]:
        low, high = PUBLISHED[found.dataset, found.kind]
        return {**dataclasses.asdict(found), "saved": found.saved, "published_low": low, "published_high": high}

    sensitivity = [
        {"beam_open_share": model.open_share, "beam_kinship": model.kinship, "savings": [plain(saving) for saving in each]}
        for model, each in others
    ]
    return {"savings": [plain(saving) for saving in savings], "sensitivity": sensitivity}


def table(savings: Seq[Saving]) -> str:
    """The savings for a reader, with what each is the quotient of, beside what was published."""
    row = "{:18} {:9} {:>2} {:>34} {:>7} {:>14} {:>12}".format
    arithmetic = "(pages alone - pages) / pages alone"
    lines = [row("outputs", "lengths", "n", arithmetic, "saved", "paper, n 2-6", "preemptions")]
    for found in savings:
        low, high = PUBLISHED[found.dataset, found.kind]
        quotient = f"({found.num_alone:,.1f} - {found.num_owned:,.1f}) / {found.num_alone:,.1f}"
        shares = f"{found.saved:.1%}", f"{low:.1%}-{high:.1%}"
        lines.append(row(found.kind, found.dataset, found.n, quotient, *shares, f"{found.num_preemptions:,}"))
    return "\n".join(lines)


def sensitivity_table(assumed: RandomModel, found: Seq[tuple[RandomModel, Seq[Saving]]], savings: Seq[Saving]) -> str:
    """What beams save under other assumptions, the assumed ones first."""
    everything = [(assumed, [saving for saving in savings if saving.kind == BEAMS]), *found]
    heads = [f"{saving.dataset} {saving.n}" for saving in everything[0][1]]
    row = ("{:>10} {:>8}" + " {:>11}" * len(heads)).format
    lines = ["beam search under other assumptions, the first being those above:", row("open share", "kinship", *heads)]
    for model, several in everything:
        lines.append(row(f"{model.open_share:g}", f"{model.kinship:g}", *(f"{saving.saved:.1%}" for saving in several)))
    return "\n".join(lines)
