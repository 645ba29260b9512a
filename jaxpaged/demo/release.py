"""Turns a finished training run into what the package ships: `python -m jaxpaged.demo.release --from DIR`.

Knows the model card, the provenance and the token ids that transformers gets. Refuses to know training: it only copies weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

from jaxpaged.demo import DRAFT_DIR, MODEL_DIR, corpus, export, skills

EXPECTED_FILE = MODEL_DIR.parent / "expected.json"
EXPECTED_TOKENS = 48

RAW_PROMPTS = (
    "One day Mia went to",
    "Once upon a time there was a",
    "Once upon a time, a boy called Björn",
    "It was a rainy morning, and José",
    "Hello, my name is",
    "The capital of France is",
    "PagedAttention is",
    "12 + 30 = 42\n25 + 31 =",
)
QUESTIONS = (
    "Hello!",
    "What is PagedAttention?",
    "Tell me a story about Mia and a fox.",
    "Repeat after me: the blue owl sings 🐱 Käse 猫",
    "Sort these numbers: 23, 7, 41, 15",
    "What is 47 + 38?",
    "Zoë has a red kite. Dan has a green cup. Aiko has a black drum. What does Dan have?",
    "Write as JSON with the keys name, age and city: Lena is 34 years old and lives in Zürich.",
    "What is bear in German?",
    "Count from 7 to 15.",
)
CONVERSATION = (
    {"role": "system", "content": "You are Nora."},
    {"role": "user", "content": "My name is Kofi."},
    {"role": "assistant", "content": "Nice to meet you, Kofi!"},
    {"role": "user", "content": "What is my name?"},
)
TOOL_QUESTION = ({"role": "user", "content": "What is the weather in Oslo?"},)


def prompts() -> list[str]:
    """The 20 prompts of expected.json as the model sees them."""
    chats = [
        *(corpus.chat("", question, "") for question in QUESTIONS),
        corpus.Example("", "", CONVERSATION),
        corpus.Example("", "", TOOL_QUESTION, (skills.tool_schema("get_weather"), skills.tool_schema("get_time"))),
    ]
    return [*RAW_PROMPTS, *(chat.prompt for chat in chats)]


def expected(folder: Path) -> dict[str, Any]:
    """Greedy token ids of every prompt from transformers at float32, the last one a stop token where one came in time.

    min_margin is the smallest lead, in logits, of the best token over the second: an engine may differ where it is tiny.
    """
    import torch
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    results = []
    for prompt in prompts():
        prompt_ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = model.generate(
            prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            do_sample=False,
            max_new_tokens=EXPECTED_TOKENS,
            return_dict_in_generate=True,
            output_logits=True,
        )
        best = torch.stack(out.logits)[:, 0].topk(2).values
        ids = out.sequences[0, prompt_ids.shape[1] :].tolist()
        results.append(
            {
                "prompt": prompt,
                "prompt_token_ids": prompt_ids[0].tolist(),
                "token_ids": ids,
                "text": tokenizer.decode(ids, skip_special_tokens=True),
                "min_margin": round(float((best[:, 0] - best[:, 1]).min()), 4),
            }
        )
    made_with = {"transformers": transformers.__version__, "torch": torch.__version__}
    return {"made_with": made_with, "dtype": "float32", "max_tokens": EXPECTED_TOKENS, "prompts": results}


# --- where it comes from -----------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def corpus_sha256(num_documents: int = 2000) -> str:
    """Names the version of the generator: a changed word changes it."""
    texts = itertools.islice(corpus.documents("fingerprint"), num_documents)
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def provenance(folder: Path, which: str, results: dict[str, Any]) -> dict[str, Any]:
    from jaxpaged.demo.train import RECIPES

    recipe = RECIPES[which]
    return {
        "weights_sha256": sha256(folder / "model.safetensors"),
        "tokenizer_sha256": sha256(folder / "tokenizer.json"),
        "corpus_sha256": corpus_sha256(),
        "parameters": _num_parameters(folder),
        "recipe": dataclasses.asdict(recipe),
        "results": results,
    }


def _num_parameters(folder: Path) -> int:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "numpy") as tensors:
        shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
    return sum(int(rows) * int(next(iter(columns), 1)) for rows, *columns in shapes)


CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# jaxpaged {which}

{purpose} It is not useful for anything but demos and tests: it knows the narrow text that it was trained on and nothing else.

| | |
|---|---|
| architecture | LlamaForCausalLM, {parameters:,} parameters, bfloat16, tied embeddings |
| shape | {num_layers} layers, width {hidden_size}, feed-forward {intermediate_size}, {num_heads} query and {num_kv_heads} key/value heads of {head_dim} |
| context | {max_position_embeddings} tokens |
| tokenizer | byte-level BPE, {vocab_size} tokens, every digit alone; ChatML marks |
| trained from | nothing, on text that the project's own generator writes (`jaxpaged/demo/corpus.py`); no outside text |
| training | {steps:,} steps of {tokens_per_step:,} tokens, {tokens:,} in all; AdamW, float32, two busy CPU cores; {time} |
| recipe | `python -m jaxpaged.demo.train --which {which} --seed {seed}` |
| bits per byte | {bits_per_byte} on held-out text, with the weights rounded to bfloat16 |
| sha256 of the weights | `{weights_sha256}` |

The rows of training text were {phases}. So a prompt with its answer works
best below 256 tokens.

## Scores

Share of {scored} held-out examples per skill that are answered exactly: greedy, weights rounded to bfloat16, computed in float32. Held out means: drawn from a
seed that training does not use. Small tasks (7 + 5, a definition) occur in training too.

| skill | exact match |
|---|---|
{scores}

Numbers that a program reads are in `provenance.json`, greedy token ids from transformers in `../expected.json`.
"""  # noqa: E501
PURPOSES = {
    "model": "A very small language model that ships with jaxpaged, so that everything can be tried offline.",
    "draft": "A still smaller model with the tokenizer of the demo model, to be its draft in speculative decoding.",
}


def card(which: str, source: dict[str, Any]) -> str:
    from jaxpaged.demo.train import SCORED

    recipe, results = source["recipe"], source["results"]
    minutes = f"{results['seconds'] / 60:.0f} minutes"
    if results["timed_steps"] != results["steps"]:
        minutes = f"the {results['timed_steps']:,} steps that were timed took {minutes}"
    phases = ", ".join(f"{length} tokens long for {share:.0%} of the steps" for share, length in recipe["phases"])
    return CARD.format(
        which=which,
        purpose=PURPOSES[which],
        time=minutes,
        phases=phases,
        scored=SCORED,
        tokens=results["steps"] * results["tokens_per_step"],
        scores="\n".join(f"| {skill} | {score:.0%} |" for skill, score in results["scores"].items()),
        **{name: value for name, value in recipe.items() if name not in ("steps", "tokens_per_step", "phases")},
        **{name: results[name] for name in ("steps", "tokens_per_step", "seed", "bits_per_byte")},
        **{name: source[name] for name in ("parameters", "weights_sha256")},
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m jaxpaged.demo.release", description=__doc__)
    parser.add_argument("--from", dest="run", type=Path, required=True, help="the --out folder of jaxpaged.demo.train")
    options = parser.parse_args(arguments)

    for which, folder in (("model", MODEL_DIR), ("draft", DRAFT_DIR)):
        shutil.copytree(options.run / which, folder, dirs_exist_ok=True)
        results = json.loads((options.run / f"{which}-results.json").read_text())
        source = provenance(folder, which, results)
        export.write_json(folder / "provenance.json", source)
        (folder / "README.md").write_text(card(which, source))
    export.write_json(EXPECTED_FILE, expected(MODEL_DIR))


if __name__ == "__main__":
    main()
