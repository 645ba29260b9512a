"""One shape for every error that a client gets, and which exception becomes which.

Knows statuses and OpenAI's error object. Refuses to tell what is nobody's business: paths, types, tracebacks.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from typing import Any

from jaxpaged.admission import QueueFullError
from jaxpaged.host.request import RequestError
from jaxpaged.streams import ClosedError, DeadlineError, EngineError, StalledError

logger = logging.getLogger("jaxpaged")

MAX_MESSAGE_LEN = 500
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 503: "service_unavailable_error"}
_CODES = {404: "not_found", 405: "method_not_allowed", 408: "timeout", 411: "length_required", 413: "too_large"}
_CODES |= {415: "unsupported_media_type", 431: "headers_too_large", 500: "internal_error", 503: "unavailable"}
# A field of SamplingParams -> fields of requests that it may come from.
_SOURCES = {
    "structured_outputs": ("response_format", "tool_choice"),
    "max_tokens": ("max_completion_tokens", "max_output_tokens"),
    "response_format": ("text",),
    "logprobs": ("top_logprobs",),
    "prompt_logprobs": ("logprobs",),
}
_TOO_LONG = re.compile(r"(prompts?\[\d+\]: )?prompt has ")
_FIELD = re.compile(r"([a-z_]+)[\w.\[\]]*(?=: )")


class ApiError(Exception):
    """What a client is told instead of an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.headers = status, param, headers or {}
        self.code = code or _CODES.get(status, "invalid_value")
        self.type = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's object. What a client has sent may be quoted in it, and is not to turn a terminal's text around."""
        message = " ".join(str(self).split())
        if not message.isprintable():
            message = "".join(one if one.isprintable() else "?" for one in message)
        return {"error": {"message": message[:MAX_MESSAGE_LEN], "type": self.type, "param": self.param, "code": self.code}}


def as_api_error(error: BaseException, *, given: Collection[str] = (), prompt: str | None = None) -> ApiError:
    """What to tell a client of an exception.

    Args:
      given: fields of the request; a message of ours begins with the one that it is about.
      prompt: the field that holds the prompt, which a message may call by another name.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="queue_full", headers={"Retry-After": str(error.retry_after_s)})
    if isinstance(error, RequestError):
        return _refusal(error, given, prompt)
    if isinstance(error, DeadlineError):
        return ApiError(408, str(error), param="timeout" if "timeout" in given else None, code=error.code)
    if isinstance(error, (ClosedError, StalledError)):
        return ApiError(503, str(error), code=error.code)
    if isinstance(error, EngineError):
        return ApiError(500, str(error), code=error.code)
    logger.error("A request has failed: %s", type(error).__name__, exc_info=error)
    return ApiError(500, "this request could not be completed")


def _refusal(error: RequestError, given: Collection[str], prompt: str | None) -> ApiError:
    text = str(error)
    found = _FIELD.match(text)
    names = (found[1], *_SOURCES.get(found[1], ())) if found else ()
    param = next((name for name in names if name in given), None)
    code = getattr(error, "code", None)
    if _TOO_LONG.match(text):
        code = "context_length_exceeded"
    if param is None and text.startswith(("prompt", "chat template", "the model has no chat template")):
        param = prompt
    return ApiError(400, text, param=param, code=code)
