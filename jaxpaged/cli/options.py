"""The grammar of flags, and flags made from the fields of a dataclass: one declaration for Python and the command line.

vLLM's grammar: `--a_b` is `--a-b`, `--no-x` turns a switch off, `4k` is 4000 and `4K` is 4096. Knows no command.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import logging
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from jaxpaged.config import nearest
from jaxpaged.host.request import RequestError
from jaxpaged.host.structured import StructuredOutputsParams

_DECIMAL = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_NONE: Mapping[str, str] = MappingProxyType({})


class UsageError(ValueError):
    """A command line that cannot be understood, in one line."""


class Parser(argparse.ArgumentParser):
    """argparse, strict: no abbreviations, no flag twice, a hint for a misspelt one, and errors that are exceptions."""

    def __init__(self, prog: str, description: str, epilog: str):
        super().__init__(
            prog=prog,
            usage=f"{prog} [FLAGS]",
            description=description,
            epilog=epilog,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=110),
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message.removeprefix('argument ')} (see '{self.prog} --help')")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse a command line; positional arguments may stand between flags, and everything after `--` is positional.

        Raises:
          UsageError: it cannot be understood.
        """
        head, tail = list(argv), []
        if "--" in head:
            at = head.index("--")
            head, tail = head[:at], head[at + 1 :]
        # parse_intermixed_args forgets about `--`. No argument can hold a NUL, so it marks the words that are no flags.
        found = self.parse_intermixed_args([*self._checked(head), *("\0" + word for word in tail)])
        for name, value in vars(found).items():
            if isinstance(value, str):
                setattr(found, name, value.removeprefix("\0"))
            elif isinstance(value, list):
                setattr(found, name, [word.removeprefix("\0") for word in value])
        return found

    def _checked(self, argv: list[str]) -> list[str]:
        """The same words with flags in their one spelling."""
        words, seen = [], set()
        for word in argv:
            if not word.startswith("--") and word not in self._option_string_actions:
                words.append(word)
                continue
            name, equals, value = word.partition("=")
            flag = name.replace("_", "-")
            action = self._option_string_actions.get(flag)
            if action is None:
                known = [option.removeprefix("--") for option in self._option_string_actions if option.startswith("--")]
                hint = nearest(flag.removeprefix("--"), [option.replace("-", "_") for option in known])
                self.error(f"unknown flag {name!r}{_as_flag(hint)}")
            if action.dest in seen:
                self.error(f"{flag}: given twice")
            seen.add(action.dest)
            words.append(flag + equals + value)
        return words


def _as_flag(hint: str) -> str:
    return re.sub(r"'(\w+)'", lambda match: f"'--{match[1].replace('_', '-')}'", hint)


def whole_number(text: str) -> int:
    """4096, 4k = 4000, 2.5k = 2500, 4K = 4096; likewise m, g, t and M, G, T."""
    match = re.fullmatch(r"(-?\d+(?:_\d+)*)(\.\d+)?([kmgtKMGT]?)", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number such as 4096, 4k or 2.5k")
    whole, fraction, suffix = match.groups()
    factor = _DECIMAL.get(suffix) or _BINARY.get(suffix) or 1
    if not fraction:
        return int(whole) * factor
    digits = int(whole + fraction[1:]) * factor
    if digits % 10 ** (len(fraction) - 1):
        raise argparse.ArgumentTypeError(f"got {text!r}, which is not a whole number")
    return digits // 10 ** (len(fraction) - 1)


def number(text: str) -> float:
    """A decimal number; whether it is in range is the dataclass's business."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number") from None


def whole_numbers(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between them."""
    return tuple(whole_number(part) for part in text.split(","))


def numbers_of(text: str) -> tuple[float, ...]:
    """Decimal numbers with commas between them."""
    return tuple(number(part) for part in text.split(","))


def goals_of(words: Iterable[str]) -> dict[str, float]:
    """What `--goodput` names: the most milliseconds of each metric. Raises UsageError."""
    goals = {}
    for word in words:
        name, colon, limit = word.partition(":")
        if not colon:
            raise UsageError(f"--goodput: got {word!r}, expected NAME:MS such as ttft:500")
        try:
            goals[name] = number(limit)
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"--goodput: {name}: {error}") from None
    return goals


def pairs_of(flag: str, words: Iterable[str]) -> dict[str, str]:
    """What a flag of NAME=VALUE words says. Raises UsageError."""
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise UsageError(f"{flag}: got {word!r}, expected NAME=VALUE")
        found[name] = value
    return found


def json_object(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError('expected a JSON object, such as {"top_p": 0.9}')
    return found


def words(text: str) -> tuple[str, ...]:
    """Words with commas between them."""
    return tuple(text.split(","))


def number_lists(text: str) -> tuple[tuple[int, ...], ...]:
    """Lists of whole numbers with semicolons between them."""
    return tuple(whole_numbers(part) for part in text.split(";"))


def numbers_by_number(text: str) -> tuple[tuple[int, float], ...]:
    """Whole numbers, each with a colon and a decimal number, and commas between these pairs."""
    pairs = [part.partition(":") for part in text.split(",")]
    return tuple((whole_number(key), number(value)) for key, _, value in pairs)


def numbers_by_name(text: str) -> tuple[tuple[str, float], ...]:
    """Names, each with a colon and a decimal number, and commas between these pairs."""
    pairs = [part.rpartition(":") for part in text.split(",")]
    return tuple((name, number(value)) for name, _, value in pairs)


def switch_or_word(text: str) -> bool | str:
    """true and false, or a word whose meaning is the dataclass's business."""
    return {"true": True, "false": False}.get(text.lower(), text)


def structured_outputs(text: str) -> StructuredOutputsParams:
    """Fields of StructuredOutputsParams as a JSON object."""
    try:
        given = json.loads(text)
        if not isinstance(given, dict):
            raise ValueError
        return StructuredOutputsParams(**given)
    except RequestError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    except (ValueError, RecursionError):
        raise argparse.ArgumentTypeError('expected a JSON object, such as {"regex": "[0-9]+"}') from None


_KINDS = {
    "StructuredOutputsParams": (structured_outputs, "JSON"),
    "int": (whole_number, "N"),
    "float": (number, "X"),
    "str": (str, "TEXT"),
    "bool | str": (switch_or_word, "true|false|WORD"),
    "tuple[int, ...]": (whole_numbers, "N,N,..."),
    "tuple[str, ...]": (words, "TEXT,TEXT,..."),
    "tuple[tuple[int, ...], ...]": (number_lists, "N,N;N,..."),
    "Mapping[int, float] | tuple[tuple[int, float], ...]": (numbers_by_number, "N:X,N:X,..."),
}
_KINDS["str | tuple[str, ...]"] = _KINDS["str"]  # a list can only be given in Python
_IN_PYTHON_ONLY = "tuple[Callable[..., Any], ...]"  # functions have no spelling on a command line
_KINDS["Mapping[str, float] | tuple[tuple[str, float], ...]"] = (numbers_by_name, "NAME:X,NAME:X,...")
_KINDS["str | Callable[..., Any]"] = _KINDS["str"]  # a function can only be given in Python
_KINDS["SpeculativeConfig | Mapping[str, Any] | str"] = (str, "JSON")


def converter(annotation: str) -> Callable[[str], Any]:
    """What makes a value of a text, for a field of this type; ValueError or argparse's error where the text is none."""
    return _KINDS[annotation][0] if annotation in _KINDS else {"bool": switch_or_word}.get(annotation, str)


def add_fields(
    parser: argparse.ArgumentParser,
    kind: type,
    title: str,
    *,
    leave_out: Collection[str] = (),
    defaults: Mapping[str, str] = _NONE,
) -> None:
    """A flag for each field of a dataclass, its help taken from the Args section of the class. Absent flags set nothing.

    Args:
      defaults: words for fields whose default is another on this command line.
    """
    group = parser.add_argument_group(title)
    described = described_fields(kind)
    for field in dataclasses.fields(kind):
        if field.name in leave_out or field.type == _IN_PYTHON_ONLY:
            continue
        # What is None in Python is a flag that is absent here.
        text = re.sub(r"[;,] None (is|means) ([^;]*)", r" (default: \2)", described.get(field.name, "")).replace("%", "%%")
        if field.name in defaults:
            text = text.partition(" (default:")[0] + f" (default: {defaults[field.name]})"
        elif field.default not in (None, "auto", ()) and not isinstance(field.default, bool):
            text += f" (default: {field.default})"
        flag, annotation = "--" + field.name.replace("_", "-"), str(field.type).removesuffix(" | None")
        if annotation == "bool":
            if field.default:
                text += " (default: yes)"
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
            continue
        convert, metavar = _KINDS[annotation]
        group.add_argument(flag, type=convert, metavar=metavar, default=argparse.SUPPRESS, help=text)


def given_fields(arguments: argparse.Namespace, kind: type, *, leave_out: Collection[str] = ()) -> dict[str, Any]:
    """The fields of a dataclass that the command line set."""
    names = (field.name for field in dataclasses.fields(kind) if field.name not in leave_out)
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def described_fields(kind: type) -> dict[str, str]:
    """Field name -> text, from the Args section of a class's docstring; empty under `python -OO`, which has no docstrings."""
    _, _, section = (inspect.getdoc(kind) or "").partition("\nArgs:\n")
    described: dict[str, str] = {}
    name = None
    for line in section.splitlines():
        if line and not line.startswith(" "):
            break  # the next section
        entry = re.match(r"  (\w+): (.*)", line)
        if entry:
            name = entry[1]
            described[name] = entry[2]
        elif name and line.strip():
            described[name] += " " + line.strip()
    return {name: text.removesuffix(".") for name, text in described.items()}


def add_counts(group: argparse._ActionsContainer, counts: Iterable[tuple[str, int, str]]) -> None:
    """Flags for whole numbers: name, default, what it is."""
    for name, default, text in counts:
        group.add_argument(f"--{name}", type=whole_number, metavar="N", default=default, help=f"{text} (default: {default})")


def add_json(group: argparse._ActionsContainer, *, saved: str = "write the numbers to a file too", form: str = "object") -> None:
    """The flags that `save_json` reads. `form`: what JSON calls the numbers."""
    group.add_argument("--output-json", metavar="FILE", help=saved)
    group.add_argument("--json", action="store_true", help=f"one JSON {form} on stdout instead of a table")


def save_json(numbers: Any, arguments: argparse.Namespace, table: str) -> None:
    """Print what the flags `--json` and `--output-json` ask for: the numbers, or their table."""
    print(json.dumps(numbers) if arguments.json else table)
    if arguments.output_json is not None:
        Path(arguments.output_json).write_text(json.dumps(numbers, indent=4), encoding="utf-8")


def add_verbose(parser: argparse.ArgumentParser) -> None:
    """The flag `-v` that `set_up_logging` reads."""
    parser.add_argument("-v", "--verbose", action="store_true", help="say on stderr where memory and time go")


def set_up_logging(arguments: argparse.Namespace) -> None:
    """Messages of the library go to stderr: warnings in the form of our errors, with `-v` everything."""
    logger = logging.getLogger("jaxpaged")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Compact())
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if arguments.verbose else logging.WARNING)
    logger.propagate = False


class _Compact(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        head = "jaxpaged: " if record.levelno < logging.WARNING else f"jaxpaged: {record.levelname.lower()}: "
        return head + record.getMessage()
