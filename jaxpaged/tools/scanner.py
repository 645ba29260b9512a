"""JSON that comes piece by piece, checked character by character and never looked at twice.

Knows RFC 8259 and what a call looks like in it. Refuses to know what stands around it in a text.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Set

MAX_DEPTH = 64  # brackets open at once in one value: whoever reads the arguments after us may recurse
MAX_NAME_LEN = 256  # characters
WHITESPACE = " \t\r\n"

_DIGITS, _HEX = frozenset("0123456789"), frozenset("0123456789abcdefABCDEF")
_LITERALS = {"t": "true", "f": "false", "n": "null"}
# What a number may go on with: place in it -> character -> next place. Those of _ENDS may be its last.
_INTEGER = {**dict.fromkeys("123456789", "integer"), "0": "zero"}
_NUMBER = {
    "minus": _INTEGER,
    "zero": {".": "point", "e": "e", "E": "e"},
    "integer": {**dict.fromkeys(_DIGITS, "integer"), ".": "point", "e": "e", "E": "e"},
    "point": dict.fromkeys(_DIGITS, "fraction"),
    "fraction": {**dict.fromkeys(_DIGITS, "fraction"), "e": "e", "E": "e"},
    "e": {**dict.fromkeys(_DIGITS, "exponent"), "+": "sign", "-": "sign"},
    "sign": dict.fromkeys(_DIGITS, "exponent"),
    "exponent": dict.fromkeys(_DIGITS, "exponent"),
}
_ENDS = ("zero", "integer", "fraction", "exponent")


class Status(enum.Enum):
    """How far a scanner is."""

    OPEN = enum.auto()
    DONE = enum.auto()
    FAILED = enum.auto()


class ValueScanner:
    """One JSON value. `feed` looks at each character once, and twice at the one that ends a number or a run in a string.

    Strict: no NaN, no control character in a string, no trailing comma. Brackets nest MAX_DEPTH deep.
    """

    def __init__(self) -> None:
        self.status = Status.OPEN
        self._expects = "value"
        self._open: list[str] = []  # the closing brackets that are due, the innermost last
        self._is_key = False
        self._left = ""  # of a literal
        self._num_hex = 0  # digits that an escape still needs
        self._number = ""

    def feed(self, text: str, start: int, end: int) -> int:
        """Take text[start:end] as far as it belongs to the value; one past what was taken."""
        place = start
        while place < end and self.status is Status.OPEN:
            if self._expects == "string":
                while place < end and text[place] not in '"\\' and text[place] >= " ":
                    place += 1
                if place == end:
                    break
            place += self._take(text[place])
        return place

    def _take(self, char: str) -> bool:
        """One character; whether it belongs to the value."""
        expects = self._expects
        if expects == "string":
            return self._in_string(char)
        if expects == "number":
            if char in _NUMBER[self._number]:
                self._number = _NUMBER[self._number][char]
                return True
            return self._end_value(takes=False) if self._number in _ENDS else self._fail()
        if expects == "literal":
            if char != self._left[0]:
                return self._fail()
            self._left = self._left[1:]
            return True if self._left else self._end_value()
        if expects == "escape":
            self._expects, self._num_hex = ("hex", 4) if char == "u" else ("string", 0)
            return char in '"\\/bfnrtu' or self._fail()
        if expects == "hex":
            self._num_hex -= 1
            self._expects = "hex" if self._num_hex else "string"
            return char in _HEX or self._fail()
        return char in WHITESPACE or self._between(char)

    def _in_string(self, char: str) -> bool:
        if char == "\\":
            self._expects = "escape"
        elif char != '"':
            return self._fail()
        elif self._is_key:
            self._is_key, self._expects = False, "colon"
        else:
            self._end_value()
        return True

    def _between(self, char: str) -> bool:
        """A character that is no white space and in no string, number or literal."""
        expects = self._expects
        if expects == "colon":
            self._expects = "value"
            return char == ":" or self._fail()
        if char in "]}":
            if not self._open or char != self._open[-1] or expects not in ("first", "next"):
                return self._fail()
            self._open.pop()
            return self._end_value()
        if expects == "next":
            self._expects = "value" if self._open[-1] == "]" else "key"
            return char == "," or self._fail()
        if expects == "key" or (expects == "first" and self._open[-1] == "}"):
            self._is_key, self._expects = True, "string"
            return char == '"' or self._fail()
        return self._begin_value(char)

    def _begin_value(self, char: str) -> bool:
        if char == '"':
            self._expects = "string"
        elif char in "{[":
            if len(self._open) == MAX_DEPTH:
                return self._fail()
            self._open.append("}" if char == "{" else "]")
            self._expects = "first"
        elif char in _LITERALS:
            self._expects, self._left = "literal", _LITERALS[char][1:]
        elif char == "-" or char in _INTEGER:
            self._expects, self._number = "number", _INTEGER.get(char, "minus")
        else:
            return self._fail()
        return True

    def _end_value(self, *, takes: bool = True) -> bool:
        if self._open:
            self._expects = "next"
        else:
            self.status = Status.DONE
        return takes

    def _fail(self) -> bool:
        self.status = Status.FAILED
        return False


class ArgumentsScanner:
    """A JSON object that is the arguments of a call whose name is known. White space may stand before it."""

    def __init__(self, name: str):
        self.status = Status.OPEN
        self.name: str | None = name
        self.arguments: list[str] | None = None  # their text so far, in pieces; None before they begin
        self._value = ValueScanner()

    def feed(self, text: str, start: int, end: int) -> int:
        """As ValueScanner's."""
        place = start
        if self.arguments is None:
            while place < end and text[place] in WHITESPACE:
                place += 1
            if place == end:
                return place
            if text[place] != "{":
                self.status = Status.FAILED
                return place
            self.arguments = []
        stop = self._value.feed(text, place, end)
        self.arguments.append(text[place:stop])
        self.status = self._value.status
        return stop


class CallScanner:
    """A JSON object that says a call: a name, a string, and arguments, an object, each of them once and in any order.

    Its `feed` looks at each character at most three times. White space may stand before it.
    """

    def __init__(self, arguments_keys: Set[str], ignored_keys: Set[str] | None):
        """`arguments_keys` are names of the arguments; `ignored_keys` what else may be there, None is anything."""
        self.status = Status.OPEN
        self.name: str | None = None
        self.arguments: list[str] | None = None  # their text so far, in pieces; None before they begin
        self._arguments_keys, self._ignored_keys = arguments_keys, ignored_keys
        self._expects = "{"
        self._key = ""
        self._value: ValueScanner | None = None
        self._pieces: list[str] | None = None  # where the text of the value goes, None is nowhere

    def feed(self, text: str, start: int, end: int) -> int:
        """As ValueScanner's."""
        place = start
        while place < end and self.status is Status.OPEN:
            if self._value is not None:
                stop = self._value.feed(text, place, end)
                if self._pieces is not None:
                    self._pieces.append(text[place:stop])
                place = stop
                if self._value.status is Status.DONE:
                    self._end_value()
                elif self._value.status is Status.FAILED:
                    self._fail()
            elif text[place] in WHITESPACE:
                place += 1
            else:
                place += self._take(text[place])
        return place

    def _take(self, char: str) -> bool:
        """One character between values; whether it is used up: the first one of a value is the value's."""
        if self._expects == "value":
            self._begin_value(char)
            return False
        if char == '"' and self._expects in ("key", "key or }"):
            self._expects, self._value, self._pieces = "key", ValueScanner(), []
            return False
        if char == "{" and self._expects == "{":
            self._expects = "key or }"
        elif char == ":" and self._expects == ":":
            self._expects = "value"
        elif char == "," and self._expects == ", or }":
            self._expects = "key"
        elif char == "}" and self._expects == ", or }" and self.name is not None and self.arguments is not None:
            self.status = Status.DONE
        else:
            return self._fail()
        return True

    def _begin_value(self, char: str) -> None:
        self._value, self._pieces = ValueScanner(), None
        if self._key == "name":
            self._pieces = []
            if char != '"' or self.name is not None:
                self._fail()
        elif self._key in self._arguments_keys:
            if char != "{" or self.arguments is not None:
                self._fail()
            elif self.arguments is None:
                self._pieces = self.arguments = []
        elif self._ignored_keys is not None and self._key not in self._ignored_keys:
            self._fail()

    def _end_value(self) -> None:
        if self._expects == "key":
            self._key, self._expects = json.loads("".join(self._pieces or ())), ":"
        else:
            self._expects = ", or }"
            if self._key == "name":
                self.name = json.loads("".join(self._pieces or ()))
                if not is_name(self.name or ""):
                    self._fail()
        self._value = self._pieces = None

    def _fail(self) -> bool:
        self.status = Status.FAILED
        return False


def is_name(name: str) -> bool:
    """Whether a function can have this name: not empty, not endless, and text that can be written as UTF-8."""
    return 0 < len(name) <= MAX_NAME_LEN and not any("\ud800" <= char <= "\udfff" for char in name)
