"""Laws of embeddings: the hidden states are the model's own, whatever is asked with them, and what is served does not notice."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from checkpoints import write_model

from jaxpaged import LLM, PoolingParams, RequestError, SamplingParams

OPTIONS = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "decode_row_buckets": (4,),
    "prefill_tile_buckets": (4,),
    "skip_tokenizer_init": True,
    "use_tqdm_on_load": False,
    "num_gpu_blocks_override": 64,
}
RAW = {"normalize": False}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("embed") / "model"
    write_model(directory, "mistral", max_position_embeddings=256)  # with a window, so that pages matter
    return directory


@pytest.fixture(scope="module")
def llm(directory: Path):
    with LLM(str(directory), dtype="float32", **OPTIONS) as llm:
        yield llm


def prompts_of(llm: LLM, lengths: list[int]) -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(3, llm.model_config.vocab_size, length).tolist() for length in lengths]


def vectors(llm: LLM, prompts: list[list[int]], **params) -> np.ndarray:
    return np.array([one.outputs.embedding for one in llm.embed(prompts, PoolingParams(**params))])


# One, up to and over a tile, a page and a call; the last is longer than any step.
LENGTHS = [1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 200]


def test_they_are_the_hidden_states_of_transformers(llm: LLM, directory: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    prompts = prompts_of(llm, LENGTHS)
    with torch.no_grad():
        states = [model.model(torch.tensor([prompt])).last_hidden_state[0].numpy() for prompt in prompts]
    for kind, expected in (("LAST", [one[-1] for one in states]), ("MEAN", [one.mean(axis=0) for one in states])):
        np.testing.assert_allclose(vectors(llm, prompts, pooling_type=kind, **RAW), expected, rtol=2e-4, atol=2e-5)
        units = [one / np.linalg.norm(one) for one in expected]
        np.testing.assert_allclose(vectors(llm, prompts, pooling_type=kind), units, rtol=2e-4, atol=2e-5)


def test_a_crowd_gets_what_each_gets_alone(llm: LLM) -> None:
    prompts = prompts_of(llm, LENGTHS)
    for kind in ("LAST", "MEAN"):
        alone = np.concatenate([vectors(llm, [prompt], pooling_type=kind) for prompt in prompts])
        np.testing.assert_allclose(vectors(llm, prompts, pooling_type=kind), alone, atol=1e-5)
        assert np.abs(alone[:-1] - alone[1:]).max(axis=1).min() > 1e-3, "different prompts, different vectors"


def test_what_is_served_does_not_notice(llm: LLM) -> None:
    """The same tokens, and no page is taken, in the middle of other requests too."""
    prompts, params = prompts_of(llm, [40, 50]), SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    llm.reset_prefix_cache()
    before = [one.outputs[0].token_ids for one in llm.generate(prompts, params, use_tqdm=False)]
    llm.reset_prefix_cache()
    found = {}
    for number, output in enumerate(llm.stream(prompts, params)):
        found[output.request_id] = output.outputs[0].token_ids
        if number % 5 == 0:
            num_used = llm.engine.pool.num_used
            llm.embed(prompts_of(llm, [70, 3]))
            assert llm.engine.pool.num_used == num_used > 0
    assert list(found.values()) == before
    llm.engine.scheduler.check()


def test_what_cannot_be_embedded_is_refused(llm: LLM) -> None:
    for prompt in ([], [-1], [llm.model_config.vocab_size], [1] * 257):
        with pytest.raises(RequestError):
            llm.embed([[1], prompt])
    for options in ({"pooling_type": "CLS"}, {"normalize": 1}):
        with pytest.raises(RequestError, match=next(iter(options))):
            PoolingParams(**options)
