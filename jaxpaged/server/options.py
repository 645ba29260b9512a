"""What can be set about the server: who may ask, how much, and how long it takes to end. Knows no route."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from jaxpaged.config import ConfigError, nearest
from jaxpaged.tools import TOOL_CALL_PARSERS

MIN_KEY_LEN = 16
LOG_FORMATS = ("text", "json")


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Everything that can be set about `jaxpaged serve` beside the engine.

    Args:
      host: address to listen on. Any but a loopback address needs api_key or api_key_file.
      port: to listen on; 0 is any that is free.
      api_key: keys, one of which every request but those for /live and for the empty page of /ui has to bring as its bearer
        token; at least 16 characters each. The command line shows them to other users of the machine: better api_key_file.
      api_key_file: a file with one key a line; None is none.
      show_state: answer /ui, and /state, which `jaxpaged inspect` and `jaxpaged debug` ask: every key then shows the ids, lengths
        and pages of all that runs and waits, never a text, and not whose it is.
      insecure_no_auth: serve on a public address without a key.
      served_model_name: names that the model answers to, the first is its own; None is the last part of its path.
      tool_call_parser: how the model writes tool calls, one of `jaxpaged.tools.TOOL_CALL_PARSERS`; auto is what fits its chat
        template.
      max_outputs: outputs of one HTTP request, its prompts times n or best_of.
      max_body_bytes: of one HTTP request.
      max_prompts: prompts of one HTTP request.
      body_timeout_s: for a client to send its request.
      send_timeout_s: for a client to take what was sent, before its request is ended.
      request_timeout_s: the longest that a request may take from when it is taken, waiting included; then it ends with status 408
        and frees its pages. A request's own field `timeout` may ask for less. 0 is no limit.
      profiler_dir: folder for traces of jax's profiler, which /start_profile and /stop_profile then begin and end; None is none.
      drain_s: for what runs to end after SIGTERM, before it is ended with an error.
      metrics_namespace: what the names of /metrics begin with, before a colon; vllm makes vLLM's boards work as they are.
      log_format: of the lines on stderr, text or json.
      access_log: a line for each request that has ended.
      enable_log_requests: with the prompts in it.
      max_log_len: characters of a prompt in the log; None is all of them.
      otlp_traces_endpoint: URL of an OpenTelemetry collector that takes traces over HTTP, such as
        http://127.0.0.1:4318/v1/traces; None is no traces.

    Raises:
      ConfigError: a value out of range, or a public address without a key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: tuple[str, ...] = ()
    api_key_file: str | None = None
    show_state: bool = True
    insecure_no_auth: bool = False
    served_model_name: tuple[str, ...] = ()
    tool_call_parser: str = "auto"
    max_outputs: int = 64
    max_body_bytes: int = 8 << 20
    max_prompts: int = 64
    body_timeout_s: float = 30.0
    send_timeout_s: float = 60.0
    request_timeout_s: float = 0.0
    profiler_dir: str | None = None
    drain_s: float = 30.0
    metrics_namespace: str = "jaxpaged"
    log_format: str = "text"
    access_log: bool = True
    enable_log_requests: bool = False
    max_log_len: int | None = None
    otlp_traces_endpoint: str | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            *(("port", 0, 65_535), ("max_outputs", 1, 4096), ("max_prompts", 1, 4096)),
            ("max_body_bytes", 1024, 2**31),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ConfigError(f"{name}: got {value!r}, expected a whole number in [{low}, {high}]")
        for name in ("body_timeout_s", "send_timeout_s", "request_timeout_s", "drain_s"):
            value, low = getattr(self, name), 0.0 if name in ("request_timeout_s", "drain_s") else 0.01
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= 86_400:
                raise ConfigError(f"{name}: got {value!r}, expected a number of seconds in [{low:g}, 86400]")
        for name in ("host", "tool_call_parser"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ConfigError(f"{name}: got {getattr(self, name)!r}, expected a text")
        for name in ("api_key", "served_model_name"):
            value = getattr(self, name)
            value = (value,) if isinstance(value, str) else value
            if not isinstance(value, (list, tuple)) or not all(isinstance(one, str) and one.strip() for one in value):
                raise ConfigError(f"{name}: expected texts that are not empty")
            object.__setattr__(self, name, tuple(value))
        if self.tool_call_parser not in ("auto", *TOOL_CALL_PARSERS):
            hint = nearest(self.tool_call_parser, list(TOOL_CALL_PARSERS))
            allowed = ", ".join(("auto", *TOOL_CALL_PARSERS))
            raise ConfigError(f"tool_call_parser: got {self.tool_call_parser!r}, expected one of {allowed}{hint}")
        for name in ("show_state", "insecure_no_auth", "access_log", "enable_log_requests"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: got {getattr(self, name)!r}, expected True or False")
        self._check_eyes()
        _check_keys("api_key", self.api_key)
        if not (self.is_local or self.api_key or self.api_key_file is not None or self.insecure_no_auth):
            raise ConfigError(
                f"host: got {self.host!r}, which others can reach, without an api_key: set api_key_file, or insecure_no_auth"
            )

    def _check_eyes(self) -> None:
        if not isinstance(self.metrics_namespace, str) or not re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", self.metrics_namespace):
            raise ConfigError(f"metrics_namespace: got {self.metrics_namespace!r}, expected a word of letters, digits and _")
        if self.log_format not in LOG_FORMATS:
            raise ConfigError(f"log_format: got {self.log_format!r}, expected one of {', '.join(LOG_FORMATS)}")
        limit, url = self.max_log_len, self.otlp_traces_endpoint
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 0):
            raise ConfigError(f"max_log_len: got {limit!r}, expected a whole number, 0 or more")
        if url is not None and (not isinstance(url, str) or not re.fullmatch(r"https?://[^/\s]+\S*", url)):
            raise ConfigError(f"otlp_traces_endpoint: got {url!r}, expected a URL with http:// or https://")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return self.host == "localhost"

    def all_keys(self) -> tuple[str, ...]:
        """All keys, those of the file among them.

        Raises:
          ConfigError: the file cannot be read, or has no key or a short one.
        """
        if self.api_key_file is None:
            return self.api_key
        try:
            with open(self.api_key_file, encoding="utf-8") as file:
                found = tuple(line.strip() for line in file if line.strip())
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise ConfigError(f"api_key_file: {self.api_key_file}: {why}") from None
        if not found:
            raise ConfigError(f"api_key_file: {self.api_key_file}: there is no key in it")
        _check_keys("api_key_file", found)
        return self.api_key + found


def _check_keys(name: str, keys: tuple[str, ...]) -> None:
    for key in keys:
        if len(key) < MIN_KEY_LEN or not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError(f"{name}: got a key of {len(key)} characters, expected at least {MIN_KEY_LEN}, ASCII, no spaces")
