"""What the command lines of this package share: strict flags, errors of one line, the choice of operations and cases, tables.

Refuses to know what any command does.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import jax

from pallas_kernels import operations
from pallas_kernels.backends import BACKENDS
from pallas_kernels.operations import Operation

RIGHT, WRONG, USAGE = 0, 1, 2  # exit codes: all is well, something is wrong with a kernel, nothing could be done


class UsageError(ValueError):
    """What was asked for cannot be done; the message is one line that says why."""


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are exceptions and name the nearest flag."""

    def __init__(self, module: str, description: str):
        super().__init__(prog=f"python -m pallas_kernels.{module}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument "))

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parse a command line.

        Raises:
          UsageError: it cannot be understood.
        """
        found, unknown = self.parse_known_args(argv)
        if unknown:
            flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
            self.error(not_one_of("flag", unknown[0].partition("=")[0], flags))
        return found


def not_one_of(what: str, got: str, allowed: Iterable[str]) -> str:
    """The line for a name that is not among those allowed, with the nearest."""
    allowed = list(allowed)
    near = difflib.get_close_matches(got, allowed, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{what}: got {got!r}, expected one of {', '.join(allowed)}{hint}"


def main(module: str, command: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Run a command; what the user got wrong becomes a line on stderr and the code USAGE."""
    try:
        return command(argv)
    except UsageError as error:
        print(f"{module}: {error}", file=sys.stderr)
        return USAGE
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return USAGE


def add_choice(parser: argparse.ArgumentParser, *, backends: str = "") -> None:
    """The flags that choose operations, and with `backends` (their default, in words) backends."""
    parser.add_argument(
        "--op", action="extend", nargs="+", default=[], metavar="NAME", help=f"of {', '.join(operations.NAMES)} (default: all)"
    )
    if backends:
        named = ", ".join(name for name in BACKENDS if name != "auto")
        parser.add_argument(
            "--backend", action="extend", nargs="+", default=[], metavar="NAME", help=f"of {named} (default: {backends})"
        )


def chosen_operations(names: Sequence[str]) -> list[Operation]:
    """The named operations in the order of operations.NAMES, all of them for no name.

    Raises:
      UsageError: there is none of that name.
    """
    for name in names:
        if name not in operations.NAMES:
            raise UsageError(not_one_of("--op", name, operations.NAMES))
    return [operations.operation(name) for name in operations.NAMES if not names or name in names]


def chosen_backends(names: Sequence[str], default: Sequence[str]) -> list[str]:
    """The named backends, or the default ones.

    Raises:
      UsageError: there is none of that name.
    """
    for name in names:
        if name not in BACKENDS:
            raise UsageError(not_one_of("--backend", name, [known for known in BACKENDS if known != "auto"]))
    return list(dict.fromkeys(names)) or list(default)


def matches(case: Any, substrings: Sequence[str]) -> bool:
    """Whether a case's name holds one of the substrings; every name does when there are none."""
    return not substrings or any(part in str(case) for part in substrings)


def is_refusal(error: Exception) -> bool:
    """Whether an operation says that a backend cannot run here, and not something below it that it lacks a feature."""
    return isinstance(error, NotImplementedError) and "cannot run here" in str(error)


def first_line(error: Exception) -> str:
    """The first line of an error's message that says something, cut to what fits a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return lines[0][:300]


def here() -> str:
    """This machine in a line: jax, and what it runs on."""
    device = jax.devices()[0]
    kind = device.device_kind if device.platform != "cpu" else f"cpu, {os.cpu_count()} cores"
    return f"jax {jax.__version__} on {kind}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: str = "") -> str:
    """Rows as aligned text; `right` holds r for each column that is aligned right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def show(line: Sequence[str]) -> str:
        cells = (
            cell.rjust(width) if right[i : i + 1] == "r" else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    return "\n".join(map(show, lines))
