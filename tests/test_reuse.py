"""A part of the figures of the real model on shared, reused and poisoned pages; `make fuzz` shows all. reuse.py has the laws."""

from __future__ import annotations

import pytest
import reuse
from bits import KeepingRunner

from jaxpaged.host.prefix_cache import PrefixCache


def test_a_crowd_on_poisoned_pages_has_the_bits_of_each_alone() -> None:
    assert reuse.crowd(100) == 100


@pytest.mark.slow
def test_two_thousand_on_poisoned_pages() -> None:
    assert sum(reuse.crowd(500, seed=1 + part) for part in range(4)) == 2000


@pytest.mark.parametrize(("page_size", "tile", "num_pairs"), [(4, 16, 170), pytest.param(16, 16, 2210, marks=pytest.mark.slow)])
def test_a_reused_prefix_of_any_length_changes_no_bit(page_size: int, tile: int, num_pairs: int) -> None:
    assert reuse.every_reuse(page_size, tile) == {"same executable": num_pairs}


@pytest.mark.slow
@pytest.mark.parametrize(("page_size", "tile", "has_buckets"), [(4, 4, False), (16, 32, False), (16, 16, True)])
def test_wherever_tiles_begin_and_whatever_runs(page_size: int, tile: int, has_buckets: bool) -> None:
    counts = reuse.every_reuse(page_size, tile, has_buckets=has_buckets)
    assert counts.total() == {4: 170, 16: 2210}[page_size]
    assert (len(counts) > 1) == has_buckets


def test_siblings_that_part_anywhere() -> None:
    assert reuse.siblings(range(0, 17, 2), (2, 8)) == 18
    assert reuse.beams(range(1, 17, 4), (3, 8)) == 8


@pytest.mark.slow
def test_five_hundred_families() -> None:
    assert reuse.siblings(range(17)) + reuse.beams(range(17)) + reuse.siblings(range(33), page_size=16) == 119 + 119 + 231


# --- what they are for would show ---


def test_a_copy_that_is_not_made_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KeepingRunner, "_copy", lambda self, copies: None)
    with pytest.raises(AssertionError, match="not finite"):
        reuse.siblings([5], [2])


def test_a_hit_on_another_page_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    match = PrefixCache.match
    monkeypatch.setattr(PrefixCache, "match", lambda self, sequence: match(self, sequence)[::-1])
    with pytest.raises(AssertionError, match="tokens cached"):
        reuse.every_reuse(4, 16)


def test_a_place_that_is_read_too_far_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """One place further than what was written: there is NaN, and not only in pages of nobody."""
    one = reuse.runner(8, 16, tiles=2)
    pad = one._pad

    def too_far(*given):
        padded = pad(*given)
        lens = padded.inputs.tokens.row_lens
        lens += lens % 8 > 0
        return padded

    monkeypatch.setattr(one, "_pad", too_far)
    with pytest.raises(AssertionError, match="not finite"):
        reuse.crowd(30)
