"""What rounding costs a model's answers: `python -m jaxpaged.bench.int8_accuracy`.

The same held-out text goes through the model's paged forward pass in float32, in bfloat16, and quantised in each of the two;
every token is predicted from the text before it, not from what was predicted. What is told is next to float32: how far the
distributions are apart, and how often another token is the likeliest. Knows no engine: accuracy is not a matter of batches.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpaged import checkpoint as checkpoints
from jaxpaged.config import ModelConfig
from jaxpaged.demo import corpus
from jaxpaged.llm import open_model
from jaxpaged.model import weights as model_weights
from jaxpaged.model.cache import init_cache
from jaxpaged.model.step import prefill
from jaxpaged.model.weights import Weights
from jaxpaged.tokenizer import Tokenizer

# name -> dtype and quantization; the first is what the others are held against.
VARIANTS: dict[str, tuple[str, str | None]] = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "int8, float32": ("float32", "int8"),
    "int8, bfloat16": ("bfloat16", "int8"),
}
PAGE_SIZE = 16


def rows_of(tokenizer: Tokenizer, documents: Iterator[str], eos: int | None, num_rows: int, length: int) -> np.ndarray:
    """Token rows, int32 [num_rows, length + 1]. Each starts with a document, and is cut where it is full.

    Args:
      eos: what ends a document for a tokenizer that does not know the bundled model's mark.

    Raises:
      ValueError: the documents end before that.
    """
    rows = np.empty((num_rows, length + 1), np.int32)
    mark = tokenizer.encode(corpus.END_OF_TEXT, add_special_tokens=False)
    end = mark if len(mark) == 1 else [eos] * (eos is not None)
    for row in rows:
        ids: list[int] = []
        for document in documents:
            ids += [*tokenizer.encode(document), *end]
            if len(ids) > length:
                break
        if len(ids) <= length:
            raise ValueError(f"the text has too few tokens for {num_rows} rows of {length}: lower --rows or --length")
        row[:] = ids[: length + 1]
    return rows


def logprobs_of(weights: Weights, config: ModelConfig, length: int, dtype: str) -> Any:
    """A compiled function from tokens [length] to the log-probabilities of what follows each, float32 [length, V]."""
    num_pages = -(-length // PAGE_SIZE)
    tables = jnp.arange(1, num_pages + 1, dtype=jnp.int32)[None]

    @jax.jit
    def compute(weights: Weights, tokens: jax.Array) -> jax.Array:
        cache = init_cache(config, num_pages + 1, PAGE_SIZE, dtype)
        scores, _ = prefill(weights, cache, tokens[None], tables, jnp.array([length], jnp.int32), config=config)
        return jax.nn.log_softmax(scores[0])

    return functools.partial(compute, weights)


def measure(model: str | None, rows: np.ndarray) -> list[dict[str, Any]]:
    """A summary of each variant."""
    checkpoint = open_model(model)
    length = rows.shape[1] - 1
    weights = {name: checkpoints.load(checkpoint, dtype, quantization=kind) for name, (dtype, kind) in VARIANTS.items()}
    functions = {name: logprobs_of(weights[name], checkpoint.config, length, dtype) for name, (dtype, _) in VARIANTS.items()}
    told: dict[str, list[tuple[np.ndarray, ...]]] = {name: [] for name in VARIANTS}
    for row in rows:
        found = {name: function(jnp.asarray(row[:-1])) for name, function in functions.items()}
        exact = found["float32"]
        for name, one in found.items():
            told[name].append(tuple(map(np.asarray, differences(exact, one, jnp.asarray(row[1:])))))
    summaries = []
    for name, (dtype, kind) in VARIANTS.items():
        lost, divergence, agrees, apart = (np.concatenate(parts) for parts in zip(*told[name], strict=True))
        summaries.append(
            {
                "variant": name,
                "weight_bytes": model_weights.num_bytes(checkpoint.config, dtype, kind),
                "tokens": len(lost),
                "perplexity": float(np.exp(np.mean(lost, dtype=np.float64))),
                "kl_divergence": float(np.mean(divergence, dtype=np.float64)),
                "kl_divergence_p99": float(np.quantile(divergence, 0.99)),
                "greedy_agreement": float(np.mean(agrees)),
                "mean_abs_logprob_difference": float(np.mean(apart, dtype=np.float64)),
                "max_abs_logprob_difference": float(np.max(apart)),
            }
        )
    return summaries


@jax.jit
def differences(exact: jax.Array, other: jax.Array, targets: jax.Array) -> tuple[jax.Array, ...]:
    """Of log-probabilities [T, V], for each place: the loss of the target, KL(exact || other) in nats, whether the likeliest
    token is the same, and how far the target's log-probability is from the exact one.
    """
    at = targets[:, None]
    lost, lost_exact = (-jnp.take_along_axis(one, at, axis=1)[:, 0] for one in (other, exact))
    divergence = jnp.sum(jnp.exp(exact) * (exact - other), axis=1)
    return lost, divergence, jnp.argmax(exact, axis=1) == jnp.argmax(other, axis=1), jnp.abs(lost - lost_exact)


def table(summaries: list[dict[str, Any]]) -> str:
    """The summaries for a reader."""
    line = "{:>15} {:>11} {:>11} {:>12} {:>12} {:>10} {:>12} {:>12}".format
    lines = [line("", "weights MB", "perplexity", "KL, nats", "KL, p99", "same token", "|dlogp| mean", "|dlogp| max")]
    for one in summaries:
        numbers = f"{one['weight_bytes'] / 1e6:,.2f}", f"{one['perplexity']:.4f}", f"{one['kl_divergence']:.2e}"
        numbers += f"{one['kl_divergence_p99']:.2e}", f"{one['greedy_agreement']:.2%}"
        numbers += f"{one['mean_abs_logprob_difference']:.4f}", f"{one['max_abs_logprob_difference']:.3f}"
        lines.append(line(one["variant"], *numbers))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m jaxpaged.bench.int8_accuracy", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", help="as for jaxpaged serve (the model that comes with jaxpaged)")
    of_text = "a file of documents with empty lines between them (the bundled model's held-out text)"
    parser.add_argument("--text", type=Path, help=of_text)
    parser.add_argument("--rows", type=int, default=64, help="texts (%(default)s)")
    parser.add_argument("--length", type=int, default=511, help="tokens of each that are predicted (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args(argv)
    if min(args.rows, args.length) < 1:
        parser.error("expected whole numbers of at least 1")

    checkpoint = open_model(args.model)
    documents = corpus.documents("held-out:0") if args.text is None else iter(args.text.read_text().split("\n\n"))
    eos = next(iter(checkpoint.config.eos_token_ids), None)
    try:
        rows = rows_of(Tokenizer.load(checkpoint.directory), documents, eos, args.rows, args.length)
    except ValueError as error:
        parser.error(str(error))
    summaries = measure(args.model, rows)
    print(f"{args.model or 'bundled model'}: {rows[:, 1:].size:,} tokens of held-out text", table(summaries), sep="\n")
    if args.json:
        options = {name: str(value) for name, value in vars(args).items()}
        args.json.write_text(json.dumps({"args": options, "jax": jax.__version__, "variants": summaries}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
