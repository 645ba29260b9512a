"""The options of speculation: who proposes tokens, and how many at a time. Frozen, every check at construction.

Knows vLLM's names for them, the old ones too. Refuses to know who reads them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxpaged.errors import ConfigError, nearest

METHODS = ("ngram", "draft_model")
BUNDLED = (None, "demo")  # names of the model that comes with jaxpaged, which brings its own draft
MAX_SPECULATIVE_TOKENS = 32  # each is a row of a step: more than ever pay
MAX_LOOKUP = 64
_OLD_NGRAM = "[ngram]"  # what older versions of vLLM call the method as a model
_DEFAULT_LOOKUP = 5  # vLLM's


@dataclass(frozen=True, kw_only=True)
class SpeculativeConfig:
    """Who proposes tokens that the model then verifies, several in one step. Names and meanings are vLLM's, but for `adaptive`.

    Args:
      method: ngram, what followed the same tokens earlier in the text, or draft_model, what a smaller model says. None is
        draft_model where a model is named.
      model: directory or hub id of the draft model; None is the one that comes with the bundled model.
      num_speculative_tokens: at most so many are proposed for a sequence in one step.
      prompt_lookup_max: tokens at the end of a text that are looked for in it, the longest first; None is prompt_lookup_min, or
        else 5.
      prompt_lookup_min: the shortest; None is prompt_lookup_max.
      adaptive: propose fewer, or none for a while, where that is measured or expected to be faster. False proposes all it can.

    Raises:
      ConfigError: an unknown key, or a value out of range, named with what is allowed.
    """

    num_speculative_tokens: int
    method: str | None = None
    model: str | None = None
    prompt_lookup_max: int | None = None
    prompt_lookup_min: int | None = None
    adaptive: bool = True

    @classmethod
    def of(cls, given: SpeculativeConfig | Mapping[str, Any] | str) -> SpeculativeConfig:
        """From what an engine's `speculative_config` may be: a dictionary, JSON text of one, or this itself."""
        if isinstance(given, cls):
            return given
        if isinstance(given, str):
            try:
                given = json.loads(given)
            except ValueError as error:
                raise ConfigError(f"speculative_config: not JSON: {error}") from None
        if not isinstance(given, Mapping):
            raise ConfigError(f"speculative_config: got {_short(given)}, expected a dictionary or the JSON text of one")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in known:
                hint = nearest(name, known) if isinstance(name, str) else ""
                raise ConfigError(f"speculative_config: unknown key {_short(name)}{hint}; known are {', '.join(known)}")
        if given.get("num_speculative_tokens") is None:
            raise _wrong("num_speculative_tokens", f"missing, expected a whole number in [1, {MAX_SPECULATIVE_TOKENS}]")
        return cls(**given)

    @classmethod
    def of_old_names(cls, model: str | None, num_tokens: int | None) -> SpeculativeConfig:
        """From vLLM's older options speculative_model and num_speculative_tokens."""
        if model is None:
            raise ConfigError(f"num_speculative_tokens: got {_short(num_tokens)} alone, expected speculative_model with it")
        if num_tokens is None:
            raise ConfigError(f"speculative_model: got {_short(model)} alone, expected num_speculative_tokens with it")
        return cls(model=model, num_speculative_tokens=num_tokens)

    def __post_init__(self) -> None:
        self._check_names()
        names = ("num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min")
        for name, high in zip(names, (MAX_SPECULATIVE_TOKENS, MAX_LOOKUP, MAX_LOOKUP), strict=True):
            value = getattr(self, name)
            if value is None and name != "num_speculative_tokens":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
                raise _wrong(name, f"got {_short(value)}, expected a whole number in [1, {high}]")
        if not isinstance(self.adaptive, bool):
            raise _wrong("adaptive", f"got {_short(self.adaptive)}, expected True or False")
        if self.method != "ngram":
            for name in names[1:]:
                if getattr(self, name) is not None:
                    raise _wrong(name, f"got {getattr(self, name)}, expected none with method {self.method!r}: it is ngram's")
            return
        most = self.prompt_lookup_max or self.prompt_lookup_min or _DEFAULT_LOOKUP
        least = self.prompt_lookup_min or most
        if least > most:
            raise _wrong("prompt_lookup_min", f"got {least}, expected at most prompt_lookup_max {most}")
        object.__setattr__(self, "prompt_lookup_max", most)
        object.__setattr__(self, "prompt_lookup_min", least)

    def _check_names(self) -> None:
        method, model = self.method, self.model
        if model is not None and (not isinstance(model, str) or not model):
            raise _wrong("model", f"got {_short(model)}, expected a directory or a hub id")
        if method is None and model is not None:
            method = "ngram" if model in ("ngram", _OLD_NGRAM) else "draft_model"
        if method not in METHODS:
            hint = nearest(method, METHODS) if isinstance(method, str) else ""
            raise _wrong("method", f"got {_short(method)}, expected one of {', '.join(METHODS)}{hint}")
        if method == "ngram":
            if model not in (None, "ngram", _OLD_NGRAM):
                raise _wrong("model", f"got {_short(model)}, expected none with method 'ngram'")
            model = None
        object.__setattr__(self, "method", method)
        object.__setattr__(self, "model", model)

    def check_beside(self, model: str | None, compare_with: str | None) -> None:
        """Raise unless it fits the engine's options of these names."""
        if self.method == "draft_model" and self.model is None and model not in BUNDLED:
            raise _wrong("model", f"missing, expected a draft model for {_short(model)}: only the bundled model brings one")
        if compare_with is not None:
            raise ConfigError(
                f"compare_with: got {compare_with!r}, expected none with speculative_config: a duel is of plain steps"
            )


def _wrong(name: str, problem: str) -> ConfigError:
    return ConfigError(f"speculative_config: {name}: {problem}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
