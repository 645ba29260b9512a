"""A tiny model that reads and writes text: a trained byte-level tokenizer, a chat template, random weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from jaxpaged.config import ModelConfig
from jaxpaged.model.weights import declare

CORPUS = ["hello world, one day a small dog went to the garden. Grüße, 日本語, 😀 and naïve café!"] * 3
CHAT_TEMPLATE = (
    "{% for message in messages %}<turn>{{ message.role }}: {{ message['content'] | trim }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant: {% endif %}"
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "tie_word_embeddings": True, "eos_token_id": 0, "dtype": "float32", "rms_norm_eps": 1e-6,
}  # fmt: skip
# Two compiled steps instead of eight: what is compiled is the test's business only in tests of compiling.
FAST = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "decode_row_buckets": (4,),
    "prefill_tile_buckets": (4,),
    "use_tqdm_on_load": False,
}


def byte_level() -> tokenizers.Tokenizer:
    """As GPT-2, Llama 3 and Qwen have it: every byte is a token, merges above."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<eos>", "<turn>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _byte_fallback() -> tokenizers.Tokenizer:
    words = ["▁", "▁▁", "a", "b", "l", "o", "é", "\ufffd", "lo", "▁a", "▁b", "▁lo", "▁hello", "▁world"]
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words])}
    merges = [("l", "o"), ("▁", "a"), ("▁", "b"), ("▁", "lo")]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    return tokenizer


def llama2() -> tokenizers.Tokenizer:
    """As Llama 2 and Mistral have it: spaces are ▁, unknown characters are byte tokens, <s> goes before everything."""
    tokenizer = _byte_fallback()
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def metaspace() -> tokenizers.Tokenizer:
    """The same vocabulary behind the newer pre-tokenizer."""
    tokenizer = _byte_fallback()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer


KINDS = {"byte_level": byte_level, "llama2": llama2, "metaspace": metaspace}


def write_tokenizer(directory: Path, kind: str = "byte_level") -> None:
    """tokenizer.json and tokenizer_config.json, with a chat template."""
    directory.mkdir(parents=True, exist_ok=True)
    KINDS[kind]().save(str(directory / "tokenizer.json"))
    names = {"eos_token": "<eos>"} if kind == "byte_level" else {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    options = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE, **names}
    (directory / "tokenizer_config.json").write_text(json.dumps(options))


def write_text_model(directory: Path, **generation: object) -> Path:
    """A whole checkpoint; `generation` goes into generation_config.json."""
    write_tokenizer(directory)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    if generation:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    rng, tensors = np.random.default_rng(0), {}
    for parameter in declare(ModelConfig.from_hf(CONFIG)):
        for name, shape in parameter.parts:
            scale = 1.0 if parameter.init == "ones" else 0.3
            tensors[name] = (rng.standard_normal(shape) * scale).astype(np.float32)
    save_file(tensors, str(directory / "model.safetensors"), metadata={"format": "pt"})
    return directory
