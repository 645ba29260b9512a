"""Models by their shape alone: a few well-known ones, how many bytes their weights take, how many pages are left for a pool.

Knows the configuration. Refuses to open a file of weights.
"""

from __future__ import annotations

from typing import Any

from jaxpaged.config import DTYPE_BYTES, ConfigError, EngineConfig, ModelConfig, nearest
from jaxpaged.simulate.gpus import Gpu


def _shape(model_type: str, layers: int, width: int, ffn: int, heads: int, kv_heads: int, **other: Any) -> dict[str, Any]:
    """The fields of a config.json that matter here."""
    return {
        "model_type": model_type,
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "dtype": "bfloat16",
        **other,
    }


# Source: the config.json of each model's repository on the Hugging Face hub.
_SHAPES = {
    "llama-3-8b": _shape("llama", 32, 4096, 14336, 32, 8, vocab_size=128256, max_position_embeddings=8192),
    "llama-3.1-8b": _shape("llama", 32, 4096, 14336, 32, 8, vocab_size=128256, max_position_embeddings=131072),
    "llama-3.2-1b": _shape(
        *("llama", 16, 2048, 8192, 32, 8), vocab_size=128256, max_position_embeddings=131072, tie_word_embeddings=True
    ),
    "llama-3-70b": _shape("llama", 80, 8192, 28672, 64, 8, vocab_size=128256, max_position_embeddings=8192),
    "llama-2-7b": _shape("llama", 32, 4096, 11008, 32, 32, vocab_size=32000, max_position_embeddings=4096),
    "llama-2-13b": _shape("llama", 40, 5120, 13824, 40, 40, vocab_size=32000, max_position_embeddings=4096),
    "mistral-7b": _shape("mistral", 32, 4096, 14336, 32, 8, vocab_size=32000, max_position_embeddings=32768, sliding_window=4096),
    "qwen2.5-7b": _shape("qwen2", 28, 3584, 18944, 28, 4, vocab_size=152064, max_position_embeddings=32768),
    "qwen3-8b": _shape("qwen3", 36, 4096, 12288, 32, 8, vocab_size=151936, max_position_embeddings=40960, head_dim=128),
    "smollm-135m": _shape(
        *("llama", 30, 576, 1536, 9, 3), vocab_size=49152, max_position_embeddings=2048, tie_word_embeddings=True
    ),
}
MODELS = tuple(_SHAPES)


def named_model(name: str) -> ModelConfig:
    """The shape of a model of the list.

    Raises:
      ConfigError: it is not in the list; the nearest name is told.
    """
    if name not in _SHAPES:
        raise ConfigError(f"model: got {name!r}{nearest(name, MODELS)} (shapes: {', '.join(MODELS)}; or a directory)")
    return ModelConfig.from_hf(_SHAPES[name], name)


def num_embedding(model: ModelConfig) -> int:
    """Numbers of the table of token embeddings: V * D."""
    return model.vocab_size * model.hidden_size


def num_layer_parameters(model: ModelConfig) -> int:
    """Numbers of one layer's parameters, matrices, biases and norms."""
    D, F, H = model.hidden_size, model.intermediate_size, model.head_dim
    qkv, heads = (model.num_heads + 2 * model.num_kv_heads) * H, model.num_heads * H
    biases = model.qkv_bias * qkv + model.o_bias * D + model.mlp_bias * (2 * F + D)
    return qkv * D + heads * D + 3 * D * F + biases + 2 * D + model.qk_norm * 2 * H


def num_parameters(model: ModelConfig) -> int:
    """Numbers of all parameters; equal to what `jaxpaged.model.weights` declares, which needs jax."""
    heads = 1 if model.tie_word_embeddings else 2
    return heads * num_embedding(model) + model.num_layers * num_layer_parameters(model) + model.hidden_size


def num_weight_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """Bytes of all parameters; equal to what `jaxpaged.model.weights` counts. For resolved options."""
    num_tables = 1 if model.tie_word_embeddings else 2
    return _bytes_of(num_parameters(model), model, config, num_layers=model.num_layers, num_tables=num_tables)


def num_step_bytes(model: ModelConfig, config: EngineConfig) -> int:
    """Bytes of weights that a step reads: the layers, and the head once."""
    num_numbers = model.num_layers * num_layer_parameters(model) + num_embedding(model)
    return _bytes_of(num_numbers, model, config, num_layers=model.num_layers, num_tables=1)


def _bytes_of(num_numbers: int, model: ModelConfig, config: EngineConfig, *, num_layers: int, num_tables: int) -> int:
    """Bytes of so many numbers, among them the matrices of so many layers and so many tables [V, D]."""
    if config.quantization is None:
        return num_numbers * DTYPE_BYTES[config.dtype]
    D, F, H = model.hidden_size, model.intermediate_size, model.head_dim
    heads, qkv = model.num_heads * H, (model.num_heads + 2 * model.num_kv_heads) * H
    num_quantised = num_layers * (qkv * D + heads * D + 3 * D * F) + num_tables * num_embedding(model)
    num_scales = num_layers * (qkv + D + 2 * F + D) + num_tables * model.vocab_size
    return num_quantised + 4 * num_scales + (num_numbers - num_quantised) * DTYPE_BYTES[config.dtype]


def plan_pages(config: EngineConfig, model: ModelConfig, gpu: Gpu) -> int:
    """Pages of the pool that an engine with these resolved options would take on this GPU, the null page included.

    Raises:
      ConfigError: the weights leave no room for a pool.
    """
    page_bytes = model.page_bytes(config.block_size, config.kv_cache_dtype)  # type: ignore[arg-type]
    if config.num_gpu_blocks_override is not None:
        return config.num_gpu_blocks_override
    if config.kv_cache_memory_bytes is not None:
        num_pages = config.kv_cache_memory_bytes // page_bytes
        room = f"kv_cache_memory_bytes: got {config.kv_cache_memory_bytes:,}"
    else:
        weight_bytes = num_weight_bytes(model, config)
        share = config.gpu_memory_utilization or 0.92
        useful = config.max_num_seqs * config.max_blocks_per_seq + 1  # type: ignore[operator]
        # The engine leaves a twentieth for the step's temporaries; see jaxpaged/runner.py.
        num_pages = min(useful, int((gpu.memory_bytes * share - weight_bytes - config.marks_bytes(model)) * 0.95) // page_bytes)
        room = f"{gpu.name}: {gpu.memory_gib:g} GiB x {share:g} less {weight_bytes / 2**30:,.1f} GiB of weights"
    if num_pages < 2:
        raise ConfigError(f"{room} leaves room for {max(0, num_pages)} pages of {page_bytes:,} bytes, at least 2 are needed")
    return num_pages
