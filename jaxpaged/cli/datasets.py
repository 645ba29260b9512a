"""Flags of what a benchmark asks, and the requests that they mean: for all kinds of `jaxpaged bench`."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import Any

from jaxpaged.bench.datasets import Ask, DatasetOptions, Ids, Words, asks
from jaxpaged.cli.options import Parser, UsageError, add_fields, given_fields, whole_number

# flag -> the field that it sets, of the dataset that is asked
_LENGTHS = {"input_len": "random_input_len", "output_len": "random_output_len"}


def add_dataset(parser: Parser, *, leave_out: Collection[str] = ()) -> None:
    """A flag for each field of DatasetOptions, and vLLM's short names of two."""
    add_fields(parser, DatasetOptions, "dataset", leave_out=leave_out)
    group = parser.add_argument_group("short names")
    for name, meant in _LENGTHS.items():
        text = f"the same as --{meant.replace('_', '-')}"
        group.add_argument(f"--{name.replace('_', '-')}", type=whole_number, metavar="N", default=argparse.SUPPRESS, help=text)


def dataset_options(arguments: argparse.Namespace, **defaults: Any) -> DatasetOptions:
    """What the flags say. Raises UsageError, ConfigError."""
    given = given_fields(arguments, DatasetOptions)
    for name, meant in _LENGTHS.items():
        if hasattr(arguments, name):
            if meant in given:
                raise UsageError(f"--{name.replace('_', '-')}: given twice, also as --{meant.replace('_', '-')}")
            given[meant] = getattr(arguments, name)
    return DatasetOptions(**{**defaults, **given})


def drawn(
    options: DatasetOptions, tokenizer: Any, num_more: int = 0, *, num_ids: int | None = None
) -> tuple[list[Ask], list[Ask]]:
    """The requests, and as many more that are not among them.

    Args:
      tokenizer: None where none is needed.
      num_ids: without a tokenizer prompts are of this many token ids.
    """
    words = Words(tokenizer) if tokenizer is not None else Ids(num_ids) if num_ids is not None else None
    found = asks(options, words)
    if not num_more:
        return found, []
    from dataclasses import replace

    return found, asks(replace(options, num_prompts=num_more, seed=options.seed + 1_000_003), words)


def load_tokenizer(name: str | None) -> Any:
    """The tokenizer of a local directory; None and demo are that of the bundled model. Raises UsageError, CheckpointError."""
    from jaxpaged.demo import MODEL_DIR
    from jaxpaged.tokenizer import Tokenizer

    if name is not None and name != "demo" and not Path(name).is_dir():
        raise UsageError(f"--tokenizer: got {name!r}, expected a local directory with a tokenizer.json")
    return Tokenizer.load(MODEL_DIR if name in (None, "demo") else name)
