"""A model's tokenizer as llguidance knows it: special tokens without names, and one of its own for the end of a grammar."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import llguidance

# No text has this character, so none has the names of special tokens that begin with it.
_NAMELESS = "\U0010ffff"


def load_vocabulary(tokenizer_json: str) -> llguidance.LLTokenizer:
    """A vocabulary without names for special tokens: where a text spells one it is written in other tokens, as it should be.

    Its last token is the end of a grammar, which no model has: what ends an output is the request's business.

    Args:
      tokenizer_json: as `tokenizers.Tokenizer.to_str` gives it.

    Raises:
      ValueError: llguidance does not know tokenizers of this kind.
    """
    from llguidance import LLTokenizer

    found = json.loads(tokenizer_json)
    added, vocabulary = found.get("added_tokens") or [], found["model"].get("vocab") or {}
    is_listed = not isinstance(vocabulary, dict)
    token_ids = range(len(vocabulary)) if is_listed else vocabulary.values()
    end = max((*(one["id"] for one in added), *token_ids), default=-1) + 1
    names = {one["content"]: f"{_NAMELESS}{one['id']}" for one in added if one.get("special")}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    found["added_tokens"] = [{**one, "content": names.get(one["content"], one["content"])} for one in added]
    found["added_tokens"].append({"id": end, "content": f"{_NAMELESS}{end}", "special": True, **flags})
    if is_listed:
        found["model"]["vocab"] = [(names.get(token, token), score) for token, score in vocabulary]
    else:
        found["model"]["vocab"] = {names.get(token, token): token_id for token, token_id in vocabulary.items()}
    if found["model"].get("unk_token") in names:
        found["model"]["unk_token"] = names[found["model"]["unk_token"]]
    decoders = (found.get("decoder") or {}).get("decoders") or [found.get("decoder") or {}]
    found["decoder"] = {"type": "Sequence", "decoders": [_plain_space(one) for one in decoders]} if decoders[0] else None
    found["post_processor"] = None  # what it puts around a text is no part of an output
    return LLTokenizer(json.dumps(found), eos_token=end)


def _plain_space(decoder: dict[str, Any]) -> dict[str, Any]:
    """A decoder that llguidance knows in place of one that it does not, which makes spaces of the sign that stands for them."""
    if decoder.get("type") != "Metaspace":
        return decoder
    return {"type": "Replace", "pattern": {"String": decoder.get("replacement", "\u2581")}, "content": " "}
