"""What a model is and how an engine is set up: frozen values, every check at construction.

Knows the names and limits of all options. Refuses to know arrays, files and devices: no jax, no numpy, no I/O.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass
from typing import Any, Literal

FLOAT_DTYPES = ("float32", "bfloat16", "float16")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_DTYPE_ALIASES = {"half": "float16", "float": "float32", "fp16": "float16", "fp32": "float32", "bf16": "bfloat16"}

# One size a page may have. 8 and below waste table space, above 128 waste the tail of every sequence.
BLOCK_SIZES = (8, 16, 32, 64, 128)


class ConfigError(ValueError):
    """An option or a field of config.json has a value that is not allowed. One line: what, where, got, allowed."""


def nearest(name: str, allowed: list[str] | tuple[str, ...]) -> str:
    """A hint ', did you mean X?' for a misspelt name, or an empty string when nothing is close."""
    close = difflib.get_close_matches(name.replace("-", "_"), allowed, n=1, cutoff=0.6)
    return f", did you mean {close[0]!r}?" if close else ""


# --- fields of config.json ---------------------------------------------------------------------------------------


class _Fields:
    """Reads typed fields of one JSON object and words the error for each."""

    def __init__(self, values: dict[str, Any], where: str):
        self.values, self.where = values, where

    def fail(self, name: str, problem: str) -> ConfigError:
        return ConfigError(f"{self.where}: {name}: {problem}")

    def integer(self, name: str, default: int | None = None, *, low: int = 1, high: int = 2**31 - 1) -> int:
        value = self.values.get(name, default)
        if value is None:
            raise self.fail(name, f"missing (expected a whole number in [{low}, {high}])")
        # bool is an int in Python, and 32.0 or "32" in this file is the mark of a broken writer.
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.fail(name, f"got {value!r}, expected a whole number in [{low}, {high}]")
        return value

    def number(self, name: str, default: float | None = None, *, above: float = 0.0) -> float:
        value = self.values.get(name, default)
        if value is None:
            raise self.fail(name, f"missing (expected a finite number above {above:g})")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= above:
            raise self.fail(name, f"got {value!r}, expected a finite number above {above:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name, default)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(name, f"got {value!r}, expected true or false")
        return value


RopeType = Literal["default", "linear", "llama3"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base frequency and how it is stretched for long contexts."""

    theta: float = 10000.0
    rope_type: RopeType = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    @classmethod
    def from_hf(cls, fields: _Fields) -> RopeConfig:
        # transformers 5 writes rope_parameters with rope_theta inside; transformers 4 wrote rope_theta and rope_scaling beside each other.
        name = "rope_parameters" if fields.values.get("rope_parameters") is not None else "rope_scaling"
        scaling = fields.values.get(name) or {}
        if not isinstance(scaling, dict):
            raise fields.fail(name, f"got {scaling!r}, expected an object")
        inner = _Fields(scaling, f"{fields.where}: {name}")
        theta = inner.number("rope_theta", fields.number("rope_theta", 10000.0))
        rope_type = scaling.get("rope_type", scaling.get("type", "default"))
        partial = scaling.get("partial_rotary_factor", fields.values.get("partial_rotary_factor", 1.0))
        if partial != 1.0:
            raise fields.fail("partial_rotary_factor", f"got {partial!r}, only 1.0 is supported")
        if rope_type == "default":
            return cls(theta)
        if rope_type == "linear":
            return cls(theta, "linear", inner.number("factor"))
        if rope_type == "llama3":
            low, high = inner.number("low_freq_factor"), inner.number("high_freq_factor")
            if high <= low:
                raise inner.fail("high_freq_factor", f"got {high:g}, expected more than low_freq_factor {low:g}")
            original = inner.integer("original_max_position_embeddings")
            return cls(theta, "llama3", inner.number("factor"), low, high, original)
        raise inner.fail("rope_type", f"got {rope_type!r}, supported are default, linear, llama3")


# What distinguishes one supported family from the next, as flags. A family is a row here, not a file.
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"architecture": "LlamaForCausalLM"},
    "mistral": {"architecture": "MistralForCausalLM", "sliding_window": "field"},
    "qwen2": {"architecture": "Qwen2ForCausalLM", "qkv_bias": True, "sliding_window": "use_flag"},
    "qwen3": {"architecture": "Qwen3ForCausalLM", "qk_norm": True, "sliding_window": "use_flag"},
    "phi3": {"architecture": "Phi3ForCausalLM", "fused": True, "sliding_window": "field"},
}


@dataclass(frozen=True)
class ModelConfig:
    """Shape and flags of one decoder-only transformer. Built by `from_hf`; letters are those of `jaxpaged/__init__.py`."""

    model_type: str
    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F
    num_layers: int  # L
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    hf_fused: bool = False  # the checkpoint holds qkv_proj and gate_up_proj (Phi-3) instead of five matrices
    windows: tuple[int, ...] = ()  # per layer; 0 sees the whole context, w > 0 the last w tokens, itself included
    dtype: str = "bfloat16"  # as saved in the checkpoint
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def group_size(self) -> int:
        """G: query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @classmethod
    def from_hf(cls, values: dict[str, Any], where: str = "config.json") -> ModelConfig:
        """Build from the object in a HF config.json, written by transformers 4 or 5.

        Raises:
          ConfigError: a field is missing, has the wrong type or range, or asks for something that is not supported.
        """
        fields = _Fields(values, where)
        model_type = values.get("model_type")
        if model_type not in _FAMILIES:
            raise fields.fail("model_type", f"got {model_type!r}, supported are {', '.join(_FAMILIES)}")
        family = _FAMILIES[model_type]
        architectures = values.get("architectures")
        if architectures and family["architecture"] not in architectures:
            raise fields.fail("architectures", f"got {architectures!r}, expected {family['architecture']}")
        if values.get("quantization_config"):
            raise fields.fail("quantization_config", "quantised checkpoints are not supported yet; load the original weights")
        activation = values.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise fields.fail("hidden_act", f"got {activation!r}, supported is silu")

        hidden_size = fields.integer("hidden_size", high=2**20)
        num_heads = fields.integer("num_attention_heads", high=2**14)
        num_kv_heads = fields.integer("num_key_value_heads", num_heads, high=2**14)
        if num_heads % num_kv_heads:
            raise fields.fail("num_attention_heads", f"{num_heads} is not divisible by num_key_value_heads {num_kv_heads}")
        if values.get("head_dim") is not None:
            head_dim = fields.integer("head_dim", high=2**12)
        elif hidden_size % num_heads:
            raise fields.fail("hidden_size", f"{hidden_size} is not divisible by num_attention_heads {num_heads}, and head_dim is not given")
        else:
            head_dim = hidden_size // num_heads
        if head_dim % 2:
            raise fields.fail("head_dim", f"got {head_dim}, expected an even number (rotary embedding turns pairs)")

        num_layers = fields.integer("num_hidden_layers", high=2**12)
        vocab_size = fields.integer("vocab_size", high=2**24)
        max_positions = fields.integer("max_position_embeddings", high=2**30)
        dtype = values.get("dtype", values.get("torch_dtype")) or "float32"
        if dtype not in FLOAT_DTYPES:
            raise fields.fail("dtype", f"got {dtype!r}, supported are {', '.join(FLOAT_DTYPES)}")
        attention_bias = fields.flag("attention_bias", False)
        return cls(
            model_type=model_type,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=fields.integer("intermediate_size", high=2**22),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_position_embeddings=max_positions,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope=RopeConfig.from_hf(fields),
            tie_word_embeddings=fields.flag("tie_word_embeddings", False),
            qkv_bias=family.get("qkv_bias", attention_bias),
            o_bias=attention_bias and model_type in ("llama", "qwen3"),
            mlp_bias=fields.flag("mlp_bias", False),
            qk_norm=family.get("qk_norm", False),
            hf_fused=family.get("fused", False),
            windows=_windows(fields, family.get("sliding_window"), num_layers),
            dtype=dtype,
            bos_token_id=_token_ids(fields, "bos_token_id", vocab_size)[0] if values.get("bos_token_id") is not None else None,
            eos_token_ids=_token_ids(fields, "eos_token_id", vocab_size),
        )


def _token_ids(fields: _Fields, name: str, vocab_size: int) -> tuple[int, ...]:
    value = fields.values.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
            raise fields.fail(name, f"got {token_id!r}, expected a token id in [0, {vocab_size - 1}]")
    return tuple(ids)


def _windows(fields: _Fields, rule: str | None, num_layers: int) -> tuple[int, ...]:
    """The sliding window of each layer, 0 for full attention, from whichever of three spellings the file uses."""
    full = (0,) * num_layers
    if rule is None or fields.values.get("sliding_window") is None:
        return full
    if rule == "use_flag" and not fields.flag("use_sliding_window", False):
        return full
    window = fields.integer("sliding_window")
    layer_types = fields.values.get("layer_types")
    if layer_types is None:
        # Qwen2: the first max_window_layers layers see everything.
        first = fields.integer("max_window_layers", num_layers, low=0) if rule == "use_flag" else 0
        return tuple(0 if layer < first else window for layer in range(num_layers))
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        raise fields.fail("layer_types", f"got {layer_types!r}, expected a list of num_hidden_layers = {num_layers} names")
    known = {"full_attention": 0, "sliding_attention": window}
    for name in layer_types:
        if name not in known:
            raise fields.fail("layer_types", f"got {name!r}, supported are {', '.join(known)}")
    return tuple(known[name] for name in layer_types)
