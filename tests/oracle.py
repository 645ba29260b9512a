"""The oracle: a dense, unpaged, unbatched transformer in numpy and float64, written from the definition.

Reads tensors by their names in a Hugging Face checkpoint. Imports nothing of jaxpaged but the type of its configuration, so
that a mistake in the engine's formulas is not made twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from jaxpaged.config import ModelConfig, RopeConfig

Tensors = Mapping[str, np.ndarray]
Rows = Callable[[np.ndarray], np.ndarray]
"""What becomes of the rows [X, I] that a matrix is about to multiply."""


def exact(x: np.ndarray) -> np.ndarray:
    """Nothing."""
    return x


def int8(x: np.ndarray) -> np.ndarray:
    """Each row in steps of a 127th of its largest number."""
    scales = np.abs(x).max(axis=-1, keepdims=True) / 127
    return np.rint(x / scales) * scales


def logits(tensors: Tensors, config: ModelConfig, token_ids: list[int], rows: Rows = exact) -> np.ndarray:
    """Scores of the next token after each prefix of `token_ids`: float64 [len(token_ids), V]."""
    tensors = {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()}
    x = tensors["model.embed_tokens.weight"][token_ids]
    for index in range(config.num_layers):
        layer = f"model.layers.{index}."
        x = x + _attention(tensors, config, index, _norm(x, tensors[layer + "input_layernorm.weight"], config.rms_norm_eps), rows)
        normed = _norm(x, tensors[layer + "post_attention_layernorm.weight"], config.rms_norm_eps)
        x = x + _mlp(tensors, config, index, normed, rows)
    x = _norm(x, tensors["model.norm.weight"], config.rms_norm_eps)
    return rows(x) @ tensors["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"].T


def _norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight


def _linear(tensors: Tensors, name: str, x: np.ndarray, has_bias: bool, rows: Rows) -> np.ndarray:
    y = rows(x) @ tensors[name + ".weight"].T
    return y + tensors[name + ".bias"] if has_bias else y


def _attention(tensors: Tensors, config: ModelConfig, index: int, x: np.ndarray, rows: Rows) -> np.ndarray:
    N, K, H, T = config.num_heads, config.num_kv_heads, config.head_dim, len(x)
    prefix = f"model.layers.{index}.self_attn."
    if config.hf_fused:
        fused = _linear(tensors, prefix + "qkv_proj", x, config.qkv_bias, rows)
        q, k, v = fused[:, : N * H], fused[:, N * H : (N + K) * H], fused[:, (N + K) * H :]
    else:
        q, k, v = (_linear(tensors, prefix + part, x, config.qkv_bias, rows) for part in ("q_proj", "k_proj", "v_proj"))
    q, k, v = q.reshape(T, N, H), k.reshape(T, K, H), v.reshape(T, K, H)
    if config.qk_norm:
        q = _norm(q, tensors[prefix + "q_norm.weight"], config.rms_norm_eps)
        k = _norm(k, tensors[prefix + "k_norm.weight"], config.rms_norm_eps)
    q, k = _rotate(q, config.rope), _rotate(k, config.rope)

    window = config.windows[index] if config.windows else 0
    out = np.zeros((T, N, H))
    for t in range(T):
        first = max(0, t - window + 1) if window else 0
        for n in range(N):
            head = n // (N // K)
            scores = k[first : t + 1, head] @ q[t, n] / math.sqrt(H)
            weights = np.exp(scores - scores.max())
            out[t, n] = weights / weights.sum() @ v[first : t + 1, head]
    return _linear(tensors, prefix + "o_proj", out.reshape(T, N * H), config.o_bias, rows)


def _rotate(x: np.ndarray, rope: RopeConfig) -> np.ndarray:
    """Turn the pair (i, i + H/2) of each head at position t by the angle t * frequency(i)."""
    T, _, H = x.shape
    out = np.empty_like(x)
    for i in range(H // 2):
        angles = np.arange(T) * _frequency(rope, i, H)
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        a, b = x[:, :, i], x[:, :, i + H // 2]
        out[:, :, i], out[:, :, i + H // 2] = a * cos - b * sin, b * cos + a * sin
    return out


def _frequency(rope: RopeConfig, i: int, head_dim: int) -> float:
    frequency = rope.theta ** (-2 * i / head_dim)
    if rope.rope_type == "linear":
        return frequency / rope.factor
    if rope.rope_type == "llama3":
        # Three cases, as in the reference code of Llama 3.1.
        wavelength = 2 * math.pi / frequency
        longest, shortest = (rope.original_max_position_embeddings / f for f in (rope.low_freq_factor, rope.high_freq_factor))
        if wavelength > longest:
            return frequency / rope.factor
        if wavelength < shortest:
            return frequency
        share = (rope.original_max_position_embeddings / wavelength - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        return (1 - share) * frequency / rope.factor + share * frequency
    return frequency


def _mlp(tensors: Tensors, config: ModelConfig, index: int, x: np.ndarray, rows: Rows) -> np.ndarray:
    prefix = f"model.layers.{index}.mlp."
    if config.hf_fused:
        gate, up = np.split(_linear(tensors, prefix + "gate_up_proj", x, config.mlp_bias, rows), 2, axis=-1)
    else:
        gate, up = (_linear(tensors, prefix + part, x, config.mlp_bias, rows) for part in ("gate_proj", "up_proj"))
    return _linear(tensors, prefix + "down_proj", gate / (1 + np.exp(-gate)) * up, config.mlp_bias, rows)
