"""What operators and tools ask beside the answers: how many requests there are, what the tokenizer is, traces of steps."""

from __future__ import annotations

from typing import Any

from jaxpaged import profiling
from jaxpaged.config import ConfigError
from jaxpaged.server.errors import ApiError
from jaxpaged.server.service import Service


def load(service: Service) -> dict[str, Any]:
    """vLLM's answer to /load: requests that have been taken and have not ended."""
    return {"server_load": service.llm.num_unfinished}


def tokenizer_info(service: Service) -> dict[str, Any]:
    """vLLM's answer: what tokenizer_config.json says that a client needs."""
    tokenizer = service.tokenizer
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "vocab_size": tokenizer.vocab_size,
        "model_max_length": service.llm.config.max_model_len,
        "chat_template": tokenizer.chat_templates.get("default"),
        **tokenizer.special_tokens,
    }


async def start_profile(service: Service) -> dict[str, Any]:
    """Begin a trace in profiler_dir. Raises ApiError."""
    try:
        await service.llm.in_thread(profiling.start, service.options.profiler_dir)
    except ConfigError:  # which names a folder, and that is nobody's business
        raise ApiError(409, "start_profile: a trace runs already, or cannot be written", code="profile") from None
    return {"success": True}


async def stop_profile(service: Service) -> dict[str, Any]:
    """End it and write it. Raises ApiError."""
    try:
        await service.llm.in_thread(profiling.stop)
    except ConfigError as error:
        raise ApiError(409, str(error), code="profile") from None
    return {"success": True}
