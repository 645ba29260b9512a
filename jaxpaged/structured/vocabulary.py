"""A model's tokenizer as llguidance knows it, with a token of its own for the end of a grammar."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import llguidance

_END = "<|end of grammar|>"


def load_vocabulary(tokenizer_json: str) -> llguidance.LLTokenizer:
    """A vocabulary whose last token is the end of a grammar, which no model has: what ends an output is the request's business.

    Args:
      tokenizer_json: as `tokenizers.Tokenizer.to_str` gives it.

    Raises:
      ValueError: llguidance does not know tokenizers of this kind.
    """
    from llguidance import LLTokenizer

    found = json.loads(tokenizer_json)
    token_ids = [one["id"] for one in found.get("added_tokens") or ()]
    vocabulary = found["model"].get("vocab") or ()
    token_ids += vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    end = max(token_ids, default=-1) + 1
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    found["added_tokens"] = [*(found.get("added_tokens") or ()), {"id": end, "content": _END, "special": True, **flags}]
    return LLTokenizer(json.dumps(found), eos_token=end)
