"""From a model's name and options to an engine that is ready, with what else its directory holds.

Knows the order: whatever can be refused is refused before the weights are read. Refuses to know requests.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxpaged import checkpoint as checkpoints
from jaxpaged.checkpoint import Checkpoint, CheckpointError
from jaxpaged.config import EngineConfig, ModelConfig
from jaxpaged.demo import DRAFT_DIR, MODEL_DIR
from jaxpaged.drafter import Draft, check_draft
from jaxpaged.engine import Engine
from jaxpaged.host.request import RequestError, SamplingParams
from jaxpaged.model.weights import Weights
from jaxpaged.runner import attention_backend
from jaxpaged.structured.grammars import Grammars
from jaxpaged.tokenizer import Tokenizer

logger = logging.getLogger("jaxpaged")

# generation_config.json's name -> ours. Its do_sample is not read, as in vLLM: a temperature that is written down is meant.
_GENERATION_FIELDS = {name: name for name in ("temperature", "top_p", "top_k", "min_p")} | {"max_new_tokens": "max_tokens"}


@dataclass(frozen=True)
class Loaded:
    """A model that can be asked. `tokenizer` is None with skip_tokenizer_init."""

    engine: Engine
    tokenizer: Tokenizer | None
    model_config: ModelConfig
    default_params: SamplingParams  # what generation_config.json recommends, else the defaults of SamplingParams
    generation_defaults: dict[str, Any]  # generation_config.json itself
    load_s: float
    warm_up_s: float


def load(model: str | os.PathLike[str] | None = None, *, use_tqdm: bool = True, **options: Any) -> Loaded:
    """Load a model and compile its steps; arguments and errors are those of `LLM`."""
    config = EngineConfig.from_options(model=None if model is None else os.fspath(model), **options)
    checkpoint = open_model(config.model, config.revision)
    # Everything that can be refused is refused before the weights are read.
    resolved = config.resolved(checkpoint.config, jax.default_backend())
    attention_backend(resolved, checkpoint.config)
    draft_checkpoint = _open_draft(resolved, checkpoint)
    tokenizer = None if config.skip_tokenizer_init else _load_tokenizer(config, checkpoint)
    default_params = _default_params(checkpoint)

    started = time.perf_counter()
    how: dict[str, Any] = {"allow_nonfinite": config.allow_nonfinite, "use_tqdm": use_tqdm, "quantization": resolved.quantization}
    weights = checkpoints.load(checkpoint, resolved.dtype, **how)
    draft = None
    if draft_checkpoint is not None:
        draft = Draft(draft_checkpoint.config, checkpoints.load(draft_checkpoint, resolved.dtype, **how))
    load_s = time.perf_counter() - started
    grammars = Grammars(tokenizer.backend.to_str) if tokenizer is not None else None
    engine = Engine.from_weights(config, checkpoint.config, weights, draft=draft, grammars=grammars, use_tqdm=use_tqdm)
    warm_up_s = time.perf_counter() - started - load_s
    return Loaded(
        engine, tokenizer, checkpoint.config, default_params, checkpoint.generation_defaults, load_s=load_s, warm_up_s=warm_up_s
    )


def load_weights(
    model: str | os.PathLike[str] | None = None,
    dtype: str = "float32",
    *,
    quantization: str | None = None,
    revision: str | None = None,
) -> tuple[Weights, ModelConfig]:
    """The parameters of a model as a pytree of arrays, and its shape: what `prefill` and `decode` take.

    Args:
      model, quantization: as for `LLM`.

    Raises:
      ConfigError: there is no such dtype or quantization.
      CheckpointError: the model cannot be found or loaded.
    """
    options = EngineConfig(model=None if model is None else os.fspath(model), dtype=dtype, quantization=quantization)
    checkpoint = open_model(options.model, revision)
    quantization = options.resolved(checkpoint.config, jax.default_backend()).quantization
    return checkpoints.load(checkpoint, dtype, quantization=quantization), checkpoint.config


def open_model(model: str | None, revision: str | None = None) -> Checkpoint:
    """The checkpoint that `LLM(model)` means, its weights not yet read. Raises CheckpointError."""
    is_demo = model is None or (model == "demo" and not Path(model).is_dir())
    checkpoint = checkpoints.open_checkpoint(MODEL_DIR if is_demo else model, revision=revision)  # type: ignore[arg-type]
    for warning in checkpoint.warnings:
        logger.warning("%s", warning)
    return checkpoint


def _open_draft(config: EngineConfig, target: Checkpoint) -> Checkpoint | None:
    """The checkpoint of the draft model that resolved options ask for, its weights not yet read; None when they ask for none.

    Raises:
      ConfigError: it cannot propose for the target.
      CheckpointError: it cannot be found.
    """
    speculation = config.speculation
    if speculation is None or speculation.method != "draft_model":
        return None
    draft = open_model(speculation.model if speculation.model is not None else os.fspath(DRAFT_DIR))
    check_draft(draft.config, target.config)
    attention_backend(config, draft.config)
    return draft


def _load_tokenizer(config: EngineConfig, checkpoint: Checkpoint) -> Tokenizer:
    directory = checkpoint.directory if config.tokenizer is None else checkpoints.resolve(config.tokenizer)
    tokenizer = Tokenizer.load(directory)
    if tokenizer.max_token_id >= checkpoint.config.vocab_size:
        logger.warning(
            "The tokenizer has ids up to %d, the model only up to %d: prompts that use those in between are refused.",
            tokenizer.max_token_id,
            checkpoint.config.vocab_size - 1,
        )
    return tokenizer


def _default_params(checkpoint: Checkpoint) -> SamplingParams:
    given = checkpoint.generation_defaults
    options = {ours: given[name] for name, ours in _GENERATION_FIELDS.items() if given.get(name) is not None}
    try:
        return SamplingParams(**options)
    except RequestError as error:
        raise CheckpointError(f"{checkpoint.directory / 'generation_config.json'}: {error}") from None
