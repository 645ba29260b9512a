"""Keys of the prefix cache: they nominate, whole keys and token ids decide (R43); all that a page depends on is in them."""

from __future__ import annotations

import dataclasses

import figures
import pytest

from jaxpaged.config import EngineConfig, ModelConfig
from jaxpaged.host import scheduler
from jaxpaged.host.pages import PagePool
from jaxpaged.host.prefix_cache import PrefixCache
from jaxpaged.host.request import Request, SamplingParams, Sequence


def test_whole_keys_and_token_ids_decide() -> None:
    count, num_hit_tokens = figures.collisions(range(20))
    assert count == 400 and num_hit_tokens > 100


@pytest.mark.parametrize("what", ["key", "tokens"])
def test_both_are_needed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens of the page alone do not decide, nor does the page that is nominated."""

    def match(self: PrefixCache, sequence: Sequence) -> list[int]:
        pages = []
        for index in range(self.num_shareable(sequence)):
            wanted = self.wanted(sequence, index)
            page = self.page_of(wanted.key)
            if page is None or (what == "key" and self._held[page].tokens != wanted.tokens):
                break
            pages.append(page)
        return pages

    monkeypatch.setattr(PrefixCache, "match", match)
    with pytest.raises(AssertionError, match="differs from its isolated run"):
        figures.collisions(range(50))


@pytest.mark.slow
def test_they_decide_twenty_thousand_times() -> None:
    assert figures.collisions(range(1000))[0] == 20_000


MODEL = ModelConfig("llama", 100, 8, 8, 2, 1, 1, 8, 64)
CONFIG = EngineConfig(block_size=8, dtype="float32").resolved(MODEL, "cpu")


def key(config: EngineConfig, model: ModelConfig, salt: str | None = None) -> bytes:
    """The key of a prompt's first page in an engine with these options."""
    pool = PagePool(9)
    scheduler.build(config, model, pool)
    limits = {"vocab_size": 100, "max_model_len": 64, "max_pool_len": 64, "cache_salt": salt}
    assert pool.cache is not None
    return pool.cache.wanted(Sequence.first(Request.checked("x", list(range(9)), SamplingParams(), **limits)), 0).key


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(ModelConfig)])
def test_every_field_of_the_model_is_in_the_key(name: str) -> None:
    value = getattr(MODEL, name)
    other = object.__new__(ModelConfig)  # whatever the value: the key is all that is asked
    other.__dict__.update({**vars(MODEL), name: value + 1 if type(value) is int else (value, "another")})
    assert key(CONFIG, other) != key(CONFIG, MODEL)


def test_salt_and_dtypes_are_in_the_key() -> None:
    keys = [key(CONFIG, MODEL, salt) for salt in (None, "a", "b", "None")]
    keys += [key(dataclasses.replace(CONFIG, dtype="bfloat16"), MODEL)]
    keys += [key(dataclasses.replace(CONFIG, kv_cache_dtype="bfloat16"), MODEL)]
    assert len(set(keys)) == len(keys)
    assert key(CONFIG, MODEL, "a") == keys[1]
