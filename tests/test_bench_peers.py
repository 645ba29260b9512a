"""The other engines themselves, on the same weights in float32: the same greedy tokens as ours, or the harness compares nothing.

JAXPAGED_PEERS="vllm=PATH llamacpp=PATH" names their interpreters; without it they are looked for in this one and where
`make accept` puts vLLM. What is not installed is skipped.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import pytest
from text_model import FAST

from jaxpaged.bench import compare, peer
from jaxpaged.bench.decode import write_random_model
from jaxpaged.demo import MODEL_DIR
from jaxpaged.llm import LLM

pytestmark = pytest.mark.slow  # half a minute to load torch and vLLM
ACCEPT = Path(__file__).parents[1] / ".accept"
SHAPES = {
    "llama": {"num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": False},  # of 32: vLLM has none of 16
    "qwen3": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True},
}


@pytest.fixture(scope="module", params=["bundled", *SHAPES])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, and random ones: untied, and with q and k norms and heads wider than the model."""
    if request.param == "bundled":
        return MODEL_DIR
    directory = tmp_path_factory.mktemp(request.param)
    common = {"vocab_size": 512, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "rms_norm_eps": 1e-5}
    names = {"model_type": request.param, "architectures": [f"{request.param.capitalize()}ForCausalLM"], "hidden_act": "silu"}
    rest = {"max_position_embeddings": 512, "rope_theta": 5000.0}
    write_random_model(directory, {**common, **names, **rest, **SHAPES[request.param]}, "float32")
    return directory


@pytest.fixture(scope="module")
def ours(model: Path) -> tuple[list[list[int]], list[int], list[list[int]]]:
    """Prompts, lengths of answers, and what we answer."""
    rng = random.Random(0)
    prompts = [[rng.randrange(500) for _ in range(num)] for num in (5, 70, 33, 1)]
    num_outputs = [24, 9, 1, 30]
    with LLM(model, dtype="float32", skip_tokenizer_init=True, max_model_len=128, enable_prefix_caching=False, **FAST) as llm:
        return prompts, num_outputs, compare.Ours(llm).tokens(prompts, num_outputs)


@pytest.mark.parametrize("kind", list(peer.KINDS))
def test_the_same_greedy_tokens(kind: str, model: Path, ours: tuple, tmp_path: Path) -> None:
    prompts, num_outputs, expected = ours
    named = dict(pair.split("=", 1) for pair in os.environ.get("JAXPAGED_PEERS", "").split())
    accepted = ACCEPT / kind / "bin" / "python"
    python = named.get(kind.removesuffix("-static"), str(accepted) if accepted.exists() else sys.executable)
    one = peer.Wanted(kind, "f32" if kind == "llamacpp" else "float32", python)
    try:
        peer.check(one)
    except peer.PeerError as error:
        pytest.skip(str(error))
    options = {"gguf_dir": str(tmp_path)} if kind == "llamacpp" else {"enforce_eager": True} if kind == "vllm" else {}
    # Fewer sequences than requests: one waits for another's end.
    load = {"model": str(model), "max_model_len": 128, "max_num_seqs": 3, "num_threads": 2, "options": options}
    side = peer.Peer(one, load, timeout_s=400)
    try:
        side.load()
        assert side.loaded["dtype"] == one.dtype
        assert side.tokens(prompts, num_outputs) == expected
        times, tokens = side.trace(prompts[0], num_outputs[0])
        assert tokens == expected[0] and times == sorted(times) and times[0] > 0
        assert side.tokens(prompts[::-1], num_outputs[::-1]) == expected[::-1]  # nothing is left of what was before
    finally:
        side.close()
