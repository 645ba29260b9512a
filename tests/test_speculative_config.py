"""The options of speculation: vLLM's spellings new and old, and what is refused in one line."""

from __future__ import annotations

import dataclasses
import json

import families
import pytest

from jaxpaged.config import Bucket, ConfigError, EngineConfig
from jaxpaged.speculative_config import SpeculativeConfig

NGRAM = {"method": "ngram", "num_speculative_tokens": 4}
MODEL = families.FAMILIES[0].config


def checked(given, **options) -> SpeculativeConfig:
    found = EngineConfig(speculative_config=given, **options).speculation
    assert found is not None
    return found


def test_a_dictionary_its_json_and_the_value_itself_are_the_same() -> None:
    found = checked(NGRAM)
    assert found == checked(json.dumps(NGRAM)) == checked(found) == SpeculativeConfig(**NGRAM)
    assert found.method == "ngram" and found.num_speculative_tokens == 4 and found.adaptive
    config = EngineConfig(speculative_config=NGRAM)
    assert dataclasses.replace(config, max_num_seqs=3).speculation == found


@pytest.mark.parametrize(
    "given, least, most",
    [
        ({}, 5, 5),
        ({"prompt_lookup_max": 3}, 3, 3),
        ({"prompt_lookup_min": 2}, 2, 2),
        ({"prompt_lookup_min": 2, "prompt_lookup_max": 4}, 2, 4),
    ],
)
def test_lengths_that_are_looked_up_default_as_in_vllm(given: dict, least: int, most: int) -> None:
    found = checked({**NGRAM, **given})
    assert (found.prompt_lookup_min, found.prompt_lookup_max) == (least, most)


def test_old_names() -> None:
    draft = {"method": "draft_model", "model": "some/draft", "num_speculative_tokens": 3}
    old = EngineConfig(model="some/model", speculative_model="some/draft", num_speculative_tokens=3)
    assert old == EngineConfig(model="some/model", speculative_config=draft)
    assert dataclasses.replace(old, seed=1).speculation == old.speculation
    for name in ("[ngram]", "ngram"):
        assert EngineConfig(speculative_model=name, num_speculative_tokens=4) == EngineConfig(speculative_config=NGRAM)
    assert checked({"model": "some/draft", "num_speculative_tokens": 3}).method == "draft_model"


def test_a_draft_model_without_a_name_is_the_one_of_the_bundled_model() -> None:
    given = {"method": "draft_model", "num_speculative_tokens": 3}
    assert checked(given).model is None and checked(given, model="demo").model is None
    with pytest.raises(ConfigError, match=r"speculative_config: model: missing, expected a draft model for 'some/model'"):
        checked(given, model="some/model")


WRONG = [
    ("{", "not JSON"),
    ([1], "got [1], expected a dictionary"),
    (3, "got 3, expected a dictionary"),
    ("3", "got 3, expected a dictionary"),
    ({"methud": "ngram", "num_speculative_tokens": 1}, "unknown key 'methud', did you mean 'method'?"),
    ({1: 2}, "unknown key 1"),
    ({"method": "ngram"}, "num_speculative_tokens: missing, expected a whole number in [1, 32]"),
    ({"num_speculative_tokens": 4}, "method: got None, expected one of ngram, draft_model"),
    ({**NGRAM, "method": "n_gram"}, "method: got 'n_gram', expected one of ngram, draft_model, did you mean 'ngram'?"),
    ({**NGRAM, "method": "eagle"}, "method: got 'eagle', expected one of"),
    ({**NGRAM, "method": []}, "method: got []"),
    ({**NGRAM, "num_speculative_tokens": 0}, "num_speculative_tokens: got 0, expected a whole number in [1, 32]"),
    ({**NGRAM, "num_speculative_tokens": 33}, "got 33"),
    ({**NGRAM, "num_speculative_tokens": True}, "got True"),
    ({**NGRAM, "num_speculative_tokens": 2.0}, "got 2.0"),
    ({**NGRAM, "num_speculative_tokens": "4"}, "got '4'"),
    ({**NGRAM, "prompt_lookup_max": 0}, "prompt_lookup_max: got 0, expected a whole number in [1, 64]"),
    ({**NGRAM, "prompt_lookup_min": 3, "prompt_lookup_max": 2}, "prompt_lookup_min: got 3, expected at most prompt_lookup_max 2"),
    ({**NGRAM, "model": "some/draft"}, "model: got 'some/draft', expected none with method 'ngram'"),
    ({**NGRAM, "adaptive": 1}, "adaptive: got 1, expected True or False"),
    ({"model": "a", "num_speculative_tokens": 1, "prompt_lookup_max": 2}, "prompt_lookup_max: got 2, expected none"),
    ({"model": "", "method": "draft_model", "num_speculative_tokens": 1}, "model: got '', expected a directory"),
    ({**NGRAM, "method": "x" * 5000}, "method: got 'xxx"),
]


@pytest.mark.parametrize("given, problem", WRONG, ids=[problem for _, problem in WRONG])
def test_what_is_refused_is_named_in_one_line(given, problem: str) -> None:
    with pytest.raises(ConfigError) as raised:
        EngineConfig(speculative_config=given)
    text = str(raised.value)
    assert text.startswith("speculative_config: ") and problem in text and "\n" not in text and len(text) < 250


def test_what_does_not_go_together() -> None:
    with pytest.raises(ConfigError, match="compare_with: got 'reference', expected none with speculative_config"):
        EngineConfig(speculative_config=NGRAM, compare_with="reference")
    with pytest.raises(ConfigError, match="speculative_model: got 'a' alone"):
        EngineConfig(speculative_model="a")
    with pytest.raises(ConfigError, match="num_speculative_tokens: got 3 alone"):
        EngineConfig(num_speculative_tokens=3)
    with pytest.raises(ConfigError, match="speculative_model too, expected one of the two"):
        EngineConfig(speculative_config=NGRAM, speculative_model="a", num_speculative_tokens=3)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("num_seqs, num_tokens", [(1, 1), (1, 5), (1, 8), (8, 3), (32, 5), (256, 8), (256, 32)])
def test_the_largest_step_has_a_bucket_and_buckets_are_few(platform: str, num_seqs: int, num_tokens: int) -> None:
    given = {**NGRAM, "num_speculative_tokens": num_tokens}
    plain = EngineConfig(max_num_seqs=num_seqs).resolved(MODEL, platform)
    config = EngineConfig(max_num_seqs=num_seqs, speculative_config=given).resolved(MODEL, platform)
    most = min(num_seqs * (1 + num_tokens), config.max_num_batched_tokens)  # type: ignore[type-var]
    assert config.max_decode_rows == most and plain.max_decode_rows == num_seqs
    assert config.buckets()[-1] == Bucket(most, plain.buckets()[-1].prefill_tiles)
    rows, plain_rows = ({bucket.decode_rows for bucket in one.buckets()} for one in (config, plain))
    assert plain_rows <= rows and len(rows) <= len(plain_rows) + 3, "a plain step is padded more, or there are many sizes"
