"""Every parameter of the transformer, declared once: shape, logical axes, initialiser, and its tensors in a HF checkpoint.

Initialisation, sharding, loading, conversion and memory estimates read this declaration. Refuses to know where bytes come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxpaged.config import DTYPE_BYTES, ModelConfig
from jaxpaged.model import quantization as quantizations
from jaxpaged.model.panels import PanelMatrix, in_panels
from jaxpaged.model.quantization import QuantizedMatrix, quantized

Matrix = jax.Array | QuantizedMatrix | PanelMatrix


@flax.struct.dataclass
class Layer:
    """One decoder layer. Matrices are [out, in], as in a HF checkpoint: on a CPU the product is up to 1.7x faster so."""

    attention_norm: jax.Array  # [D]
    qkv: Matrix  # [K, G+2, H, D]: per key/value head, its G query heads, then key, then value
    qkv_bias: jax.Array | None  # [K, G+2, H]
    q_norm: jax.Array | None  # [H]
    k_norm: jax.Array | None  # [H]
    o: Matrix  # [D, N*H]
    o_bias: jax.Array | None  # [D]
    mlp_norm: jax.Array  # [D]
    gate_up: Matrix  # [2, F, D]: gate, then up
    gate_up_bias: jax.Array | None  # [2, F]
    down: Matrix  # [D, F]
    down_bias: jax.Array | None  # [D]


@flax.struct.dataclass
class Weights:
    """All parameters, as a plain pytree. The layers are a list: a scan over a stack would copy its slices (TRIED.md)."""

    embed: Matrix  # [V, D]
    layers: list[Layer]
    norm: jax.Array  # [D]
    lm_head: Matrix | None  # [V, D]; None when tied to embed


@dataclass(frozen=True)
class Parameter:
    """One parameter: where it sits in the tree, its shape, the logical name of each axis, and how a checkpoint stores it.

    `parts` names the HF tensors and the shape of each; `pack` builds the parameter from them and `unpack` takes it apart again,
    both on numpy arrays and both without arithmetic, so that a round trip is bit-exact.
    """

    path: tuple[str | int, ...]
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: str  # "normal", "ones" or "zeros"
    fan_in: int
    parts: tuple[tuple[str, tuple[int, ...]], ...]
    pack: Callable[[list[np.ndarray]], np.ndarray]
    unpack: Callable[[np.ndarray], list[np.ndarray]]

    @property
    def name(self) -> str:
        """The path as one string, for messages and manifests: 'layers.3.qkv'."""
        return ".".join(map(str, self.path))

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """Whether it is one that rows are multiplied by, or looked up in: those are what quantisation is for."""
        return self.init == "normal"

    def num_bytes(self, dtype: str, quantization: str | None = None) -> int:
        """Bytes on the device."""
        if self.is_matrix and quantization is not None:
            return quantizations.num_bytes(self.shape)
        return self.size * DTYPE_BYTES[dtype]


def declare(config: ModelConfig) -> list[Parameter]:
    """All parameters of a model, in the order of a HF checkpoint."""
    D, V = config.hidden_size, config.vocab_size
    parameters = [_plain(("embed",), (V, D), ("vocab", "embed"), "model.embed_tokens.weight", init="normal")]
    for index in range(config.num_layers):
        parameters += _declare_layer(config, index)
    parameters.append(_plain(("norm",), (D,), ("embed",), "model.norm.weight", init="ones"))
    if not config.tie_word_embeddings:
        parameters.append(_plain(("lm_head",), (V, D), ("vocab", "embed"), "lm_head.weight", init="normal"))
    return parameters


def _declare_layer(config: ModelConfig, index: int) -> list[Parameter]:
    D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
    N, K, G = config.num_heads, config.num_kv_heads, config.group_size
    hf = f"model.layers.{index}."

    def plain(name: str, shape: tuple[int, ...], axes: tuple[str, ...], hf_name: str, init: str) -> Parameter:
        return _plain(("layers", index, name), shape, axes, hf + hf_name, init=init)

    def qkv(name: str, kind: str, tail: tuple[int, ...], axes: tuple[str, ...], init: str) -> Parameter:
        """The fused query/key/value parameter; `tail` is (D,) for the matrix and () for its bias."""
        heads = ((N, "q_proj"), (K, "k_proj"), (K, "v_proj"))

        def pack(tensors: list[np.ndarray]) -> np.ndarray:
            if config.hf_fused:
                tensors = np.split(tensors[0], [N * H, (N + K) * H])
            q, k, v = (t.reshape(K, -1, H, *t.shape[1:]) for t in tensors)
            return np.concatenate([q, k, v], axis=1)

        def unpack(array: np.ndarray) -> list[np.ndarray]:
            q, k, v = array[:, :G], array[:, G], array[:, G + 1]
            tensors = [np.ascontiguousarray(t).reshape(-1, *tail) for t in (q, k, v)]
            return [np.concatenate(tensors)] if config.hf_fused else tensors

        if config.hf_fused:
            parts = ((f"{hf}self_attn.qkv_proj.{kind}", ((N + 2 * K) * H, *tail)),)
        else:
            parts = tuple((f"{hf}self_attn.{part}.{kind}", (n * H, *tail)) for n, part in heads)
        return Parameter(("layers", index, name), (K, G + 2, H, *tail), axes, init, D, parts, pack, unpack)

    def gate_up(name: str, kind: str, tail: tuple[int, ...], axes: tuple[str, ...], init: str) -> Parameter:
        def pack(tensors: list[np.ndarray]) -> np.ndarray:
            return tensors[0].reshape(2, F, *tensors[0].shape[1:]) if config.hf_fused else np.stack(tensors)

        def unpack(array: np.ndarray) -> list[np.ndarray]:
            return [array.reshape(2 * F, *tail)] if config.hf_fused else [array[0], array[1]]

        if config.hf_fused:
            parts = ((f"{hf}mlp.gate_up_proj.{kind}", (2 * F, *tail)),)
        else:
            parts = tuple((f"{hf}mlp.{part}.{kind}", (F, *tail)) for part in ("gate_proj", "up_proj"))
        return Parameter(("layers", index, name), (2, F, *tail), axes, init, D, parts, pack, unpack)

    parameters = [
        plain("attention_norm", (D,), ("embed",), "input_layernorm.weight", "ones"),
        qkv("qkv", "weight", (D,), ("kv_heads", "group", "head", "embed"), "normal"),
    ]
    if config.qkv_bias:
        parameters.append(qkv("qkv_bias", "bias", (), ("kv_heads", "group", "head"), "zeros"))
    if config.qk_norm:
        parameters.append(plain("q_norm", (H,), ("head",), "self_attn.q_norm.weight", "ones"))
        parameters.append(plain("k_norm", (H,), ("head",), "self_attn.k_norm.weight", "ones"))
    parameters.append(plain("o", (D, N * H), ("embed", "heads"), "self_attn.o_proj.weight", "normal"))
    if config.o_bias:
        parameters.append(plain("o_bias", (D,), ("embed",), "self_attn.o_proj.bias", "zeros"))
    parameters.append(plain("mlp_norm", (D,), ("embed",), "post_attention_layernorm.weight", "ones"))
    parameters.append(gate_up("gate_up", "weight", (D,), ("gate", "ffn", "embed"), "normal"))
    if config.mlp_bias:
        parameters.append(gate_up("gate_up_bias", "bias", (), ("gate", "ffn"), "zeros"))
    parameters.append(plain("down", (D, F), ("embed", "ffn"), "mlp.down_proj.weight", "normal"))
    if config.mlp_bias:
        parameters.append(plain("down_bias", (D,), ("embed",), "mlp.down_proj.bias", "zeros"))
    return parameters


def _plain(path: tuple[str | int, ...], shape: tuple[int, ...], axes: tuple[str, ...], hf_name: str, *, init: str) -> Parameter:
    """A parameter that is one tensor of the checkpoint, unchanged."""
    return Parameter(path, shape, axes, init, shape[-1], ((hf_name, shape),), lambda tensors: tensors[0], lambda array: [array])


def build(config: ModelConfig, leaf: Callable[[Parameter], Any]) -> Weights:
    """The weights tree with `leaf(parameter)` in each place; parameters that this model lacks are None."""
    top: dict[str, Any] = {"lm_head": None}
    layers: list[dict[str, Any]] = [dict.fromkeys(Layer.__dataclass_fields__) for _ in range(config.num_layers)]
    for parameter in declare(config):
        holder, name = (layers[parameter.path[1]], parameter.path[2]) if len(parameter.path) == 3 else (top, parameter.path[0])  # type: ignore[index]
        holder[name] = leaf(parameter)  # type: ignore[index]
    return Weights(layers=[Layer(**layer) for layer in layers], **top)


def get(weights: Weights, path: tuple[str | int, ...]) -> Any:
    """The leaf at a parameter's path."""
    node: Any = weights
    for step in path:
        node = node[step] if isinstance(step, int) else getattr(node, step)
    return node


def init(config: ModelConfig, key: jax.Array, dtype: str = "float32") -> Weights:
    """Random weights: normal with standard deviation fan_in ** -0.5 (0.02 for the embedding), norms 1, biases 0."""
    keys = iter(jax.random.split(key, len(declare(config))))

    def leaf(parameter: Parameter) -> jax.Array:
        key = next(keys)
        if parameter.init != "normal":
            return getattr(jnp, parameter.init)(parameter.shape, dtype)
        scale = 0.02 if parameter.axes[0] == "vocab" else parameter.fan_in**-0.5
        return (jax.random.normal(key, parameter.shape) * scale).astype(dtype)

    return build(config, leaf)


def to_hf(weights: Weights, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """(HF tensor name, array) for every tensor of the checkpoint, one parameter at a time."""
    for parameter in declare(config):
        arrays = parameter.unpack(np.asarray(get(weights, parameter.path)))
        for (hf_name, _), array in zip(parameter.parts, arrays, strict=True):
            yield hf_name, array


def quantize(weights: Weights, config: ModelConfig) -> Weights:
    """The same with all matrices as `QuantizedMatrix`, in new arrays; what is one already stays what it is."""

    def leaf(parameter: Parameter) -> Any:
        found = get(weights, parameter.path)
        return quantized(found) if parameter.is_matrix and not isinstance(found, QuantizedMatrix) else found

    return build(config, leaf)


def turn(weights: Weights, config: ModelConfig, turned: dict[int, tuple[jax.Array, Matrix]]) -> Weights:
    """The same with the numbers of matrices as `PanelMatrix`, one after the other: those that were given are deleted.

    `turned` has what became of arrays, by their id, for those that stand in several places or models.
    """

    def leaf(parameter: Parameter) -> Any:
        found = get(weights, parameter.path)
        values = found.values if isinstance(found, QuantizedMatrix) else found
        if not parameter.is_matrix or not isinstance(values, jax.Array):
            return found
        if id(values) not in turned:
            turned[id(values)] = values, in_panels(values)
        panels = turned[id(values)][1]
        return found.replace(values=panels) if isinstance(found, QuantizedMatrix) else panels  # type: ignore[attr-defined]

    return build(config, leaf)


def num_bytes(config: ModelConfig, dtype: str, quantization: str | None = None) -> int:
    """Bytes of all parameters at `dtype`, those of matrices as they are quantised and before they are turned into panels."""
    return sum(parameter.num_bytes(dtype, quantization) for parameter in declare(config))
