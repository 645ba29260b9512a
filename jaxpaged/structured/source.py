"""What a user asks for as a grammar of llguidance: `StructuredOutputsParams` in, its text out.

Runs where it may be killed: see `jaxpaged.structured.probe`. Refuses to know tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# Any white space of JSON, but not without end: a model that is once in it may never find out.
_SPACE = r"[\x20\x0A\x0D\x09]{1,32}"


def grammar_text(given: Mapping[str, Any]) -> str:
    """The grammar that `StructuredOutputsParams.given` stands for.

    Raises:
      ValueError: it stands for none.
    """
    from llguidance import LLMatcher

    if "json" in given or "json_object" in given:
        schema = json.loads(given["json"]) if "json" in given else {"type": "object"}
        if given.get("disable_additional_properties"):
            _close_objects(schema)
        options: dict[str, Any] = {"whitespace_flexible": False}
        if not given.get("disable_any_whitespace"):
            options = {"whitespace_flexible": True, "whitespace_pattern": given.get("whitespace_pattern", _SPACE)}
        return LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=options)  # type: ignore[arg-type]
    if "regex" in given:
        return LLMatcher.grammar_from_regex(given["regex"])
    if "choice" in given:
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(one, ensure_ascii=False) for one in given["choice"]))
    if "grammar" in given:
        return _lark(given["grammar"])
    return _structural_tag(json.loads(given["structural_tag"]))


def _close_objects(schema: Any) -> None:
    """As in vLLM: what describes an object and says nothing of other properties has none."""
    left = [schema]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            if value.get("type") == "object" or "properties" in value or "patternProperties" in value:
                value.setdefault("additionalProperties", False)
            left += value.values()
        elif isinstance(value, list):
            left += value


def _lark(text: str) -> str:
    from llguidance import LLMatcher

    if "::=" not in text:
        return LLMatcher.grammar_from_lark(text)
    from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

    try:
        return LLMatcher.grammar_from_lark(gbnf_to_lark(text))
    except GbnfToLarkError as error:
        raise ValueError(f"GBNF: {error}") from None


def _structural_tag(asked: Any) -> str:
    from llguidance import LLMatcher, StructTag

    structures, triggers = asked.get("structures"), asked.get("triggers")
    if not isinstance(structures, list) or not isinstance(triggers, list) or not structures:
        raise ValueError('expected {"structures": [{"begin", "schema", "end"}, ...], "triggers": [...]}')
    tags = []
    for one in structures:
        begin, end, schema = (one.get(name) for name in ("begin", "end", "schema")) if isinstance(one, dict) else (None,) * 3
        if not isinstance(begin, str) or not isinstance(end, str) or not isinstance(schema, (dict, str)):
            raise ValueError("expected texts as begin and end of a structure, and a schema")
        found = [trigger for trigger in triggers if isinstance(trigger, str) and trigger and begin.startswith(trigger)]
        if not found:
            raise ValueError(f"no trigger begins {begin[:32]!r}")
        schema = json.loads(schema) if isinstance(schema, str) else schema
        tags.append(StructTag(trigger=found[0], begin=begin, grammar=schema, end=end))
    return LLMatcher.grammar_from_lark(StructTag.to_grammar(tags, assume_special=False))
