"""Trains the demo model and its draft from nothing: `python -m jaxpaged.demo.train --out DIR`.

Knows the recipe, the loop and its checkpoints. Refuses to know the layers (they are the engine's own) and the files of an export.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from tokenizers import Tokenizer
from tqdm import tqdm

from jaxpaged.config import ModelConfig
from jaxpaged.demo import corpus, export, skills
from jaxpaged.model import weights as W
from jaxpaged.model.transformer import forward, logits
from pallas_kernels import Heads

HELD_OUT_ROWS = 64
SCORED = 100  # examples per skill
QUERY_TILE = 128


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, with the seed. Tokens per step are the same in every phase."""

    hidden_size: int
    num_layers: int
    intermediate_size: int
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    vocab_size: int = export.VOCAB_SIZE
    max_position_embeddings: int = 1024
    steps: int = 1000
    tokens_per_step: int = 2048
    # (share of the steps, row length): short rows first, because attention over long ones is most of their cost.
    phases: tuple[tuple[float, int], ...] = ((0.491, 64), (0.482, 256), (0.018, 512), (0.009, 1024))
    peak_rate: float = 2e-3
    warmup: int = 200
    weight_decay: float = 0.1

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.from_hf(export.hf_config(self))

    def length(self, step: int) -> int:
        """Tokens per row at this step."""
        end = 0.0
        for share, length in self.phases:
            end += share * self.steps
            if step < round(end):
                return length
        return self.phases[-1][1]


RECIPES = {
    "model": Recipe(hidden_size=128, num_layers=4, intermediate_size=384, steps=4400),
    "draft": Recipe(hidden_size=96, num_layers=2, intermediate_size=256, steps=800),
}


# --- batches -----------------------------------------------------------------------------------------------------


def batch(tokenizer: Tokenizer, seed: str, rows: int, length: int) -> np.ndarray:
    """Token rows, int32 [rows, length + 1], a pure function of the arguments.

    Each row starts at the start of a document, as a prompt does when the model is used, and is cut where it is full.
    """
    documents = corpus.documents(seed)
    out = np.empty((rows, length + 1), np.int32)
    for row in out:
        ids: list[int] = []
        while len(ids) <= length:
            ids += [*tokenizer.encode(next(documents)).ids, export.END_OF_TEXT_ID]
        row[:] = ids[: length + 1]
    return out


def training_batch(tokenizer: Tokenizer, recipe: Recipe, seed: int, step: int) -> np.ndarray:
    length = recipe.length(step)
    return batch(tokenizer, f"train:{seed}:{step}", recipe.tokens_per_step // length, length)


# --- the step ----------------------------------------------------------------------------------------------------


def dense_attention(B: int, T: int):
    """Causal attention for B rows of T tokens that lie one after the other, a tile of queries at a time.

    A tile reads only the keys up to its end: half of the scores of a long row are never computed.
    """

    def attend(layer: int, heads: Heads, state: None) -> tuple[jax.Array, None]:
        q, k, v, _ = heads
        N, H, K = q.shape[1], q.shape[2], k.shape[1]
        q = q.reshape(B, T, K, N // K, H) * H**-0.5
        k, v = k.reshape(B, T, K, H), v.reshape(B, T, K, H)
        tiles = []
        for start in range(0, T, QUERY_TILE):
            end = min(start + QUERY_TILE, T)
            scores = jnp.einsum("btkgh,bskh->bkgts", q[:, start:end], k[:, :end])
            mask = jnp.arange(start, end)[:, None] >= jnp.arange(end)
            chances = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
            tiles.append(jnp.einsum("bkgts,bskh->btkgh", chances, v[:, :end]))
        return jnp.concatenate(tiles, axis=1).reshape(B * T, N, H), state

    return attend


def losses(weights: W.Weights, config: ModelConfig, tokens: jax.Array) -> jax.Array:
    """Cross-entropy in nats of every next token: tokens [B, T+1] -> [B, T]."""
    B, T = tokens.shape[0], tokens.shape[1] - 1
    positions = jnp.tile(jnp.arange(T), B)
    hidden, _ = forward(weights, config, tokens[:, :-1].reshape(-1), positions, dense_attention(B, T), None)
    scores = logits(weights, config, hidden)
    return optax.softmax_cross_entropy_with_integer_labels(scores, tokens[:, 1:].reshape(-1)).reshape(B, T)


def learning_rate(recipe: Recipe) -> optax.Schedule:
    """Two cosine cycles: the first, of 18/22 of the steps, is left at 14/22 for one of half the height.

    Copying appears all at once at about two fifths of the way. A single cycle has little left to learn with by then.
    """
    steps, peak = recipe.steps, recipe.peak_rate
    left, warmup = steps * 14 // 22, min(recipe.warmup, steps // 4)  # a short trial run warms up for a quarter of its steps
    first = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps * 18 // 22, peak * 0.01)
    rate_left = float(first(left))  # type: ignore[arg-type]
    second = optax.warmup_cosine_decay_schedule(rate_left, peak / 2, min(50, (steps - left) // 4), steps - left, peak * 0.01)
    return optax.join_schedules([first, second], [left])


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    decay = partial(jax.tree.map, lambda leaf: leaf.ndim > 1)  # norms are not shrunk
    adamw = optax.adamw(learning_rate(recipe), b2=0.95, weight_decay=recipe.weight_decay, mask=decay)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def first_state(recipe: Recipe, seed: int) -> dict[str, Any]:
    """Weights and optimizer state before step 0."""
    weights = W.init(recipe.config, jax.random.key(seed))
    # Which word a token is must stay visible behind what the layers add. With embeddings of 0.02 and layers at full size the loss
    # was 4.8 after 85 steps, like this it was 2.8 after 69 (width 160, 5 layers; warm-up was 300 and 200 steps; November 2026).
    embed = weights.embed * (recipe.hidden_size**-0.5 / weights.embed.std())  # type: ignore[union-attr]
    scale = 0.1 * (2 * recipe.num_layers) ** -0.5
    layers = [layer.replace(o=layer.o * scale, down=layer.down * scale) for layer in weights.layers]  # type: ignore[attr-defined]
    weights = weights.replace(layers=layers, embed=embed)  # type: ignore[attr-defined]
    return {"weights": weights, "optimizer": optimizer(recipe).init(weights)}


def make_step(recipe: Recipe):
    """The compiled training step: (state, tokens [B, T+1]) -> (state, mean loss in nats)."""
    config, optimize = recipe.config, optimizer(recipe)

    @partial(jax.jit, donate_argnums=0)
    def step(state: dict[str, Any], tokens: jax.Array) -> tuple[dict[str, Any], jax.Array]:
        loss, gradient = jax.value_and_grad(lambda weights: losses(weights, config, tokens).mean())(state["weights"])
        updates, optimizer_state = optimize.update(gradient, state["optimizer"], state["weights"])
        return {"weights": optax.apply_updates(state["weights"], updates), "optimizer": optimizer_state}, loss

    return step


# --- the loop ----------------------------------------------------------------------------------------------------


def train(
    recipe: Recipe,
    tokenizer: Tokenizer,
    checkpoints: Path,
    *,
    seed: int = 0,
    resume: bool = False,
    minutes: float = math.inf,
    save_every: int = 200,
) -> tuple[W.Weights, list[tuple[int, float]]]:
    """Train to the last step of the recipe and return the weights and this run's (step, loss) pairs.

    A run that was killed and resumed computes the same bits as one that was not: the batch depends on the step alone, and a
    checkpoint holds everything else.

    Args:
      checkpoints: absolute folder, one per model.
      minutes: stop early, with a checkpoint, once this much time has passed.

    Raises:
      ValueError: the folder holds checkpoints and resume is false.
    """
    with ocp.CheckpointManager(checkpoints, options=ocp.CheckpointManagerOptions(max_to_keep=2)) as manager:
        state, first = first_state(recipe, seed), 0
        latest = manager.latest_step()
        if latest is not None and not resume:
            raise ValueError(f"{checkpoints} holds step {latest}: pass --resume to go on from it, or another --out")
        if latest is not None:
            shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            state, first = manager.restore(latest, args=ocp.args.StandardRestore(shapes)), latest

        step_function, log, began = make_step(recipe), [], time.monotonic()
        progress = tqdm(range(first, recipe.steps), initial=first, total=recipe.steps, unit="step", mininterval=5.0)
        for step in progress:
            state, loss = step_function(state, training_batch(tokenizer, recipe, seed, step))
            log.append((step, float(loss)))
            if step % 10 == 0:
                progress.set_postfix(loss=f"{np.mean([value for _, value in log[-10:]]):.4f}")
            late = time.monotonic() - began > minutes * 60
            if (step + 1) % save_every == 0 or step + 1 == recipe.steps or late:
                manager.save(step + 1, args=ocp.args.StandardSave(state))
            if late:
                break
        manager.wait_until_finished()
    return state["weights"], log


# --- how good it is ----------------------------------------------------------------------------------------------


def bits_per_byte(weights: W.Weights, config: ModelConfig, tokenizer: Tokenizer) -> float:
    """Bits that the model needs per byte of held-out text. Marks of chat and of text end cost bits but count no bytes."""
    rows = batch(tokenizer, "held-out:0", HELD_OUT_ROWS, 512)
    measure = jax.jit(lambda weights, tokens: losses(weights, config, tokens).sum())
    nats = sum(float(measure(weights, chunk)) for chunk in np.split(rows, HELD_OUT_ROWS // 8))
    text_bytes = sum(len(tokenizer.decode(row[1:].tolist(), skip_special_tokens=True).encode()) for row in rows)
    return nats / math.log(2) / text_bytes


def greedy_generator(weights: W.Weights, config: ModelConfig, tokenizer: Tokenizer, max_tokens: int = 96):
    """A function from prompts to greedy answers, for `skills.score`: a contiguous cache, one token per row and step.

    Prompts are fed token by token, as answers are. That is slow and leaves no second path to be wrong.
    """

    def attend(layer: int, heads: Heads, state: Any) -> tuple[jax.Array, Any]:
        q, k, v, _ = heads
        keys, values, t = state  # one [B, T, K, H] per layer
        keys, values = list(keys), list(values)
        keys[layer], values[layer] = keys[layer].at[:, t].set(k), values[layer].at[:, t].set(v)
        B, N, H = q.shape
        scores = jnp.einsum("bkgh,btkh->bkgt", q.reshape(B, k.shape[1], -1, H), keys[layer]) * H**-0.5
        chances = jax.nn.softmax(jnp.where(jnp.arange(scores.shape[-1]) <= t, scores, -jnp.inf), axis=-1)
        return jnp.einsum("bkgt,btkh->bkgh", chances, values[layer]).reshape(B, N, H), (keys, values, t)

    @jax.jit
    def run(weights: W.Weights, tokens: jax.Array, prompt_lens: jax.Array) -> jax.Array:
        B, T = tokens.shape
        empty = [jnp.zeros((B, T, config.num_kv_heads, config.head_dim)) for _ in weights.layers]

        def advance(t: jax.Array, carry: Any) -> Any:
            tokens, keys, values = carry
            hidden, (keys, values, _) = forward(weights, config, tokens[:, t], jnp.full(B, t), attend, (keys, values, t))
            best = jnp.argmax(logits(weights, config, hidden), axis=-1).astype(tokens.dtype)
            following = jnp.where(t + 1 < prompt_lens, tokens[:, t + 1], best)
            return tokens.at[:, t + 1].set(following), keys, values

        return jax.lax.fori_loop(0, T - 1, advance, (tokens, empty, empty))[0]

    def generate(prompts: list[str]) -> list[str]:
        prompt_ids = [tokenizer.encode(prompt).ids for prompt in prompts]
        longest = max(map(len, prompt_ids))
        tokens = np.zeros((len(prompts), -(-(longest + max_tokens) // 64) * 64), np.int32)
        for row, ids in zip(tokens, prompt_ids, strict=True):
            row[: len(ids)] = ids
        rows = np.asarray(run(weights, tokens, np.array([len(ids) for ids in prompt_ids])))
        return [_until_stop(tokenizer, row[len(ids) :].tolist()) for row, ids in zip(rows, prompt_ids, strict=True)]

    return generate


def _until_stop(tokenizer: Tokenizer, ids: list[int]) -> str:
    end = next((at for at, token_id in enumerate(ids) if token_id in export.STOP_IDS), len(ids))
    return tokenizer.decode(ids[:end], skip_special_tokens=False)


def measure(weights: W.Weights, config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Held-out bits per byte and the score of every skill."""
    generate = greedy_generator(weights, config, tokenizer)
    scores = {skill: skills.score(generate, skill, SCORED) for skill in tqdm(skills.SKILLS, unit="skill")}
    return {"bits_per_byte": round(bits_per_byte(weights, config, tokenizer), 4), "scores": scores}


# --- command line ------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m jaxpaged.demo.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for tokenizer, checkpoints and exports")
    parser.add_argument("--which", choices=(*RECIPES, "both"), default="both")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="instead of the recipe's; the learning rate is stretched to it")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop early; go on later with --resume")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    options = parser.parse_args(arguments)

    out = options.out.absolute()  # orbax takes absolute folders only
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = export.load_or_train_tokenizer(out, options.seed)
    for which in RECIPES if options.which == "both" else (options.which,):
        recipe = RECIPES[which] if options.steps is None else replace(RECIPES[which], steps=options.steps)
        began = time.monotonic()
        weights, log = train(
            recipe, tokenizer, out / "checkpoints" / which, seed=options.seed, resume=options.resume, minutes=options.minutes
        )
        runs = out / f"{which}-runs.jsonl"
        with runs.open("a") as file, (out / f"{which}-loss.jsonl").open("a") as loss_file:
            file.write(json.dumps({"steps": len(log), "seconds": round(time.monotonic() - began, 1)}) + "\n")
            loss_file.writelines(json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in log)
        export.write(out / which, recipe, weights, tokenizer)

        # What is measured is what is shipped: rounded to bfloat16.
        config = recipe.config
        shipped = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), weights)
        timed = [json.loads(line) for line in runs.read_text().splitlines()]
        results = {
            "steps": log[-1][0] + 1 if log else recipe.steps,
            "tokens_per_step": recipe.tokens_per_step,
            "seed": options.seed,
            "timed_steps": sum(run["steps"] for run in timed),  # fewer than steps when a run was killed
            "seconds": round(sum(run["seconds"] for run in timed if run["steps"]), 1),
            **measure(shipped, config, tokenizer),
        }
        (out / f"{which}-results.json").write_text(json.dumps(results, indent=2) + "\n")
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
