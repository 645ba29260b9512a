"""What chats and completions have in common: who may be asked, what it cost, tokens and how likely they were.

Knows OpenAI's objects. Refuses to know where outputs come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxpaged.outputs import CompletionOutput, Logprob, PositionLogprobs, RequestOutput
from jaxpaged.server.errors import ApiError
from jaxpaged.version import __version__

FINGERPRINT = f"jaxpaged-{__version__}"
_LEAST_LOGPROB = -9999.0  # JSON has no infinity; vLLM's number


@dataclass
class Usage:
    """Tokens of one HTTP request so far, by the place of the prompt."""

    prompts: dict[int, int] = field(default_factory=dict)
    cached: dict[int, int] = field(default_factory=dict)
    generated: dict[int, int] = field(default_factory=dict)

    def add(self, place: int, output: RequestOutput) -> None:
        """Take what an output says of itself; the last one counts."""
        self.prompts[place] = len(output.prompt_token_ids)
        self.cached[place] = output.num_cached_tokens or 0
        self.generated[place] = output.metrics.num_generation_tokens if output.metrics is not None else 0

    def json(self) -> dict[str, Any]:
        """OpenAI's object. With best_of, what was drawn and not returned counts too."""
        num_prompt, num_generated = sum(self.prompts.values()), sum(self.generated.values())
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_generated,
            "total_tokens": num_prompt + num_generated,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached.values())},
        }


def check_ending(one: CompletionOutput) -> None:
    """Refuse to call an answer what has ended with an error."""
    if one.finish_reason == "error":
        raise ApiError(
            500, "the numbers of this request were not finite, or its grammar allowed no token", code="numerical_fault"
        )


def clamped(logprob: float) -> float:
    """A log-probability that JSON can say."""
    return logprob if math.isfinite(logprob) else _LEAST_LOGPROB


def token_name(token_id: int, found: Logprob, as_id: bool) -> str:
    """How a token is written in an answer."""
    return f"token_id:{token_id}" if as_id or found.decoded_token is None else found.decoded_token


def chat_logprobs(
    token_ids: Iterable[int],
    places: Iterable[PositionLogprobs],
    num_top: int,
    as_id: bool,
    token_bytes: Callable[[int], bytes | None],
) -> dict[str, Any]:
    """OpenAI's object for a chat: of each token, and of the likeliest at its place. All their bytes are the text's.

    Args:
      token_bytes: `Tokenizer.token_bytes`, asked of what is no text.
    """

    def told(token_id: int, one: Logprob) -> dict[str, Any]:
        name = token_name(token_id, one, as_id)
        said = token_bytes(token_id) if "\ufffd" in name else None
        return {"token": name, "logprob": clamped(one.logprob), "bytes": list(said or name.encode("utf-8", "replace"))}

    content = []
    for token_id, place in zip(token_ids, places, strict=True):
        top = [told(*pair) for pair in likeliest(place, num_top)]
        content.append({**told(token_id, place[token_id]), "top_logprobs": top})
    return {"content": content, "refusal": None}


def likeliest(place: PositionLogprobs, num_top: int) -> list[tuple[int, Logprob]]:
    """The likeliest at a place, the best first."""
    ranked = sorted(place.items(), key=lambda pair: (pair[1].rank or 0, -pair[1].logprob))
    return [pair for pair in ranked if (pair[1].rank or 0) <= num_top][:num_top]


def prompt_places(places: list[PositionLogprobs | None] | None) -> list[dict[str, Any] | None] | None:
    """vLLM's `prompt_logprobs`: by token id, as a text."""
    if places is None:
        return None
    return [
        None
        if place is None
        else {
            str(token_id): {"logprob": clamped(one.logprob), "rank": one.rank, "decoded_token": one.decoded_token}
            for token_id, one in place.items()
        }
        for place in places
    ]


class TextLogprobs:
    """OpenAI's object for a completion, which grows; where each token begins in the text is counted on."""

    def __init__(self, num_top: int, as_id: bool):
        self._num_top, self._as_id, self._offset = num_top, as_id, 0

    def take(
        self, token_ids: Iterable[int], places: Iterable[PositionLogprobs | None], names: Mapping[int, str]
    ) -> dict[str, Any]:
        """The object for these tokens. `names` are for places of which nothing is known: a prompt's first token."""
        found: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for token_id, place in zip(token_ids, places, strict=True):
            found["text_offset"].append(self._offset)
            if place is None:
                text = names.get(token_id, "")
                found["tokens"].append(f"token_id:{token_id}" if self._as_id else text)
                found["token_logprobs"].append(None)
                found["top_logprobs"].append(None)
            else:
                one = place[token_id]
                text = one.decoded_token or ""
                # As in OpenAI's answers the token that is there counts too, even where it is not among the likeliest.
                top = dict(likeliest(place, self._num_top)) | {token_id: one}
                found["tokens"].append(token_name(token_id, one, self._as_id))
                found["token_logprobs"].append(clamped(one.logprob))
                found["top_logprobs"].append(
                    {token_name(id, each, self._as_id): clamped(each.logprob) for id, each in top.items()}
                )
            self._offset += len(text)
        return found
