"""Byte-level BPE gives back any text, and sees a number the same way everywhere."""

import random

import pytest

from jaxpaged.demo import export

TEXTS = (
    "",
    " ",
    "  two  spaces \n\n\t tab \r\n",
    "One day Mia went to the park.",
    "Zoë, Björn, Jürgen, Łukasz, Søren",
    "猫と犬 狐狸 りんご",
    "🐱🐶👩‍👩‍👧‍👦🇩🇪é",
    "עברית العربية हिन्दी ไทย",
    "\x00\x01\x7f\u200b\ufeff\ufffd",
    '{"a": [1, 2.5, null, true], "b": "c\\n"}',
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𓀀 \U0010ffff",
)


@pytest.fixture(scope="module")
def tokenizer():
    return export.train_tokenizer(0, vocab_size=600, num_documents=500)


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_random_code_points_round_trip(tokenizer):
    rng = random.Random(0)
    for _ in range(300):
        points = [
            rng.choice((rng.randrange(0x80), rng.randrange(0x800), rng.randrange(0x10000), rng.randrange(0x110000)))
            for _ in range(20)
        ]
        text = "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_special_tokens_have_the_ids_that_the_exports_name(tokenizer):
    assert [tokenizer.token_to_id(token) for token in export.SPECIAL_TOKENS] == [0, 1, 2]
    assert tokenizer.decode(tokenizer.encode("<|im_start|>user<|im_end|>").ids) == "user"


def test_every_digit_is_a_token_of_its_own_with_and_without_a_space(tokenizer):
    plain, spaced = tokenizer.encode("47").ids, tokenizer.encode("a 47").ids
    assert len(plain) == 2 and spaced[-2:] == plain


def test_training_it_again_gives_the_same_file(tokenizer):
    assert export.train_tokenizer(0, vocab_size=600, num_documents=500).to_str() == tokenizer.to_str()
