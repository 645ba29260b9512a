"""Text <-> token ids: a model's tokenizer.json, its chat template, and text that grows token by token.

Uses the `tokenizers` library directly, so that nothing waits for transformers. Refuses to know models and requests.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from jaxpaged.host.request import RequestError
from jaxpaged.templates import messages as chats
from jaxpaged.templates.process import Look, TemplateError, shared

if TYPE_CHECKING:
    from jaxpaged.checkpoint.files import CheckpointError

logger = logging.getLogger("jaxpaged")

MAX_TOKENIZER_BYTES = 200 * 2**20
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_TOKEN_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def _damaged(message: str) -> CheckpointError:
    from jaxpaged.checkpoint.files import CheckpointError  # brings jax, which text alone does not need

    return CheckpointError(message)


class Tokenizer:
    """One model's tokenizer. `encode` and `decode` give what the Hugging Face fast tokenizer gives for the same directory.

    The one difference: `clean_up_tokenization_spaces` is not applied, since text that shrinks afterwards cannot be streamed.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: dict[str, str] | None = None,
        chat_templates: dict[str, str] | None = None,
        where: str = "chat template",
    ):
        """`special_tokens` are by name ("eos_token"); so are `chat_templates`: "default", and "tool_use" for calls with tools."""
        self.backend = backend
        self.backend.no_truncation()
        self.backend.no_padding()
        self.special_tokens = special_tokens or {}
        self.chat_templates = chat_templates or {}
        self._looks = {}
        for name, source in self.chat_templates.items():
            try:
                self._looks[source] = look(source)
            except TemplateError as error:
                raise _damaged(f"{where}: chat template {name!r}: {error}") from None
        decoder = json.dumps(json.loads(backend.to_str()).get("decoder"))
        has_byte_fallback, self._has_byte_level = "ByteFallback" in decoder, "ByteLevel" in decoder
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.known_ids = frozenset(vocabulary.values())
        byte_tokens = (token for token in vocabulary if _BYTE_TOKEN.fullmatch(token)) if has_byte_fallback else ()
        self.byte_ids = frozenset(vocabulary[token] for token in byte_tokens)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self._added_ids = frozenset(added)

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Read tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja of a local directory.

        Raises:
          CheckpointError: tokenizer.json is missing, or a file is damaged.
        """
        from jaxpaged.checkpoint.files import read_json, regular_file

        directory = Path(directory)
        if not (directory / "tokenizer.json").exists():
            others = [name for name in ("tokenizer.model", "vocab.json", "vocab.txt") if (directory / name).exists()]
            hint = f" ({others[0]} alone is not supported; save_pretrained of the fast tokenizer writes one)" if others else ""
            raise _damaged(f"{directory / 'tokenizer.json'}: missing{hint}")
        path = regular_file(directory, "tokenizer.json")
        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise _damaged(f"{path}: {path.stat().st_size:,} bytes, the limit is {MAX_TOKENIZER_BYTES:,}")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise _damaged(f"{path}: {_one_line(error)}") from None

        options: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (directory / name).exists():
                options |= read_json(directory, name)
        special_tokens = _special_tokens(options, directory / "tokenizer_config.json")
        _add_missing(backend, options, special_tokens)
        templates = _templates(options.get("chat_template"), directory / "tokenizer_config.json")
        if (directory / "chat_template.jinja").exists():
            try:
                templates["default"] = regular_file(directory, "chat_template.jinja").read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise _damaged(f"{directory / 'chat_template.jinja'}: {_one_line(error)}") from None
        return cls(backend, special_tokens=special_tokens, chat_templates=templates, where=str(directory))

    # --- ids ---

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def max_token_id(self) -> int:
        """The largest id that `encode` can give."""
        return max(self.known_ids, default=-1)

    def token_id(self, token: str) -> int | None:
        """The id of one token's exact spelling."""
        return self.backend.token_to_id(token)

    @property
    def eos_token_id(self) -> int | None:
        """The tokenizer's own end-of-sequence id; what ends a request is the model's configuration."""
        token = self.special_tokens.get("eos_token")
        return None if token is None else self.token_id(token)

    @property
    def bos_token_id(self) -> int | None:
        """The id that stands before every text, where the model has one."""
        token = self.special_tokens.get("bos_token")
        return None if token is None else self.token_id(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text. Spellings of special tokens in the text become those tokens, as everywhere in this field.

        Args:
          add_special_tokens: put around it what tokenizer.json says, such as the beginning-of-sequence token.

        Raises:
          RequestError: the text is not Unicode text (a lone surrogate).
        """
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (UnicodeError, TypeError):
            raise RequestError("prompt: not valid Unicode text (a lone surrogate)") from None

    def decode(self, token_ids: Seq[int], skip_special_tokens: bool = True) -> str:
        """Text of ids. Ids that the tokenizer does not have give nothing."""
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes | None:
        """What a token of bytes stands for, which may be a part of a character; None of a token of text."""
        token = self.backend.id_to_token(token_id)
        if token_id in self.byte_ids and token is not None:
            return bytes([int(token[3:5], 16)])
        if not self._has_byte_level or token is None or token_id in self._added_ids:
            return None
        letters = _byte_letters()
        return bytes(letters[letter] for letter in token) if all(letter in letters for letter in token) else None

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """A fresh text that grows token by token."""
        return Detokenizer(self, skip_special_tokens=skip_special_tokens)

    # --- chat ---

    def apply_chat_template(
        self,
        messages: Seq[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool | str = False,
        chat_template: str | None = None,
        tools: Seq[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        now: datetime | None = None,
        **variables: Any,
    ) -> str:
        """One conversation as the text that the model was trained on; encode it with add_special_tokens=False.

        Control tokens spelled out in a message are control tokens in the result, as in transformers: a caller who does not
        trust the author of a message has to filter it. A template runs in a process of its own, within 200 ms of processor
        time and 4 MiB of text.

        Args:
          messages: with texts, or lists of {"type": "text", "text": ...}, as their content; `tool_calls` as in OpenAI's.
          add_generation_prompt: end with the beginning of the assistant's turn.
          continue_final_message: end inside the last message, so that a model goes on with it; a text names the field, by default
            its content. Not with add_generation_prompt.
          chat_template: Jinja source to use instead of the model's. It is a program: never one that a stranger sent.
          tools: as in OpenAI's requests.
          chat_template_kwargs: further names that the template can read, such as enable_thinking; those that it does not read are
            left out. `variables` are more of them.
          now: what `strftime_now` shows, None is the time.

        Raises:
          RequestError: there is no template, or it refuses these messages.
        """
        source = self.chat_template(chat_template, has_tools=bool(tools))
        if continue_final_message and add_generation_prompt:
            raise RequestError("continue_final_message: not with add_generation_prompt")
        if not isinstance(chat_template_kwargs, (Mapping, type(None))):
            raise RequestError(f"chat_template_kwargs: got {type(chat_template_kwargs).__name__}, expected names and values")
        try:
            found = self._looks.get(source) or look(source)
            variables = {**(chat_template_kwargs or {}), **variables}
            values = {**self.special_tokens, **chats.allowed(variables, found.variables, self.special_tokens)}
            conversation = chats.conversation(messages, lists_content=found.lists_content)
            last = ""
            if continue_final_message:
                conversation, last = chats.marked(conversation, continue_final_message)
            values |= {"messages": conversation, "tools": chats.tool_list(tools), "documents": None}
            values["add_generation_prompt"] = bool(add_generation_prompt)
            text = shared().render(source, values, now or datetime.now())
        except TemplateError as error:
            raise RequestError(f"chat template: {error}") from None
        return chats.cut(text, last) if continue_final_message else text

    def chat_template(self, chat_template: str | None = None, *, has_tools: bool = False) -> str:
        """The source of the template that a conversation gets: the one given, the one for tools, or the model's only one.

        Raises:
          RequestError: there is none.
        """
        own = (self.chat_templates.get("tool_use") if has_tools else None) or self.chat_templates.get("default")
        if chat_template is None and own is None:
            raise RequestError("the model has no chat template: pass chat_template, or use generate with a plain prompt")
        return chat_template if chat_template is not None else own  # type: ignore[return-value]


@functools.lru_cache(maxsize=32)
def look(source: str) -> Look:
    """What there is to know of a template. Raises TemplateError."""
    return shared().look(source)


_MAX_OPEN_IDS = 3  # an incomplete character has so many bytes, and no more ids
_MANY_IDS = 16  # that are not settled: fewer are not worth further looks


class Detokenizer:
    """The text of a growing list of ids. It only ever grows, and never by a part of a character.

    Law: what all `add` calls returned, then `finish`, is together `tokenizer.decode(all ids)`, however many ids came at a time.

    Ids are decoded in a window that begins at a place where the text is settled; the window keeps the ids before that place up
    to the settled place before it, because decoders treat the first token of a text specially (a leading space is dropped).
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True):
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._window: list[int] = []
        self._num_settled = 0  # ids of the window whose text is out and final
        self._num_out = 0  # characters of the window's text that are out
        self._is_in_bytes = False
        self.text = ""

    def add(self, *token_ids: int) -> str:
        """The text that these ids settle, often of exactly these; empty while a character is incomplete."""
        end = 0  # of the window's ids that can be settled
        for token_id in token_ids:
            self._window.append(token_id)
            # Byte-fallback decoders turn a whole run of byte tokens into replacement characters when one byte of it is wrong, so
            # no character of the run is settled before the run ends. A skipped token does not end it.
            is_skipped = (self._skip and token_id in self._tokenizer.special_ids) or token_id not in self._tokenizer.known_ids
            self._is_in_bytes = self._is_in_bytes if is_skipped else token_id in self._tokenizer.byte_ids
            if not self._is_in_bytes:
                end = len(self._window)
        if not end:
            return ""
        text = self._tokenizer.decode(self._window[:end], self._skip)
        # An incomplete character shows as one replacement character at the end; the next id may complete it.
        settled = text[:-1] if text.endswith("\ufffd") else text
        new = self._give(settled)
        if len(settled) < len(text):
            # Several ids at a time may always end inside a character: what is before it is settled all the same.
            ends = (
                range(end - 1, max(end - 1 - _MAX_OPEN_IDS, self._num_settled), -1) if end - self._num_settled > _MANY_IDS else ()
            )
            end = next((one for one in ends if self._tokenizer.decode(self._window[:one], self._skip) == settled), 0)
        if new and end:
            self._window, self._num_settled = self._window[self._num_settled :], end - self._num_settled
            self._num_out = len(self._tokenizer.decode(self._window[: self._num_settled], self._skip))
        return new

    def finish(self, *token_ids: int) -> str:
        """The rest behind the last ids: what an incomplete character at the very end decodes to, too."""
        self._window += token_ids
        return self._give(self._tokenizer.decode(self._window, self._skip))

    def _give(self, settled: str) -> str:
        new = settled[self._num_out :]
        self._num_out += len(new)
        self.text += new
        return new


# --- files -------------------------------------------------------------------------------------------------------


def _special_tokens(options: dict[str, Any], path: Path) -> dict[str, str]:
    """The named special tokens, each a string or an object with "content" in the file."""
    special_tokens = {}
    for name in _SPECIAL_NAMES:
        value = options.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if value is None:
            continue
        if not isinstance(value, str):
            raise _damaged(f"{path}: {name}: got {type(value).__name__}, expected a string")
        special_tokens[name] = value
    return special_tokens


def _add_missing(backend: tokenizers.Tokenizer, options: dict[str, Any], special_tokens: dict[str, str]) -> None:
    """Add the tokens that only tokenizer_config.json names, as the Hugging Face fast tokenizer does when it loads."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    listed = options.get("added_tokens_decoder")
    entries = listed.items() if isinstance(listed, dict) else ()
    for _, entry in sorted(entries, key=lambda item: int(item[0]) if str(item[0]).isdecimal() else 0):
        if isinstance(entry, dict) and isinstance(entry.get("content"), str) and entry["content"] not in known:
            flags = {name: bool(entry[name]) for name in _TOKEN_FLAGS if name in entry}
            backend.add_tokens([tokenizers.AddedToken(entry["content"], **flags)])
            known.add(entry["content"])
    more = options.get("additional_special_tokens") or options.get("extra_special_tokens")
    names = [*special_tokens.values(), *(more if isinstance(more, list) else ())]
    names = [name.get("content") if isinstance(name, dict) else name for name in names]
    backend.add_special_tokens([name for name in names if isinstance(name, str) and name not in known])


def _templates(value: Any, path: Path) -> dict[str, str]:
    """Chat templates by name, from the string or the list of {name, template} in tokenizer_config.json."""
    if value is None:
        return {}
    entries = [{"name": "default", "template": value}] if isinstance(value, str) else value
    try:
        templates = {entry["name"]: entry["template"] for entry in entries}
        sound = all(isinstance(text, str) for pair in templates.items() for text in pair)
    except (TypeError, KeyError):
        sound, templates = False, {}
    if not sound:
        raise _damaged(f"{path}: chat_template: expected a string or a list of {{name, template}}")
    return templates


@functools.cache
def _byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in byte-level vocabularies: itself where it can be seen, else one from 256 on.

    Source: Radford et al. 2019, GPT-2's encoder.
    """
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + place): byte for place, byte in enumerate(unseen)}


def _one_line(error: BaseException, limit: int = 200) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
