"""The demo model as files: tokenizer and HF layout.

Knows formats. Refuses to know training, it is handed finished weights; and releasing, which is `release`.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxpaged.demo import corpus
from jaxpaged.model import weights as W

if TYPE_CHECKING:
    from jaxpaged.demo.train import Recipe

VOCAB_SIZE = 1536
SPECIAL_TOKENS = [corpus.END_OF_TEXT, corpus.TURN_START, corpus.TURN_END]
END_OF_TEXT_ID, _, TURN_END_ID = range(3)
STOP_IDS = [TURN_END_ID, END_OF_TEXT_ID]
TOKENIZER_DOCUMENTS = 20_000

# GPT-2's split, but every digit alone and without its space: 47 is then the same two tokens wherever it stands.
_SPLIT = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


# --- tokenizer ---------------------------------------------------------------------------------------------------


def train_tokenizer(seed: int, vocab_size: int = VOCAB_SIZE, num_documents: int = TOKENIZER_DOCUMENTS) -> Tokenizer:
    """Byte-level BPE: any text round-trips, whatever the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.islice(corpus.documents(f"tokenizer:{seed}"), num_documents), trainer)
    return tokenizer


def load_or_train_tokenizer(out: Path, seed: int) -> Tokenizer:
    path = out / "tokenizer.json"
    if not path.exists():
        train_tokenizer(seed).save(str(path))
    return Tokenizer.from_file(str(path))


# --- HF layout ---------------------------------------------------------------------------------------------------


def hf_config(recipe: Recipe) -> dict[str, Any]:
    """config.json in the spelling of transformers 4 and of 5 at once: each reads its own half."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": recipe.vocab_size,
        "hidden_size": recipe.hidden_size,
        "intermediate_size": recipe.intermediate_size,
        "num_hidden_layers": recipe.num_layers,
        "num_attention_heads": recipe.num_heads,
        "num_key_value_heads": recipe.num_kv_heads,
        "head_dim": recipe.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": recipe.max_position_embeddings,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "use_cache": True,
        "initializer_range": 0.02,
        "bos_token_id": None,
        "eos_token_id": STOP_IDS,
        "pad_token_id": END_OF_TEXT_ID,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }


def write(folder: Path, recipe: Recipe, weights: W.Weights, tokenizer: Tokenizer) -> None:
    """Write everything that a loader of the HF layout asks for; the weights are rounded to bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: array.astype(ml_dtypes.bfloat16) for name, array in W.to_hf(weights, recipe.config)}
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes for the owner alone; an installed package is for everyone
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(corpus.CHAT_TEMPLATE)
    write_json(folder / "config.json", hf_config(recipe))
    write_json(folder / "generation_config.json", {"eos_token_id": STOP_IDS, "pad_token_id": END_OF_TEXT_ID})
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": corpus.TURN_END,
            "pad_token": corpus.END_OF_TEXT,
            "additional_special_tokens": [corpus.TURN_START],
            "clean_up_tokenization_spaces": False,
            "model_max_length": recipe.max_position_embeddings,
        },
    )


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
