"""The engine computes what the model's definition says: against a float64 oracle, and against transformers where torch is.

Greedy text is checked by one forward pass of the reference over prompt and answer: if every token of the answer has the
reference's largest score after the tokens before it, then the answer is the reference's own greedy text.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import families
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from driving import Ask, ShuffledPool, another_engine, greedy, run
from families import FAMILIES, Family

from jaxpaged.checkpoint import load, open_checkpoint
from jaxpaged.config import EngineConfig
from jaxpaged.engine import Engine
from jaxpaged.model import cache as kv_cache
from jaxpaged.model import step as model_step
from jaxpaged.model.weights import Weights

PAGE = 8
NUM_TOKENS = 64
# Of the largest logit. float32 sums of this size differ by some 1e-6.
TOLERANCE = 1e-4
# Two scores closer than this are a near tie that rounding may turn: choose another seed for the family, do not loosen the test.
NEAR_TIE = 1e-4

each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


@functools.cache
def loaded(family: Family) -> Weights:
    with tempfile.TemporaryDirectory() as folder:
        return load(open_checkpoint(family.save(Path(folder))), "float32")


@functools.cache
def greedy_answers(family: Family) -> list[list[int]]:
    """The engine's greedy text, the same for every way of cutting prompts into chunks and however few pages there are."""
    options = EngineConfig(
        dtype="float32",
        block_size=PAGE,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        prefill_tile=16,
        decode_row_buckets=(8,),
        prefill_tile_buckets=(4,),
        num_gpu_blocks_override=8 * 16 + 1,
    )
    asks = [Ask(prompt, greedy(NUM_TOKENS)) for prompt in family.prompts()]
    # The engine owns its weights and deletes them.
    engine = Engine.from_weights(options, family.config, jax.tree.map(jnp.copy, loaded(family)), pool_type=ShuffledPool)
    with engine:
        answers = {"all": run(engine, asks)}
        for chunk in (1, 7, PAGE):
            answers[f"chunks of {chunk}"] = run(another_engine(engine, long_prefill_token_threshold=chunk), asks)
        # Where every layer has a window a sequence soon owns few pages.
        num_pages = 20 if engine.scheduler.limits.sliding_window else 40
        for chunk in (0, 7):
            small = another_engine(engine, num_pages=num_pages, long_prefill_token_threshold=chunk)
            answers[f"preempted, chunks of {chunk}"] = run(small, asks)
            assert small.scheduler.num_preemptions > 0
        assert engine.scheduler.num_preemptions == 0

    tokens = {name: [answer.token_ids for answer in batch] for name, batch in answers.items()}
    for name, batch in tokens.items():
        assert batch == tokens["all"], name
    assert all(len(answer) == NUM_TOKENS for answer in tokens["all"])
    assert all(len(set(answer)) > 10 for answer in tokens["all"]), "greedy text repeats itself: the test would see little"
    return tokens["all"]


def check_greedy(scores: np.ndarray, prompt: list[int], answer: list[int]) -> None:
    """`scores` [T, V] are the reference's after each token of prompt + answer."""
    deciding = scores[len(prompt) - 1 : len(prompt) - 1 + len(answer)]
    best = np.sort(deciding, axis=-1)
    assert (best[:, -1] - best[:, -2]).min() > NEAR_TIE, "a near tie: choose another seed for this family"
    assert deciding.argmax(axis=-1).tolist() == answer


@functools.cache
def paged_logits(family: Family, backend: str) -> tuple[list[list[int]], list[np.ndarray]]:
    """Sequences, and the scores after each of their tokens: all but the last four by one prefill, those by decoding."""
    config, num_decoded = family.config, 4
    sequences = [prompt + prompt[:1] * num_decoded for prompt in family.prompts()]
    B, M = len(sequences), 64 // PAGE + 1
    lens = np.array([len(sequence) - num_decoded for sequence in sequences], np.int32)
    tables = np.random.default_rng(0).permutation(np.arange(1, B * M + 1, dtype=np.int32)).reshape(B, M)
    padded = np.zeros((B, 64), np.int32)
    for row, sequence in enumerate(sequences):
        padded[row, : lens[row]] = sequence[:-num_decoded]

    cache = kv_cache.init_cache(config, B * M + 1, PAGE)
    prefill = jax.jit(functools.partial(model_step.prefill, config=config, backend=backend), donate_argnums=1)
    decode = jax.jit(functools.partial(model_step.decode, config=config, backend=backend), donate_argnums=1)
    scores, cache = prefill(loaded(family), cache, padded, tables, lens)
    rows = [list(np.asarray(scores[row, : lens[row]])) for row in range(B)]
    for offset in range(num_decoded):
        token_ids = np.array([sequence[offset - num_decoded] for sequence in sequences], np.int32)
        scores, cache = decode(loaded(family), cache, token_ids, tables, lens + offset + 1)
        for row in range(B):
            rows[row].append(np.asarray(scores[row]))
    return sequences, [np.stack(row) for row in rows]


def check_logits(got: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE * np.abs(want).max())


# --- against the oracle ---------------------------------------------------------------------------------------------


@each_family
def test_logits_equal_the_oracle(family: Family) -> None:
    """With the backend that this machine chooses, and with the one that runs everywhere."""
    tensors = family.tensors()
    want = None
    for backend in ("auto", "xla"):
        sequences, got = paged_logits(family, backend)
        want = want or [oracle.logits(tensors, family.config, sequence) for sequence in sequences]
        for one, other in zip(got, want, strict=True):
            check_logits(one, other)


@each_family
def test_greedy_text_equals_the_oracle(family: Family) -> None:
    tensors = family.tensors()
    for prompt, answer in zip(family.prompts(), greedy_answers(family), strict=True):
        check_greedy(oracle.logits(tensors, family.config, prompt + answer), prompt, answer)


def test_the_older_spelling_of_config_json_means_the_same() -> None:
    """transformers 4 wrote rope_theta beside rope_scaling, torch_dtype, and no layer_types."""
    for family in FAMILIES:
        values = dict(family.hf_config)
        values["torch_dtype"] = values.pop("dtype")
        rope = dict(values.pop("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0}))
        values["rope_theta"] = rope.pop("rope_theta")
        values["rope_scaling"] = None if rope == {"rope_type": "default"} else {"type": rope.pop("rope_type"), **rope}
        assert families.ModelConfig.from_hf(values) == family.config, family.name


# --- against transformers -------------------------------------------------------------------------------------------


@each_family
def test_a_saved_checkpoint_loads_to_the_same_weights(family: Family, torch, tmp_path: Path) -> None:
    """The config.json and the safetensors that transformers itself writes."""
    family.transformers_model().save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config == family.config
    for got, want in zip(jax.tree.leaves(load(checkpoint, "float32")), jax.tree.leaves(loaded(family)), strict=True):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


@each_family
def test_logits_equal_transformers(family: Family, torch) -> None:
    sequences, got = paged_logits(family, "auto")
    want = transformers_logits(torch, family, sequences)
    for row, sequence in enumerate(sequences):
        check_logits(got[row], want[row, : len(sequence)])


@each_family
def test_greedy_text_equals_transformers(family: Family, torch) -> None:
    prompts, answers = family.prompts(), greedy_answers(family)
    scores = transformers_logits(torch, family, [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)])
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        check_greedy(scores[row], prompt, answer)
    # Once with its own loop and cache as well.
    with torch.no_grad():
        generated = family.transformers_model().generate(torch.tensor(prompts[-1:]), max_new_tokens=NUM_TOKENS, do_sample=False)
    assert generated[0, len(prompts[-1]) :].tolist() == answers[-1]


def transformers_logits(torch, family: Family, sequences: list[list[int]]) -> np.ndarray:
    """One pass over all sequences, padded on the right, where causal attention does not look."""
    padded = np.zeros((len(sequences), max(map(len, sequences))), np.int64)
    for row, sequence in enumerate(sequences):
        padded[row, : len(sequence)] = sequence
    with torch.no_grad():
        return family.transformers_model()(torch.from_numpy(padded)).logits.numpy()
