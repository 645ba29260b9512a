"""A picture of the page pool over time: who owned which page at each step, and how many were free, cached and asked for.

Knows pages and steps; needs matplotlib to draw. Reads the record alone and replays nothing.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from jaxpaged.observe.recording import Recording, Segment
from jaxpaged.observe.records import Admission, Decision, Kind, RecordingError, readable, sets_back, unwords

FREE, SHARED = -1, -2
_MAX_CELLS = 1200  # of the picture, either way; more would be less than a pixel each


class PoolTimeline:
    """Owners of pages from step to step. `owners[page]` counts them, `rows[row]` are the pages of one stay of a sequence."""

    def __init__(self, recording: Recording):
        self.recording = recording
        self.num_pages: int = recording.header["num_pages"]
        self.page_size: int = recording.header["page_size"]
        self.window: int = recording.header["limits"]["sliding_window"]
        self.owners: Counter[int] = Counter()
        self.rows: dict[int, list[int]] = {}

    def steps(self) -> Iterator[Decision]:
        """Each plan in turn; between two of them this object is as the pool was."""
        is_first = True
        for frame in self.recording.frames:
            if frame.kind is Kind.SEGMENT and is_first:
                for row in Segment.unpack(frame.payload).rows:
                    self._take(row["row"], row["pages"])
                is_first = False
            elif frame.kind is Kind.ADMIT:
                admitted = Admission.unpack(frame.payload)
                self._take(admitted.row, admitted.pages)
            elif frame.kind in (Kind.PREEMPT, Kind.FINISH):
                self.owners.subtract(self.rows.pop(unwords(frame.payload[:4])[0], ()))
            elif sets_back(frame):
                self.rows.clear()
                self.owners.clear()
            elif frame.kind is Kind.PLAN:
                plan = Decision.unpack(frame.payload)
                for work in (*plan.decodes, *plan.prefills):
                    self._write(work.row, work.start, work.pages)
                yield plan

    def _take(self, row: int, pages: Any) -> None:
        self.rows[row] = list(pages)
        self.owners.update(page for page in pages if page)

    def _write(self, row: int, start: int, pages: tuple[int, ...]) -> None:
        """A row writes from its token `start` on to these pages: they are new to it, or copies of shared ones."""
        held = self.rows.setdefault(row, [])
        if self.window:
            for index in range(max(0, (start + 1 - self.window) // self.page_size)):
                self.owners[held[index]] -= 1
                held[index] = 0
        for index, page in enumerate(pages, start // self.page_size):
            if index < len(held) and held[index] == page:
                continue
            if index < len(held):
                self.owners[held[index]] -= 1
                held[index] = page
            else:
                held.append(page)
            self.owners[page] += 1

    def column(self) -> list[int]:
        """Of each page from 1 on: the row that owns it, FREE (cached pages among them) or SHARED."""
        found = [FREE] * (self.num_pages - 1)
        for row, pages in self.rows.items():
            for page in pages:
                if page:
                    found[page - 1] = row if self.owners[page] == 1 else SHARED
        return found


def draw_pool(recording: Recording, *, title: str | None = None) -> Any:
    """The pool over time as a matplotlib figure, which a notebook shows and `savefig` writes.

    Above, a line per page and a column per step: white is free, black is shared, every stay of a request has a colour. Below, the
    pages in use, the cached ones on top of them, and the requests that wait. Long recordings are sampled.

    Raises:
      RecordingError: matplotlib is not installed, or the recording holds no step.
    """
    try:
        colors, figures = (importlib.import_module(f"matplotlib.{name}") for name in ("colors", "figure"))
    except ImportError:
        raise RecordingError("a picture needs matplotlib: pip install 'jaxpaged[notebooks]'") from None
    steps, columns, plans = sample(recording)
    if not steps:
        raise RecordingError(f"{recording.path}: holds no step, there is nothing to draw")
    # 0 is white, 1 is black, the rest are the colours of rows, of which neighbours in time differ most.
    palette = ["#ffffff", "#202020", *_COLOURS]
    cells = [[_colour(columns[x][y]) for x in range(len(columns))] for y in range(len(columns[0]))]
    figure = figures.Figure(figsize=(11, 6.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    num_pages, last = recording.header["num_pages"], steps[-1] + 1
    above.imshow(
        cells,
        cmap=colors.ListedColormap(palette),
        vmin=0,
        vmax=len(palette) - 1,
        aspect="auto",
        interpolation="nearest",
        extent=(steps[0], last, num_pages, 1),
    )
    above.set(ylabel="page", title=title or _title(recording))
    used = [num_pages - 1 - plan.num_free for plan in plans]
    below.stackplot(
        steps, used, [plan.num_cached for plan in plans], labels=("owned", "cached"), colors=("#4477aa", "#aaccee"), step="post"
    )
    below.set(xlabel="step", ylabel="pages", ylim=(0, num_pages - 1), xlim=(steps[0], last))
    waiting = below.twinx()
    waiting.step(steps, [plan.num_waiting for plan in plans], where="post", color="#cc3311", linewidth=1, label="waiting")
    waiting.set(ylabel="requests", ylim=(0, None))
    handles = [handle for axes in (below, waiting) for handle in axes.get_legend_handles_labels()[0]]
    below.legend(handles, ("owned", "cached", "waiting"), loc="upper left", fontsize="small", ncols=3)
    return figure


def _title(recording: Recording) -> str:
    pages = f"{recording.header['num_pages'] - 1:,} pages of {recording.header['page_size']} tokens"
    return f"{pages}: a colour for each stay of a request, black is shared, white is free"


def sample(recording: Recording) -> tuple[list[int], list[list[int]], list[Decision]]:
    """Steps, columns and plans, no more than a picture can show: every k-th step, every j-th page."""
    timeline = PoolTimeline(recording)
    first = next((segment.num_steps for _, segment in recording.segments()), 0)
    every = -(-recording.num_steps // _MAX_CELLS) or 1
    each = -(-(timeline.num_pages - 1) // _MAX_CELLS) or 1
    steps, columns, plans = [], [], []
    with readable(recording.path):
        for number, plan in enumerate(timeline.steps()):
            if number % every == 0:
                steps.append(first + number)
                columns.append(timeline.column()[::each])
                plans.append(plan)
    return steps, columns, plans


_COLOURS = (
    "#4477aa",
    "#ee6677",
    "#228833",
    "#ccbb44",
    "#66ccee",
    "#aa3377",
    "#ee8866",
    "#44bb99",
    "#aaaa00",
    "#9966cc",
    "#dd99bb",
)


def _colour(owner: int) -> int:
    if owner == FREE:
        return 0
    return 1 if owner == SHARED else 2 + owner % len(_COLOURS)
