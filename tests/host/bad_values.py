"""Every field of a request x every kind of bad value (R13, R14): a RequestError that names the field, and nothing else.

Each function returns how many cases it has seen. test_bad_values.py runs all of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

from jaxpaged.host.beam_params import BeamSearchParams
from jaxpaged.host.request import Request, RequestError, SamplingParams

V = 96
BAD_IDS = (-1, V, V + 1, 2**31, 2**63, 1.5, True, "5", None)
ODD_NUMBERS = (
    math.nan,
    math.inf,
    -math.inf,
    1e400,
    -0.0,
    1e-320,
    True,
    False,
    "1",
    2**53 + 1,
    -(2**53) - 1,
    10**4999,
    -(10**4999),
)

# field -> a request of which one id, here `bad`, is bad
ID_FIELDS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "prompt_token_ids": lambda bad: {"prompt_token_ids": [1, bad, 2]},
    "stop_token_ids": lambda bad: {"stop_token_ids": [1, bad]},
    "logit_bias": lambda bad: {"logit_bias": {1: 0.5, bad: 1.0}},
    "allowed_token_ids": lambda bad: {"allowed_token_ids": [bad, 1]},
    "bad_words_token_ids": lambda bad: {"bad_words_token_ids": [[1], [2, bad]]},
}


def checked(prompt_token_ids: Any = (1, 2), *, priority: Any = 0, **options: Any) -> Request:
    """The only way into an engine."""
    limits = {"vocab_size": V, "max_model_len": 64, "max_pool_len": 512}
    return Request.checked("r", prompt_token_ids, SamplingParams(**options), priority=priority, **limits)


def refusal(make: Callable[[], object]) -> str | None:
    """What a RequestError says, in one line that can be printed; None when there is none. Anything else is raised."""
    try:
        make()
    except RequestError as error:
        message = str(error)
        assert "\n" not in message and message.isprintable() and len(message) < 300, message
        return message
    return None


def bad_ids() -> int:
    """R13: every field that holds token ids."""
    count = 0
    for name, make in ID_FIELDS.items():
        for bad in BAD_IDS:
            if name == "logit_bias" and bad is True:
                given = {"logit_bias": {True: 1.0}}  # or it would be the key 1
            else:
                given = make(bad)
            message = refusal(lambda given=given: checked(**given))
            assert message is not None and message.startswith(name), (name, bad, message)
            count += 1
    return count


def is_allowed(value: Any, low: float, high: float, *, is_whole: bool = False, exclude_low: bool = False) -> bool:
    """Whether a number is of its kind and in range, by the plainest words."""
    if isinstance(value, (bool, str)) or (is_whole and not isinstance(value, int)):
        return False
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return low <= value <= high and not (exclude_low and value == low)


INT, BIG = 2**31 - 1, 2**63
# field -> (how a value is given, what is allowed), for every field that holds a number
NUMBER_FIELDS: dict[str, tuple[Callable[[Any], dict[str, Any]] | None, dict[str, Any]]] = {
    "n": (None, {"low": 1, "high": 128, "is_whole": True}),
    "best_of": (None, {"low": 1, "high": 128, "is_whole": True}),
    "temperature": (None, {"low": 0, "high": 100}),
    "top_p": (None, {"low": 0, "high": 1, "exclude_low": True}),
    "top_k": (None, {"low": -1, "high": INT, "is_whole": True}),
    "min_p": (None, {"low": 0, "high": 1}),
    "seed": (None, {"low": -BIG, "high": BIG - 1, "is_whole": True}),
    "max_tokens": (None, {"low": 1, "high": INT, "is_whole": True}),
    "length_penalty": (lambda x: {"length_penalty": x, "use_beam_search": True, "temperature": 0}, {"low": -10, "high": 10}),
    "presence_penalty": (None, {"low": -2, "high": 2}),
    "frequency_penalty": (None, {"low": -2, "high": 2}),
    "repetition_penalty": (None, {"low": 1e-3, "high": 1e3}),
    "min_tokens": (None, {"low": 0, "high": 16, "is_whole": True}),
    "logit_bias": (lambda x: {"logit_bias": {3: x}}, {"low": -100, "high": 100}),
    "logprobs": (None, {"low": 0, "high": INT, "is_whole": True}),
    "prompt_logprobs": (None, {"low": 0, "high": INT, "is_whole": True}),
    "extra_args": (lambda x: {"extra_args": {"boost": x}}, {"low": -1e38, "high": 1e38}),
    "priority": (None, {"low": -BIG, "high": BIG - 1, "is_whole": True}),
}
BEAM_FIELDS: dict[str, dict[str, Any]] = {
    "temperature": {"low": 0, "high": 100},
    "length_penalty": {"low": -10, "high": 10},
    "max_tokens": {"low": 1, "high": INT, "is_whole": True},
}


def odd_numbers() -> int:
    """R14: every field that holds a number. What is allowed is served, what is not is refused by its name."""
    count = 0
    for name, value, make, is_right in number_cases():
        message = refusal(make)
        assert (message is None) == is_right, (name, value if not isinstance(value, int) else "", message)
        assert message is None or message.startswith(name), (name, message)
        count += 1
    return count


def number_cases() -> Iterator[tuple[str, Any, Callable[[], object], bool]]:
    """Field, value, what makes the request, and whether it is one."""
    for name, (make, limits) in NUMBER_FIELDS.items():
        for value in ODD_NUMBERS:
            given = make(value) if make is not None else {name: value}
            yield name, value, lambda given=given: checked(**given), is_allowed(value, **limits)
    for name, limits in BEAM_FIELDS.items():
        for value in ODD_NUMBERS:
            given = {"beam_width": 2, "max_tokens": 4, name: value}
            make = lambda given=given: BeamSearchParams(**given).sampling_params()  # noqa: E731
            yield name, value, make, is_allowed(value, **limits)


def unlisted() -> set[str]:
    """Fields that hold numbers or ids and are in no table above: a new one has to be put there."""
    mine = {*ID_FIELDS, *NUMBER_FIELDS}
    numeric = {
        field.name for field in dataclasses.fields(SamplingParams) if any(kind in str(field.type) for kind in ("int", "float"))
    }
    return numeric - mine
