"""What a model is and how an engine is set up: frozen values, every check at construction.

Knows the names and limits of all options. Refuses to know arrays, files and devices: no jax, no numpy, no I/O.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxpaged.errors import ConfigError, nearest
from jaxpaged.quantization_config import COMPRESSED_TENSORS, check_quantization, quantization_of
from jaxpaged.speculative_config import SpeculativeConfig

FLOAT_DTYPES = ("float32", "bfloat16", "float16")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_DTYPE_ALIASES = {"half": "float16", "float": "float32", "fp16": "float16", "fp32": "float32", "bf16": "bfloat16"}

MAX_SWAP_SPACE = 2**20  # GiB
MAX_SURE_DRAFTS = 8  # as many rows as cost little more than one

# One size a page may have. 8 and below waste table space, above 128 waste the tail of every sequence.
BLOCK_SIZES = (8, 16, 32, 64, 128)

LOGPROBS_MODES = ("raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits")  # model/step.py
PREEMPTION_MODES = ("recompute", "swap", "auto")  # host/preemption.py
SCHEDULING_POLICIES = ("fcfs", "lifo", "priority", "fair_share", "sjf", "prefix")  # host/policies.py


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
        # transformers 5 writes rope_parameters with rope_theta inside; 4 wrote rope_theta and rope_scaling beside each other.
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
    quantization: str | None = None  # likewise; `dtype` is then that of what is not quantised
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def group_size(self) -> int:
        """G: query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    def page_bytes(self, page_size: int, dtype: str) -> int:
        """Bytes of one page over all layers: page_size * 2 * K * H * L * bytes per element."""
        return page_size * 2 * self.num_kv_heads * self.head_dim * self.num_layers * DTYPE_BYTES[dtype]

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
        quantization = quantization_of(values.get("quantization_config"), where)
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
            raise fields.fail(
                "hidden_size", f"{hidden_size} is not divisible by num_attention_heads {num_heads}, and head_dim is not given"
            )
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
            quantization=quantization,
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


# --- options of the engine ----------------------------------------------------------------------------------------


@dataclass(frozen=True, order=True)
class Bucket:
    """One compiled shape of the step: decode rows of one token each, and prefill tiles of a fixed number of tokens."""

    decode_rows: int
    prefill_tiles: int


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything that can be set about an engine. Names and meanings are vLLM's where it has them; None means chosen at start-up.

    Args:
      model: a local Hugging Face or orbax directory, or a hub id; None is the model that comes with jaxpaged.
      tokenizer: directory or hub id of the tokenizer; None is the model's own.
      revision: branch, tag or commit of a hub id.
      dtype: of weights and activations; auto is the checkpoint's.
      quantization: of the weights, while they are loaded; of a draft model too. int8 keeps each matrix, the embedding included,
        as int8 numbers with one float32 scale per output, and rounds each token's activations to int8 with a scale of their own
        where they meet one (w8a8, dynamic per token); all else is `dtype`. What it costs a model's answers is measured by
        `python -m jaxpaged.bench.int8_accuracy`. A checkpoint that llm-compressor has made so is loaded so without being asked;
        compressed-tensors is vLLM's name for that; None is what the checkpoint has.
      max_model_len: tokens of a prompt and its output together; auto is the model's limit.
      block_size: tokens of one page; auto is 16 on a CPU, 64 on a GPU.
      max_num_seqs: sequences in one step; auto is 32 on a CPU, 256 on a GPU.
      max_num_batched_tokens: tokens of one step, so also the longest chunk of a prompt; auto is 512 on a CPU, 2048 on a GPU.
      long_prefill_token_threshold: longest chunk of one prompt in one step; 0 for no limit of its own.
      max_num_partial_prefills: prompts in the middle of which a step may end; 0 for no limit of its own.
      async_scheduling: plan a step while the one before it runs, whose tokens reach it on the device; the outputs are the same.
        Not done where compare_with is set.
      eager_copy: outputs that share a page which each of them will write get their copies in the step after they part, those
        that cannot run in that step too; else each when it first writes.
      batch_merge_window: steps that a request may be held back, while others run, for more to be admitted with it; 0 for none.
      scheduling_policy: who is admitted first, and gives way last when pages run out: fcfs, lifo, priority, fair_share (between
        tenants), sjf (shortest job first) or prefix (longest cached prefix first); in Python also a function, see
        `jaxpaged.host.policies.Policy`.
      speculative_config: propose tokens that the model verifies several at a time; the tokens that come are the same. A
        dictionary of method (ngram or draft_model), model, num_speculative_tokens, prompt_lookup_max, prompt_lookup_min and
        adaptive, or the JSON text of one; see `jaxpaged.speculative_config`. None is none.
      speculative_model: vLLM's old way to name its model, with num_speculative_tokens; "[ngram]" is the method of that name.
      num_speculative_tokens: likewise how many.
      ageing_steps: a request that has waited longer than this many steps is ahead of all that came later, whatever the policy.
      enable_prefix_caching: requests that begin with the same tokens share the pages of that beginning.
      max_logprobs: likeliest tokens of which a step can give the log-probabilities; a beam search needs its width and one for
        each id that ends it.
      batch_invariant: the same bits for a request, whatever shares its batch and however it is chunked, cached and preempted, on
        one machine with one backend; of tokens, log-probabilities and scores. Norms and products then run in tiles of 16 tokens,
        and attention token by token, which costs up to two thirds of the tokens/s of one float32 sequence on a CPU and less of
        many: `python -m jaxpaged.bench.batch_invariant`. Seen on CPUs alone: on a GPU attention would be called for one token at
        a time, and nothing is promised.
      logprobs_mode: what `logprobs` gives of new tokens: raw_logprobs, what the model alone finds; processed_logprobs, after all
        that changes or cuts logits and the temperature, -inf for what is cut, greedy rows without temperature; or raw_logits and
        processed_logits, the same before they are normalised. Those of prompts, and of beams, are always raw_logprobs.
      logits_processors: functions that change the logits of every row, compiled into the step, in Python only; see
        `jaxpaged.LogitsProcessor`.
      kv_cache_dtype: of the page pool; auto is dtype.
      num_gpu_blocks_override: pages of the pool, whatever the memory.
      kv_cache_memory_bytes: bytes of the pool; overrides gpu_memory_utilization.
      swap_space: GiB of host memory for pages that the pool has no room for: those of preempted requests and of prefixes that
        nobody uses just now; they come back when they are asked for. 0 is none.
      kv_offloading_size: vLLM's newer name of swap_space; None is whatever that is.
      preemption_mode: what becomes of the pages of a request that gives way: recompute lets them go, swap moves them to host
        memory when the pool needs their room, auto does for each request what takes less time. Without swap_space all are
        recompute.
      offload_dir: a folder for pages that swap_space has no room for; this engine's part of it is removed when it is closed.
        None is none.
      offload_num_threads: threads that read and write there.
      offload_threshold: a page is moved to host memory or disk only when the prefix that it ends has at least so many tokens.
      prefetch_blocks: pages on their way from disk at a time.
      gpu_memory_utilization: share of the device's memory for weights, temporaries and pool; a CPU's device is the machine. Auto
        is 0.92 on a GPU, and on a CPU room for max_num_seqs full-length sequences within 4 GiB and a quarter of the free memory.
      seed: of requests that bring none of their own.
      enforce_eager: compile each bucket at its first use instead of all of them at start-up.
      skip_tokenizer_init: load no tokenizer; prompts and answers are token ids.
      allow_nonfinite: load weights that hold NaN or infinities, or a matrix of zeros.
      attention_backend: a backend of pallas_kernels, by name.
      compare_with: a second backend that runs beside the first in every step, on the same pages; see `LLM.duel`. None for none.
      compare_tolerance: largest difference of the two that is no breach, as a share of the largest number; auto is 1e-4 in
        float32, 4e-3 in float16, 2e-2 in bfloat16.
      compare_dir: where a breach is written for replay.
      prefill_tile: tokens of one prefill tile; auto is 16 on a CPU, 64 on a GPU.
      decode_row_buckets: decode rows that get a compiled step of their own.
      prefill_tile_buckets: likewise prefill tiles, so the lengths that prompts are padded to; 0, a step that only decodes, is
        always one.
      compilation_cache_dir: where compiled steps are kept between runs; auto is a folder in the user's cache, "none" is nowhere.
      flight_recorder_bytes: memory for the record of what the scheduler was told and decided, the oldest of which is dropped; see
        `Engine.save_recording` and `jaxpaged replay`. 0 is off.
      recording_dir: where that record is written when a step fails; None is nowhere.
      debug_socket: path of a local socket, this user's alone, that `jaxpaged inspect` and `jaxpaged debug` ask; None is none.

    Raises:
      ConfigError: an unknown option, or a value out of range, named with what is allowed.
    """

    model: str | None = None
    tokenizer: str | None = None
    revision: str | None = None
    dtype: str = "auto"
    quantization: str | None = None
    max_model_len: int | None = None
    block_size: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    long_prefill_token_threshold: int = 0
    max_num_partial_prefills: int = 0
    async_scheduling: bool = True
    eager_copy: bool = False
    batch_merge_window: int = 0
    scheduling_policy: str | Callable[..., Any] = "fcfs"
    speculative_config: SpeculativeConfig | Mapping[str, Any] | str | None = None
    speculative_model: str | None = None
    num_speculative_tokens: int | None = None
    ageing_steps: int = 5000
    enable_prefix_caching: bool = True
    max_logprobs: int = 20
    logprobs_mode: str = "raw_logprobs"
    logits_processors: tuple[Callable[..., Any], ...] = ()
    batch_invariant: bool = False
    kv_cache_dtype: str = "auto"
    num_gpu_blocks_override: int | None = None
    kv_cache_memory_bytes: int | None = None
    swap_space: float = 0.0
    kv_offloading_size: float | None = None
    preemption_mode: str = "auto"
    offload_dir: str | None = None
    offload_num_threads: int = 4
    offload_threshold: int = 0
    prefetch_blocks: int = 32
    gpu_memory_utilization: float | None = None
    seed: int = 0
    enforce_eager: bool = False
    skip_tokenizer_init: bool = False
    allow_nonfinite: bool = False
    attention_backend: str = "auto"
    compare_with: str | None = None
    compare_tolerance: float | None = None
    compare_dir: str = "."
    prefill_tile: int | None = None
    decode_row_buckets: tuple[int, ...] | None = None
    prefill_tile_buckets: tuple[int, ...] | None = None
    compilation_cache_dir: str | None = None
    flight_recorder_bytes: int = 64 << 20
    recording_dir: str | None = None
    debug_socket: str | None = None

    @classmethod
    def from_options(cls, **options: Any) -> EngineConfig:
        """Build from keywords; an unknown one raises and names its nearest neighbour."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                raise ConfigError(f"unknown option {name!r}{nearest(name, known)}")
        return cls(**options)

    def __post_init__(self) -> None:
        for name in ("dtype", "kv_cache_dtype"):
            value = getattr(self, name)
            value = _DTYPE_ALIASES.get(value, value) if isinstance(value, str) else value
            if value not in ("auto", *FLOAT_DTYPES):
                raise ConfigError(f"{name}: got {value!r}, expected one of auto, {', '.join(FLOAT_DTYPES)}")
            object.__setattr__(self, name, value)
        check_quantization(self.quantization)
        paths = ("compilation_cache_dir", "compare_dir", "recording_dir", "debug_socket", "offload_dir")
        for name in ("model", "tokenizer", "revision", "compare_with", *paths):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name}: got {getattr(self, name)!r}, expected a string")
        # 16.0 equals 16, so membership alone is not a check.
        if self.block_size is not None and (type(self.block_size) is not int or self.block_size not in BLOCK_SIZES):
            raise ConfigError(f"block_size: got {self.block_size!r}, expected one of {', '.join(map(str, BLOCK_SIZES))}")
        self._check_int("max_model_len", 2, 2**30)
        self._check_int("max_num_seqs", 1, 4096)
        self._check_int("max_num_batched_tokens", 1, 2**20)
        self._check_int("long_prefill_token_threshold", 0, 2**30)
        self._check_int("max_num_partial_prefills", 0, 4096)
        self._check_int("batch_merge_window", 0, 2**30)
        self._check_int("ageing_steps", 0, 2**30)
        policy = self.scheduling_policy
        if not callable(policy) and policy not in SCHEDULING_POLICIES:
            hint = nearest(policy, SCHEDULING_POLICIES) if isinstance(policy, str) else ""
            known = ", ".join(SCHEDULING_POLICIES)
            raise ConfigError(f"scheduling_policy: got {policy!r}, expected a function or one of {known}{hint}")
        self._check_int("max_logprobs", 1, 1024)
        self._check_int("num_gpu_blocks_override", 2, 2**30)
        self._check_int("kv_cache_memory_bytes", 1, 2**50)
        self._check_int("seed", -(2**63), 2**63 - 1)
        # A smaller ring would hold little more than the heads of its segments.
        self._check_int("flight_recorder_bytes", 2**16 if self.flight_recorder_bytes else 0, 2**36)
        self._check_int("prefill_tile", 1, 4096)
        self._check_int("offload_num_threads", 1, 64)
        self._check_int("offload_threshold", 0, 2**30)
        self._check_int("prefetch_blocks", 1, 2**20)
        self._check_offloading()
        self._check_speculation()
        self._check_logits()
        if self.gpu_memory_utilization is not None:
            value = self.gpu_memory_utilization
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
                raise ConfigError(f"gpu_memory_utilization: got {value!r}, expected a number in (0, 1]")
        if self.compare_tolerance is not None:
            value = self.compare_tolerance
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ConfigError(f"compare_tolerance: got {value!r}, expected a number above 0")
        flags = ("enable_prefix_caching", "batch_invariant", "async_scheduling", "eager_copy", "enforce_eager")
        for name in (*flags, "skip_tokenizer_init", "allow_nonfinite"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: got {getattr(self, name)!r}, expected True or False")
        for name, low in (("decode_row_buckets", 1), ("prefill_tile_buckets", 0)):
            sizes = getattr(self, name)
            if sizes is None:
                continue
            if not isinstance(sizes, (tuple, list)) or not all(type(size) is int and size >= low for size in sizes):
                raise ConfigError(f"{name}: got {sizes!r}, expected whole numbers of at least {low}")
            object.__setattr__(self, name, tuple(sorted(set(sizes))))

    def _check_logits(self) -> None:
        mode, processors = self.logprobs_mode, self.logits_processors
        if mode not in LOGPROBS_MODES:
            hint = nearest(mode, LOGPROBS_MODES) if isinstance(mode, str) else ""
            raise ConfigError(f"logprobs_mode: got {mode!r}, expected one of {', '.join(LOGPROBS_MODES)}{hint}")
        if not isinstance(processors, (tuple, list)) or not all(map(callable, processors)):
            raise ConfigError(f"logits_processors: got {processors!r}, expected a list of functions")
        object.__setattr__(self, "logits_processors", tuple(processors))
        for index, processor in enumerate(processors):
            for name, default in getattr(processor, "extra_args", {}).items():
                is_number = isinstance(default, (int, float)) and not isinstance(default, bool) and math.isfinite(default)
                if not isinstance(name, str) or not is_number:
                    raise ConfigError(
                        f"logits_processors[{index}]: extra_args: got {name!r}: {default!r}, expected names and finite numbers"
                    )

    @property
    def extra_args(self) -> dict[str, float]:
        """The numbers that `logits_processors` ask for by name, with what they are for requests that do not give them."""
        return {name: one for processor in self.logits_processors for name, one in getattr(processor, "extra_args", {}).items()}

    def _check_offloading(self) -> None:
        for name in ("swap_space", "kv_offloading_size"):
            value = getattr(self, name)
            if value is None and name == "kv_offloading_size":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= MAX_SWAP_SPACE:
                raise ConfigError(f"{name}: got {value!r}, expected a number of GiB in [0, {MAX_SWAP_SPACE}]")
        if self.kv_offloading_size is not None:
            if self.swap_space not in (0, self.kv_offloading_size):
                given = f"{self.kv_offloading_size!r} and swap_space {self.swap_space!r}"
                raise ConfigError(f"kv_offloading_size: got {given}, expected one of them: they are two names of one option")
            object.__setattr__(self, "swap_space", self.kv_offloading_size)
            object.__setattr__(self, "kv_offloading_size", None)  # or one of the names could not be replaced
        if self.preemption_mode not in PREEMPTION_MODES:
            hint = nearest(self.preemption_mode, PREEMPTION_MODES) if isinstance(self.preemption_mode, str) else ""
            known = ", ".join(PREEMPTION_MODES)
            raise ConfigError(f"preemption_mode: got {self.preemption_mode!r}, expected one of {known}{hint}")
        if not self.swap_space:
            if self.offload_dir is not None:
                raise ConfigError(f"offload_dir: got {self.offload_dir!r}, expected none without swap_space: set swap_space too")
            if self.preemption_mode == "swap":
                raise ConfigError(
                    "preemption_mode: got 'swap', expected recompute or auto without swap_space: set swap_space too"
                )

    def _check_speculation(self) -> None:
        given = self.speculative_config
        if self.speculative_model is not None or self.num_speculative_tokens is not None:
            if given is not None:
                raise ConfigError("speculative_config: got the older speculative_model too, expected one of the two")
            given = SpeculativeConfig.of_old_names(self.speculative_model, self.num_speculative_tokens)
            object.__setattr__(self, "speculative_model", None)  # as for kv_offloading_size
            object.__setattr__(self, "num_speculative_tokens", None)
        if given is not None:
            given = SpeculativeConfig.of(given)
            given.check_beside(self.model, self.compare_with)
            object.__setattr__(self, "speculative_config", given)

    @property
    def speculation(self) -> SpeculativeConfig | None:
        """`speculative_config` in its one form."""
        return self.speculative_config  # type: ignore[return-value]

    def _check_int(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ConfigError(f"{name}: got {value!r}, expected a whole number in [{low}, {high}]")

    def resolved(self, model: ModelConfig, platform: str) -> EngineConfig:
        """The same options with every None and auto replaced, except those that only the device's free memory can tell.

        Args:
          platform: jax's name, "cpu" or "gpu" or another.
        """
        on_cpu = platform == "cpu"
        max_model_len = self.max_model_len or model.max_position_embeddings
        if max_model_len > model.max_position_embeddings:
            raise ConfigError(
                f"max_model_len: got {max_model_len:,}, the model's max_position_embeddings is {model.max_position_embeddings:,}"
            )
        max_num_seqs = self.max_num_seqs or (32 if on_cpu else 256)
        max_tokens = self.max_num_batched_tokens or max(max_num_seqs, 512 if on_cpu else 2048)
        if max_tokens < max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens: got {max_tokens}, expected at least max_num_seqs {max_num_seqs} (one token each)"
            )
        dtype = model.dtype if self.dtype == "auto" else self.dtype
        if self.quantization == COMPRESSED_TENSORS and model.quantization is None:
            raise ConfigError(f"quantization: got {COMPRESSED_TENSORS!r}, the checkpoint is not quantised; int8 quantises it")
        quantization = model.quantization or self.quantization
        tile = self.prefill_tile or (16 if on_cpu else 64)
        max_tiles, max_rows = -(-max_tokens // tile), self._rows_of(max_num_seqs, max_tokens)
        return dataclasses.replace(
            self,
            dtype=dtype,
            quantization=quantization,
            kv_cache_dtype=dtype if self.kv_cache_dtype == "auto" else self.kv_cache_dtype,
            max_model_len=max_model_len,
            block_size=self.block_size or (16 if on_cpu else 64),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_tokens,
            async_scheduling=self.async_scheduling and self.compare_with is None,  # a duel looks at the pages between two steps
            prefill_tile=tile,
            decode_row_buckets=self.decode_row_buckets or _default_rows(max_num_seqs, on_cpu, max_rows),
            prefill_tile_buckets=self.prefill_tile_buckets or _default_tiles(max_tiles, on_cpu),
        )

    @property
    def weights_dtype(self) -> str:
        """What the weights are kept as, in words. For resolved options."""
        return self.dtype if self.quantization is None else f"{self.quantization}, {self.dtype}"

    def marks_bytes(self, model: ModelConfig) -> int:
        """What the marks of tokens that penalties count take on the device; see jaxpaged/adjuster.py. For resolved options."""
        return self.max_num_seqs * model.vocab_size * 4  # type: ignore[operator]

    def num_host_pages(self, model: ModelConfig) -> int:
        """Pages of host memory below the pool. For resolved options.

        Raises:
          ConfigError: swap_space is too small for one.
        """
        page_bytes = model.page_bytes(self.block_size, self.kv_cache_dtype)  # type: ignore[arg-type]
        num_bytes = int(self.swap_space * 2**30)
        if self.swap_space and num_bytes < page_bytes:
            needed = f"at least {page_bytes / 2**30:.2g} GiB, one page of {page_bytes:,} bytes"
            raise ConfigError(f"swap_space: got {self.swap_space!r} GiB, expected 0 or {needed}")
        return num_bytes // page_bytes

    def buckets(self) -> list[Bucket]:
        """Every shape that is compiled, smallest first; the largest holds every step. For resolved options."""
        if self.decode_row_buckets is None or self.prefill_tile_buckets is None or self.max_num_seqs is None:
            raise ConfigError("buckets() needs resolved options")
        rows = _enough(self.decode_row_buckets, self.max_decode_rows)
        tiles = _enough((0, *self.prefill_tile_buckets), self.max_prefill_tiles)
        return [Bucket(decode_rows, prefill_tiles) for prefill_tiles in tiles for decode_rows in rows]

    @property
    def max_decode_rows(self) -> int:
        """Decode rows of the largest step: of each sequence its last token, and those that are proposed. For resolved options."""
        return self._rows_of(self.max_num_seqs, self.max_num_batched_tokens)  # type: ignore[arg-type]

    @property
    def max_drafts(self) -> int:
        """Tokens that are proposed for one sequence in one step at most: there may be sure ones without speculation too."""
        return max(MAX_SURE_DRAFTS, self.speculation.num_speculative_tokens if self.speculation is not None else 0)

    @property
    def num_places_ahead(self) -> int:
        """Places after its next token that a sequence is to have pages for: a draft model keeps there what it goes on from."""
        is_by_model = self.speculation is not None and self.speculation.method == "draft_model"
        return self.speculation.num_speculative_tokens if is_by_model else 0  # type: ignore[union-attr]

    def _rows_of(self, max_num_seqs: int, max_tokens: int) -> int:
        num_each = 1 + (self.speculation.num_speculative_tokens if self.speculation is not None else 0)
        return min(max_num_seqs * num_each, max(max_tokens, max_num_seqs))

    @property
    def max_prefill_tiles(self) -> int:
        """Tiles of the largest step. For resolved options."""
        return -(-self.max_num_batched_tokens // self.prefill_tile)  # type: ignore[operator]

    @property
    def max_blocks_per_seq(self) -> int:
        """M, the width of a block table. For resolved options."""
        return -(-self.max_model_len // self.block_size)  # type: ignore[operator]


def _enough(sizes: tuple[int, ...], largest: int) -> list[int]:
    """The sizes up to the first that holds `largest`, which is added when none does."""
    above = [size for size in sizes if size >= largest]
    return sorted({size for size in sizes if size < largest} | {min(above, default=largest)})


def _default_tiles(max_tiles: int, on_cpu: bool) -> tuple[int, ...]:
    """Prompts are padded to the next of these: on a CPU at full price, while on a GPU a few tiles cost what one does.

    With (1, 8, 32) tiles of 16 tokens ShareGPT-like prompts were padded by 91%, with (1, 4, 16, 32) by 56%, with all powers of
    two by 35%, which takes 14 compiled steps instead of 10 (400 simulated requests, 20 a second, November 2026). A prompt a step,
    16 to 512 tokens, log-uniform: (1, 4, 16, 32) 60%, (1, 4, 8, 16, 32) 42%, all powers of two 38%.
    """
    return tuple(sorted({*(size for size in ((1, 4, 8, 16) if on_cpu else (1, 8)) if size < max_tiles), max_tiles}))


def _default_rows(max_num_seqs: int, on_cpu: bool, max_rows: int) -> tuple[int, ...]:
    """Few sizes: rows cost little where the weights' bytes are the cost, and each size compiles once per prefill size.

    Rows beyond max_num_seqs are those of proposed tokens. How many are worth it is found by trying, so that there are sizes in
    between; max_num_seqs stays one, for steps in which nothing is proposed.
    """
    sizes = {1, 8, *(2**k for k in range(5 if on_cpu else 4, 12, 2 if on_cpu else 1))}
    found = {size for size in sizes if size < max_num_seqs}
    size = max_num_seqs
    while size < max_rows:
        found.add(size)
        size = 4 * size if 6 * size <= max_rows else max_rows
    return tuple(sorted(found | {size}))
