"""What every route needs: the model, its names, whose request it is. Knows no route."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxpaged.async_llm import AsyncLLM
from jaxpaged.host.checks import shown
from jaxpaged.host.request import RequestError
from jaxpaged.server.errors import ApiError
from jaxpaged.server.ids import new_id
from jaxpaged.server.options import ServerOptions
from jaxpaged.tokenizer import Tokenizer

MAX_SALT_LEN = 1024
MAX_TIMEOUT_S = 86_400
DEMO_NAME = "demo"


@dataclass(frozen=True)
class Asked:
    """One request whose fields have been read."""

    body: dict[str, Any]
    num_bytes: int
    tenant: str  # the same for one key, empty without
    receive: Any  # of ASGI: it tells when the client has left
    as_error: Callable[[BaseException], ApiError]


class Service:
    """A model behind routes."""

    def __init__(
        self,
        llm: AsyncLLM,
        options: ServerOptions,
        *,
        make_id: Callable[[], str] = new_id,
        time_s: Callable[[], float] = time.time,
    ):
        self.llm, self.options, self.make_id, self._time_s = llm, options, make_id, time_s
        self.names = options.served_model_name or (_own_name(llm.config.model),)
        self.started = self.now()
        self.queued_paths: set[str] = set()  # of routes whose requests wait for the engine

    def check_room(self, method: str, path: str) -> None:
        """Refuse what would wait where nothing more may, before its body is read. Raises QueueFullError."""
        if method == "POST" and path in self.queued_paths and self.llm.is_ready:  # else it is told that it drains
            self.llm.admission.check()

    def now(self) -> int:
        """Seconds since 1970, whole."""
        return int(self._time_s())

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's. Raises RequestError where there is none."""
        if self.llm.tokenizer is None:
            raise RequestError("prompt: this server knows no text (skip_tokenizer_init): give token ids")
        return self.llm.tokenizer

    def model_meant(self, body: dict[str, Any]) -> str:
        """The name by which a request asks for the model; none is the model's own. Raises ApiError."""
        name = body.get("model", self.names[0])
        if name not in self.names:
            message = f"model: got {shown(name)}, expected one of {', '.join(self.names)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return name

    def salt(self, asked: Asked) -> str | None:
        """What keeps the pages of one tenant's prompts from another's, and a caller's own salts apart. Raises RequestError."""
        own = asked.body.get("cache_salt")
        if own is not None and not 0 < len(own) <= MAX_SALT_LEN:
            raise RequestError(f"cache_salt: got {len(own):,} characters, expected 1 to {MAX_SALT_LEN:,}")
        if own is None and not asked.tenant:
            return None
        return hashlib.sha256(f"{asked.tenant}:{own or ''}".encode("utf-8", "backslashreplace")).hexdigest()

    def timeout_s(self, body: dict[str, Any]) -> float | None:
        """The longest that a request may take. Raises RequestError."""
        limit = self.options.request_timeout_s or None
        own = body.get("timeout")
        if own is None:
            return limit
        if isinstance(own, bool) or not isinstance(own, (int, float)) or not 0 < own <= MAX_TIMEOUT_S:
            raise RequestError(f"timeout: got {shown(own)}, expected seconds in (0, {MAX_TIMEOUT_S}]")
        return own if limit is None else min(own, limit)

    def models(self) -> list[dict[str, Any]]:
        """OpenAI's model objects."""
        root = self.names[0]
        return [
            {
                "id": name,
                "object": "model",
                "created": self.started,
                "owned_by": "jaxpaged",
                "root": root,
                "parent": None,
                "max_model_len": self.llm.config.max_model_len,
            }
            for name in self.names
        ]


def _own_name(model: str | None) -> str:
    if model is None:
        return DEMO_NAME
    return Path(model).resolve().name if os.path.isdir(model) else model
