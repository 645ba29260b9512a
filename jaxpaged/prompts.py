"""What callers ask with, as the engine takes it: prompts in every form, conversations, parameters that name words.

Knows tokenizers and what an engine accepts. Refuses to know who asks, and when the answer comes.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any

from jaxpaged.engine import Engine
from jaxpaged.host.request import Request, RequestError, SamplingParams
from jaxpaged.outputs import EmbeddingOutput, EmbeddingRequestOutput
from jaxpaged.tokenizer import Tokenizer
from jaxpaged.tools import TOOL_CALL_PARSERS, UnknownParserError, check_parser, fitting_parser

Prompt = str | Mapping[str, Any] | Seq[int]
"""A text, token ids, {"prompt": text} or {"prompt_token_ids": ids}; with both keys the ids count and the text is shown.

Beside them {"cache_salt": text}: prompts share cached pages only with prompts of the same salt."""

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Checked:
    """A prompt that an engine will take, as the request that it is to queue, and its text where it has one."""

    prompt: str | None
    request: Request


def check(
    engine: Engine,
    tokenizer: Tokenizer | None,
    prompt: Prompt,
    params: SamplingParams,
    *,
    request_id: str,
    priority: int = 0,
    tenant: str = "",
) -> Checked:
    """Everything that can be said of a prompt before it is queued, a grammar compiled included.

    A thread beside the engine's may ask: it reads of the engine what does not change.

    Raises:
      RequestError: the engine would refuse it, or there is no tokenizer for what it needs.
    """
    if not isinstance(params, SamplingParams):
        raise RequestError(f"sampling_params: got {type(params).__name__}, expected SamplingParams")
    text, token_ids = tokens_of(tokenizer, prompt)
    params = with_bad_words(tokenizer, params)
    if params.structured_outputs is not None and tokenizer is None:
        raise RequestError("structured_outputs: need the tokenizer, and skip_tokenizer_init is set")
    cache_salt = prompt.get("cache_salt") if isinstance(prompt, Mapping) else None
    options: dict[str, Any] = {"request_id": request_id, "cache_salt": cache_salt, "priority": priority, "tenant": tenant}
    request = engine.check_request(token_ids, params, **options)
    if params.stop and tokenizer is None:
        raise RequestError("stop: strings need the tokenizer, and skip_tokenizer_init is set: use stop_token_ids")
    return Checked(text, request)


def embedded(request: Request, vector: list[float]) -> EmbeddingRequestOutput:
    """What a caller gets of a prompt that was checked and embedded."""
    return EmbeddingRequestOutput(request.request_id, EmbeddingOutput(vector), list(request.prompt_token_ids))


def tokens_of(tokenizer: Tokenizer | None, prompt: Prompt) -> tuple[str | None, Seq[int]]:
    """The text of a prompt, when it has one, and its ids."""
    if isinstance(prompt, Mapping):
        unknown = sorted(map(str, prompt.keys() - {"prompt", "prompt_token_ids", "cache_salt"}))
        if unknown or not prompt:
            raise RequestError(f"prompt: got the keys {unknown}, expected 'prompt' or 'prompt_token_ids'")
        text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    elif isinstance(prompt, str):
        text, token_ids = prompt, None
    else:
        text, token_ids = None, prompt
    if text is not None and not isinstance(text, str):
        raise RequestError(f"prompt: got {type(text).__name__}, expected a text")
    if hasattr(token_ids, "tolist"):
        token_ids = token_ids.tolist()  # type: ignore[union-attr]  (numpy and jax arrays)
    if token_ids is not None:
        return text, token_ids
    if text is None:
        raise RequestError("prompt: got None, expected a text or a list of token ids")
    if tokenizer is None:
        raise RequestError("prompt: a text needs the tokenizer, and skip_tokenizer_init is set: pass token ids")
    return text, tokenizer.encode(text)


def with_bad_words(tokenizer: Tokenizer | None, params: SamplingParams) -> SamplingParams:
    """Parameters whose bad words are token ids too, as vLLM makes them of the words."""
    if not params.bad_words or tokenizer is None:  # the engine refuses the latter
        return params
    found: list[tuple[int, ...]] = []
    for word in params.bad_words:
        try:
            plain, spaced = (tuple(tokenizer.encode(space + word.lstrip(), add_special_tokens=False)) for space in ("", " "))
        except RequestError:
            raise RequestError(f"bad_words: {word[:32]!a} is not valid Unicode text") from None
        if not plain:
            raise RequestError(f"bad_words: {word[:32]!a} has no tokens")
        found.append(plain)
        # Where the space is a token of its own, the word after it is the one without a space.
        if spaced[:1] != plain[:1] and len(spaced) == len(plain):
            found.append(spaced)
    return replace(params, bad_words_token_ids=(*params.bad_words_token_ids, *found))


def chat_prompt(
    tokenizer: Tokenizer, messages: Seq[Message], *, add_generation_prompt: bool = True, **options: Any
) -> dict[str, Any]:
    """One conversation as a prompt; options are those of `Tokenizer.apply_chat_template`. Raises RequestError."""
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Seq) or not messages:
        raise RequestError("messages: expected a list of {'role': ..., 'content': ...}, at least one")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(f"messages[{index}]: expected {{'role': ..., 'content': ...}}")
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, **options)
    # The template writes the special tokens itself.
    return {"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)}


def parser_meant(name: str, chat_template: str) -> str:
    """The parser that is meant by `tool_call_parser`. Raises RequestError when there is none."""
    found = fitting_parser(chat_template) if name == "auto" else name
    if found is None:
        allowed = ", ".join(TOOL_CALL_PARSERS)
        raise RequestError(f"tool_call_parser: got 'auto', and no parser fits the model's chat template: name one of {allowed}")
    try:
        check_parser(found)
    except UnknownParserError as error:
        raise RequestError(str(error)) from None
    return found


def with_special_tokens(params: SamplingParams) -> SamplingParams:
    """Parameters whose text has the markers of tool calls."""
    if not params.detokenize:
        raise RequestError("tool_call_parser: calls are found in the text, and detokenize=False gives none")
    return replace(params, skip_special_tokens=False)
