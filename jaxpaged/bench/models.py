"""Models to measure: the bundled one, a directory or hub id, or random weights of a known shape. Opens engines, no more."""

from __future__ import annotations

from typing import Any

import jax

from jaxpaged.bench.decode import SHAPE_135M
from jaxpaged.config import EngineConfig, ModelConfig
from jaxpaged.engine import Engine
from jaxpaged.llm import LLM
from jaxpaged.model import weights as model_weights

# Qwen3-0.6B's.
SHAPE_0_6B = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
# Small, and long enough to see how a step grows with its context.
_SMALL = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8}
SHAPE_LONG = {**SHAPE_135M, **_SMALL, "num_key_value_heads": 4, "max_position_embeddings": 16384}
LONG = "long"
SHAPES = {"135M": SHAPE_135M, "0.6B": SHAPE_0_6B, LONG: SHAPE_LONG}
HELP = f"a directory or hub id, or random weights of a shape: {', '.join(SHAPES)} (default: the bundled model)"


def open_engine(name: str | None, **options: Any) -> Engine:
    """An engine of a model, without a tokenizer. A shape's longest context is as long as `max_model_len` asks."""
    if name not in SHAPES:
        return LLM(name, **{**options, "skip_tokenizer_init": True, "use_tqdm_on_load": False}).engine
    shape, dtype = SHAPES[name], options.get("dtype", "bfloat16")
    longest = max(shape["max_position_embeddings"], options.get("max_model_len") or 0)  # type: ignore[call-overload]
    model = ModelConfig.from_hf({**shape, "dtype": dtype, "max_position_embeddings": longest})
    options = {"dtype": dtype, **options}
    return Engine.from_weights(EngineConfig(**options), model, model_weights.init(model, jax.random.key(0), dtype))
