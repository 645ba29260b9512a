"""What a request may not ask: every bad value is a RequestError of one line with the field, what it got and what is allowed."""

from __future__ import annotations

import dataclasses
import pickle
import re
from array import array

import numpy as np
import pytest

from jaxpaged.host.request import FinishReason, Request, RequestError, SamplingParams, Sequence, TokenEvent

NAN, INF = float("nan"), float("inf")


def refused(field: str, make, *parts: str) -> None:
    """`make` raises a RequestError: one short printable line that starts with the field and holds the parts."""
    with pytest.raises(RequestError) as caught:
        make()
    message = str(caught.value)
    assert message.startswith(field), message
    assert "\n" not in message and message.isprintable() and len(message) < 300, message
    for part in parts:
        assert part in message, message
    assert isinstance(caught.value, ValueError)


# --- sampling parameters ---

NOT_NUMBERS = [NAN, INF, -INF, "1", "", b"1", True, False, None, [], [1.0], {}, 1j, 10**400, -(10**400), "x" * 100_000]
NOT_INTS = [1.0, 0.5, NAN, INF, "1", "", b"1", True, False, [], [1], {}, 1j, 10**400, np.int64(3), np.ones((9, 9))]

BAD_VALUES = [
    *(("temperature", value, "a finite number in [0, 100]") for value in (*NOT_NUMBERS, -1, -1e-9, 100.5, 1e300)),
    *(("top_p", value, "a finite number in (0, 1]") for value in (*NOT_NUMBERS, 0, 0.0, -0.1, 1.1, 1.0000001)),
    *(("min_p", value, "a finite number in [0, 1]") for value in (*NOT_NUMBERS, -0.1, 1.1)),
    *(("top_k", value, "a whole number in [-1, 2147483647]") for value in (*NOT_INTS, None, -2, 2**31)),
    *(
        ("seed", value, "a whole number in [-9223372036854775808, 9223372036854775807]")
        for value in (*NOT_INTS, 2**63, -(2**63) - 1)
    ),
    *(("max_tokens", value, "a whole number in [1, 2147483647]") for value in (*NOT_INTS, 0, -1, 2**31)),
    *(
        ("stop_token_ids", value, "a list of token ids")
        for value in ("1", b"1", bytearray(b"1"), 5, None, {1}, {1: 1}, iter([1]))
    ),
    *(("stop_token_ids", [7, value], "a whole number in [0, 2147483647]") for value in (*NOT_INTS, None, -1, 2**31)),
    *(
        (field, value, "True or False")
        for field in ("ignore_eos", "detokenize", "skip_special_tokens")
        for value in (0, 1, "true", "False", None, 1.0)
    ),
]


@pytest.mark.parametrize(("field", "value", "allowed"), BAD_VALUES, ids=lambda value: repr(value)[:24])
def test_a_bad_sampling_parameter_is_refused(field: str, value: object, allowed: str) -> None:
    refused(field, lambda: SamplingParams(**{field: value}), "got ", allowed)


def test_the_message_shows_the_value() -> None:
    refused("temperature", lambda: SamplingParams(temperature=-1), "got -1, expected a finite number in [0, 100]")
    refused("top_k", lambda: SamplingParams(top_k="x\ny"), r"got 'x\ny'")  # type: ignore[arg-type]
    refused("stop_token_ids", lambda: SamplingParams(stop_token_ids=(3, -4)), "got -4")


@pytest.mark.parametrize(
    ("misspelt", "neighbour"),
    [
        ("temprature", "temperature"),
        ("max_token", "max_tokens"),
        ("max-tokens", "max_tokens"),
        ("topp", "top_p"),
        ("stop_token_id", "stop_token_ids"),
        ("ignore_eso", "ignore_eos"),
    ],
)
def test_a_misspelt_option_names_its_neighbour(misspelt: str, neighbour: str) -> None:
    for make in (
        lambda: SamplingParams(**{misspelt: 1}),
        lambda: dataclasses.replace(SamplingParams(), **{misspelt: 1}),
    ):
        refused("SamplingParams", make, f"unknown option {misspelt!r}, did you mean {neighbour!r}?")


def test_an_option_that_is_like_nothing_is_refused_too() -> None:
    refused("SamplingParams", lambda: SamplingParams(zzzz=1), "unknown option 'zzzz'")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0},
        {"temperature": 0.0, "top_p": 1, "min_p": 0, "top_k": -1},
        {"temperature": np.float64(0.5)},  # numpy's float64 is a float; its other types are not, and are refused
        {"temperature": 100, "top_p": 1e-9, "min_p": 1, "top_k": 2**31 - 1},
        {"seed": -(2**63)},
        {"seed": 2**63 - 1},
        {"max_tokens": None},
        {"max_tokens": 1},
        {"stop_token_ids": [1, 2]},
        {"stop_token_ids": ()},
        {"ignore_eos": True, "detokenize": False, "skip_special_tokens": False},
    ],
)
def test_the_edges_of_what_is_allowed(options: dict) -> None:
    params = SamplingParams(**options)
    assert isinstance(params.stop_token_ids, tuple)
    assert pickle.loads(pickle.dumps(params)) == params == dataclasses.replace(params)
    hash(params)


def test_params_are_frozen_and_own_their_stop_ids() -> None:
    stops = [1, 2]
    params = SamplingParams(stop_token_ids=stops)  # type: ignore[arg-type]
    stops.append(3)
    assert params.stop_token_ids == (1, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_k = 3  # type: ignore[misc]


# --- requests ---


def checked(prompt: object = (1, 2, 3), params: SamplingParams | None = None, *, request_id: object = "r", **limits) -> Request:
    options = dict(vocab_size=100, max_model_len=16, max_pool_len=32) | limits
    return Request.checked(request_id, prompt, params or SamplingParams(), **options)  # type: ignore[arg-type]


NOT_TOKENS = [
    -1,
    100,
    2**31,
    2**64,
    10**400,
    1.0,
    NAN,
    "1",
    "x" * 100_000,
    b"1",
    True,
    None,
    [1],
    (),
    np.int64(3),
    np.ones((9, 9)),
]


@pytest.mark.parametrize("value", NOT_TOKENS, ids=lambda value: repr(value)[:24])
@pytest.mark.parametrize("place", [0, 1, -1])
def test_a_prompt_of_bad_token_ids_is_refused(place: int, value: object) -> None:
    prompt: list[object] = [5, 6, 7]
    prompt[place] = value
    refused("prompt_token_ids", lambda: checked(prompt), "got ", "expected token ids in [0, 99]")


@pytest.mark.parametrize("prompt", ["text", b"bytes", bytearray(b"bytes"), 5, None, {1, 2}, {1: 2}, iter([1]), np.arange(3)])
def test_a_prompt_that_is_no_list_is_refused(prompt: object) -> None:
    refused("prompt_token_ids", lambda: checked(prompt), f"got {type(prompt).__name__}, expected a list of token ids")


@pytest.mark.parametrize("prompt", [[], (), range(0), array("i")])
def test_an_empty_prompt_is_refused(prompt: object) -> None:
    refused("prompt is empty", lambda: checked(prompt), "at least one token is needed")


@pytest.mark.parametrize("prompt", [[0, 99], (0, 99), range(98, 100), array("i", [0, 99])])
def test_any_sequence_of_ints_is_a_prompt(prompt) -> None:
    assert checked(prompt).prompt_token_ids == tuple(prompt)


def test_a_prompt_too_long_is_refused_with_its_numbers() -> None:
    assert checked([1] * 4095, max_model_len=4096, max_pool_len=5000).max_len == 4096
    refused(
        "prompt has 4,096 tokens, the limit is 4,095",
        lambda: checked([1] * 4096, max_model_len=4096, max_pool_len=5000),
        "max_model_len 4,096",
    )
    assert checked([1] * 4095, max_model_len=5000, max_pool_len=4095).max_len == 4096
    refused(
        "prompt has 4,096 tokens, the whole page pool holds 4,095",
        lambda: checked([1] * 4096, max_model_len=5000, max_pool_len=4095),
        "num_gpu_blocks_override",
        "kv_cache_memory_bytes",
    )


def test_a_stop_id_outside_the_vocabulary_is_refused() -> None:
    checked(params=SamplingParams(stop_token_ids=(99,)))
    refused("stop_token_ids", lambda: checked(params=SamplingParams(stop_token_ids=(1, 100))), "got 100", "[0, 99]")


@pytest.mark.parametrize("request_id", [None, 5, b"r", "", "a\r\nb", "a\x00b", ["r"]])
def test_a_request_id_that_would_break_a_log_line_is_refused(request_id: object) -> None:
    refused("request_id", lambda: checked(request_id=request_id), "got ", "expected a non-empty string")


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "max_model_len", "max_pool_len", "max_len"),
    [
        (3, 5, 16, 32, 8),
        (3, None, 16, 32, 16),
        (3, 100, 16, 32, 16),
        (3, 100, 64, 32, 33),  # the last token is sampled, and needs no place
        (32, 100, 64, 32, 33),
        (15, 100, 16, 32, 16),
        (1, 1, 2, 1, 2),
    ],
)
def test_where_a_sequence_ends(
    num_prompt: int, max_tokens: int | None, max_model_len: int, max_pool_len: int, max_len: int
) -> None:
    params = SamplingParams(max_tokens=max_tokens)
    assert checked([1] * num_prompt, params, max_model_len=max_model_len, max_pool_len=max_pool_len).max_len == max_len


def test_seeds_are_64_unsigned_bits() -> None:
    assert checked(params=SamplingParams(seed=-1)).seed == 2**64 - 1
    assert checked(params=SamplingParams(seed=7), default_seed=9).seed == 7
    assert checked(params=SamplingParams(seed=0), default_seed=9).seed == 0
    assert checked(default_seed=2**64 + 9).seed == 9


def test_stop_ids_are_the_request_s_and_the_model_s() -> None:
    stops = SamplingParams(stop_token_ids=(1, 2))
    assert checked(params=stops, eos_token_ids=(2, 3)).stop_ids == {1, 2, 3}
    assert checked(params=dataclasses.replace(stops, ignore_eos=True), eos_token_ids=(2, 3)).stop_ids == {1, 2}


def test_a_sequence_starts_as_its_prompt() -> None:
    sequence = Sequence.first(checked([4, 5, 6]))
    assert sequence.tokens == [4, 5, 6] and sequence.num_prompt == sequence.num_uncomputed == 3
    assert sequence.output_token_ids == sequence.pages == [] and sequence.finish_reason is None
    sequence.tokens.append(7)
    sequence.num_computed = 3
    assert sequence.output_token_ids == [7] and sequence.num_uncomputed == 1
    assert sequence.request.prompt_token_ids == (4, 5, 6)


def test_finish_reasons_are_the_strings_of_the_public_answers() -> None:
    assert [f"{reason}" for reason in FinishReason] == ["stop", "length", "abort", "error", "pruned"]
    assert TokenEvent("r", 5) == TokenEvent("r", 5, None, None)
    assert re.fullmatch("[a-z]+", FinishReason.STOP)
