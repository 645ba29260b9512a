"""One list of tiny models, a case for every flag of the supported families, with random tensors that hide nothing.

Norm weights and biases are random too: ones and zeros would hide a norm that is skipped and a bias that is dropped. The tensors
are made by numpy, so that every case also runs without torch; with it, transformers loads the very same ones.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from jaxpaged.config import ModelConfig
from jaxpaged.model.weights import Weights, build, declare

COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}


@dataclass(frozen=True, eq=False)
class Family:
    """`fields` are those of config.json as transformers 5 spells them; `seed` is one without near ties in the greedy text."""

    name: str
    model_type: str
    fields: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def hf_config(self) -> dict[str, Any]:
        """The object of config.json, written by hand."""
        head = {"model_type": self.model_type, "architectures": [ARCHITECTURES[self.model_type]], "dtype": "float32"}
        return {**head, **COMMON, **self.fields}

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.from_hf(self.hf_config)

    def tensors(self) -> dict[str, np.ndarray]:
        """Random tensors by name, so large that attention is sharp and greedy text does not repeat itself."""
        rng = np.random.default_rng([self.seed, len(self.name)])
        tensors = {}
        for parameter in declare(self.config):
            for name, shape in parameter.parts:
                if parameter.init == "ones":
                    tensor = rng.uniform(0.5, 1.5, shape)
                else:
                    tensor = rng.normal(0.0, 0.2, shape)
                tensors[name] = tensor.astype(np.float32)
        return tensors

    def weights(self) -> Weights:
        """The same tensors as the arrays of the engine."""
        tensors = self.tensors()
        return build(self.config, lambda parameter: jnp.asarray(parameter.pack([tensors[name] for name, _ in parameter.parts])))

    def save(self, directory: Path) -> Path:
        """Write a checkpoint without torch and transformers."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(self.hf_config))
        safetensors.numpy.save_file(self.tensors(), directory / "model.safetensors")
        return directory

    def transformers_model(self):
        """The same model in transformers, with the same tensors. Needs torch."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(self.model_type, **COMMON | self.fields, attn_implementation="eager")
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        tensors = {name: torch.from_numpy(tensor) for name, tensor in self.tensors().items()}
        if self.config.tie_word_embeddings:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        model.load_state_dict(tensors, strict=True)
        return model

    def prompts(self, count: int = 8) -> list[list[int]]:
        """Prompts of one token, of about a page, and of many."""
        rng = np.random.default_rng([self.seed, 1])
        lengths = [1, 7, 8, 9, 60, *rng.integers(2, 60, count)][:count]
        return [rng.integers(0, COMMON["vocab_size"], length).tolist() for length in lengths]


_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Short, so that at a head size of 16 some frequencies are kept, some divided and some in between.
    "original_max_position_embeddings": 64,
}

FAMILIES = [
    Family("llama2-mha", "llama", {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    Family("llama2-linear", "llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    Family("llama3", "llama", {"num_key_value_heads": 1, "rope_parameters": _LLAMA3_ROPE}),
    Family(
        "smollm", "llama", {"tie_word_embeddings": True, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72}
    ),
    Family("llama-biases", "llama", {"attention_bias": True, "mlp_bias": True}),
    Family("mistral", "mistral", {"sliding_window": 24, "head_dim": 32}),
    Family("qwen2", "qwen2", {"tie_word_embeddings": True, "use_sliding_window": False, "sliding_window": 24}),
    Family("qwen2-window", "qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}),
    Family(
        "qwen3", "qwen3", {"head_dim": 32, "rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    ),
    Family("phi3", "phi3", {"sliding_window": 30, "num_key_value_heads": 4}),
]
