"""jaxpaged: PagedAttention inference in JAX.

    from jaxpaged import LLM, SamplingParams

    llm = LLM()                                   # the model that comes with the package; or a directory, or a hub id
    for output in llm.generate(["One day", "Sort these words"], SamplingParams(temperature=0, max_tokens=32)):
        print(output.outputs[0].text)

The letters of every shape, comment and einsum in this project:

    B  rows of a batch               N  query heads                 X  tokens of one step, all rows and tiles together
    T  query tokens per row          K  key/value heads             R  rows of one step that may sample a token
    L  layers                        G  query heads per key/value   C  prefill tiles of one step
    P  pages per layer                  head, N / K
    S  token places per page         H  size of one head            page 0 is the null page, where padding reads and writes;
    M  pages per row, the width      D  model width                 slot = page * S + offset
       of a block table              F  feed-forward width
                                     V  vocabulary

Nothing heavy is imported before it is used: `import jaxpaged` loads neither jax nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jaxpaged.version import __version__

if TYPE_CHECKING:
    from jaxpaged.async_llm import AsyncLLM
    from jaxpaged.config import ConfigError, EngineConfig, ModelConfig
    from jaxpaged.config import EngineConfig as EngineArgs
    from jaxpaged.embedder import PoolingParams
    from jaxpaged.engine import Engine
    from jaxpaged.host.beam_params import BeamSearchParams
    from jaxpaged.host.request import RequestError, RequestOutputKind, SamplingParams
    from jaxpaged.host.structured import StructuredOutputsParams
    from jaxpaged.llm import LLM, load_weights
    from jaxpaged.model.cache import init_cache
    from jaxpaged.model.processors import LogitsProcessor, LogitsRows
    from jaxpaged.model.step import decode, prefill
    from jaxpaged.outputs import (
        BeamSearchOutput,
        BeamSearchSequence,
        CompletionOutput,
        EmbeddingRequestOutput,
        Logprob,
        RequestOutput,
        ScoreOutput,
    )
    from jaxpaged.tokenizer import Tokenizer

__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSearchSequence",
    "CompletionOutput",
    "ConfigError",
    "EmbeddingRequestOutput",
    "Engine",
    "EngineArgs",
    "EngineConfig",
    "LogitsProcessor",
    "LogitsRows",
    "Logprob",
    "ModelConfig",
    "PoolingParams",
    "RequestError",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "ScoreOutput",
    "StructuredOutputsParams",
    "Tokenizer",
    "__version__",
    "decode",
    "init_cache",
    "load_weights",
    "prefill",
]

# public name -> (module, name in it)
_LAZY = {
    "LLM": ("jaxpaged.llm", "LLM"),
    "AsyncLLM": ("jaxpaged.async_llm", "AsyncLLM"),
    "BeamSearchOutput": ("jaxpaged.outputs", "BeamSearchOutput"),
    "BeamSearchParams": ("jaxpaged.host.beam_params", "BeamSearchParams"),
    "BeamSearchSequence": ("jaxpaged.outputs", "BeamSearchSequence"),
    "CompletionOutput": ("jaxpaged.outputs", "CompletionOutput"),
    "ConfigError": ("jaxpaged.config", "ConfigError"),
    "EmbeddingRequestOutput": ("jaxpaged.outputs", "EmbeddingRequestOutput"),
    "Engine": ("jaxpaged.engine", "Engine"),
    "EngineArgs": ("jaxpaged.config", "EngineConfig"),  # vLLM's name for it
    "EngineConfig": ("jaxpaged.config", "EngineConfig"),
    "LogitsProcessor": ("jaxpaged.model.processors", "LogitsProcessor"),
    "LogitsRows": ("jaxpaged.model.processors", "LogitsRows"),
    "Logprob": ("jaxpaged.outputs", "Logprob"),
    "ModelConfig": ("jaxpaged.config", "ModelConfig"),
    "PoolingParams": ("jaxpaged.embedder", "PoolingParams"),
    "RequestError": ("jaxpaged.host.request", "RequestError"),
    "RequestOutput": ("jaxpaged.outputs", "RequestOutput"),
    "RequestOutputKind": ("jaxpaged.host.request", "RequestOutputKind"),
    "SamplingParams": ("jaxpaged.host.request", "SamplingParams"),
    "ScoreOutput": ("jaxpaged.outputs", "ScoreOutput"),
    "StructuredOutputsParams": ("jaxpaged.host.structured", "StructuredOutputsParams"),
    "Tokenizer": ("jaxpaged.tokenizer", "Tokenizer"),
    "decode": ("jaxpaged.model.step", "decode"),
    "init_cache": ("jaxpaged.model.cache", "init_cache"),
    "load_weights": ("jaxpaged.llm", "load_weights"),
    "prefill": ("jaxpaged.model.step", "prefill"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'jaxpaged' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
