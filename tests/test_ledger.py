"""The ledger of compiled steps: counts are what was told, and advice names the bucket that wastes."""

from __future__ import annotations

import json

import pytest

from jaxpaged import cli
from jaxpaged.config import Bucket
from jaxpaged.ledger import OFTEN, Ledger, table


def a_ledger(num_steps: int) -> Ledger:
    ledger = Ledger(tile=16)
    for bucket in (Bucket(8, 0), Bucket(64, 0), Bucket(8, 32)):
        ledger.compiled(bucket, 1.5)
    for _ in range(num_steps):
        ledger.ran(Bucket(64, 0), 9, 0)
        ledger.ran(Bucket(8, 0), 8, 0)
    return ledger


def test_what_ran_is_counted() -> None:
    rows = {(row["decode_rows"], row["prefill_tiles"]): row for row in a_ledger(3).rows()}
    assert rows[64, 0] == {
        **{"decode_rows": 64, "prefill_tiles": 0, "compile_s": 1.5, "calls": 3},
        **{"rows": 27, "padded_rows": 165, "tokens": 0, "padded_tokens": 0},
    }
    assert rows[8, 32]["calls"] == 0
    ledger = Ledger(tile=16)
    ledger.ran(Bucket(8, 2), 3, 20)
    assert ledger.rows()[0]["padded_tokens"] == 12
    assert "86%" in table(a_ledger(3).rows())


def test_advice_names_what_wastes_and_what_never_ran() -> None:
    first, second = a_ledger(OFTEN).advice()
    assert first.startswith("decode_row_buckets: add 9: ")
    assert "86% padding" in first
    assert second.startswith("1 of 3 compiled shapes never ran")


def test_a_few_steps_are_no_reason_for_advice() -> None:
    assert a_ledger(3).advice() == []


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--num-prompts", "2", "--input-len", "16", "--output-len", "4", "--json", "--max-num-seqs", "2"]
    flags += ["--max-num-batched-tokens", "32", "--enforce-eager"]
    assert cli.main(["bench", "ledger", *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["open_s"] > 0
    # Of each prompt all tokens were computed as tiles, the lone one before them too.
    assert sum(row["tokens"] for row in found["ledger"]) > 4
    assert sum(row["compile_s"] for row in found["ledger"]) == pytest.approx(found["compile_s"])
