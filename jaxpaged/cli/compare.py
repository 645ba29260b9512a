"""Flags and the run of a comparison: for `jaxpaged bench throughput` and `latency` with `--compare`."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxpaged.bench import compare, compare_table
from jaxpaged.bench.peer import KINDS, Peer, PeerError, Wanted, check, wanted
from jaxpaged.cli.options import Parser, UsageError, json_object, number, pairs_of, save_json, whole_number

if TYPE_CHECKING:
    from jaxpaged.llm import LLM

EXIT_PEER = 5
ROUNDS, TIMEOUT_S = 5, 900.0
_PEER_GIB = 4.0  # of a peer beside its weights: 2 of cache, the rest is torch and its scratch
_BYTES = {"float32": 4.0, "f32": 4.0, "q8_0": 1.07, "q4_0": 0.57}

NOTE = """\
--compare runs other engines beside ours, each in the interpreter that --peer-python names: the same weights and token ids,
greedy, the end of text ignored, no prefix cache, no texts made. They take turns; what counts are the ratios of each round.
Loading and a warm-up turn of each are not timed. llama.cpp reads a GGUF file that is written from the same weights."""


def add_compare(parser: Parser) -> None:
    """The flags of `--compare`."""
    group = parser.add_argument_group("comparison")
    kinds = ", ".join(KINDS)
    group.add_argument(
        "--compare", metavar="NAME[:TYPE],...", help=f"engines beside ours, of {kinds}; a type such as llamacpp:q8_0"
    )
    group.add_argument("--peer-python", nargs="+", metavar="NAME=PATH", default=[], help="their interpreters (default: this one)")
    group.add_argument(
        "--peer-options", nargs="+", metavar="NAME=JSON", default=[], help="options of their own, for their engine"
    )
    group.add_argument("--rounds", type=whole_number, metavar="N", help=f"turns of each that count (default: {ROUNDS})")
    group.add_argument(
        "--peer-threads", type=whole_number, metavar="N", help="their threads (default: the cores of this process)"
    )
    text = f"seconds that one answer of theirs may take, loading too (default: {TIMEOUT_S:g})"
    group.add_argument("--peer-timeout", type=number, metavar="X", help=text)
    text = "together, or in-turn: at most one of them at a time (default: together where memory allows)"
    group.add_argument("--peers-loaded", choices=("together", "in-turn"), help=text)


def check_flags(arguments: argparse.Namespace) -> None:
    """Before anything is loaded. Raises UsageError."""
    names = ("rounds", "peer_threads", "peer_timeout", "peers_loaded")
    if arguments.compare is None:
        given = next((name for name in names if getattr(arguments, name) is not None), None)
        given = given or next((name for name in ("peer_python", "peer_options") if getattr(arguments, name)), None)
        if given:
            raise UsageError(f"--{given.replace('_', '-')}: needs --compare")
        return
    for name in names[:3]:
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')}: got {getattr(arguments, name):g}, expected at least 1")
    if getattr(arguments, "enable_prefix_caching", False):
        raise UsageError("--enable-prefix-caching: not with --compare: from the second round on all prompts would be known")
    wanted(arguments.compare, "float32", pairs_of("--peer-python", arguments.peer_python))
    _options(arguments)


def run_compare(
    arguments: argparse.Namespace,
    llm: LLM,
    turn: compare.Turn,
    keys: Sequence[str],
    *,
    num_seqs: int,
    max_len: int,
    num_warmup: int = 1,
    about: dict[str, Any],
) -> int:
    """Load the peers, measure, report; the exit code.

    Args:
      keys: whose ratios are told.
      num_seqs: requests at once, at most.
      max_len: tokens of the longest request with its answer.
      num_warmup: turns after a loading that do not count.
      about: what the JSON says of the workload.
    """
    try:
        numbers = _measured(arguments, llm, turn, keys, num_seqs, max_len, num_warmup)
    except PeerError as error:
        from jaxpaged.cli import fail

        head, _, said = str(error).partition("\n")
        if said:
            print(said, file=sys.stderr)
        return fail(head, EXIT_PEER)
    mine = {key: value for key, value in numbers["sides"][numbers["ours"]].items() if isinstance(value, int | float)}
    numbers = {**mine, **about, **numbers, "command": shlex.join(["jaxpaged", *sys.argv[1:]])}
    save_json(numbers, arguments, compare_table.text(numbers))
    return 0


def _measured(
    arguments: argparse.Namespace,
    llm: LLM,
    turn: compare.Turn,
    keys: Sequence[str],
    num_seqs: int,
    max_len: int,
    num_warmup: int,
) -> dict[str, Any]:
    ours = compare.Ours(llm)
    pythons = pairs_of("--peer-python", arguments.peer_python)
    chosen = wanted(arguments.compare, ours.dtype, pythons)
    for one in chosen:
        check(one)
    on = compare.machine()
    directory = _directory(arguments)
    is_together = _fits(chosen, directory, on) if arguments.peers_loaded is None else arguments.peers_loaded == "together"
    options = _options(arguments)
    with tempfile.TemporaryDirectory(prefix="jaxpaged-gguf-") as folder, contextlib.ExitStack() as stack:
        peers = []
        for one in chosen:
            given = {**options.get(one.kind, {}), **({"gguf_dir": folder} if one.kind == "llamacpp" else {})}
            limits = {"max_model_len": max_len, "max_num_seqs": num_seqs, "num_threads": arguments.peer_threads or on["cores"]}
            peer = Peer(one, {"model": str(directory), **limits, "options": given}, timeout_s=arguments.peer_timeout or TIMEOUT_S)
            stack.callback(peer.close)
            peers.append(peer)
        found = compare.in_turn(
            [ours, *peers],
            turn,
            rounds=arguments.rounds or ROUNDS,
            num_warmup=num_warmup,
            is_together=is_together,
            say=lambda line: print(f"jaxpaged: {line}", file=sys.stderr, flush=True),
        )
    return {
        **compare.summary(found, keys),
        "num_rounds": arguments.rounds or ROUNDS,
        "peers_loaded": "all loaded at once" if is_together else "peers loaded one at a time",
        "machine": on,
    }


def _options(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    found = {}
    for name, text in pairs_of("--peer-options", arguments.peer_options).items():
        if name not in KINDS:
            raise UsageError(f"--peer-options: got {name!r} (of: {', '.join(KINDS)})")
        try:
            found[name] = json_object(text)
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"--peer-options: {name}: {error}") from None
    return found


def _directory(arguments: argparse.Namespace) -> Path:
    """Where the weights lie that all can read. Raises UsageError, CheckpointError."""
    from jaxpaged.checkpoint.find import resolve

    model = getattr(arguments, "model", None)
    if model in (None, "demo"):
        from jaxpaged.demo import MODEL_DIR

        return MODEL_DIR
    directory = Path(resolve(model, revision=getattr(arguments, "revision", None)))
    if not any(directory.glob("*.safetensors")):
        raise UsageError(f"--model: {directory} has no *.safetensors, which the other engines read")
    return directory


def _fits(chosen: Sequence[Wanted], directory: Path, on: dict[str, Any]) -> bool:
    """Whether all peers have room beside us. A type of 2 bytes is assumed of the file."""
    import psutil

    stored = sum(os.path.getsize(path) for path in directory.glob("*.safetensors"))
    needed = sum(_PEER_GIB * 2**30 + stored * _BYTES.get(one.dtype, 2.0) / 2.0 for one in chosen)
    return needed < psutil.virtual_memory().available
