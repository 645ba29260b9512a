"""R13 and R14: nothing but a RequestError that names the field comes of a bad id or an odd number."""

from __future__ import annotations

import bad_values
import pytest

from jaxpaged.host import request
from jaxpaged.host.request import RequestError, SamplingParams


def test_bad_token_ids_are_refused_by_the_name_of_their_field() -> None:
    assert bad_values.bad_ids() == 45


def test_odd_numbers_are_served_or_refused_by_the_name_of_their_field() -> None:
    assert bad_values.odd_numbers() > 250


def test_every_field_is_in_the_tables() -> None:
    assert bad_values.unlisted() == set()


def test_a_number_of_thousands_of_digits_is_refused_in_one_line() -> None:
    with pytest.raises(RequestError, match="max_tokens: got a value of type int that is too long to show, expected"):
        SamplingParams(max_tokens=10**4999)
    with pytest.raises(RequestError, match="stop_token_ids: got a value of type list"):
        SamplingParams(stop_token_ids=[[10**4999]])  # type: ignore[list-item]


def test_a_check_that_lets_nan_pass_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(name, value, low, high, *, exclude_low=False):
        if value < low or value > high or (exclude_low and value == low):
            raise RequestError(f"{name}: got {value}")

    monkeypatch.setattr(request, "check_number", careless)
    with pytest.raises((AssertionError, TypeError)):
        bad_values.odd_numbers()
