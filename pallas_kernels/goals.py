"""What the kernels are to reach on a GPU: the table that `gpu_check` fills in. Goals, not measurements.

Set for an H200 (4.3 TB/s of copy, 790 TFLOP/s of bfloat16 products), as shares of what the same run measures, so that they mean
something on other chips too. Those in microseconds are an H200's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pallas_kernels.timing import Row

_DECODE, _PREFILL = "paged_decode_attention", "paged_prefill_attention"
_HEADS = r"^N32-K8-H128"


@dataclass(frozen=True)
class Goal:
    """What every case of some operations whose name matches must reach, and should.

    unit: "bandwidth" or "matmul" for shares of those floors, "us" for microseconds of a call.
    """

    what: str
    operations: tuple[str, ...]
    pattern: str
    unit: str
    must: float
    goal: float
    least_bytes: int = 0  # only cases that move as many
    note: str = ""

    def takes(self, operation: str, case: str, num_bytes: int) -> bool:
        """Whether a case falls under this goal."""
        return operation in self.operations and num_bytes >= self.least_bytes and bool(re.search(self.pattern, case))

    def measured(self, rows: Sequence[Row], backend: str) -> float | None:
        """The worst of the cases that were timed on our backend; None when none was."""
        mine = [row for row in rows if row.name == backend and self.takes(row.operation, row.case, row.num_bytes)]
        if not mine:
            return None
        return max(row.median_us for row in mine) if self.unit == "us" else min(row.share for row in mine)

    def verdict(self, value: float | None) -> str:
        """What a measured value means."""
        if value is None:
            return "not measured"
        reaches = (lambda bar: value <= bar) if self.unit == "us" else (lambda bar: value >= bar)
        return "goal" if reaches(self.goal) else "must" if reaches(self.must) else "below"

    def show(self, value: float | None) -> str:
        """A value in the goal's unit."""
        if value is None:
            return "-"
        return f"{value:.1f} us" if self.unit == "us" else f"{value:.0%}"


# In the order in which they are timed, the most telling first.
GOALS = (
    Goal("decode, 32 rows of 4k, pages of 64", (_DECODE,), _HEADS + r"-S64-T1-bfloat16-32x4096$", "bandwidth", 0.80, 0.90),
    Goal("prefill of a whole prompt, pages of 64", (_PREFILL,), _HEADS + r"-S64-.*-64to(4096|16384)$", "matmul", 0.45, 0.60),
    Goal(
        "decode, 32-128 rows of 4k-16k, pages of 64",
        (_DECODE,),
        _HEADS + r"-S64-T1-bfloat16-\d+x(4096|16384)$",
        "bandwidth",
        0.80,
        0.90,
    ),
    Goal("decode, pages of 16", (_DECODE,), _HEADS + r"-S16-T1-bfloat16-\d+x\d+$", "bandwidth", 0.75, 0.85),
    Goal("decode, one row of 32k", (_DECODE,), _HEADS + r"-S64-T1-bfloat16-1x32768$", "us", 55, 42, note="31 us at 4.3 TB/s"),
    Goal("decode, one row of 1k", (_DECODE,), _HEADS + r"-S64-T1-bfloat16-1x1024$", "us", 15, 10),
    Goal("decode, fp8 pages", (_DECODE,), _HEADS + r".*-kv_float8_e4m3fn", "bandwidth", 0.70, 0.80, note="of its own bytes"),
    Goal("prefill of a chunk of 512 after 8k, pages of 16", (_PREFILL,), _HEADS + r"-S16-.*-8256to8704$", "matmul", 0.40, 0.55),
    Goal(
        "moves of pages, 64 MB and more",
        ("write_kv_pages", "copy_pages", "gather_pages", "scatter_pages"),
        "",
        "bandwidth",
        0.75,
        0.85,
        least_bytes=64_000_000,
        note="read and write",
    ),
    Goal("products with quantised weights, 1-16 rows", ("quantized_matmul",), r"^X(1|16)-D4096-F14336-", "bandwidth", 0.70, 0.85),
    Goal(
        "sampling, 64 rows of 152k",
        ("sample_logits",),
        r"^V151936-B64-",
        "bandwidth",
        0.35,
        0.58,
        note="of one read of the logits: two reads at 70%, 1.2 reads at 70%",
    ),
)
