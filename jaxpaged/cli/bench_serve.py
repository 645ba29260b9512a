"""`jaxpaged bench serve`: requests to a server at a rate, and how long their answers took. Imports no jax."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jaxpaged.bench import serve_report
from jaxpaged.bench.datasets import Ask, DatasetOptions
from jaxpaged.bench.serve import PATHS, Offer, Run, Seen, measure
from jaxpaged.cli.datasets import add_dataset, dataset_options, drawn, load_tokenizer
from jaxpaged.cli.options import Parser, UsageError, goals_of, json_object, number, numbers_of, pairs_of, whole_number, words
from jaxpaged.cli.server_flags import DEFAULT_URL, add_headers, headers
from jaxpaged.client.connection import HttpError
from jaxpaged.client.http import Client
from jaxpaged.client.openai import models
from jaxpaged.simulate.arrivals import RAMPS, Ramp
from jaxpaged.simulate.report import check_goodput, check_percentiles

DESCRIPTION = """\
Send requests to a server of OpenAI's API at a rate that does not wait for answers, and measure each of them here, at the client:
time to first token (ttft), time per output token (tpot), time between chunks (itl), and end to end (e2el)."""
EPILOG = """\
examples:
  jaxpaged bench serve --random-input-len 64 --random-output-len 32 --num-prompts 200 --request-rate 8
  jaxpaged bench serve --base-url http://host:8000 --backend openai-chat --dataset-name sharegpt --max-concurrency 16
  jaxpaged bench serve --ramp-up-strategy linear --ramp-up-start-rps 1 --ramp-up-end-rps 40 --num-prompts 500
  jaxpaged bench serve --request-rate 20 --burstiness 0.5 --goodput ttft:200 tpot:50 --save-result --result-dir runs
  jaxpaged bench serve --dataset-name custom --dataset-path prompts.jsonl --json | jq .p99_ttft_ms

Ctrl-C ends it early and gives the numbers of what has ended. The client watches itself and says when it was too slow to measure.
Exit code 1: no request was answered."""
_INTERRUPTED = 130


def add_arguments(parser: Parser) -> None:
    """The flags of this command."""

    def add(group: Any, flag: str, metavar: str, text: str, convert: Any = str, default: Any = None, **other: Any) -> None:
        group.add_argument(flag, type=convert, metavar=metavar, help=text, default=default, **other)

    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of a table")
    group = parser.add_argument_group("server")
    add(group, "--backend", "NAME", f"one of {', '.join(PATHS)} (default: openai)", default="openai")
    add(group, "--base-url", "URL", f"of the server (default: {DEFAULT_URL})")
    add(group, "--host", "NAME", "instead of --base-url", default=None)
    add(group, "--port", "N", "with --host (default: 8000)", whole_number)
    add(group, "--endpoint", "PATH", "asked for answers (default: what the backend has)")
    add(group, "--model", "NAME", "asked for (default: the first that the server names)")
    add(
        group, "--tokenizer", "DIR", "that counts prompts; a local directory (default: --model where it is one, else the bundled)"
    )
    add_headers(group)
    add(group, "--extra-body", "JSON", "more fields of every request", json_object)
    add(group, "--temperature", "X", "of every request (default: 0)", number, default=0.0)
    group.add_argument("--ignore-eos", action="store_true", help="answers are as long as they may be")
    add(group, "--request-timeout-s", "X", "for a whole answer (default: 21600)", number, default=21_600.0)
    text = "ask for the tokens of every chunk, which servers like vLLM and jaxpaged tell (default: yes)"
    group.add_argument("--continuous-usage-stats", action=argparse.BooleanOptionalAction, default=True, help=text)

    group = parser.add_argument_group("rate")
    add(group, "--request-rate", "X", "requests per second; inf is all at once (default: inf)", number, default=math.inf)
    text = f"instead of --request-rate: it grows from the first request to the last, one of {', '.join(RAMPS)}"
    add(group, "--ramp-up-strategy", "NAME", text)
    add(group, "--ramp-up-start-rps", "X", "requests per second of the first", number)
    add(group, "--ramp-up-end-rps", "X", "and of the last", number)
    add(group, "--burstiness", "X", "1 is Poisson, below 1 in bursts, above 1 evenly (default: 1)", number, default=1.0)
    add(group, "--max-concurrency", "N", "requests at a time; others wait until one has ended", whole_number)
    add(
        group,
        "--num-warmups",
        "N",
        "other requests before, one after the other, not counted (default: 0)",
        whole_number,
        default=0,
    )

    group = parser.add_argument_group("results")
    names, some = ",".join(serve_report.METRICS), ("ttft", "tpot", "itl", "e2el")
    add(group, "--percentile-metrics", "NAME,NAME,...", f"which times to report (default: {names})", words, default=some)
    add(group, "--metric-percentiles", "X,X,...", "which percentiles of them (default: 99)", numbers_of, default=(99.0,))
    text = "the most that a good request may take, such as ttft:200 tpot:50 e2el:2000, in milliseconds"
    add(group, "--goodput", "NAME:MS", text, nargs="+", action="extend", default=[])
    group.add_argument("--save-result", action="store_true", help="write a JSON file of vLLM's keys")
    group.add_argument("--save-detailed", action="store_true", help="with the times and texts of every request in it")
    group.add_argument("--append-result", action="store_true", help="as another line of the file, where there is one")
    add(group, "--result-dir", "DIR", "where (default: here)")
    add(group, "--result-filename", "NAME", "its name (default: BACKEND-RATEqps-MODEL-TIME.json)")
    add(group, "--label", "TEXT", "put into the result, and into the name of its file")
    add(group, "--metadata", "NAME=VALUE", "put into the result", nargs="+", action="extend", default=[])
    text = "let the server trace meanwhile, into its --profiler-dir"
    group.add_argument("--profile", action="store_true", help=text)
    group.add_argument("--disable-tqdm", action="store_true", help="no progress bar")
    add_dataset(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure and report; the exit code. What can be refused is refused before anything is sent."""
    options, goals = dataset_options(arguments), goals_of(arguments.goodput)
    check_goodput(goals)
    check_percentiles(arguments.metric_percentiles)
    serve_report.check_metrics(arguments.percentile_metrics)
    metadata = pairs_of("--metadata", arguments.metadata)
    _check(arguments)
    rate = _rate(arguments)
    url, sent = _url(arguments), headers(arguments)
    Client(url, headers=sent)  # refuses bad ones
    path = _result_path(arguments) if arguments.save_result or arguments.save_detailed else None
    try:
        ran, setting = asyncio.run(_measured(arguments, options, rate, url, sent))
    except HttpError as error:
        raise UsageError(f"{url}: {error}") from None

    metrics = arguments.percentile_metrics
    numbers = serve_report.summarise(ran, metrics=metrics, percentiles=arguments.metric_percentiles, goodput=goals)
    result = {**setting, **metadata, **numbers}
    if arguments.json:
        print(json.dumps(result))
    else:
        print(serve_report.table(numbers, metrics, goals))
    for warning in serve_report.warnings(numbers, has_rate=rate != math.inf):
        print(f"jaxpaged: warning: {warning}", file=sys.stderr)
    if failed := next((seen for seen in ran.seen if seen.error is not None), None):
        print(f"jaxpaged: warning: {numbers['failed']:,} failed, the first: {failed.message}", file=sys.stderr)
    if path is not None:
        whole = result | (serve_report.details(ran) if arguments.save_detailed else {})
        path /= arguments.result_filename or _filename(setting, arguments.label or arguments.backend)
        _save(path, whole, appends=arguments.append_result)
    if ran.is_interrupted:
        return _INTERRUPTED
    return 0 if numbers["completed"] else 1


def _check(arguments: argparse.Namespace) -> None:
    if arguments.backend not in PATHS:
        raise UsageError(f"--backend: got {arguments.backend!r}, expected one of {', '.join(PATHS)}")
    for name in ("request_rate", "burstiness", "request_timeout_s"):
        value = getattr(arguments, name)
        if not value > 0 or (name == "burstiness" and value == math.inf):
            raise UsageError(f"--{name.replace('_', '-')}: got {value:g}, expected a number above 0")
    if arguments.max_concurrency is not None and arguments.max_concurrency < 1:
        raise UsageError(f"--max-concurrency: got {arguments.max_concurrency}, expected at least 1")
    if arguments.append_result and not (arguments.result_filename and (arguments.save_result or arguments.save_detailed)):
        raise UsageError("--append-result: needs --save-result or --save-detailed, and --result-filename, the file to append to")
    if arguments.num_warmups < 0:
        raise UsageError(f"--num-warmups: got {arguments.num_warmups}, expected at least 0")
    if arguments.endpoint is not None and not (arguments.endpoint.startswith("/") and arguments.endpoint.isascii()):
        raise UsageError(f"--endpoint: got {arguments.endpoint!r}, expected a path such as /v1/completions")


def _rate(arguments: argparse.Namespace) -> float | Ramp:
    """Requests per second."""
    names = ("ramp_up_start_rps", "ramp_up_end_rps")
    flags = [f"--{name.replace('_', '-')}" for name in names]
    given = [getattr(arguments, name) for name in names]
    if arguments.ramp_up_strategy is None:
        if extra := next((flag for flag, value in zip(flags, given, strict=True) if value is not None), None):
            raise UsageError(f"{extra}: needs --ramp-up-strategy, one of {', '.join(RAMPS)}")
        return arguments.request_rate
    if arguments.request_rate < math.inf:
        raise UsageError(f"--ramp-up-strategy: not with --request-rate, got {arguments.request_rate:g}")
    if missing := next((flag for flag, value in zip(flags, given, strict=True) if value is None), None):
        raise UsageError(f"{missing}: missing, --ramp-up-strategy needs it")
    return Ramp(arguments.ramp_up_strategy, *given)


def _rate_setting(rate: float | Ramp) -> dict[str, Any]:
    if isinstance(rate, Ramp):
        ramp = {"ramp_up_strategy": rate.strategy, "ramp_up_start_rps": rate.start_rps, "ramp_up_end_rps": rate.end_rps}
        return {"request_rate": "inf", **ramp}
    return {"request_rate": rate if rate < math.inf else "inf"}  # JSON has no word for it; this is vLLM's


def _url(arguments: argparse.Namespace) -> str:
    if arguments.base_url is not None:
        if arguments.host is not None or arguments.port is not None:
            raise UsageError("--base-url: not with --host and --port")
        return arguments.base_url
    if arguments.host is None and arguments.port is None:
        return DEFAULT_URL
    host = arguments.host or "127.0.0.1"
    return f"http://{f'[{host}]' if ':' in host else host}:{arguments.port or 8000}"


async def _measured(
    arguments: argparse.Namespace, options: DatasetOptions, rate: float | Ramp, url: str, sent: dict[str, str]
) -> tuple[Run, dict[str, Any]]:
    """What was seen, and under which setting."""
    async with Client(url, headers=sent) as client:
        model, tokenizer_id = arguments.model, arguments.tokenizer
        if model is None:
            model = (await models(client))[0]["id"]
        if tokenizer_id is None:
            tokenizer_id = model if Path(model).is_dir() else "demo" if model == "demo" else None
        if tokenizer_id is None and options.needs_tokenizer:
            raise UsageError(f"--tokenizer: missing, {model!r} is no local directory, and prompts have to be counted")
        tokenizer = load_tokenizer(tokenizer_id) if tokenizer_id is not None else None
        asks, before = drawn(options, tokenizer, arguments.num_warmups)
        body = {"temperature": arguments.temperature, **({"ignore_eos": True} if arguments.ignore_eos else {})}
        offer = Offer(
            backend=arguments.backend,
            path=arguments.endpoint or PATHS[arguments.backend],
            model=model,
            body=body | (arguments.extra_body or {}),
            request_rate=rate,
            burstiness=arguments.burstiness,
            max_concurrency=arguments.max_concurrency,
            timeout_s=arguments.request_timeout_s,
            has_counts=arguments.continuous_usage_stats,
            seed=options.seed,
            has_texts=arguments.save_detailed,
        )
        date = time.strftime("%Y%m%d-%H%M%S")
        ran = await _with_progress(arguments, client, asks, before, offer)
    return ran, {
        "date": date,
        "endpoint_type": arguments.backend,
        "backend": arguments.backend,
        "label": arguments.label,
        "model_id": model,
        "tokenizer_id": tokenizer_id,
        "num_prompts": options.num_prompts,
        **_rate_setting(rate),
        "burstiness": arguments.burstiness,
        "max_concurrency": arguments.max_concurrency,
    }


async def _with_progress(arguments: argparse.Namespace, client: Client, asks: list[Ask], before: list[Ask], offer: Offer) -> Run:
    from dataclasses import replace

    if before:
        warmed = await measure(client, before, replace(offer, request_rate=math.inf, max_concurrency=1))
        if warmed.is_interrupted:
            return Run([], 0.0, 0.0, [], len(asks), is_interrupted=True)
    is_shown = sys.stderr.isatty() and not arguments.disable_tqdm
    if arguments.profile:
        await _profile(client, "start")
    try:
        with tqdm(total=len(asks), desc="Requests", dynamic_ncols=True, disable=not is_shown, mininterval=0.5) as bar:
            return await measure(client, asks, offer, on_end=_counting(bar))
    finally:
        if arguments.profile:
            await _profile(client, "stop")


async def _profile(client: Client, verb: str) -> None:
    status, answer = await client.json("POST", f"/{verb}_profile")
    if status != 200:
        reason = "the server has none: it is started with --profiler-dir" if status == 404 else f"HTTP {status}: {answer}"
        raise UsageError(f"--profile: /{verb}_profile: {reason}")


def _counting(bar: Any) -> Callable[[Seen], None]:
    num_failed = 0

    def on_end(seen: Seen) -> None:
        nonlocal num_failed
        if seen.error is not None:
            num_failed += 1
            bar.set_postfix_str(f"{num_failed:,} failed", refresh=False)
        bar.update()

    return on_end


def _result_path(arguments: argparse.Namespace) -> Path:
    """The folder of the result, which is there before anything is measured."""
    folder = Path(arguments.result_dir or ".")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--result-dir: {folder}: {error.strerror}") from None
    return folder


def _filename(setting: dict[str, Any], label: str) -> str:
    concurrency = f"-concurrency{setting['max_concurrency']}" if setting["max_concurrency"] is not None else ""
    model = setting["model_id"].split("/")[-1]
    if (strategy := setting.get("ramp_up_strategy")) is not None:
        rate = f"ramp-up-{strategy}-{setting['ramp_up_start_rps']:g}qps-{setting['ramp_up_end_rps']:g}qps"
    else:
        rate = f"{float(setting['request_rate'])}qps"
    return f"{label}-{rate}{concurrency}-{model}-{setting['date']}.json"


def _save(path: Path, result: dict[str, Any], *, appends: bool) -> None:
    before = path.read_text(encoding="utf-8").rstrip("\n") + "\n" if appends and path.exists() else ""
    part = path.with_name(path.name + ".part")
    part.write_text(before + json.dumps(result), encoding="utf-8")
    os.replace(part, path)
    print(f"jaxpaged: wrote {path}", file=sys.stderr)
