"""Flags that say which server is asked, and with which key: of every command that talks to one."""

from __future__ import annotations

import argparse
from pathlib import Path

from jaxpaged.cli.options import UsageError, pairs_of

DEFAULT_URL = "http://127.0.0.1:8000"


def add_headers(group: argparse._ActionsContainer) -> None:
    """`--api-key-file` and `--header`. A key itself is no flag: a command line can be read by others."""
    group.add_argument("--api-key-file", metavar="FILE", help="a file whose first line is the key that the server wants")
    group.add_argument("--header", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="sent with every request")


def headers(arguments: argparse.Namespace) -> dict[str, str]:
    """What these flags say. Raises UsageError."""
    found = pairs_of("--header", arguments.header)
    if arguments.api_key_file is None:
        return found
    path = arguments.api_key_file
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UsageError(f"--api-key-file: {path}: {why}") from None
    key = next((line.strip() for line in lines if line.strip()), "")
    if not key or not key.isascii() or not key.isprintable():
        raise UsageError(f"--api-key-file: {path}: there is no key in it")
    return {"authorization": f"Bearer {key}", **found}
