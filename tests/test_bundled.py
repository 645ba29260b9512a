"""The bundled model through the real engine: the recorded token ids, and the recorded score of every skill.

An engine bug that breaks the model is a failing test here: what is written down came from transformers and from dense attention.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from jaxpaged import LLM, SamplingParams
from jaxpaged.demo import MODEL_DIR, skills

# Of 100 answers; one near tie that falls the other way may cost or win one.
SLACK = 0.02


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    # Small pages, small chunks and a pool that forces preemption: the answers must not notice.
    options = {"max_num_seqs": 32, "max_num_batched_tokens": 256, "num_gpu_blocks_override": 160, "max_model_len": 512}
    with LLM(dtype="float32", block_size=8, decode_row_buckets=(32,), use_tqdm_on_load=False, **options) as llm:
        yield llm


def test_greedy_token_ids_are_those_of_transformers(llm: LLM) -> None:
    expected = json.loads((MODEL_DIR.parent / "expected.json").read_text())
    prompts = [{"prompt_token_ids": entry["prompt_token_ids"]} for entry in expected["prompts"]]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=expected["max_tokens"]), use_tqdm=False)
    for entry, output in zip(expected["prompts"], outputs, strict=True):
        lead = f"{entry['prompt']!r}, smallest lead {entry['min_margin']} logits"
        assert output.outputs[0].token_ids == entry["token_ids"], lead


@pytest.mark.parametrize("skill", skills.SKILLS)
def test_every_skill_scores_what_the_model_card_says(llm: LLM, skill: str) -> None:
    recorded = json.loads((MODEL_DIR / "provenance.json").read_text())["results"]["scores"][skill]
    params = SamplingParams(temperature=0, max_tokens=160)

    def generate(prompts: list[str]) -> list[str]:
        return [output.outputs[0].text for output in llm.generate(prompts, params, use_tqdm=False)]

    assert skills.score(generate, skill, 100) == pytest.approx(recorded, abs=SLACK)
