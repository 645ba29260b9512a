"""`jaxpaged serve`: a model behind OpenAI's API, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
from typing import Any

from jaxpaged.admission import QueueOptions
from jaxpaged.cli import config_file
from jaxpaged.cli.options import Parser, UsageError, add_fields, add_verbose, given_fields
from jaxpaged.config import EngineConfig
from jaxpaged.server.options import ServerOptions

DESCRIPTION = "Serve a model over HTTP as OpenAI's API has it, with vLLM's extra fields."
EPILOG = """\
examples:
  jaxpaged serve                                       the bundled model on http://127.0.0.1:8000
  jaxpaged serve ./llama --port 8001 --max-num-seqs 64
  jaxpaged serve ./llama --config online-chat --port 80
  jaxpaged serve ./llama --host 0.0.0.0 --api-key-file keys.txt

  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "One day", "max_tokens": 32}'

http://127.0.0.1:8000/ui shows in a browser what runs and who owns which page, and has a chat.
SIGTERM and Ctrl-C end it when what runs has ended, a second one at once."""

KINDS = (ServerOptions, QueueOptions, EngineConfig)
_NEEDS = ("fastapi", "uvicorn", "httptools", "prometheus_client")


def add_arguments(parser: Parser) -> None:
    """The flags of this command."""
    parser.usage = "jaxpaged serve [FLAGS] [MODEL]"
    parser.add_argument("model_name", nargs="?", metavar="MODEL", help="the same as --model")
    names = ", ".join(config_file.shipped())
    text = f"options from a file, by their names, or from one that comes along: {names}; flags win"
    parser.add_argument("--config", metavar="FILE.yaml", help=text)
    add_verbose(parser)
    add_fields(parser, ServerOptions, "server")
    add_fields(parser, QueueOptions, "queue")
    add_fields(parser, EngineConfig, "model and engine")


def run(arguments: argparse.Namespace) -> int:
    """Serve; the exit code. What can be refused is refused before anything is loaded."""
    from_file = config_file.read(arguments.config, KINDS) if arguments.config is not None else {}

    def options_of(kind: type) -> dict[str, Any]:
        names = {field.name for field in dataclasses.fields(kind)}
        return {name: value for name, value in from_file.items() if name in names} | given_fields(arguments, kind)

    given = options_of(EngineConfig)
    if arguments.model_name is not None:
        if hasattr(arguments, "model"):
            raise UsageError("MODEL: given twice, also as --model")
        given["model"] = arguments.model_name
    EngineConfig.from_options(**given)
    options = ServerOptions(**options_of(ServerOptions))
    options.all_keys()
    queue = QueueOptions(**options_of(QueueOptions))
    if missing := [name for name in _NEEDS if importlib.util.find_spec(name) is None]:
        raise UsageError(f"{missing[0]} is not installed: pip install 'jaxpaged[serve]'")
    from jaxpaged.async_llm import AsyncLLM
    from jaxpaged.server.logs import logging_to
    from jaxpaged.server.run import bind, serve

    how: dict[str, Any] = {"log_format": options.log_format, "is_verbose": arguments.verbose}
    with logging_to(**how), bind(options.host, options.port) as bound:
        llm = AsyncLLM.from_options(**given, queue=queue, use_tqdm_on_load=sys.stderr.isatty())
        serve(llm, options, bound, when_ready=lambda url: print(f"jaxpaged: serving on {url}", file=sys.stderr, flush=True))
    return 0
