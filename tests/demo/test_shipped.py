"""The folders in the package are the ones that the model cards describe, and transformers reads them as recorded."""

import json

import pytest
from tokenizers import Tokenizer

from jaxpaged.config import ModelConfig
from jaxpaged.demo import DRAFT_DIR, MODEL_DIR, corpus, export, release, train

FOLDERS = {"model": MODEL_DIR, "draft": DRAFT_DIR}


def read_json(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("which", FOLDERS)
def test_the_weights_are_the_ones_that_the_card_names(which):
    source = read_json(FOLDERS[which] / "provenance.json")
    assert release.sha256(FOLDERS[which] / "model.safetensors") == source["weights_sha256"]
    assert release.sha256(FOLDERS[which] / "tokenizer.json") == source["tokenizer_sha256"]
    assert (FOLDERS[which] / "README.md").read_text() == release.card(which, source)


@pytest.mark.parametrize("which", FOLDERS)
def test_recipe_and_corpus_in_the_source_are_those_of_the_weights(which):
    source = read_json(FOLDERS[which] / "provenance.json")
    recipe = train.RECIPES[which]
    assert json.loads(json.dumps(release.dataclasses.asdict(recipe))) == source["recipe"]
    assert source["corpus_sha256"] == release.corpus_sha256()
    assert read_json(FOLDERS[which] / "config.json") == export.hf_config(recipe)
    assert source["results"]["steps"] == recipe.steps, "a shipped model was trained to the end"


def test_both_share_one_tokenizer_and_one_template():
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (MODEL_DIR / name).read_bytes() == (DRAFT_DIR / name).read_bytes()
    assert (MODEL_DIR / "chat_template.jinja").read_text() == corpus.CHAT_TEMPLATE
    assert Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json")).get_vocab_size() == export.VOCAB_SIZE


def test_they_are_small():
    sizes = [path.stat().st_size for folder in FOLDERS.values() for path in folder.iterdir()]
    assert sum(sizes) < 8e6


def test_the_stop_tokens_are_the_same_everywhere():
    config = ModelConfig.from_hf(read_json(MODEL_DIR / "config.json"))
    assert list(config.eos_token_ids) == export.STOP_IDS == read_json(MODEL_DIR / "generation_config.json")["eos_token_id"]


def test_transformers_gets_the_recorded_token_ids():
    pytest.importorskip("torch", reason="expected.json is checked with transformers on torch, which is not installed")
    recorded, found = read_json(release.EXPECTED_FILE), release.expected(MODEL_DIR)
    for want, got in zip(recorded["prompts"], found["prompts"], strict=True):
        assert got["prompt_token_ids"] == want["prompt_token_ids"]
        assert got["token_ids"] == want["token_ids"], f"{want['prompt']!r} (smallest lead {want['min_margin']} logits)"
