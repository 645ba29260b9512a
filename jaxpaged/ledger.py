"""The ledger of compiled steps: what each bucket took to compile, how often it ran, and how full. Knows counts and no arrays."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from jaxpaged.config import Bucket

MATTERS = 0.05  # of all padding: less is not worth a compilation
OFTEN = 20  # calls after which advice means something


@dataclass
class Entry:
    """Of one bucket. Rows are decode rows, tokens those of prompts."""

    compile_s: float = 0.0
    calls: int = 0
    rows: int = 0
    padded_rows: int = 0
    tokens: int = 0
    padded_tokens: int = 0


class Ledger:
    """One entry for each bucket that was compiled or has run."""

    def __init__(self, tile: int):
        """`tile`: tokens of one tile of a prompt."""
        self._tile = tile
        self.entries: dict[Bucket, Entry] = {}
        self.num_compilations = 0

    def compiled(self, bucket: Bucket, seconds: float) -> None:
        """A bucket has been compiled, or found on disk."""
        self.entries.setdefault(bucket, Entry()).compile_s += seconds
        self.num_compilations += 1

    @property
    def compile_s(self) -> float:
        """Seconds of all compilations."""
        return sum(entry.compile_s for entry in self.entries.values())

    @property
    def num_real(self) -> int:
        """Token places of the steps that ran, of those that held a token."""
        return sum(entry.rows + entry.tokens for entry in self.entries.values())

    @property
    def num_padding(self) -> int:
        """Likewise of those that held none."""
        return sum(entry.padded_rows + entry.padded_tokens for entry in self.entries.values())

    def ran(self, bucket: Bucket, num_rows: int, num_tokens: int) -> None:
        """A step of so many decode rows and tokens of prompts ran in a bucket."""
        entry = self.entries.setdefault(bucket, Entry())
        entry.calls += 1
        entry.rows += num_rows
        entry.padded_rows += bucket.decode_rows - num_rows
        entry.tokens += num_tokens
        entry.padded_tokens += bucket.prefill_tiles * self._tile - num_tokens

    def rows(self) -> list[dict[str, Any]]:
        """The entries as flat objects, those that ran most first."""
        entries = sorted(self.entries.items(), key=lambda one: -one[1].calls)
        return [{**asdict(bucket), **asdict(entry)} for bucket, entry in entries]

    def advice(self) -> list[str]:
        """What other buckets would save, in words; nothing where little is known or wasted."""
        entries = self.entries.values()
        total, found = self.num_padding, []
        for bucket, entry in self.entries.items():
            if entry.calls < OFTEN:
                continue
            for name, size, unit, real, padded in (
                ("decode_row_buckets", bucket.decode_rows, 1, entry.rows, entry.padded_rows),
                ("prefill_tile_buckets", bucket.prefill_tiles, self._tile, entry.tokens, entry.padded_tokens),
            ):
                mean = -(-real // (entry.calls * unit))
                if padded > real and padded >= MATTERS * total and 0 < mean < size:
                    share = padded / (padded + real)
                    found.append(f"{name}: add {mean}: {entry.calls} steps of {size} were {share:.0%} padding")
        idle = [bucket for bucket, entry in self.entries.items() if not entry.calls]
        if idle and sum(entry.calls for entry in entries) >= OFTEN:
            seconds = sum(self.entries[bucket].compile_s for bucket in idle)
            found.append(f"{len(idle)} of {len(self.entries)} compiled shapes never ran; they took {seconds:.1f} s to compile")
        return found


def table(rows: Iterable[dict[str, Any]]) -> str:
    """The entries for a reader."""
    lines = [f"{'rows':>6}{'tiles':>7}{'compile s':>11}{'calls':>9}{'rows padded':>13}{'tokens padded':>15}"]
    for row in rows:
        shares = [_share(row["padded_rows"], row["rows"]), _share(row["padded_tokens"], row["tokens"])]
        size = f"{row['decode_rows']:>6}{row['prefill_tiles']:>7}"
        lines.append(f"{size}{row['compile_s']:>11.2f}{row['calls']:>9}{shares[0]:>13}{shares[1]:>15}")
    return "\n".join(lines)


def _share(padded: int, real: int) -> str:
    return f"{padded / (padded + real):.0%}" if padded + real else "-"
