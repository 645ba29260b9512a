"""R51: one text by every path, the same tokens and the same bits. See paths.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import bits
import pytest
from paths import all_paths


@pytest.fixture(scope="module")
def runner() -> Iterator[bits.KeepingRunner]:
    # Grouped heads, biases, one layer that sees everything and one with a window.
    runner = bits.new_runner("qwen2-window", 8, tile=16, num_pages=260, tiles=4)
    yield runner
    runner.close()


def test_every_path_yields_the_same_tokens_and_bits(runner: bits.KeepingRunner, tmp_path: Path) -> None:
    for found in all_paths(runner, 500, str(tmp_path), few_pages=24):
        print(f"  {found.name:24} {found.num_tokens:6,} tokens, {found.num_same:6,} bit by bit, "
              f"the others {found.largest:g} apart   ({found.took})")  # fmt: skip
        assert found.num_same > 0.9 * found.num_tokens
