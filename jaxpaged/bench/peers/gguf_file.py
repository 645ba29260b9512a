"""Writes a Hugging Face directory's weights as GGUF, llama.cpp's format, for models of the llama and qwen3 architectures.

Token ids in, token ids out: the file has no vocabulary. Knows nothing of tokenizers, and no model but what config.json says.
Source of names and of the order of q and k: llama.cpp's `convert_hf_to_gguf.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ARCHITECTURES = ("llama", "qwen3")
TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
_MAX_PIECE = 2**24  # elements that are quantised at once: what a matrix needs as float32 stays small beside the matrix

_LAYER = {
    "input_layernorm.weight": "attn_norm",
    "self_attn.q_proj.weight": "attn_q",
    "self_attn.k_proj.weight": "attn_k",
    "self_attn.v_proj.weight": "attn_v",
    "self_attn.o_proj.weight": "attn_output",
    "self_attn.q_norm.weight": "attn_q_norm",
    "self_attn.k_norm.weight": "attn_k_norm",
    "post_attention_layernorm.weight": "ffn_norm",
    "mlp.gate_proj.weight": "ffn_gate",
    "mlp.up_proj.weight": "ffn_up",
    "mlp.down_proj.weight": "ffn_down",
}
_WHOLE = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}


def write(model: str, path: str, kind: str) -> None:
    """Write `path`, whole or not at all.

    Matrices get the type `kind`, norms are float32. A matrix whose rows are not whole blocks of 32 is float16 where `kind` is
    a quantised type, as llama.cpp's own converter has it.

    Raises:
      ValueError: a type, an architecture or a tensor that this writer does not know.
    """
    import gguf  # pyright: ignore[reportMissingImports]

    if kind not in TYPES:
        raise ValueError(f"GGUF type: got {kind!r} (of: {', '.join(TYPES)})")
    config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    _check(config, model)
    scratch = f"{path}.{os.getpid()}"
    writer = gguf.GGUFWriter(scratch, config["model_type"])
    _describe(writer, config, gguf, kind)
    for name, tensor in tensors(Path(model)):
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        new = new_name(name)
        if config["model_type"] == "llama" and new.endswith(("attn_q.weight", "attn_k.weight")):
            heads = config["num_attention_heads"]
            tensor = in_pairs(tensor, heads if new.endswith("attn_q.weight") else config.get("num_key_value_heads", heads))
        chosen = _type_of(tensor, kind)
        kept = gguf.GGMLQuantizationType[chosen.upper()]
        writer.add_tensor(new, _converted(tensor, kept, gguf), raw_dtype=kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(scratch, path)


def new_name(name: str) -> str:
    """What llama.cpp calls a tensor. Raises ValueError where it has none."""
    if name in _WHOLE:
        return f"{_WHOLE[name]}.weight"
    head, _, rest = name.removeprefix("model.layers.").partition(".")
    if not name.startswith("model.layers.") or not head.isdecimal() or rest not in _LAYER:
        raise ValueError(f"GGUF: {name}: a tensor that neither llama nor qwen3 has")
    return f"blk.{head}.{_LAYER[rest]}.weight"


def in_pairs(matrix: np.ndarray, num_heads: int) -> np.ndarray:
    """The rows of q or k as llama.cpp's llama wants them: its rope turns neighbours, Hugging Face's turns halves of a head."""
    rows, width = matrix.shape
    return matrix.reshape(num_heads, 2, rows // num_heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def tensors(directory: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values of all safetensors files, bfloat16 as float32. Values are read when they are asked for."""
    kinds = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] not in kinds:
                raise ValueError(f"GGUF: {path}: {name}: {entry['dtype']}, expected one of {', '.join(kinds)}")
            start, shape = 8 + length + entry["data_offsets"][0], tuple(entry["shape"])
            values = np.memmap(path, dtype=kinds[entry["dtype"]], mode="r", offset=start, shape=shape)
            yield name, (values.astype("<u4") << 16).view("<f4") if entry["dtype"] == "BF16" else np.asarray(values)


def _check(config: dict[str, Any], model: str) -> None:
    """Refuse what would be written wrong in silence."""
    if config.get("model_type") not in ARCHITECTURES:
        raise ValueError(f"GGUF: {model}: model_type {config.get('model_type')!r} (of: {', '.join(ARCHITECTURES)})")
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if (kind := scaling.get("rope_type", scaling.get("type", "default"))) != "default":
        raise ValueError(f"GGUF: {model}: rope type {kind!r}, expected default")
    for name in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if config.get(name):
            raise ValueError(f"GGUF: {model}: {name} is set, which this writer does not know")


def _describe(writer: Any, config: dict[str, Any], gguf: Any, kind: str) -> None:
    heads = config["num_attention_heads"]
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(float((config.get("rope_parameters") or {}).get("rope_theta") or config.get("rope_theta", 1e4)))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    kinds = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}
    writer.add_file_type(gguf.LlamaFileType[kinds[kind]])


def _type_of(tensor: np.ndarray, kind: str) -> str:
    if tensor.ndim == 1:
        return "f32"
    return "f16" if kind.startswith("q") and tensor.shape[-1] % 32 else kind


def _converted(tensor: np.ndarray, kind: Any, gguf: Any) -> np.ndarray:
    rows = max(1, _MAX_PIECE // max(1, tensor.shape[-1])) if tensor.ndim == 2 else len(tensor)
    pieces = [np.asarray(tensor[at : at + rows], np.float32) for at in range(0, len(tensor), rows)]
    return np.concatenate([gguf.quants.quantize(piece, kind) for piece in pieces])
