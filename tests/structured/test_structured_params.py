"""What StructuredOutputsParams takes and refuses, without any model: sizes, types, exactly one of them, in one line each."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest

from jaxpaged.bench.forms import form, hostile
from jaxpaged.host.request import Request, RequestError, SamplingParams
from jaxpaged.host.structured import MAX_DEPTH, MAX_NODES, MAX_SOURCE_BYTES, GrammarError, StructuredOutputsParams
from jaxpaged.observe.records import pack_request, unpack_request


def nested(depth: int) -> dict:
    """A schema of so many levels."""
    found: dict = {}
    for _ in range(depth - 1):
        found = {"a": found}
    return found


def itself() -> dict:
    """A schema that contains itself."""
    found: dict = {}
    found["properties"] = found
    return found


GOOD = [
    {"json": {"type": "object"}},
    {"json": '{"type": "object"}'},
    {"json": nested(MAX_DEPTH)},
    {"json": {"enum": list(range(MAX_NODES - 2))}},
    {"json": {"const": "x" * (MAX_SOURCE_BYTES - len('{"const": ""}'))}},
    {"regex": "x" * MAX_SOURCE_BYTES},
    {"regex": "\\(" * 100},
    {"regex": "(" * MAX_DEPTH + "a" + ")" * MAX_DEPTH},
    {"choice": ["a", "b"]},
    {"choice": ("é", "日本")},
    {"grammar": 'start: "a"'},
    {"json_object": True},
    {"json_object": True, "disable_any_whitespace": True},
    {"json": {}, "json_object": False, "whitespace_pattern": " ?"},
    {"structural_tag": "{}"},
]
BAD = [
    ({}, "got none, expected exactly one of json, regex"),
    ({"json_object": False}, "got none"),
    ({"regex": "a", "choice": ["a"]}, "got regex and choice, expected exactly one"),
    ({"json": nested(MAX_DEPTH + 1)}, "grammar_too_complex: more than 64 levels"),
    ({"json": itself()}, "grammar_too_complex: more than 64 levels"),
    ({"json": {"enum": list(range(MAX_NODES))}}, "grammar_too_complex: more than 2,048 values"),
    ({"json": {"const": "x" * MAX_SOURCE_BYTES}}, "grammar_too_complex: 16,389 characters and more, the limit is 16,384 bytes"),
    ({"json": {"const": "é" * (MAX_SOURCE_BYTES // 2)}}, "grammar_too_complex"),
    ({"json": {"const": "x" * 10**7}}, "grammar_too_complex: 10,000,005 characters and more"),
    ({"json": "[" * 9000}, "json: is no JSON"),
    ({"json": "{" + '"a":{' * 9000}, "grammar_too_complex"),
    ({"json": "[]"}, "json: got list, expected an object"),
    ({"json": "true"}, "json: got True, expected an object"),
    ({"json": 7}, "json: got 7, expected a schema"),
    ({"json": {7: 1}}, "got the key 7, expected texts as keys"),
    ({"json": {"const": float("nan")}}, "got nan, which JSON does not have"),
    ({"json": '{"const": NaN}'}, "got nan, which JSON does not have"),
    ({"json": '{"const": 1e400}'}, "got inf, which JSON does not have"),
    ({"json": {"const": 10**5000}}, "a whole number that no float64 holds"),
    ({"json": '{"const": ' + "9" * 5000 + "}"}, "json: is no JSON"),
    ({"json": {"const": b"a"}}, "got bytes, which JSON does not have"),
    ({"json": {"const": "\ud800"}}, "not valid Unicode text"),
    ({"regex": "x" * (MAX_SOURCE_BYTES + 1)}, "grammar_too_complex: 16,385 characters"),
    ({"regex": "é" * (MAX_SOURCE_BYTES // 2 + 1)}, "grammar_too_complex"),
    ({"regex": "(" * (MAX_DEPTH + 1)}, "grammar_too_complex: brackets more than 64 deep"),
    ({"regex": "\ud800"}, "not valid Unicode text"),
    ({"regex": ""}, "got an empty text"),
    ({"regex": b"a"}, "got bytes, expected a text"),
    ({"grammar": "(" * (MAX_DEPTH + 1)}, "brackets more than 64 deep"),
    ({"choice": []}, "expected a list of texts, at least one"),
    ({"choice": "abc"}, "got str, expected a list of texts"),
    ({"choice": ["a", ""]}, "got an empty text"),
    ({"choice": ["a", 7]}, "got 7, expected texts"),
    ({"choice": ["a"] * (MAX_NODES + 1)}, "2,049 choices, the limit is 2,048"),
    ({"choice": ["x" * MAX_SOURCE_BYTES, "y"]}, "the limit is 16,384 bytes"),
    ({"json_object": 1}, "json_object: got 1, expected True or False"),
    ({"regex": "a", "whitespace_pattern": " "}, "is for json and json_object, and this is regex"),
    ({"regex": "a", "disable_any_whitespace": True}, "is for json and json_object"),
    ({"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True}, "not with disable_any_whitespace"),
    ({"structural_tag": "x"}, "structural_tag: is no JSON"),
    ({"jsn": {}}, "unknown option 'jsn', did you mean 'json'?"),
]


@pytest.mark.parametrize("options", GOOD, ids=range(len(GOOD)))
def test_what_is_within_the_limits_is_taken(options: dict) -> None:
    params = StructuredOutputsParams(**options)
    assert SamplingParams(structured_outputs=params).structured_outputs is params


@pytest.mark.parametrize(("options", "problem"), BAD, ids=range(len(BAD)))
def test_what_is_not_is_refused_in_a_line(options: dict, problem: str) -> None:
    with pytest.raises(RequestError) as caught:
        StructuredOutputsParams(**options)
    text = str(caught.value)
    assert problem in text
    assert "\n" not in text and len(text) < 300
    assert getattr(caught.value, "code", None) == ("grammar_too_complex" if "too_complex" in text else "invalid_grammar") or (
        "unknown" in text
    )


def test_what_a_hostile_user_gives_is_taken_or_refused_and_nothing_else() -> None:
    codes = set()
    for options, _ in zip(hostile(random.Random(1)), range(1000), strict=False):
        try:
            StructuredOutputsParams(**options)
        except GrammarError as error:
            assert "\n" not in str(error) and len(str(error)) < 300
            codes.add(error.code)
        except RequestError as error:
            assert "unknown option" in str(error)
    assert codes == {"invalid_grammar", "grammar_too_complex"}


def test_a_beam_search_has_no_grammar() -> None:
    with pytest.raises(RequestError, match=r"structured_outputs: got .*beam search draws no tokens") as caught:
        SamplingParams(use_beam_search=True, n=2, temperature=0, structured_outputs=StructuredOutputsParams(regex="a\nb"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["a", 7, ("regex", "a"), [1]])
def test_what_is_no_such_params(value: object) -> None:
    with pytest.raises(RequestError, match=r"structured_outputs: got .*, expected StructuredOutputsParams"):
        SamplingParams(structured_outputs=value)  # type: ignore[arg-type]


def test_the_same_schema_has_one_key_however_it_is_given() -> None:
    schema = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "null"}}}
    one, other = StructuredOutputsParams(json=schema), StructuredOutputsParams(json=json.dumps(schema, indent=3))
    assert one == other and one.key == other.key and hash(one) == hash(other)
    turned = {**schema, "properties": dict(reversed(schema["properties"].items()))}
    assert StructuredOutputsParams(json=turned).key != one.key  # the order of properties is that of the output
    assert dataclasses.replace(one, disable_any_whitespace=True).key != one.key


def test_a_recording_keeps_them() -> None:
    rng = random.Random(0)
    for _ in range(50):
        params = SamplingParams(structured_outputs=form(rng))
        request = Request.checked("a", [1], params, vocab_size=5, max_model_len=9, max_pool_len=9)
        assert unpack_request(pack_request(request)) == request
