"""Training on a tiny recipe: loss falls, and a run that was killed and resumed computes the same bits."""

import signal
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpaged.demo import export, skills, train
from pallas_kernels import Heads

TINY = replace(
    train.RECIPES["draft"],
    hidden_size=32,
    num_layers=1,
    intermediate_size=32,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    vocab_size=400,
    steps=12,
    tokens_per_step=256,
    phases=((0.5, 64), (0.5, 128)),
    peak_rate=1e-2,
    warmup=2,
)

# The same training in a process of its own, which is killed in the middle of step 7.
KILLED = """
import os, signal, sys
from pathlib import Path
from dataclasses import replace
from jaxpaged.demo import export, train
sys.path.insert(0, sys.argv[2])
from test_train import TINY

batch = train.training_batch
def training_batch(tokenizer, recipe, seed, step):
    if step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return batch(tokenizer, recipe, seed, step)
train.training_batch = training_batch
train.train(TINY, export.train_tokenizer(0, 400, 300), Path(sys.argv[1]), save_every=2)
"""


@pytest.fixture(scope="module")
def tokenizer():
    return export.train_tokenizer(0, vocab_size=400, num_documents=300)


@pytest.fixture(scope="module")
def undisturbed(tokenizer, tmp_path_factory):
    return train.train(TINY, tokenizer, tmp_path_factory.mktemp("undisturbed"))


def assert_same_bits(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


def test_loss_falls(undisturbed):
    _, log = undisturbed
    assert [step for step, _ in log] == list(range(12))
    assert log[-1][1] < log[0][1] - 0.5


def test_a_killed_run_goes_on_with_the_same_bits(undisturbed, tokenizer, tmp_path):
    weights, log = undisturbed
    folder = str(tmp_path / "checkpoints")
    tests = str(__file__.rpartition("/")[0])
    killed = subprocess.run([sys.executable, "-c", KILLED, folder, tests], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    with pytest.raises(ValueError, match="pass --resume"):
        train.train(TINY, tokenizer, tmp_path / "checkpoints")
    resumed, rest = train.train(TINY, tokenizer, tmp_path / "checkpoints", resume=True)
    assert 0 < rest[0][0] <= 6, "it went on from a checkpoint"
    assert rest == log[rest[0][0] :]
    assert_same_bits(resumed, weights)


def test_a_batch_depends_on_seed_and_step_alone(tokenizer):
    rows = train.training_batch(tokenizer, TINY, 0, 3)
    assert rows.shape == (4, 65) and train.training_batch(tokenizer, TINY, 0, 9).shape == (2, 129)
    np.testing.assert_array_equal(rows, train.training_batch(tokenizer, TINY, 0, 3))
    assert (rows != train.training_batch(tokenizer, TINY, 0, 4)).any()
    assert (rows != train.training_batch(tokenizer, TINY, 1, 3)).any()


def test_dense_attention_is_causal_and_its_tiles_do_not_matter(monkeypatch):
    B, T, N, K, H = 2, 10, 4, 2, 8
    q, k, v = (jax.random.normal(jax.random.key(at), (B * T, heads, H)) for at, heads in enumerate((N, K, K)))
    sound = jnp.ones(B * T, bool)
    whole, _ = train.dense_attention(B, T)(0, Heads(q, k, v, sound), None)
    later = np.arange(B * T) % T >= 6
    changed, _ = train.dense_attention(B, T)(0, Heads(q, k.at[later].set(0), v.at[later].set(0), sound), None)
    np.testing.assert_allclose(changed[~later], whole[~later], atol=1e-6)

    monkeypatch.setattr(train, "QUERY_TILE", 4)
    tiled, _ = train.dense_attention(B, T)(0, Heads(q, k, v, sound), None)
    np.testing.assert_allclose(tiled, whole, atol=1e-6)


def test_the_generator_with_a_cache_says_what_the_dense_model_says(undisturbed, tokenizer):
    weights, _ = undisturbed
    prompts = [example.prompt for example in skills.held_out("order", 3)]
    generate = train.greedy_generator(weights, TINY.config, tokenizer, max_tokens=32)
    for prompt, text in zip(prompts, generate(prompts), strict=True):
        assert text == generate([prompt])[0], "a prompt alone equals the same prompt in a batch"
