"""Traffic that was recorded: a CSV or JSONL file, one request a line. Knows files' columns and refuses what it cannot read."""

from __future__ import annotations

import csv
import json
import logging
import math
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from jaxpaged.config import ConfigError, nearest
from jaxpaged.simulate.arrivals import Arrival

logger = logging.getLogger("jaxpaged")

# column -> how else public traces spell it: Azure's LLM inference traces (TIMESTAMP, ContextTokens, GeneratedTokens), BurstGPT
# (Timestamp, Request tokens, Response tokens). Case does not matter.
_COLUMNS = {
    "arrival_s": ("timestamp",),
    "prompt_tokens": ("contexttokens", "request tokens"),
    "output_tokens": ("generatedtokens", "response tokens"),
    "tenant": (),
    "priority": (),
    "prefix_id": (),
    "prefix_tokens": (),
    "n": (),
}
_NEEDED = ("arrival_s", "prompt_tokens", "output_tokens")
_NAMES = {spelling: name for name, others in _COLUMNS.items() for spelling in (name, *others)}


def read_trace(path: str) -> list[Arrival]:
    """The requests of a file in order of arrival, the first at 0 s.

    A file whose name ends in .jsonl has an object on each line, any other a header and comma-separated values. Columns are
    arrival_s (seconds, or a date and time), prompt_tokens, output_tokens, and if they are there tenant, priority, prefix_id,
    prefix_tokens and n; other columns are left alone. Requests without prompt or answer, failures in public traces, are left out.

    Raises:
      ConfigError: with the line, the column, what it got and what is allowed.
    """
    rows = _json_rows(path) if path.endswith(".jsonl") else _csv_rows(path)
    prefixes: dict[str, int] = {}
    found, num_empty = [], 0
    for where, row in rows:
        missing = [name for name in _NEEDED if name not in row]
        if missing:
            raise ConfigError(f"{where}: column {missing[0]} is missing{nearest(missing[0], list(row))}")
        num_prompt, num_output = (_whole(row[name], f"{where}: {name}") for name in _NEEDED[1:])
        arrival_s = _seconds(row["arrival_s"], f"{where}: arrival_s")
        if not num_prompt or not num_output:
            num_empty += 1
            continue
        prefix = str(row.get("prefix_id", "") or "")
        found.append(
            Arrival(
                arrival_s,
                num_prompt,
                num_output,
                tenant=str(row["tenant"]) if row.get("tenant") else None,
                priority=_whole(row.get("priority") or 0, f"{where}: priority", low=-(2**31)),
                prefix_id=prefixes.setdefault(prefix, len(prefixes)),
                prefix_len=_whole(row.get("prefix_tokens") or 0, f"{where}: prefix_tokens") if prefix else 0,
                n=_whole(row.get("n") or 1, f"{where}: n", low=1),
            )
        )
    if num_empty:
        logger.warning("%s: %d requests without prompt or answer are left out", path, num_empty)
    if not found:
        raise ConfigError(f"{path}: no requests")
    found.sort(key=lambda arrival: arrival.arrival_s)
    first = found[0].arrival_s
    return [_at(arrival, arrival.arrival_s - first) for arrival in found]


def _at(arrival: Arrival, arrival_s: float) -> Arrival:
    # dataclasses.replace would run a million times over, at three times the price.
    return Arrival(
        *(arrival_s, arrival.num_prompt, arrival.num_output),
        *(arrival.tenant, arrival.priority, arrival.prefix_id, arrival.prefix_len, arrival.n),
    )


def _csv_rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with _opened(path) as file:
        try:
            reader = csv.reader(file)
            header: list[str] = [_NAMES.get(name.strip().lower(), name) for name in next(reader, [])]
            for values in reader:
                if values:
                    yield f"{path}:{reader.line_num}", dict(zip(header, values, strict=False))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not a CSV file ({error})") from None


def _json_rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with _opened(path) as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    values = json.loads(line)
                    if not isinstance(values, dict):
                        raise ConfigError(f"{path}:{number}: got {type(values).__name__}, expected an object")
                    yield f"{path}:{number}", {_NAMES.get(str(name).lower(), str(name)): value for name, value in values.items()}
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(f"{path}: not a JSONL file ({error})") from None


def _opened(path: str) -> TextIO:
    try:
        return Path(path).open(encoding="utf-8", newline="")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None


def _whole(value: Any, where: str, low: int = 0) -> int:
    try:
        number = int(value) if isinstance(value, str) else value
    except ValueError:
        number = value
    if type(number) is not int or not low <= number < 2**31:
        raise ConfigError(f"{where}: got {value!r}, expected a whole number of at least {low}")
    return number


def _seconds(value: Any, where: str) -> float:
    number = value
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            try:
                number = (datetime.fromisoformat(value.strip()).replace(tzinfo=None) - datetime(1970, 1, 1)).total_seconds()
            except ValueError:
                raise ConfigError(f"{where}: got {value!r}, expected seconds, or a date and time") from None
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
        raise ConfigError(f"{where}: got {value!r}, expected a finite number of seconds")
    return float(number)
