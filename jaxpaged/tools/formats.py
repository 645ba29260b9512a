"""How models write tool calls: Hermes and Qwen, Llama 3, Mistral."""

from __future__ import annotations

from collections.abc import Callable

from jaxpaged.tools.parser import State, ToolParser
from jaxpaged.tools.scanner import MAX_NAME_LEN, ArgumentsScanner, CallScanner

_ALPHANUMERIC = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789")
_NAME_CHARACTERS = _ALPHANUMERIC | frozenset("_-.")


class HermesParser(ToolParser):
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, several and with text around them.

    The call is its object: the end marker may be missing, as where it is a token that stopped the text.
    """

    def _options_here(self) -> dict[str, State]:
        return {"<tool_call>": self._opened}

    def _begin(self, text: str, start: int) -> int:
        return self._content(text, start, self._options_here())

    def _text(self, text: str, start: int) -> int:
        return self._content(text, start, self._options_here())

    def _opened(self, text: str, start: int) -> int:
        self._scan(self._call_scanner())
        return start

    def _call_scanner(self) -> CallScanner:
        return CallScanner({"arguments"}, None)

    def _after_call(self) -> State:
        return self._closing

    def _closing(self, text: str, start: int) -> int:
        end = self._hold_space(text, start)
        if end < len(text):
            if text[end] == "<":
                self._expect(self._options_here() | {"</tool_call>": self._closed})
            else:
                self._state = self._text
        return end

    def _closed(self, text: str, start: int) -> int:
        self._forget()
        self._state = self._blank
        return start


class Llama3Parser(ToolParser):
    """`{"name": ..., "parameters": {...}}` at the beginning of a text, several separated by `;`, or after `<|python_tag|>`.

    An object that stands there bare may be an answer in JSON, so the first key that no call has shows that it is none.
    """

    def _begin(self, text: str, start: int) -> int:
        if text[start] == "{":
            self._scan(self._call_scanner())
            return start
        return self._text(text, start)

    def _text(self, text: str, start: int) -> int:
        return self._content(text, start, {"<|python_tag|>": self._opened})

    def _opened(self, text: str, start: int) -> int:
        self._scan(self._call_scanner())
        return start

    def _call_scanner(self) -> CallScanner:
        return CallScanner({"parameters", "arguments"}, {"type", "id"})

    def _after_call(self) -> State:
        return self._separator

    def _separator(self, text: str, start: int) -> int:
        end = self._hold_space(text, start)
        if end < len(text):
            self._state = self._begin
            if text[end] == ";":
                self._hold(";")
                self._state = self._blank
                end += 1
        return end


class MistralParser(ToolParser):
    """`[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`, and the newer `[TOOL_CALLS]name[ARGS]{...}`.

    Between name and arguments may stand `[CALL_ID]` and an id, which is the call's then, or nothing.
    """

    def __init__(self, make_id: Callable[[], str], *, is_eager: bool = True):
        super().__init__(make_id, is_eager=is_eager)
        self._own_make_id = make_id
        self._is_array = False
        self._word: list[str] = []  # the characters of a name or an id
        self._name = ""

    def _begin(self, text: str, start: int) -> int:
        return self._text(text, start)

    def _text(self, text: str, start: int) -> int:
        return self._content(text, start, {"[TOOL_CALLS]": self._opened})

    def _opened(self, text: str, start: int) -> int:
        end = self._hold_space(text, start)
        if end < len(text):
            self._make_id = self._own_make_id
            self._is_array = text[end] == "["
            if self._is_array:
                self._hold("[")
                end += 1
                self._scan(self._call_scanner())
            else:
                self._word, self._state = [], self._in_name
        return end

    def _call_scanner(self) -> CallScanner:
        return CallScanner({"arguments"}, None)

    # --- a name, and arguments ---

    def _in_word(self, text: str, start: int, allowed: frozenset[str]) -> int:
        """Characters of a word, as many as it may have."""
        end, last = start, min(len(text), start + MAX_NAME_LEN - len(self._word))
        while end < last and text[end] in allowed:
            end += 1
        self._word += text[start:end]
        self._hold(text[start:end])
        return end

    def _in_name(self, text: str, start: int) -> int:
        end = self._in_word(text, start, _NAME_CHARACTERS)
        if end < len(text):
            self._name = "".join(self._word)
            if self._name and text[end] == "[":
                self._expect({"[ARGS]": self._named, "[CALL_ID]": self._identified})
            elif self._name and text[end] == "{":
                self._state = self._named
            else:
                self._give_up()
        return end

    def _identified(self, text: str, start: int) -> int:
        self._word, self._state = [], self._in_id
        return start

    def _in_id(self, text: str, start: int) -> int:
        end = self._in_word(text, start, _ALPHANUMERIC)
        if end < len(text):
            found = "".join(self._word)
            if found and text[end] == "[":
                self._make_id = lambda: found
                self._expect({"[ARGS]": self._named})
            else:
                self._give_up()
        return end

    def _named(self, text: str, start: int) -> int:
        self._scan(ArgumentsScanner(self._name))
        return start

    # --- an array ---

    def _after_call(self) -> State:
        return self._separator if self._is_array else self._blank

    def _separator(self, text: str, start: int) -> int:
        end = self._hold_space(text, start)
        if end == len(text):
            return end
        if text[end] == "]":
            self._forget()
            self._state = self._blank
            return end + 1
        if text[end] == ",":
            self._hold(",")
            self._scan(self._call_scanner())
            return end + 1
        self._state = self._text
        return end
