"""The command `jaxpaged`: finds the subcommand, and turns what goes wrong into one line and an exit code.

Knows names, codes and how an error is shown. Refuses to import jax: `jaxpaged --help` answers at once.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType

from jaxpaged.cli.options import Parser, UsageError
from jaxpaged.config import ConfigError, nearest
from jaxpaged.host.request import RequestError
from jaxpaged.version import __version__

EXIT_USAGE, EXIT_CHECKPOINT, EXIT_RESOURCES, EXIT_BUG, EXIT_INTERRUPTED, EXIT_PIPE = 2, 3, 4, 70, 130, 141

# Each is a module of this folder: DESCRIPTION, EPILOG, add_arguments(parser), run(arguments). Those of OWN_PARSERS have main.
OWN_PARSERS = ("convert", "bench")
COMMANDS = {
    "generate": "complete prompts and print the texts",
    "serve": "answer OpenAI's API over HTTP",
    "chat": "talk with a model in the terminal, here or on a server",
    "complete": "go on with texts, line by line, here or on a server",
    "run-batch": "a file of requests in, a file of answers out, in OpenAI's batch format",
    "demo": "watch paged attention at work on a small model that comes along",
    "bench": "measure a server under load, or this machine: serve, latency, throughput",
    "convert": "Hugging Face safetensors to orbax and back",
    "simulate": "the scheduler on a virtual clock: throughput and latency on a GPU that is not here, and memory",
    "replay": "run a flight recording again without the model, or draw it",
    "inspect": "which pages are in use, and by whom",
    "debug": "what the scheduler and the prefix cache hold",
    "collect-env": "one block of text about this machine, for an issue",
}

_DESCRIPTION = "jaxpaged serves language models from JAX, with a paged KV cache."
_EPILOG = """\
examples:
  jaxpaged demo                                         the bundled model, eight prompts at once
  jaxpaged generate "One day" --max-tokens 64           the bundled model again
  jaxpaged generate --model ./llama "Dear" --stream     a Hugging Face directory
  jaxpaged serve ./llama --port 8000                    OpenAI's API over HTTP
  jaxpaged chat --url http://127.0.0.1:8000             with history, in the terminal
  jaxpaged bench serve --request-rate 8                 how quick a server answers, under load
  jaxpaged convert ./llama ./llama-orbax --verify       for faster loading

'jaxpaged COMMAND --help' tells the rest.

exit codes: 0 done, 1 a check failed, 2 usage, configuration or request, 3 bad checkpoint or recording, 4 memory or space,
70 a bug of jaxpaged, 130 interrupted"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code. Errors are one line on stderr, without a traceback unless the fault is ours."""
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()  # here, where a closed pipe can still be caught
        return code
    except BrokenPipeError:
        # The reader has had enough. The interpreter flushes stdout once more when it ends: give it a place that takes it.
        _discard_stdout()
        return EXIT_PIPE
    except KeyboardInterrupt:
        return fail("interrupted", EXIT_INTERRUPTED)
    except Exception as error:
        code = exit_code(error)
        if code == EXIT_BUG:
            traceback.print_exc()
            return fail(f"a bug ({type(error).__name__}): please report the above and the output of 'jaxpaged collect-env'", code)
        return fail(_message(error), code)


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if argv else EXIT_USAGE
    if argv[0] in ("-V", "--version", "version"):
        print(f"jaxpaged {__version__}")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        kind = "flag" if name.startswith("-") else "command"
        raise UsageError(f"unknown {kind} {name!r}{nearest(name, list(COMMANDS))} (commands: {', '.join(COMMANDS)})")
    command = _module(name)
    if name in OWN_PARSERS:
        return command.main(rest)
    return run_command(f"jaxpaged {name}", command, rest)


def run_command(prog: str, command: ModuleType, argv: list[str]) -> int:
    """Parse the flags of a command's module and run it."""
    parser = Parser(prog, command.DESCRIPTION, command.EPILOG)
    command.add_arguments(parser)
    try:
        arguments = parser.parse(argv)
    except SystemExit:  # --help has been printed
        return 0
    return command.run(arguments)


def _module(name: str) -> ModuleType:
    return importlib.import_module("convert.cli" if name == "convert" else f"jaxpaged.cli.{name.replace('-', '_')}")


def _help() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items())
    return f"usage: jaxpaged COMMAND [...]\n\n{_DESCRIPTION}\n\ncommands:\n{commands}\n\n{_EPILOG}"


def fail(message: str, code: int) -> int:
    """Print one line and hand the code back."""
    print("jaxpaged: error: " + " ".join(message.split()), file=sys.stderr)
    return code


def exit_code(error: Exception) -> int:
    """The exit code of an error that reached the command line."""
    if isinstance(error, (UsageError, ConfigError, RequestError)):
        return EXIT_USAGE
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return EXIT_RESOURCES
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EROFS):
        return EXIT_RESOURCES
    # Only a process that has imported these modules can have raised their errors.
    known = (
        ("jaxpaged.checkpoint", "CheckpointError", EXIT_CHECKPOINT),
        ("jaxpaged.observe.records", "RecordingError", EXIT_CHECKPOINT),
        ("jaxpaged.runner", "ResourceError", EXIT_RESOURCES),
    )
    for module, name, code in known:
        if module in sys.modules and isinstance(error, getattr(sys.modules[module], name)):
            return code
    return EXIT_BUG


def _message(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    if isinstance(error, MemoryError):
        return "not enough memory"
    return str(error).splitlines()[0] if "RESOURCE_EXHAUSTED" in str(error) else str(error)


def _discard_stdout() -> None:
    with contextlib.suppress(OSError, ValueError):  # a stdout that is no file, as in tests
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
